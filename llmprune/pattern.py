"""Which weights of a matrix may go: a share of them, or all but n of every m neighbours.

A pattern turns a score (the importance of each weight) into a keep mask whose counts are exact: of a
comparison group of `size` weights, `floor(size * sparsity)` are removed, the lowest scores first, and
among equal scores the one with the lower index (row-major) first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from llmprune.errors import ConfigError

Within = Literal["row", "matrix", "columns"]
"""Where weights compete: one row (Wanda), the matrix (magnitude), a column block (SparseGPT)."""

COLUMN_BLOCK = (
    128  # width of a `columns` group, SparseGPT's own default (arXiv 2301.00774, sec. 3.2)
)


@dataclass(frozen=True)
class Unstructured:
    """Remove a share of the weights, compared within each group.

    `sparsity` is the share removed, strictly between 0 and 1. `within` is the comparison group; None
    leaves the choice to the method. `width` is the number of columns in a `columns` group. The count
    per group is `math.floor(size * sparsity)` in double precision, as the papers' code counts.
    """

    sparsity: float
    within: Within | None = None
    width: int = COLUMN_BLOCK

    def __post_init__(self) -> None:
        if not 0.0 < self.sparsity < 1.0:
            raise ConfigError(f"sparsity must lie strictly between 0 and 1, got {self.sparsity:g}")
        if self.within is not None and self.within not in get_args(Within):
            raise ConfigError(
                f"within must be one of {', '.join(get_args(Within))}, got {self.within!r}"
            )

    def removed(self, size: int) -> int:
        """How many of a comparison group of `size` weights are removed."""
        return math.floor(size * self.sparsity)

    def resolved(self, default: Within, width: int = COLUMN_BLOCK) -> Unstructured:
        """This pattern with its comparison group decided; `width` is the method's column block."""
        return replace(self, within=self.within or default, width=width)

    def groups(self, score: Tensor) -> Iterator[Tensor]:
        """Views of `score` [out, in], one per set of comparison groups: each row of a view competes."""
        match self.within or "row":
            case "row":
                yield score
            case "matrix":
                yield score.reshape(1, -1)
            case "columns":
                for start in range(0, score.shape[1], self.width):
                    yield score[:, start : start + self.width].reshape(1, -1)

    def keep(self, score: Tensor) -> Tensor:
        """Keep mask of `score` [out, in]: bool [out, in], True for the weights that stay."""
        masks = [keep_highest(g, self.removed(g.shape[1])) for g in self.groups(score)]
        return torch.cat([m.reshape(score.shape[0], -1) for m in masks], dim=1)

    def fits(self, columns: int) -> bool:
        """Whether a matrix of rows of `columns` weights can take this pattern: always."""
        return True

    def __str__(self) -> str:
        return f"{self.sparsity:g}"


@dataclass(frozen=True)
class NM:
    """Keep n of every m neighbouring weights in a row, as sparse tensor cores read them.

    Hardware documents and this class count the *kept*; the code of Wanda and SparseGPT counts the
    removed.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ConfigError(f"n:m keeps n of m and needs 0 < n < m, got {self.n}:{self.m}")

    @property
    def sparsity(self) -> float:
        """Share of the weights that is removed."""
        return 1 - self.n / self.m

    def resolved(self, default: Within, width: int = COLUMN_BLOCK) -> NM:
        """Itself: the comparison group of n:m is always the m neighbours."""
        return self

    def fits(self, columns: int) -> bool:
        """Whether rows of `columns` weights divide into groups of m."""
        return columns % self.m == 0

    def keep(self, score: Tensor) -> Tensor:
        """Keep mask of `score` [out, in]: bool [out, in]; `in` must be a multiple of m."""
        rows, columns = score.shape
        if not self.fits(columns):
            raise ConfigError(f"{self} needs rows divisible by {self.m}, got rows of {columns}")
        groups = score.reshape(-1, self.m)
        return keep_highest(groups, self.m - self.n).reshape(rows, columns)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


Pattern = Unstructured | NM


def keep_highest(score: Tensor, removed: int) -> Tensor:
    """Mask of `score` [groups, size] that drops exactly `removed` per row: lowest first, ties to the left.

    Selection, not sorting: for short groups each weight counts those that go before it, for long ones
    the threshold comes from `kthvalue` and only the ties at it are counted out.
    """
    if removed == 0:
        return torch.ones_like(score, dtype=torch.bool)
    if score.shape[1] <= 8:
        return _rank(score) >= removed
    threshold = score.kthvalue(removed, dim=1, keepdim=True).values  # [groups, 1]
    below = score < threshold
    tied = score == threshold
    spare = removed - below.sum(1, keepdim=True, dtype=torch.int32)
    if int(tied.sum()) == score.shape[0]:  # one weight at each threshold: nothing to count out
        return ~(below | tied)
    return ~(below | (tied & (tied.cumsum(1, dtype=torch.int32) <= spare)))


def _rank(score: Tensor) -> Tensor:
    """How many weights of the same row go before each one, int8 [groups, size], for short rows."""
    size = score.shape[1]
    columns = score.unbind(1)
    ranks = [torch.zeros_like(columns[0], dtype=torch.int8) for _ in range(size)]
    for right in range(1, size):
        for left in range(right):
            first = columns[left] <= columns[right]  # the left one goes first, on a tie too
            ranks[right] += first
            ranks[left] += ~first
    return torch.stack(ranks, dim=1)


def parse(text: str | float | Pattern, within: Within | None = None) -> Pattern:
    """'0.5', 0.5 or '2:4' as a pattern; `within` is the comparison group of an unstructured one."""
    if isinstance(text, NM | Unstructured):
        return text.resolved(within) if within else text
    text = str(text).strip()
    if pair := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = int(pair[1]), int(pair[2])
        if 0 < m < n:
            raise ConfigError(
                f"pattern {text} keeps more than there are; n:m keeps n of m: {m}:{n}?"
            )
        if not 0 < n < m:
            raise ConfigError(f"pattern {text} removes nothing or everything; n:m needs 0 < n < m")
        if within:
            raise ConfigError(
                f"within={within} needs a share such as 0.5; {text} compares m neighbours"
            )
        return NM(n, m)
    try:
        share = float(text)
    except ValueError:
        raise ConfigError(
            f"{text!r} is no sparsity; use the share removed (0.5) or kept:group (2:4)"
        ) from None
    if 1 < share < 100:
        raise ConfigError(f"sparsity {text} is no share; for {text} percent use {share / 100:g}")
    if not 0 < share < 1:
        raise ConfigError(f"sparsity must lie strictly between 0 and 1, got {text}; use e.g. 0.5")
    return Unstructured(share, within)
