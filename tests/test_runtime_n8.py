"""Layers that llmprune pruned to n:8 are held for n8_mma, and are the stored ones to all who ask."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import INTERPRETED
from gluon_on_cpu import on_cpu
from kernel_harness import bits
from laying import layers
from safetensors.torch import load_file
from tiny import llama
from transformers import AutoModelForCausalLM

import llmprune
from llmprune.kernels import choice, explain, n8_mma
from llmprune.kernels.held import N8
from llmprune.kernels.interface import Case

IDS = torch.arange(3, 13).view(2, 5)
CPU = torch.device("cpu")


class Emulated(N8):
    """As on a GPU whose trial gives what it gives here, in the emulator."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.found: str | None = n8_mma._wrong(CPU, n)

    def unavailable(self, device: torch.device) -> str | None:
        return self.found

    def launches(self, device: torch.device) -> bool:
        return True

    def static(self, case: Case) -> str | None:
        return "the weights are trained" if case.trains else self._misfit(case)


@pytest.fixture
def emulated(root: Path) -> Iterator[ModuleType]:
    if not INTERPRETED:
        pytest.skip("runs on the GPU here")
    with on_cpu(root / "kernels" / "n8_gluon.py") as module:
        yield module


def offer(monkeypatch: pytest.MonkeyPatch, kernel: N8) -> None:
    """In place of the one of its n."""
    found = {(kernel.n, 8): kernel}
    monkeypatch.setitem(choice.FAMILIES, "n8_mma", lambda n, m: found.get((n, m)))


@pytest.mark.parametrize(("pattern", "dtype"), [("4:8", torch.bfloat16), ("3:8", torch.float16)])
def test_a_pruned_model_is_held_computes_and_is_saved(
    pattern: str,
    dtype: torch.dtype,
    emulated: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offer(monkeypatch, Emulated(int(pattern[0])))
    llama().to(dtype).save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    llmprune.prune(dense, sparsity=pattern, method="magnitude", progress=False)
    stored, sparse = copy.deepcopy(dense), copy.deepcopy(dense)
    llmprune.sparsify(stored)
    with torch.no_grad():
        llmprune.sparsify(sparse)
        assert {layer.kernel for layer in layers(sparse)} == {f"n8_mma {pattern}"}
        assert len(layers(sparse)) == 14
        assert explain(layers(sparse)[0], 10).route.startswith("by the kernel")
        logits = sparse(IDS).logits
        truth = dense(IDS).logits.float()
        torch.testing.assert_close(logits.float(), truth, rtol=0.05, atol=0.05)
        state, expected = sparse.state_dict(), stored.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(bits(state[name]), bits(expected[name])) for name in state)
        sparse.save_pretrained(tmp_path / "a")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=dtype)
        given = again(IDS).logits
        assert {layer.kernel for layer in layers(again)} == {f"n8_mma {pattern}"}
        assert torch.equal(given, logits)
    stored.save_pretrained(tmp_path / "b")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(bits(one[name]), bits(other[name])) for name in one)
    llmprune.densify(again)
    for name, weight in dense.state_dict().items():
        assert torch.equal(bits(again.state_dict()[name]), bits(weight))


def test_a_device_that_fails_the_trial_holds_no_layer(
    emulated: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = emulated._decode
    monkeypatch.setattr(emulated, "_decode", lambda step, n: right(step ^ 2, n))
    linear = torch.nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    linear.weight.data.view(-1, 8)[:, 4:] = 0
    linear.requires_grad_(False).eval()
    broken = Emulated(4)
    offer(monkeypatch, broken)
    sparse = llmprune.SparseLinear.from_linear(linear)
    with torch.no_grad():
        sparse(torch.ones(1, 64).bfloat16())
    assert sparse.kernel is None  # as it is stored
    told = explain(sparse, 1)
    assert told.refused["n8_mma 4:8"] == "[1, 2048] x [32, 2048] 4:8 torch.bfloat16"
    broken.found = None  # as on another device
    assert choice.choose(sparse.case(1)) is broken


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["4:8", "3:8", "2:8"])
def test_on_a_gpu_a_pruned_model_is_held_and_computes(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(choice.SETTING, "n8_mma")
    dense = llama().to("cuda", torch.bfloat16).eval()
    llmprune.prune(dense, sparsity=pattern, method="magnitude", progress=False)
    sparse, ids = copy.deepcopy(dense), IDS.to("cuda")
    llmprune.sparsify(sparse)
    with torch.no_grad():
        for tokens in (ids, ids.repeat(1, 8)):
            given, truth = (model(tokens).logits.float() for model in (sparse, dense))
            torch.testing.assert_close(given, truth, rtol=0.05, atol=0.05)
    assert {layer.kernel for layer in layers(sparse)} == {f"n8_mma {pattern}"}
    llmprune.densify(sparse)
    for name, weight in dense.state_dict().items():
        assert torch.equal(bits(sparse.state_dict()[name]), bits(weight))
