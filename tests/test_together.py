"""Matrices that read the same input: solved from one factor, which goes when they are done."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from tiny import llama

import llmprune
from llmprune.factor import InverseFactor


def test_the_factor_of_an_input_is_gone_when_the_next_one_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []
    of = InverseFactor.of.__func__  # type: ignore[attr-defined]

    def counted(cls: type[InverseFactor], gram: torch.Tensor, damping: float) -> InverseFactor:
        alive.append(sum(ref() is not None for ref in made))
        factor: InverseFactor = of(cls, gram, damping)
        made.append(weakref.ref(factor))
        return factor

    monkeypatch.setattr(InverseFactor, "of", classmethod(counted))
    model = llama()
    ids = torch.randint(0, 60, (4, 16), generator=torch.Generator().manual_seed(0))
    llmprune.prune(model, calibration=ids, method="sparsegpt", sparsity=0.5, progress=False)
    blocks = model.config.num_hidden_layers
    assert alive == [0] * 4 * blocks  # one factor for q, k, v; o; gate, up; down
