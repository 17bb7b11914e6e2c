"""Fewer bits: what a method keeps is rounded to whole numbers times a scale (`--quantize int8 | int4`).

The method prunes; then one sweep over the columns rounds what it has kept, and lets the columns to the
right of each make up for it, with the same Gram matrix and inverse factor as SparseGPT's own sweep. It is
the joint sweep of arXiv 2301.00774, sec. 3.5, and GPTQ (arXiv 2210.17323) where nothing is removed.

What the sweep approximates: a method that finds new values for what it keeps (SparseGPT, a refit, ALPS) has
made up for what it removed, and these values are to be met. A method that leaves them as they are has not:
there the dense row is to be met, and the sweep makes up for both. From SparseGPT's values and from dense ones
it gives the same: W - B = f U, where f is zero for what is kept, so that the same reaches each kept weight.
Only the mask could differ, if it were chosen among weights that have been rounded to the left of it.

int8 has one scale for each row; int4 one for 128 neighbouring columns, so that a column block of SparseGPT
and a tile of a kernel meet one scale, and one weight that stands out spoils 128 others at most. Ranges are
tried from the largest weight downwards (`methods/grid.py`): the one counts in which squared errors, each
column weighed by what it costs, are least. In the sweep that is 1 / U_jj^2, by which its whole loss is a sum
over columns; to the nearest, the diagonal of the Gram matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmprune.errors import ConfigError, nearest
from llmprune.methods.base import Around, Method, Pruned
from llmprune.methods.grid import Grid, fitted
from llmprune.methods.registry import settled
from llmprune.methods.sparsegpt import SparseGPT, onto_grid
from llmprune.pattern import Pattern, Within
from llmprune.stats import Gram, InputNorms, NoStats, Stats

BITS = {"int8": 8, "int4": 4}
GROUPS = {"int8": 0, "int4": 128}
ROUNDINGS = ("gptq", "nearest")
RANGES = ("search", "max")


@dataclass(frozen=True)
class Quantize:
    """How kept weights are rounded.

    Attributes:
        kind: `int8` or `int4`.
        rounding: `gptq`, the sweep; `nearest`, each weight by itself: the baseline.
        range: `search` for the range that costs least; `max`, the largest weight.
        group: columns that share a scale; 0 is a whole row.
        damping: of the sweep, a share of the mean diagonal, as SparseGPT's.
    """

    kind: str
    rounding: str = "gptq"
    range: str = "search"
    group: int = 0
    damping: float = 0.01

    def __post_init__(self) -> None:
        for name, value, known in (
            ("rounding", self.rounding, ROUNDINGS),
            ("range", self.range, RANGES),
        ):
            if value not in known:
                raise ConfigError(
                    f"setting {name} of quantize: no {value!r}, {nearest(value, known)}"
                )
        if not 0 <= self.group < 2**31:
            raise ConfigError(
                f"setting group of quantize is a number of columns, or 0 for the row, got {self.group}"
            )
        if not 0 <= self.damping <= 1:
            raise ConfigError(
                f"setting damping of quantize is a share of the mean diagonal, 0 to 1, got {self.damping:g}"
            )

    @property
    def bits(self) -> int:
        """Of a whole number."""
        return BITS[self.kind]

    def columns(self, features: int) -> int:
        """Columns of a row of `features` that share a scale."""
        return min(self.group, features) or features

    def as_dict(self) -> dict[str, Any]:
        """Every setting with its value, defaults too."""
        return {name: getattr(self, name) for name in ("rounding", "range", "group", "damping")}


def build(kind: str, settings: Mapping[str, Any]) -> Quantize:
    """A way to round to `kind` with `settings`: values, or text as typed after `--quantize-set`.

    Raises:
        ConfigError: for a kind or a setting that there is not, or a value that makes no sense.
    """
    if kind not in BITS:
        raise ConfigError(f"no quantize {kind!r}: {nearest(str(kind), list(BITS))}")
    usual = Quantize(kind, group=GROUPS[kind])
    return replace(usual, **settled("quantize", usual.as_dict(), settings))


@dataclass(frozen=True)
class Kept(Method[NoStats]):
    """Keeps every weight that is not zero, as it is: what has been pruned already."""

    name: ClassVar[str] = "kept"
    stats: ClassVar[type[NoStats]] = NoStats
    within: ClassVar[Within] = "row"
    paper: ClassVar[str] = "none"
    exact: ClassVar[bool] = False

    def prune(self, weight: Tensor, stats: NoStats, pattern: Pattern) -> Pruned:
        """`weight` and where it is not zero."""
        return Pruned(weight, weight != 0)

    def by_rows(self, pattern: Pattern) -> bool:
        """Nothing is compared."""
        return True


@dataclass(frozen=True)
class Quantized(Around):
    """Another method, what it keeps rounded.

    Attributes:
        inner: the method.
        how: how it is rounded.
    """

    inner: Method[Any]
    how: Quantize

    name: ClassVar[str] = "quantize"
    paper: ClassVar[str] = "Frantar and Alistarh 2023, arXiv 2301.00774, sec. 3.5"

    def __post_init__(self) -> None:
        if self.inner.stats not in (Gram, InputNorms, NoStats):
            raise ConfigError(
                f"{self.inner.name} learns what a Gram matrix does not hold, so that nothing can round what "
                "it keeps; leave --quantize out, or use another --method"
            )

    @property
    def called(self) -> str:
        """The method, and how it is rounded."""
        return f"{self.inner.called} in {self.how.kind}"

    def settings(self) -> dict[str, Any]:
        """The method's own."""
        return self.inner.settings()

    def needs_tokens(self, features: int) -> int:
        """What the method needs, and for the sweep what SparseGPT's own does."""
        swept = SparseGPT().needs_tokens(features) if self.how.rounding == "gptq" else 0
        return max(self.inner.needs_tokens(features), swept)

    def fallback(self, stats: Gram) -> tuple[Method[Any], Stats]:
        """First the method, rounded to the nearest; then what the method falls back to."""
        if self.how.rounding == "gptq":
            return replace(self, how=replace(self.how, rounding="nearest")), stats
        inner, known = self.inner.fallback(self.inner_stats(stats))
        return replace(self, inner=inner), known

    def follow(
        self, weights: Sequence[Tensor], found: list[Pruned], stats: Any, pattern: Pattern
    ) -> Iterator[Pruned]:
        """The masks, with values on a grid each."""
        for weight in weights:
            first = found.pop(0)
            if self.how.rounding == "nearest":
                yield self._near(first, stats)
            else:
                yield self._swept(weight, first, stats)

    def _swept(self, weight: Tensor, first: Pruned, stats: Any) -> Pruned:
        """`first` on a grid by the sweep."""
        factor = stats.inverse_factor(self.how.damping)
        raised = {"damping": factor.damping} if factor.raised else {}
        cost = factor.upper.diagonal().square().reciprocal() if self.how.range == "search" else None
        moved = ((first.weight != weight) & first.keep).any(1, keepdim=True)
        goal = first.weight.where(moved, weight)
        grid = self._grid(first, cost)
        values = onto_grid(goal, first.keep, factor.upper, grid, SparseGPT.block)
        return self._told(first, values, grid, raised)

    def _near(self, first: Pruned, stats: Stats) -> Pruned:
        """`first` on a grid, each weight rounded to the nearest point of it."""
        cost = _diagonal(stats, first.weight) if self.how.range == "search" else None
        grid = self._grid(first, cost)
        return self._told(first, grid.nearest(first.weight.float()), grid, {"rounding": "nearest"})

    def _grid(self, first: Pruned, cost: Tensor | None) -> Grid:
        return fitted(first.weight, cost, self.how.bits, self.how.columns(first.weight.shape[1]))

    def _told(
        self, first: Pruned, values: Tensor, grid: Grid, more: Mapping[str, float | str]
    ) -> Pruned:
        """Nothing is held back for later: what is rounded has its final value."""
        notes = {**first.notes, **more, "quantize": self.how.kind}
        return Pruned(values.to(first.weight.dtype), first.keep, notes, grid=grid)


def _diagonal(stats: Stats, weight: Tensor) -> Tensor:
    """What a squared error in each column of `weight` costs by itself, [in]; one where nothing is known."""
    if isinstance(stats, Gram | InputNorms) and stats.tokens:
        return stats.diagonal if isinstance(stats, Gram) else stats.sum_sq
    return weight.new_ones(weight.shape[1], dtype=torch.float32)
