"""Count the zeros of one tensor, and the tightest n:m that its groups really hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Axis = Literal["rows", "columns"]
"""Whether the m neighbours lie along the last dimension or down the one before it."""

GROUPS = (4, 8, 16, 32)
AT_ONCE = 1 << 22  # weights looked at together: 4 MB as bytes, which a core's cache nearly holds


@dataclass(frozen=True)
class Census:
    """What one tensor holds.

    Attributes:
        zeros: number of weights that are zero.
        pattern: tightest (n, m) with m in `GROUPS` that every group satisfies, or None. For m above
            4 half of the groups must hold n weights: otherwise the bound is a coincidence, such as
            the 28:32 that a random half of a matrix satisfies.
        axis: along which the groups lie; None without a pattern.
    """

    zeros: int
    pattern: tuple[int, int] | None = None
    axis: Axis | None = None


def take(tensor: Tensor, axes: tuple[Axis, ...]) -> Census:
    """Census of a floating-point tensor of any dimension, fp8 included; integers have no zeros.

    Args:
        tensor: [..., rows, columns]; patterns are looked for from two dimensions on.
        axes: orientations to try, the preferred one first.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return Census(0)
    grouped = tensor.dim() >= 2
    matrix = tensor.reshape(-1, tensor.shape[-1]) if grouped else tensor.reshape(1, -1)
    rows = tensor.shape[-2] if grouped else 1
    zeros = sum(part.numel() - int(_nonzero(part).sum()) for part in _parts(matrix, rows))
    for axis in axes if grouped and zeros else ():
        groups = Groups(tensor.shape, axis)
        for part in _parts(matrix, rows):
            if groups.seen:
                groups.add(_nonzero(part))
        if pattern := groups.tightest():
            return Census(zeros, pattern, axis)
    return Census(zeros)


class Groups:
    """For each m that is still possible: most weights in a group, groups that hold as many, groups."""

    def __init__(self, shape: Sequence[int], axis: Axis) -> None:
        """For a tensor of `shape` [..., rows, columns]."""
        self.axis = axis
        length = shape[-1 if axis == "rows" else -2]
        self.seen = {m: (0, 0, 0) for m in GROUPS if length % m == 0}

    def add(self, nonzero: Tensor) -> None:
        """Count the groups of `nonzero` [rows, columns] bool; an m that is out of the question goes."""
        if not self.seen:
            return
        bits = nonzero if self.axis == "rows" else nonzero.T
        fours = bits.contiguous().flatten().view(torch.int32)  # four bytes of 0 or 1 each
        counts = (fours * 0x01010101 >> 24).to(torch.int8)  # the product's top byte is their sum
        for m in GROUPS:
            if m > GROUPS[0]:
                counts = counts[0::2] + counts[1::2]
            if m in self.seen:
                self._note(m, counts)
            if not any(later > m for later in self.seen):
                return

    def _note(self, m: int, counts: Tensor) -> None:
        most, hits, groups = self.seen[m]
        here = int(counts.max())
        hits = hits if here <= most else 0
        most = max(most, here)
        hits, groups = hits + int((counts == most).sum()), groups + counts.numel()
        self.seen[m] = (most, hits, groups)
        if most == m or (m > GROUPS[0] and 2 * hits < groups):
            del self.seen[m]

    def tightest(self) -> tuple[int, int] | None:
        """(n, m) with the smallest share kept, and among equals the smallest m."""
        held = [(n / m, m, n) for m, (n, _, _) in self.seen.items() if n > 0]
        if not held:
            return None
        _, m, n = min(held)
        return n, m


def _parts(matrix: Tensor, rows: int) -> Iterator[Tensor]:
    """The slices of `cuts`."""
    for first, count in cuts(matrix.shape[0], rows, matrix.shape[1]):
        yield matrix[first : first + count]


def cuts(total: int, rows: int, columns: int, group: int = 1) -> Iterator[tuple[int, int]]:
    """(first, count) of slices of whole rows that cut neither a group of rows nor one of several matrices.

    Matrices that are small go together: a file may hold very many of a single weight.

    Args:
        total: number of rows of all matrices, one after the other.
        rows: of each matrix.
        columns: of each matrix.
        group: a number of rows that is not cut either, beside those of `GROUPS`.
    """
    columns = max(1, columns)
    if several := AT_ONCE // (rows * columns):
        for first in range(0, total, several * rows):
            yield first, min(several * rows, total - first)
        return
    least = math.lcm(GROUPS[-1], group)
    step = max(1, AT_ONCE // columns // least) * least
    for first in range(0, total, rows):
        for start in range(first, first + rows, step):
            yield start, min(step, first + rows - start)


def _nonzero(part: Tensor) -> Tensor:
    """Which weights are not zero; a minus zero is one, too."""
    if part.element_size() > 1:
        return part != 0
    return part.view(torch.uint8).bitwise_and(0x7F) != 0
