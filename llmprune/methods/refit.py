"""The exact refit: given which weights stay, the values that disturb the layer's output least.

For a mask S this solves, row by row and to convergence,

    min over B with support S of  tr((W - B) (G + damping * diag G) (W - B)^T),    G = X^T X

by conjugate gradients. It is the step that ends ALPS (Meng et al. 2024, arXiv 2406.07831, sec. 3.3),
here one that can follow any method: `--set refit=true`.

Features are scaled to unit size first: V = W D and A = D^-1 G D^-1 + damping I with D = diag(G)^(1/2).
That is the Jacobi preconditioner, and it makes damping fair to all features: a share of the mean diagonal,
as SparseGPT adds it, is ruled by a few large activations and drowns the others. Damping draws weights to
their dense values, not to zero. What few tokens do not show needs more of it: see `DAMPING`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmprune.errors import ConfigError
from llmprune.methods.base import Around, Method, Pruned
from llmprune.methods.swaps import FLOOR, exchange
from llmprune.pattern import Pattern
from llmprune.stats import Gram, Stats

DAMPING = 0.3
"""On a diagonal of ones, at one token per feature; it falls with their number, as the best one does. After 8
to 128 windows of 256 tokens (ALPS at 70%: to 64), ALPS and Wanda with a refit lost on other text 1.014 times
what they lose with the best damping of each case, at worst 1.08; with 0.1, 1.022 and 1.19; with 1, 1.020 and
1.16. Inputs of 256 features are best served by less, of 704 by more. All on two blocks of one model
(wikillama-5m, benchmarks/results/damping.json)."""
FEWEST = 128
"""Tokens that an expert must have seen, as for Wanda; damping makes up for a Gram matrix of low rank. It is a
choice: benchmarks/damping.py can measure it with less than one window, which has not been done."""
TOLERANCE = 1e-5  # of a row: its slope on the kept weights, over its slope where all are zero
MOST = 300  # steps; rows that are not solved by then are counted in the notes
MOST_PASSES = 100  # of swaps: more is surely a mistake
CHUNK = 2**22  # weights that are solved at a time: float32 matrices of 16 MiB
SETTINGS: dict[str, bool | float] = {"refit": False, "refit_damping": DAMPING, "refit_swaps": 0}
UNIT = 16
"""Rows leave the products only in such numbers that so many remain: products of fewer rows round otherwise,
and the result must not depend on how rows are shared out (llmprune/share.py)."""


class Problem:
    """What rows v that read one input share: to minimise (v - y) A (v - y)^T, features at unit size.

    Attributes:
        scale: [features] float32, D over the root of its mean square; 1 where dead.
        dead: [features] bool, features that were zero on every token: only damping acts on them.
        damping: what is added to the diagonal of ones.
    """

    def __init__(self, stats: Gram, damping: float) -> None:
        """`damping` is that of one token per feature."""
        squares = stats.diagonal
        self.dead = squares <= 0
        live = squares[~self.dead]
        unit = live.double().mean() if len(live) else squares.new_ones((), dtype=torch.float64)
        root = (squares.double() / unit).sqrt().masked_fill_(self.dead, 1)
        self.scale = root.float()
        self._inverse = (1 / root).masked_fill_(self.dead, 0).float()
        self._unit = float(unit)
        self._gram = stats.gram  # whole from here on
        self.damping = damping * len(squares) / max(1, stats.tokens)

    def times(self, v: Tensor) -> Tensor:
        """The products v A for rows v [rows, features] float32."""
        product = (v * self._inverse) @ self._gram
        return product.mul_(self._inverse / self._unit).add_(v, alpha=self.damping)

    def loss(self, gap: Tensor) -> Tensor:
        """(gap A gap^T) of each row of `gap` [rows, features] float32: [rows]."""
        return (gap * self.times(gap)).sum(1)

    def undamped(self) -> Tensor:
        """A less damping, [features, features] float64: ones on the diagonal, zero where dead."""
        inverse = self._inverse.double()
        return self._gram.double().mul_(inverse / self._unit).mul_(inverse[:, None])


def refit(
    weight: Tensor,
    keep: Tensor,
    problem: Problem,
    start: Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> tuple[Tensor, int]:
    """The best values for the kept ones of `weight` [out, in]: as conjugate gradients find them.

    They begin at `start`, float32 with features at unit size, or at what is kept of `weight`; where they end
    does not depend on it, but within `tolerance`, which is of the kind of `TOLERANCE`. A kept weight of a
    feature that was never seen stays as it is.

    Returns:
        [out, in] in the dtype of `weight`, zero where `keep` is False; and how many rows were not solved.
    """
    found = torch.empty_like(weight, memory_format=torch.contiguous_format)
    unsolved = 0
    for rows in chunks(*weight.shape):
        mask = keep[rows]
        v = weight[rows].float() * problem.scale
        begin = v if start is None else start[rows].where(~problem.dead, v)
        y, failed = _solve(v, begin, mask, problem, tolerance)
        found[rows] = (y / problem.scale).to(weight.dtype).where(mask, 0)
        unsolved += failed
    return found, unsolved


def swapped(
    weight: Tensor, pruned: Pruned, problem: Problem, pattern: Pattern, passes: int
) -> Pruned:
    """A refit with a better mask, by so many passes of swaps; a row that lost by them stays as it was."""
    a = problem.undamped().float()
    a.diagonal().add_(max(problem.damping, FLOOR))
    v, y, keep = weight.float() * problem.scale, pruned.weight.float() * problem.scale, pruned.keep
    for seed in range(passes):
        keep = exchange(v, y, keep, a, problem.dead, pattern, seed)
        best, unsolved = refit(weight, keep, problem)
        y = best.float() * problem.scale
    better = problem.loss(v - y) < problem.loss(v - pruned.weight.float() * problem.scale)
    keep = keep.where(better[:, None], pruned.keep)
    moved = int((keep & ~pruned.keep).sum())
    notes = {key: value for key, value in pruned.notes.items() if key != "unsolved"}
    best = best.where(better[:, None], pruned.weight)
    return Pruned(best, keep, {**notes, **told(unsolved), "swapped": moved})


def chunks(rows: int, features: int) -> Iterator[slice]:
    """All rows in order, as many at a time as CHUNK allows, a multiple of UNIT."""
    step = max(1, CHUNK // features // UNIT) * UNIT
    yield from (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _solve(
    v: Tensor, start: Tensor, keep: Tensor, problem: Problem, tolerance: float
) -> tuple[Tensor, int]:
    """Minimise (v - y) A (v - y)^T over y with support `keep`, from `start`; all [rows, features].

    Every row has steps of its own, and leaves once it is solved.

    Returns:
        y float32, and how many rows were not solved.
    """
    y = start * keep
    out = y.clone()
    goal = (problem.times(v) * keep).square().sum(1).mul_(tolerance**2)
    r = problem.times(v - y) * keep
    p, size = r, r.square().sum(1)
    index = torch.arange(len(v), device=v.device)
    for _ in range(MOST):
        open_ = size > goal
        left = int(open_.sum())
        if left == 0:
            break
        if UNIT <= left <= len(index) // 2:
            out[index] = y
            index, y, r, p = index[open_], y[open_], r[open_], p[open_]
            keep, goal, size = keep[open_], goal[open_], size[open_]
            open_ = torch.ones_like(size, dtype=torch.bool)
        q = problem.times(p) * keep
        curve = (p * q).sum(1)
        step = (size / curve).where(open_ & (curve > 0), 0)[:, None]
        y, r = y + step * p, r - step * q
        after = r.square().sum(1)
        p = r + (after / size).where(open_, 0)[:, None] * p
        size = after
    else:
        left = int((size > goal).sum())
    out[index] = y
    return out, left


@dataclass(frozen=True)
class Refitted(Around):
    """Another method's mask with the best values for it.

    Attributes:
        inner: the method.
        damping: that of one token per feature.
        swaps: passes of swaps between kept and removed weights (llmprune/methods/swaps.py).
    """

    inner: Method[Any]
    damping: float = DAMPING
    swaps: int = 0

    name: ClassVar[str] = "refit"
    paper: ClassVar[str] = "Meng et al. 2024, arXiv 2406.07831, sec. 3.3"

    def __post_init__(self) -> None:
        check_damping("refit_damping", self.damping)
        if not 0 <= self.swaps <= MOST_PASSES:
            raise ConfigError(
                f"refit_swaps is a number of passes, 0 to {MOST_PASSES}, got {self.swaps}"
            )

    def settings(self) -> dict[str, Any]:
        """The method's own, and the refit's."""
        mine = {"refit": True, "refit_damping": self.damping, "refit_swaps": self.swaps}
        return {**self.inner.settings(), **mine}

    def needs_tokens(self, features: int) -> int:
        """What the method and the refit need."""
        return max(self.inner.needs_tokens(features), FEWEST)

    def fallback(self, stats: Gram) -> tuple[Method[Any], Stats]:
        """The method without a refit."""
        return self.inner, self.inner_stats(stats)

    def follow(
        self, weights: Sequence[Tensor], found: list[Pruned], stats: Gram, pattern: Pattern
    ) -> Iterator[Pruned]:
        """The masks, refit."""
        problem = Problem(stats, self.damping)
        for weight in weights:
            first = found.pop(0)
            best, unsolved = refit(weight, first.keep, problem)
            done = Pruned(best, first.keep, {**first.notes, **told(unsolved)})
            yield swapped(weight, done, problem, pattern, self.swaps) if self.swaps else done


def wrapped(cls: type[Method[Any]], settings: Mapping[str, Any]) -> Method[Any]:
    """The method `cls`, with a refit where `settings`, its own and those of `SETTINGS`, ask for one.

    Raises:
        ConfigError: settings of a refit without one.
    """
    inner = cls(**{key: value for key, value in settings.items() if key not in SETTINGS})
    if settings.get("refit", False):
        rest = (settings.get(key, SETTINGS[key]) for key in ("refit_damping", "refit_swaps"))
        return Refitted(inner, *rest)
    for key in SETTINGS:
        if key != "refit" and key in settings:
            raise ConfigError(f"{key} is of a refit: add --set refit=true")
    return inner


def check_damping(name: str, damping: float) -> None:
    """Refuse what is no damping.

    Raises:
        ConfigError: a number below zero, or none.
    """
    if not 0 <= damping < float("inf"):
        raise ConfigError(f"{name} is a number of at least 0, got {damping:g}")


def told(unsolved: int) -> dict[str, int]:
    """The note on rows that were not solved."""
    return {"unsolved": unsolved} if unsolved else {}
