"""The grid that kept weights are rounded to: whole numbers of few bits, times a scale that neighbours share.

Symmetric: zero is on it, and 2^(bits-1) - 1 steps lie on either side. A scale is a bfloat16 number, so that a
whole number times a scale needs no more than 15 bits and is exact in float32. What rounding the scale itself
takes from a range, a 256th at most, is taken before any weight is rounded. Groups are of columns, not of
kept weights: they begin where the tiles of a kernel begin, whatever the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 2**20  # weights whose ranges are tried at a time, so that they stay in a cache
SHRINK = tuple(1 - i / 40 for i in range(25))
"""Ranges that are tried, shares of the largest weight: down to 0.4, which int4 takes in groups of 128 where
one weight stands out. A choice, not measured."""
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Grid:
    """Where the weights of a matrix [out, in] may lie.

    Attributes:
        scale: [out, groups] float32, each a bfloat16 number; 0 where all that is kept of a group is zero.
        bits: of a whole number.
        group: neighbouring columns that share a scale; the last group may have fewer.
    """

    scale: Tensor
    bits: int
    group: int

    @property
    def top(self) -> int:
        """The largest whole number; the smallest is its negative."""
        return top_of(self.bits)

    def columns(self, count: int) -> list[Tensor]:
        """The scale [out] of each of `count` columns."""
        return [column for column in self.scale.T for _ in range(self.group)][:count]

    def wide(self, count: int) -> Tensor:
        """The scale of each weight: [out, count]."""
        return self.scale.repeat_interleave(self.group, 1)[:, :count]

    def nearest(self, values: Tensor) -> Tensor:
        """Points of the grid next to `values` [out, in] float32."""
        return nearest(values, self.wide(values.shape[1]), self.top)

    def holds(self, values: Tensor) -> bool:
        """Whether `values` [out, in] of any floating dtype are points of the grid, rounded to that dtype."""
        return torch.equal(self.nearest(values.float()).to(values.dtype), values)

    def whole(self, values: Tensor) -> Tensor:
        """The whole numbers, int8 [out, in], that points of the grid [out, in] stand for."""
        steps = values.float() / self.wide(values.shape[1]).clamp_min(_TINY)
        return steps.round_().to(torch.int8)

    def points(self, whole: Tensor) -> Tensor:
        """What whole numbers [out, in] stand for: their exact products with the scale, in float32."""
        return whole.float() * self.wide(whole.shape[1])


def top_of(bits: int) -> int:
    """The largest whole number of a symmetric grid."""
    return int(2 ** (bits - 1) - 1)


def nearest(values: Tensor, scale: Tensor, top: int) -> Tensor:
    """Points next to `values` on the grid of `scale`, which has `top` steps on either side; never -0.0."""
    steps = (values / scale.clamp_min(_TINY)).round_().clamp_(-top, top)
    return steps.mul_(scale).add_(0.0)  # -0.0 + 0.0 is 0.0


def fitted(values: Tensor, cost: Tensor | None, bits: int, group: int) -> Grid:
    """A grid for the kept weights of a matrix.

    Args:
        values: [out, in] of any floating dtype, zero where a weight is removed.
        cost: [in] float32, what a squared error in each column costs: the range is the one of SHRINK that
            costs least. None takes the largest weight of each group for its range.
        bits: of a whole number.
        group: columns that share a scale.
    """
    shrink = SHRINK if cost is not None else SHRINK[:1]
    scales = [_best(part, cost, top_of(bits), group, shrink) for part in _parts(values)]
    return Grid(torch.cat(scales), bits, group)


def _parts(values: Tensor) -> Iterator[Tensor]:
    step = max(1, CHUNK // values.shape[1])
    for start in range(0, len(values), step):
        yield values[start : start + step].float()


def _best(
    values: Tensor, cost: Tensor | None, top: int, group: int, shrink: tuple[float, ...]
) -> Tensor:
    """Scales [rows, groups] of `values` [rows, in] float32."""
    spare = -values.shape[1] % group
    grouped = pad(values, (0, spare)).view(len(values), -1, group)
    largest = grouped.abs().amax(2)
    best = _as_scale(largest / top)
    if cost is None:
        return best
    weights = pad(cost, (0, spare)).view(-1, group)
    least = _loss(grouped, best, weights, top)
    for share in shrink[1:]:
        scale = _as_scale(largest * (share / top))
        loss = _loss(grouped, scale, weights, top)
        better = loss < least
        best, least = scale.where(better, best), loss.where(better, least)
    return best


def _as_scale(scale: Tensor) -> Tensor:
    return scale.bfloat16().float()


def _loss(grouped: Tensor, scale: Tensor, weights: Tensor, top: int) -> Tensor:
    """What rounding costs each group: [rows, groups]."""
    change = nearest(grouped, scale[:, :, None], top).sub_(grouped).square_()
    return (change * weights).sum(2)
