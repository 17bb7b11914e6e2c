"""Matrices that read the same input: solved from one factor, which goes when they are done."""

from __future__ import annotations

import weakref
from typing import Any, get_args

import pytest
import torch
from tiny import llama

import llmprune
from llmprune import methods
from llmprune.factor import InverseFactor
from llmprune.methods import sparsegpt
from llmprune.pattern import NM, Pattern, Unstructured, Within


def test_the_factor_of_an_input_is_gone_when_the_next_one_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []
    of = InverseFactor.of.__func__  # type: ignore[attr-defined]

    def counted(cls: type[InverseFactor], *given: Any, **named: Any) -> InverseFactor:
        alive.append(sum(ref() is not None for ref in made))
        factor: InverseFactor = of(cls, *given, **named)
        made.append(weakref.ref(factor))
        return factor

    monkeypatch.setattr(InverseFactor, "of", classmethod(counted))
    model = llama()
    ids = torch.randint(0, 60, (4, 16), generator=torch.Generator().manual_seed(0))
    llmprune.prune(model, calibration=ids, method="sparsegpt", sparsity=0.5, progress=False)
    blocks = model.config.num_hidden_layers
    assert alive == [0] * 4 * blocks  # one factor for q, k, v; o; gate, up; down


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "pattern",
    [NM(2, 4), NM(3, 7), NM(8, 16), *(Unstructured(0.5, w) for w in get_args(Within))],
    ids=str,
)
@pytest.mark.parametrize("refit", [False, True], ids=["", "refit"])
@pytest.mark.parametrize("name", ["magnitude", "wanda", "ria", "sparsegpt"])
def test_together_is_as_one_by_one(
    name: str, refit: bool, pattern: Pattern, dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(0)
    method = methods.build(name, {"refit": True} if refit else {})
    stats = method.stats.empty(560, torch.device("cpu"))
    stats.add(torch.randn(900, 560, generator=random) * torch.logspace(-1, 1, 560))
    weights = [torch.randn(out, 560, generator=random).to(dtype) for out in (48, 16, 1, 24)]
    weights[1] *= 100  # were they one comparison group, this would lose nothing
    weights[3] = (weights[3] * 2).round() / 2  # ties
    pattern = method.resolve(pattern)
    together = list(method.prune_together(weights, stats, pattern))
    for weight, one in zip(weights, together, strict=True):
        alone = method.prune(weight, stats, pattern)
        assert torch.equal(one.keep, alone.keep)
        assert one.weight.dtype == dtype
        torch.testing.assert_close(one.weight, alone.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.passed_on, alone.passed_on, rtol=1e-4, atol=1e-5)
        assert (one.late is None) == (alone.late is None)
        if one.late is not None:
            assert torch.equal(one.late, alone.late)


def test_only_so_much_is_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsegpt, "STACK", {"cpu": 100})
    tall: list[int] = []
    sweep = sparsegpt.SparseGPT._sweep

    def counted(self: Any, wt: torch.Tensor, *others: Any) -> Any:
        tall.append(wt.shape[1])
        return sweep(self, wt, *others)

    monkeypatch.setattr(sparsegpt.SparseGPT, "_sweep", counted)
    method = methods.build("sparsegpt")
    stats = method.stats.empty(8, torch.device("cpu"))
    stats.add(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)))
    weights = [torch.ones(out, 8) for out in (4, 8, 1, 40, 3, 3)]
    assert len(list(method.prune_together(weights, stats, NM(2, 4)))) == 6
    assert tall == [12, 1, 40, 6]  # one that is too large alone is solved alone


@pytest.mark.parametrize("name", sorted(methods.known()))
def test_what_is_removed_is_a_zero_without_a_sign(name: str) -> None:
    """A sparse checkpoint drops +0.0 alone."""
    model = llama()
    ids = torch.randint(0, 60, (8, 16), generator=torch.Generator().manual_seed(0))
    llmprune.prune(model, calibration=ids, method=name, sparsity="2:4", progress=False)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert int((weight == 0).sum()) == weight.numel() // 2
    assert not bool(torch.signbit(weight[weight == 0]).any())
