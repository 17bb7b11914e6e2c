"""Which weights of a matrix may go: a share of them, or all but n of every m neighbours.

A pattern turns a score (the importance of each weight) into a keep mask whose counts are exact: of a
comparison group of `size` weights, `floor(size * sparsity)` are removed, the lowest scores first, and
among equal scores the one with the lower index (row-major) first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from llmprune.errors import ConfigError
from llmprune.kernels import nm_mask

Within = Literal["row", "matrix", "columns"]
"""Where weights compete: one row (Wanda), the matrix (magnitude), a column block (SparseGPT)."""

SHORT = 8  # weights in a group up to which ranks are counted by comparison
SORTED = 2**26  # weights in a group up to which a GPU sorts, for its memory
CHUNK = 2**20  # weights that one thread selects from at a time: their copy stays in its cache

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
        if nm_mask.takes(score, self.m):
            return nm_mask.nm_keep(score, self.n, self.m)
        groups = score.reshape(-1, self.m)
        return keep_highest(groups, self.m - self.n).reshape(rows, columns)

    def keep_down(self, score: Tensor) -> Tensor:
        """Keep mask of one group in each row, given transposed: `score` and the mask are [m, out]."""
        if self.m > SHORT:
            return keep_highest(score.T.contiguous(), self.m - self.n).T
        return torch.stack([rank >= self.m - self.n for rank in _ranks(score.unbind(0))])

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


Pattern = Unstructured | NM
Level = Pattern | None
"""What one matrix of several is to be pruned to; None for one that stays dense."""
DENSE = "dense"


def as_text(level: Level) -> str:
    """A level as text that `from_text` reads back exactly."""
    if level is None:
        return DENSE
    return repr(level.sparsity) if isinstance(level, Unstructured) else str(level)


def from_text(text: str | None, base: Pattern) -> Level:
    """The level that `as_text` wrote in a run of the pattern `base`, which it is without a text."""
    if text is None:
        return base
    if text == DENSE:
        return None
    return replace(base, sparsity=float(text)) if isinstance(base, Unstructured) else parse(text)


def keep_highest(score: Tensor, removed: int) -> Tensor:
    """Mask of `score` [groups, size] that drops exactly `removed` per row: lowest first, ties to the left.

    Selection, not sorting: for short groups each weight counts those that go before it, for long ones
    only the ties at a threshold are counted out.
    """
    if removed == 0:
        return torch.ones_like(score, dtype=torch.bool)
    groups, size = score.shape
    if size <= SHORT:
        return torch.stack([rank >= removed for rank in _ranks(score.unbind(1))], dim=1)
    threshold = kth_lowest(score, removed)
    above = score > threshold
    if true_in(above) == groups * (size - removed):  # no group can keep more: nothing to count out
        return above
    below = score < threshold
    tied = score == threshold
    spare = removed - below.sum(1, keepdim=True, dtype=torch.int32)
    return ~(below | (tied & (tied.cumsum(1, dtype=torch.int32) <= spare)))


def kth_lowest(score: Tensor, k: int) -> Tensor:
    """The k-th lowest (from 1) of each row of `score` [groups, size]: [groups, 1].

    On a CPU by numpy, whose selection uses vector instructions: 2 to 3 times as fast as `kthvalue` for
    rows of 768 and 2048 and for one group of 98,304 on an AMD EPYC. A GPU sorts one long group with all its
    processors, where `kthvalue` gives it to one of them; not measured. Sorting takes some 24 bytes a weight.
    """
    if score.device.type == "cuda" and len(score) == 1 and score.numel() <= SORTED:
        return score.sort(dim=1).values[:, k - 1 : k]
    if score.device.type != "cpu" or score.dtype not in (torch.float32, torch.float64):
        return score.kthvalue(k, dim=1, keepdim=True).values

    def select(part: Tensor) -> Tensor:
        return torch.from_numpy(np.partition(part.numpy(), k - 1, axis=1)[:, k - 1 : k].copy())

    parts = score.detach().split(max(1, CHUNK // score.shape[1]))  # type: ignore[no-untyped-call]
    if len(parts) == 1:
        return select(score.detach())
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return torch.cat(list(pool.map(select, parts)))


def true_in(mask: Tensor) -> int:
    """How many of a mask are True; on a CPU by numpy, which takes a tenth of torch's time."""
    return int(np.count_nonzero(mask.numpy()) if mask.device.type == "cpu" else mask.sum())


def _ranks(columns: Sequence[Tensor]) -> list[Tensor]:
    """For each of a few columns [groups], how many of its neighbours in the row go before it, int8."""
    ranks = [
        torch.full_like(c, len(columns) - 1 - i, dtype=torch.int8) for i, c in enumerate(columns)
    ]
    for right in range(1, len(columns)):
        for left in range(right):
            first = (columns[left] <= columns[right]).view(torch.int8)  # left first, on a tie too
            ranks[right] += first
            ranks[left] -= first
    return ranks


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
