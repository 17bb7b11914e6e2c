"""Swaps: of a mask that has its best values, exchange a kept weight for a removed one where that pays.

For features at unit size (llmprune/methods/refit.py), a row v, its mask S, y = its best values there, H =
A[S, S]^-1 and r = (v - y) A, optimal brain surgery (Hassibi & Stork 1992) says what leaving costs and what
entering gains, all other kept weights adapting: p out, y_p^2 / H_pp; q in, r_q^2 / s_q, with s = the diagonal
of A - A[:, S] H A[S, :]. With b = A[q, S] H, both at once gain

    (r_q + b_p y_p / H_pp)^2 / (s_q + b_p^2 / H_pp)  -  y_p^2 / H_pp.

The best swap is made until none gains more than a `LEAST` part of what the row loses. H, b and s are parts of
one tableau, which a swap changes by two steps of elimination (Goodnight 1979, the sweep operator).

A row is taken some columns at a time, those outside standing still: what a swap gains there is a lower bound,
so each one made is worth making. A row of up to `WIDTH` features is one part, and the formula exact. Both
weights of a swap are of one row, and of one group or column block, so that counts stay what they were.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llmprune.pattern import NM, Pattern

WIDTH = 64
"""Columns in a part. On rows of 1024 at 2:4, parts of 32 lost 0.6% more than these in about two thirds of
their time, parts of 128 lost 0.6% less in twice of it (benchmarks/results/wide-layer.json)."""
LEAST = 1e-4  # a choice, not measured
FLOOR = 1e-4  # damping at least, while swaps are chosen: what is swapped in must have something of its own
CELLS = {
    "cpu": 2**20,
    "other": 2**24,
}  # of the tableaus of the rows that are done at a time: a cache, a GPU


def exchange(
    v: Tensor, y: Tensor, keep: Tensor, a: Tensor, dead: Tensor, pattern: Pattern, seed: int
) -> Tensor:
    """One pass over the columns.

    Args:
        v: [rows, features] float32, dense rows, features at unit size.
        y: [rows, features] float32, best values of `keep`.
        keep: [rows, features] bool.
        a: [features, features] float32, damped.
        dead: [features] bool, those whose weights never enter.
        pattern: that `keep` holds, and that what comes back holds.
        seed: of the parts that columns are put in where the pattern leaves it open.

    Returns:
        [rows, features] bool, as many kept in every comparison group.
    """
    keep, y = keep.clone(), y.clone()
    parts = list(_parts(v.shape[1], pattern, seed))
    cells = CELLS["cpu" if v.device.type == "cpu" else "other"]
    step = max(1, cells // max(len(part) for part in parts) ** 2 // 16) * 16
    for start in range(0, len(v), step):
        rows = slice(start, start + step)
        r = (v[rows] - y[rows]) @ a
        least = ((v[rows] - y[rows]) * r).sum(1) * LEAST
        r[:, dead] = 0
        for part in parts:
            columns = part.to(v.device)
            group = pattern.m if isinstance(pattern, NM) else None
            old = y[rows][:, columns]
            mask = keep[rows][:, columns]
            new, mask = _Part(a[columns][:, columns], old, r[:, columns], mask, group).best(least)
            r -= (new - old) @ a[columns]
            y[rows, columns] = new
            keep[rows, columns] = mask
    return keep


def _parts(features: int, pattern: Pattern, seed: int) -> Iterator[Tensor]:
    """Columns [n] of each part: whole groups, within a column block, or drawn where any may meet."""
    if isinstance(pattern, NM):
        width, groups = max(1, WIDTH // pattern.m) * pattern.m, [torch.arange(features)]
    elif pattern.within == "columns":
        width, groups = WIDTH, list(torch.split(torch.arange(features), pattern.width))
    else:
        random = torch.Generator().manual_seed(seed)
        width, groups = WIDTH, [torch.randperm(features, generator=random)]
    for group in groups:
        yield from torch.split(group, width)


class _Part:
    """Some columns of some rows, whose swaps are found by their tableaus.

    A tableau T [rows, width, width] holds H where row and column are kept, b where only the column is, -b
    transposed where only the row is, and A - A[:, S] H A[S, :] where neither.
    """

    def __init__(self, a: Tensor, y: Tensor, r: Tensor, keep: Tensor, group: int | None) -> None:
        """`a` [width, width]; `y`, `r` and `keep` [rows, width]; `group` neighbours compete, or all."""
        kept = keep.float()
        both = kept[:, :, None] * kept[:, None, :]
        inverse = torch.linalg.inv(a * both + torch.diag_embed(1 - kept)).mul_(both)
        b = a @ inverse
        other = torch.where(keep[:, None, :], b, a - b @ a)
        self.tableau = torch.where(
            keep[:, :, None], torch.where(keep[:, None, :], inverse, -b.mT), other
        )
        slope = (r * kept)[:, :, None]  # none but rounding, and what parts before this one left
        self.y = y + (inverse @ slope)[:, :, 0]
        self.r = (r - (b @ slope)[:, :, 0]) * ~keep
        self.keep, self.group = keep.clone(), group

    def best(self, least: Tensor) -> tuple[Tensor, Tensor]:
        """Swap in each row until no swap gains more than `least` [rows]; then its values and its mask."""
        y, keep = self.y.clone(), self.keep.clone()
        index = torch.arange(len(y), device=y.device)
        for _ in range(2 * y.shape[1]):
            gain, into, out = self._gains()
            going = gain > least[index]
            if not bool(going.any()):
                break
            index, into, out = index[going], into[going], out[going]
            self.tableau, self.y = self.tableau[going], self.y[going]
            self.r, self.keep = self.r[going], self.keep[going]
            self._leave(out)
            self._enter(into)
            y[index], keep[index] = self.y, self.keep
        return y, keep

    def _gains(self) -> tuple[Tensor, Tensor, Tensor]:
        """The best swap of each row: what it gains [rows], which column enters and which leaves."""
        rows, width = self.y.shape
        size = self.group or width
        shape = (rows, width // size, size)
        t = self.tableau.view(*shape, width // size, size).diagonal(dim1=1, dim2=3)
        t = t.permute(0, 3, 1, 2)  # [rows, groups, size, size]: enters, leaves
        keep, y, r = (x.view(shape) for x in (self.keep, self.y, self.r))
        own = t.diagonal(dim1=2, dim2=3)
        h, s = own.where(keep, 1)[:, :, None, :], own.where(~keep, 1)[..., None]
        part = y[:, :, None, :] / h
        gain = (r[..., None] + t * part).square_().div_(s + t.square() / h)
        gain -= y[:, :, None, :] * part
        gain.masked_fill_(keep[..., None] | ~keep[:, :, None, :] | (s <= 0) | (h <= 0), -torch.inf)
        best = gain.flatten(1).max(1)
        first = best.indices // size**2 * size
        return best.values, first + best.indices // size % size, first + best.indices % size

    def _leave(self, p: Tensor) -> None:
        """Take the weight `p` [rows] out of each row."""
        row = torch.arange(len(p), device=p.device)
        column = self.tableau[row, :, p]
        part = (self.y[row, p] / column[row, p])[:, None]
        self.y -= (column * part).where(self.keep, 0)
        self.r += (column * part).where(~self.keep, 0)
        self.y[row, p], self.r[row, p] = 0, part[:, 0]
        self.keep[row, p] = False
        self._sweep(row, p)

    def _enter(self, q: Tensor) -> None:
        """Take the weight `q` [rows] into each row."""
        row = torch.arange(len(q), device=q.device)
        column = self.tableau[row, :, q]
        part = (self.r[row, q] / column[row, q])[:, None]
        self.y += (column * part).where(self.keep, 0)
        self.r -= (column * part).where(~self.keep, 0)
        self.y[row, q], self.r[row, q] = part[:, 0], 0
        self.keep[row, q] = True
        self._sweep(row, q)

    def _sweep(self, row: Tensor, k: Tensor) -> None:
        """The step of elimination with which `k` [rows] enters or leaves: done twice, it undoes itself."""
        t = self.tableau
        across, down = t[row, k, :] / t[row, k, k][:, None], t[row, :, k]
        pivot = 1 / t[row, k, k]
        t -= down[:, :, None] * across[:, None, :]
        t[row, k, :] = -across
        t[row, :, k] = down * pivot[:, None]
        t[row, k, k] = pivot
