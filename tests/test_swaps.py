"""Swaps after a refit, against brute force over all supports and over all swaps, and their promises."""

from __future__ import annotations

import pytest
import torch
from test_refit import (
    KEPT,
    OTHERS,
    PATTERNS,
    SIZE,
    best_of_all,
    damped,
    errors,
    gram_of,
    kkt,
    problem,
    run,
)
from torch import Tensor

from llmprune import methods
from llmprune.errors import ConfigError
from llmprune.methods import swaps
from llmprune.methods.refit import Problem
from llmprune.pattern import NM, Pattern, Unstructured

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", OTHERS)
def test_they_bring_every_mask_within_two_hundredths_of_the_best(name: str) -> None:
    found = best = 0.0
    for seed in range(16):
        weight, inputs = problem(4, SIZE, seed, tokens=200)
        pruned = run(name, weight, inputs, Unstructured(0.5, "row"), refit=True, refit_swaps=1)
        assert (pruned.keep.sum(1) == KEPT).all()
        assert kkt(weight, pruned, inputs, 0.3) < 1e-4
        best += float(best_of_all(weight, inputs).sum())
        found += float(errors(weight, pruned.weight, inputs).sum())
    assert found / best < 1.02


def least(weight: Tensor, keep: Tensor, matrix: Tensor) -> float:
    """Damped error of one row with the best values of its mask, float64."""
    gap = weight.double().clone()
    kept = matrix[keep][:, keep]
    gap[keep] -= torch.linalg.solve(kept, (matrix @ weight.double())[keep])
    return float(gap @ matrix @ gap)


@pytest.mark.parametrize("pattern", [Unstructured(0.5, "row"), NM(2, 4)], ids=str)
def test_no_single_swap_is_left_that_pays(pattern: Pattern) -> None:
    weight, inputs = problem(3, 16, tokens=100)
    pruned = run("magnitude", weight, inputs, pattern, refit=True, refit_swaps=1)
    matrix = damped(inputs, 0.3)
    for row, keep in zip(weight, pruned.keep, strict=True):
        now, after = least(row, keep, matrix), []
        for out in keep.nonzero()[:, 0].tolist():
            for into in (~keep).nonzero()[:, 0].tolist():
                if isinstance(pattern, NM) and out // pattern.m != into // pattern.m:
                    continue
                other = keep.clone()
                other[out], other[into] = False, True
                after.append(least(row, other, matrix))
        assert min(after) > now * (1 - 1.1 * swaps.LEAST)


def test_what_a_swap_gains_is_exact_and_stays_so_after_swaps() -> None:
    weight, inputs = problem(5, 12, tokens=60)
    shared = Problem(gram_of(inputs), 0.3)
    a = shared.undamped().float() + torch.eye(12) * shared.damping
    matrix = damped(inputs, 0.3) / float(shared._unit)
    keep = torch.arange(12) % 2 == 0
    keep = keep.expand(5, 12).contiguous()
    v = weight * shared.scale
    y = torch.zeros_like(v)  # not the best values: a part finds them first
    part = swaps._Part(a, y, v @ a, keep, None)
    for _ in range(4):
        gain, into, out = part._gains()
        for row in range(5):
            now, masks = part.keep[row], {}
            for p in now.nonzero()[:, 0].tolist():
                for q in (~now).nonzero()[:, 0].tolist():
                    other = now.clone()
                    other[p], other[q] = False, True
                    masks[q, p] = least(weight[row], other, matrix)
            best = min(masks, key=lambda pair: masks[pair])
            assert best == (int(into[row]), int(out[row]))
            gained = least(weight[row], now, matrix) - masks[best]
            assert float(gain[row]) == pytest.approx(gained, rel=1e-3, abs=1e-4)
        part._leave(out)
        part._enter(into)


@pytest.mark.parametrize("tokens", [400, 48], ids=["many tokens", "fewer tokens than features"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_counts_stay_and_the_error_falls(name: str, pattern: Pattern, tokens: int) -> None:
    """On rows of several parts."""
    weight, inputs = problem(40, 200, tokens=tokens)
    first = run(name, weight, inputs, pattern, refit=True)
    pruned = run(name, weight, inputs, pattern, refit=True, refit_swaps=1)
    resolved = methods.build(name).resolve(pattern)
    groups = list(resolved.groups(first.keep)) if isinstance(resolved, Unstructured) else []
    after = list(resolved.groups(pruned.keep)) if isinstance(resolved, Unstructured) else []
    if isinstance(resolved, NM):
        groups, after = [first.keep.view(-1, resolved.m)], [pruned.keep.view(-1, resolved.m)]
    for before, now in zip(groups, after, strict=True):
        assert torch.equal(before.sum(1), now.sum(1))
    assert pruned.notes["swapped"] == int((pruned.keep & ~first.keep).sum()) > 0
    assert kkt(weight, pruned, inputs, 0.3) < 1e-4
    mine, other = (
        float(((weight - p.weight).double() @ damped(inputs, 0.3) * (weight - p.weight)).sum())
        for p in (pruned, first)
    )
    assert mine < 0.95 * other


@pytest.mark.parametrize("tokens", [1, 8, 64])
@pytest.mark.parametrize("damping", [0.0, 10.0])
def test_they_never_raise_the_damped_error_of_a_row(tokens: int, damping: float) -> None:
    weight, inputs = problem(16, 64, tokens=tokens)
    matrix = damped(inputs, damping)
    lost = []
    for passes in (0, 2):
        pruned = run("wanda", weight, inputs, NM(2, 4), refit=True, refit_damping=damping,
                     refit_swaps=passes)  # fmt: skip
        assert pruned.weight.isfinite().all()
        gap = (weight - pruned.weight).double()
        lost.append((gap @ matrix * gap).sum(1))
    assert (lost[1] <= lost[0] * (1 + 1e-5) + 1e-6).all()


def test_features_never_seen_do_not_come_in() -> None:
    weight, inputs = problem(8, 40)
    dead = [0, 1, 17, 39]
    inputs[:, dead] = 0
    weight[:, dead] *= 100
    pruned = run("wanda", weight, inputs, NM(2, 4), refit=True, refit_swaps=1)
    assert not pruned.keep[:, dead].any()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_rows_may_be_swapped_a_few_at_a_time(
    pattern: Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, inputs = problem(50, 96)
    whole = run("wanda", weight, inputs, pattern, refit=True, refit_swaps=1)
    monkeypatch.setitem(swaps.CELLS, "cpu", 1)
    parts = run("wanda", weight, inputs, pattern, refit=True, refit_swaps=1)
    assert torch.equal(whole.keep, parts.keep)
    torch.testing.assert_close(whole.weight, parts.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refit_swaps": 1}, "refit_swaps is of a refit: add --set refit=true"),
        ({"refit": True, "refit_swaps": -1}, "0 to 100, got -1"),
        ({"refit": True, "refit_swaps": "many"}, "takes a whole number, got 'many'"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        methods.build("wanda", settings)
