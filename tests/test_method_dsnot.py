"""DSnoT against the paper's rule, one row and one swap at a time, and its promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llmprune import methods
from llmprune.errors import ConfigError
from llmprune.methods.dsnot import InputMoments
from llmprune.pattern import NM, Pattern, Unstructured

PATTERNS = [NM(2, 4), NM(4, 8), *(Unstructured(0.6, w) for w in ("row", "matrix", "columns"))]


@pytest.fixture
def layer() -> tuple[Tensor, InputMoments]:
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 160, generator=random) * torch.logspace(-1, 1, 160)
    inputs += torch.randn(160, generator=random) * torch.logspace(-1, 1, 160)
    inputs[:, :5] = 0
    stats = InputMoments.empty(160, torch.device("cpu"))
    for batch in inputs.view(3, 10, 10, 160):
        stats.add(batch)
    return torch.randn(24, 160, generator=random), stats


def lost(weight: Tensor, keep: Tensor, stats: InputMoments) -> Tensor:
    """What each row loses of its mean output: [rows] float64."""
    return (weight.double() * ~keep * stats.mean.double()).sum(1).abs()


def literal(weight: Tensor, keep: Tensor, stats: InputMoments, width: int) -> Tensor:
    """The swaps of one row [in], as the paper tells them; `width` columns are one group."""
    keep, barred = keep.tolist(), set()
    part = (weight.double() * stats.mean.double()).tolist()
    score = (weight.double().abs() * stats.norm.double()).tolist()
    inverse = (1 / stats.variance.double().clamp_min(1e-30)).tolist()
    error = sum(p for p, stays in zip(part, keep, strict=True) if not stays)
    for _ in range(50):
        sign = math.copysign(1, error)
        grow = [j for j in range(len(keep)) if not keep[j] and j not in barred]
        best = max(grow, key=lambda j: sign * part[j] * inverse[j], default=None)
        if best is None or sign * part[best] <= 0:
            break
        barred.add(best)
        prune = [
            j
            for j in range(len(keep))
            if keep[j] and j not in barred and sign * part[j] < 0 and j // width == best // width
        ]
        if not prune:
            continue
        worst = min(prune, key=score.__getitem__)
        after = error - part[best] + part[worst]
        if abs(after) >= abs(error):
            break
        barred.add(worst)
        keep[best], keep[worst], error = True, False, after
    return torch.tensor(keep)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_mask_is_that_of_the_papers_rule(
    layer: tuple[Tensor, InputMoments], pattern: Pattern
) -> None:
    weight, stats = layer
    first = methods.build("wanda").prune(weight, stats, pattern).keep
    pruned = methods.build("dsnot").prune(weight, stats, pattern)
    columns = isinstance(pattern, Unstructured) and pattern.within == "columns"
    width = pattern.m if isinstance(pattern, NM) else 128 if columns else 160
    expected = torch.stack(
        [literal(w, k, stats, width) for w, k in zip(weight, first, strict=True)]
    )
    assert torch.equal(pruned.keep, expected)
    assert torch.equal(pruned.weight, weight * pruned.keep)
    assert torch.equal(pruned.keep.sum(1), first.sum(1))
    before, after = lost(weight, first, stats), lost(weight, pruned.keep, stats)
    assert (after <= before).all()
    assert after.sum() < 0.5 * before.sum()


def test_without_cycles_it_is_wanda(layer: tuple[Tensor, InputMoments]) -> None:
    weight, stats = layer
    pruned = methods.build("dsnot", {"cycles": 0}).prune(weight, stats, NM(2, 4))
    assert torch.equal(pruned.keep, methods.build("wanda").prune(weight, stats, NM(2, 4)).keep)


def test_moments_are_those_of_all_tokens() -> None:
    inputs = torch.randn(60, 7, generator=torch.Generator().manual_seed(1)) + 3
    one, two = (InputMoments.empty(7, torch.device("cpu")) for _ in range(2))
    one.add(inputs[:20])
    two.add(inputs[20:].view(2, 20, 7).bfloat16())
    one.merge(two)
    seen = torch.cat([inputs[:20], inputs[20:].bfloat16().float()])
    assert one.tokens == 60
    assert [len(part) for part in one.parts()] == [7, 7]
    torch.testing.assert_close(one.mean, seen.mean(0))
    torch.testing.assert_close(one.variance, seen.var(0, unbiased=False), rtol=1e-3, atol=1e-4)
    assert InputMoments.empty(3, torch.device("cpu")).mean.tolist() == [0, 0, 0]


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 0, got -1"):
        methods.build("dsnot", {"cycles": -1})
    with pytest.raises(ConfigError, match="dsnot has no setting 'refit'"):
        methods.build("dsnot", {"refit": True})
