"""Fused experts in the layout of a kernel compute the same, and are the stored ones to all who ask for that."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import WINDOWS, logits, tiny
from gluon_on_cpu import on_cpu
from torch import Tensor, nn

import llmprune
from llmprune.errors import ModelError
from llmprune.kernels import experts as forms
from llmprune.kernels import explain, measure, prefer, prepare, table
from llmprune.kernels.experts import S24Experts
from llmprune.kernels.held import S24_MMA
from llmprune.kernels.interface import Mixture
from llmprune.kernels.sparse_experts import route, sparse_experts
from llmprune.model import matrices
from llmprune.runtime import laid_experts
from llmprune.runtime.absent import AbsentValues
from llmprune.runtime.experts import PackedModule
from llmprune.runtime.laid_experts import held

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "nemotron_h")


class Anywhere(S24Experts):
    """Holds experts on a CPU, too, where plain torch multiplies."""

    def static(self, case: Mixture) -> str | None:
        if case.trains or case.dtype not in (torch.bfloat16, torch.float16):
            return "trained, or of another dtype"
        return S24_MMA._misfit(case)

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def launches(self, device: torch.device) -> bool:
        return False


@pytest.fixture(autouse=True)
def anywhere(monkeypatch: pytest.MonkeyPatch) -> S24Experts:
    form = Anywhere()
    monkeypatch.setattr(forms, "S24_EXPERTS", form)
    monkeypatch.setitem(forms.FORMS, form.name, form)
    laid_experts._COMPARED.clear()
    return form


def two_of_four(family: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A tiny model whose decoder matrices are 2:4 along their inputs."""
    model = tiny(family).to(dtype)
    random = torch.Generator().manual_seed(3)
    for matrix in matrices(model):
        weight = matrix.weight.clone()
        if weight.shape[1] % 4 == 0:
            groups = weight.unflatten(1, (-1, 4))
            order = torch.rand(groups.shape, generator=random).argsort(-1)
            matrix.write(groups.masked_fill(order >= 2, 0).flatten(1))
    return model


def packed_modules(model: nn.Module) -> list[PackedModule]:
    return [m for m in model.modules() if isinstance(m, PackedModule) and len(m.rooms) > 1]


def laid(model: nn.Module) -> bool:
    found = {held(module) is not None for module in packed_modules(model)}
    assert len(found) == 1
    return found.pop()


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_the_same_and_comes_back(family):
    model = two_of_four(family)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    truth = logits(model)
    llmprune.sparsify(model)
    assert laid(model)
    for module in packed_modules(model):
        assert all(type(module.parts(name)[0]) is AbsentValues for name in module.rooms)
    close(logits(model), truth)
    assert laid(model)
    assert prepare(model)["s24_experts"] == 2 * len(packed_modules(model))
    llmprune.densify(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n].view(torch.int16), before[n].view(torch.int16)) for n in before)
