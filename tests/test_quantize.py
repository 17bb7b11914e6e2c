"""Fewer bits against brute force over a whole grid, a slow GPTQ in float64, and its invariants."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from test_refit import gram_of, problem
from torch import Tensor

from llmprune import methods
from llmprune.errors import ConfigError
from llmprune.methods.base import Pruned, Share
from llmprune.methods.grid import SHRINK, Grid, fitted
from llmprune.methods.quantized import Quantized, build
from llmprune.methods.sparsegpt import onto_grid
from llmprune.pattern import NM, Pattern, Unstructured
from llmprune.stats import Gram, NoStats

KINDS = ("int8", "int4")
METHODS = ("magnitude", "wanda", "ria", "sparsegpt", "alps")
PATTERNS = [NM(2, 4), NM(4, 8), *(Unstructured(0.6, w) for w in ("row", "matrix", "columns"))]


pytestmark = pytest.mark.usefixtures("one_thread")


def quantized(
    name: str, kind: str, settings: dict[str, Any] | None = None, **how: Any
) -> Quantized:
    return Quantized(methods.build(name, settings), build(kind, how))


def rounded(
    name: str, kind: str, weight: Tensor, inputs: Tensor, pattern: Pattern, **how: Any
) -> Pruned:
    method = quantized(name, kind, **how)
    return method.prune(weight, gram_of(inputs), method.resolve(pattern))


def error(dense: Tensor, found: Tensor, inputs: Tensor) -> float:
    """||X (W - B)^T||^2."""
    return float((inputs.double() @ (dense.double() - found.double()).T).square().sum())


# The grid


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [0, 128, 16, 7])
def test_a_point_is_a_whole_number_times_its_scale(
    kind: str, dtype: torch.dtype, group: int
) -> None:
    weight, inputs = problem(9, 48)
    found = rounded("sparsegpt", kind, weight.to(dtype), inputs, NM(2, 4), group=group)
    grid = found.grid
    assert grid is not None
    top = {"int8": 127, "int4": 7}[kind]
    assert grid.scale.shape == (9, -(-48 // (min(group, 48) or 48)))
    assert torch.equal(grid.scale, grid.scale.bfloat16().float())
    whole = grid.whole(found.weight)
    assert int(whole.abs().max()) <= top
    scales = torch.stack([grid.scale[:, j // grid.group] for j in range(48)], dim=1)
    exact = whole.double() * scales.double()
    assert torch.equal(exact.float().double(), exact)  # the product needs no rounding in float32
    assert torch.equal(exact.float().to(dtype), found.weight)
    assert not found.weight[~found.keep].any()
    zeros = found.weight[found.weight == 0]
    assert not torch.signbit(zeros).any()  # -0.0 would be kept by a packer


def test_the_largest_weight_of_each_group_is_met_where_that_is_the_range() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5, 64.0], [0.0, 0.0, 3.0, -7.0]])
    grid = fitted(weight, None, 4, 2)
    assert torch.equal(grid.scale, torch.tensor([[2 / 7, 64 / 7], [0.0, 1.0]]).bfloat16().float())
    assert torch.equal(
        grid.whole(grid.nearest(weight)).int(), torch.tensor([[4, -7, 0, 7], [0, 0, 3, -7]])
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_range_is_the_best_of_those_that_are_tried(seed: int) -> None:
    weight, inputs = problem(5, 20, seed)
    cost = inputs.square().sum(0)
    grid = fitted(weight, cost, 4, 8)
    for row, first in product(range(5), (0, 8, 16)):
        part, own = weight[row, first : first + 8].double(), cost[first : first + 8].double()
        tried = []
        for share in SHRINK:
            scale = float((part.abs().max() * share / 7).float().bfloat16())
            points = (part / scale).round().clamp(-7, 7) * scale
            tried.append((float(((points - part).square() * own).sum()), scale))
        best = min(loss for loss, _ in tried)
        mine = [loss for loss, scale in tried if scale == float(grid.scale[row, first // 8])]
        assert mine
        assert min(mine) <= best * (1 + 1e-5)


# Against independent answers


def slow_gptq(weight: Tensor, keep: Tensor, gram: Tensor, grid: Grid, damping: float) -> Tensor:
    """Optimal brain surgery as the papers derive it: float64, an explicit inverse, one column at a time.

    After column j is fixed, the inverse of what is left of the damped matrix is the inverse with row and
    column j eliminated, and columns on the right move by -error / [H^-1]_jj [H^-1]_j.
    """
    h = gram.double().clone()
    live = h.diagonal() > 0
    mean = h.diagonal()[live].mean()
    h += torch.diag((~live).double() * mean + damping * mean)
    inverse = torch.linalg.inv(h)
    w = weight.double().clone()
    for j in range(w.shape[1]):
        scale = grid.scale[:, j // grid.group].double()
        steps = (w[:, j] / scale.where(scale > 0, 1)).round().clamp(-grid.top, grid.top)
        point = (steps * scale).where(keep[:, j], 0)
        wrong = (w[:, j] - point) / inverse[j, j]
        w[:, j + 1 :] -= wrong[:, None] * inverse[j, j + 1 :]
        w[:, j] = point
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
    return w


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns", "kept"), [(12, 40, 1.0), (12, 40, 0.5), (7, 200, 0.4)])
def test_the_sweep_is_a_slow_gptq(kind: str, rows: int, columns: int, kept: float) -> None:
    weight, inputs = problem(rows, columns, tokens=500)
    inputs[:, 3] = 0  # a feature that was never seen
    stats = gram_of(inputs)
    keep = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) < kept
    grid = fitted(weight.where(keep, 0), None, build(kind, {}).bits, 64)
    truth = slow_gptq(weight, keep, stats.gram, grid, 0.01)
    found = onto_grid(weight, keep, stats.inverse_factor(0.01).upper, grid, 128)
    # float32 may round the other way where a weight lies half-way, and what follows in that row is moved
    same = (found.double() - truth).abs().amax(1) < 1e-5
    assert same.float().mean() > 0.8
    assert error(weight, found, inputs) == pytest.approx(
        error(weight, truth.float(), inputs), rel=0.02
    )


def test_blocks_are_a_matter_of_speed() -> None:
    weight, inputs = problem(16, 96)
    keep = torch.ones_like(weight, dtype=torch.bool)
    upper = gram_of(inputs).inverse_factor(0.01).upper
    grid = fitted(weight, None, 8, 96)
    one, other = (onto_grid(weight, keep, upper, grid, block) for block in (128, 32))
    assert (one - other).abs().max() <= grid.scale.max() * 1.001
    assert ((one - other).abs() > 1e-6).float().mean() < 0.02


def best_on_grid(row: Tensor, keep: Tensor, gram: Tensor, scale: float, top: int) -> float:
    """Least (w - b) G (w - b)^T over every b on a grid with support `keep`: float64 brute force."""
    places = keep.nonzero().flatten().tolist()
    steps = torch.cartesian_prod(
        *[torch.arange(-top, top + 1.0, dtype=torch.float64)] * len(places)
    )
    least = float("inf")
    for some in steps.split(2**18):
        change = row.double().repeat(len(some), 1)
        change[:, places] -= some * scale
        least = min(least, float(((change @ gram) * change).sum(1).min()))
    return least


@pytest.fixture(scope="module")
def ratios() -> dict[str, float]:
    """Error over that of the best rounding on the same grid, in all, on 12 rows of 6 to 8 weights, 3 bits."""
    total = {"best": 0.0, "gptq": 0.0, "nearest": 0.0}
    for seed, size in product(range(6), (6, 8)):
        weight, inputs = problem(1, size, seed, tokens=60, spread=0.3)
        inputs += 1.5 * inputs[:, [seed]]  # what columns have in common is what can be made up for
        keep = torch.ones_like(weight, dtype=torch.bool)
        if size == 8:
            keep[0, [1, 4]] = False
            weight[0, [1, 4]] = 0  # of what is removed every rounding loses the same
        stats = gram_of(inputs)
        gram = stats.gram.double().clone()
        grid = fitted(weight.where(keep, 0), None, 3, size)
        best = best_on_grid(weight[0], keep[0], gram, float(grid.scale), 3)
        upper = stats.inverse_factor(0.0).upper
        found = {"gptq": onto_grid(weight, keep, upper, grid, 128)}
        found["nearest"] = grid.nearest(weight).where(keep, 0)
        total["best"] += best
        for name, values in found.items():
            mine = error(weight, values, inputs)
            assert mine >= best * (1 - 1e-6), name
            total[name] += mine
    return {name: value / total["best"] for name, value in total.items()}


def test_the_sweep_is_nearer_to_the_best_rounding_than_the_nearest(
    ratios: dict[str, float],
) -> None:
    assert ratios["gptq"] < 1.35
    assert ratios["nearest"] > 1.35 * ratios["gptq"]


@pytest.mark.parametrize("kind", KINDS)
def test_sparsegpts_own_values_and_dense_ones_are_swept_to_the_same(kind: str) -> None:
    """The joint sweep with its mask given: what the module says of W - B = f U."""
    weight, inputs = problem(24, 64)
    stats = gram_of(inputs)
    found = methods.build("sparsegpt").prune(weight, stats, NM(2, 4))
    grid = fitted(found.weight, None, build(kind, {}).bits, 64)
    upper = stats.inverse_factor(0.01).upper
    ends = [onto_grid(goal, found.keep, upper, grid, 128) for goal in (weight, found.weight)]
    assert ((ends[0] - ends[1]).abs() > 1e-5).float().mean() < 0.01


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_sweep_loses_less_than_the_nearest(name: str, kind: str) -> None:
    weight, inputs = problem(48, 64)
    pattern = NM(2, 4)
    swept, near = (
        error(weight, rounded(name, kind, weight, inputs, pattern, rounding=r).weight, inputs)
        for r in ("gptq", "nearest")
    )
    assert swept < near


def test_int8_costs_a_pruned_matrix_next_to_nothing() -> None:
    weight, inputs = problem(48, 64)
    plain = methods.build("alps").prune(weight, gram_of(inputs), NM(2, 4))
    found = rounded("alps", "int8", weight, inputs, NM(2, 4))
    assert torch.equal(found.keep, plain.keep)
    assert error(weight, found.weight, inputs) < 1.01 * error(weight, plain.weight, inputs)


# Invariants


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_masks_are_the_methods_own(name: str, pattern: Pattern, rounding: str) -> None:
    weight, inputs = problem(32, 48)
    plain = methods.build(name)
    keep = plain.prune(weight, gram_or_norms(plain, inputs), plain.resolve(pattern)).keep
    found = rounded(name, "int4", weight, inputs, pattern, rounding=rounding)
    assert torch.equal(found.keep, keep)
    assert not found.weight[~keep].any()
    assert found.late is None
    assert found.notes["quantize"] == "int4"


def gram_or_norms(method: Any, inputs: Tensor) -> Any:
    stats = method.stats.empty(inputs.shape[1], torch.device("cpu"))
    stats.add(inputs)
    return stats


@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "alps"])
def test_rows_are_independent(name: str, rounding: str) -> None:
    """Of processes that share out rows, each has the bits that one process has."""
    weight, inputs = problem(64, 48)
    method = quantized(name, "int4", rounding=rounding, group=16)
    pattern = method.resolve(NM(2, 4))
    assert method.by_rows(pattern)
    stats = gram_of(inputs)
    (whole,) = method.prune_rows([weight], stats, pattern, [Share(64)])
    for own in (slice(0, 32), slice(32, 64)):
        (part,) = method.prune_rows([weight[own]], gram_of(inputs), pattern, [Share(64, own)])
        assert torch.equal(part.weight, whole.weight[own])
        assert torch.equal(part.grid.scale, whole.grid.scale[own])


def test_several_matrices_are_one_by_one() -> None:
    weight, inputs = problem(48, 32)
    method = quantized("sparsegpt", "int8")
    both = list(method.prune_together([weight[:16], weight[16:]], gram_of(inputs), NM(2, 4)))
    for part, own in zip(both, (weight[:16], weight[16:]), strict=True):
        assert torch.equal(part.weight, method.prune(own, gram_of(inputs), NM(2, 4)).weight)


@pytest.mark.parametrize("rows", [1, 16])
def test_arguments_are_not_changed(rows: int) -> None:
    weight, inputs = problem(rows, 32)
    stats, before = gram_of(inputs), weight.clone()
    gram = stats.gram.clone()
    quantized("wanda", "int4").prune(weight, stats, NM(2, 4))
    assert torch.equal(weight, before)
    assert torch.equal(stats.gram, gram)


def test_a_transposed_view_is_as_good_as_its_copy() -> None:
    weight, inputs = problem(16, 32)
    view = weight.T.contiguous().T
    one, other = (rounded("wanda", "int8", w, inputs, NM(2, 4)).weight for w in (weight, view))
    assert torch.equal(one, other)


def test_what_is_zero_stays_zero() -> None:
    weight, inputs = problem(16, 32)
    weight[3] = 0
    weight[5, 8:16] = 0
    found = rounded(
        "magnitude", "int4", weight, inputs, Unstructured(0.5, "row"), group=8, rounding="nearest"
    )
    assert not found.weight[3].any()
    assert not found.weight[5, 8:16].any()
    assert bool(
        rounded("magnitude", "int4", weight, inputs, NM(2, 4), group=8).weight.isfinite().all()
    )


# Experts with few tokens


def test_too_few_tokens_are_rounded_to_the_nearest_first() -> None:
    weight, inputs = problem(8, 32, tokens=20)
    method: Any = quantized("wanda", "int8")
    stats: Any = gram_of(inputs)
    assert method.needs_tokens(512) == 768  # as SparseGPT
    method, known = method.fallback(stats)
    assert known is stats
    assert method.how.rounding == "nearest"
    assert method.needs_tokens(32) == methods.build("wanda").needs_tokens(32)
    method, known = method.fallback(Gram.empty(0, torch.device("cpu")))
    assert isinstance(known, NoStats)
    assert method.called == "magnitude in int8"
    assert method.needs_tokens(32) == 0
    found = method.prune(weight, known, NM(2, 4))
    assert found.grid.holds(found.weight)


# What is refused


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("int5", {}, "no quantize 'int5': did you mean"),
        ("int8", {"round": "gptq"}, "quantize has no setting 'round'"),
        ("int8", {"rounding": "gtpq"}, "no 'gtpq', did you mean 'gptq'"),
        ("int8", {"range": "most"}, "setting range of quantize"),
        ("int4", {"group": -1}, "setting group of quantize is a number of columns"),
        ("int4", {"group": "many"}, "takes a whole number"),
        ("int4", {"damping": 2}, "damping of quantize is a share"),
    ],
)
def test_what_makes_no_sense_is_refused(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(kind, settings)


def test_a_method_that_learns_something_else_is_refused() -> None:
    with pytest.raises(ConfigError, match="dsnot learns what a Gram matrix does not hold"):
        quantized("dsnot", "int8")
