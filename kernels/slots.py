"""The n places that each group of m neighbours keeps: between a dense matrix and a device layout.

A kernel wants the same number of values from every group. A group that keeps fewer than n is filled up
with its first free places, whose weight is +0.0: the places of a group are distinct and increase.

A zero that a bitmap keeps is kept, and comes back bit for bit. Only where a group would then keep more
than n do its zeros of either sign give way, and come back as +0.0: multiplying a weight by a mask leaves
such zeros, and no product changes with them.

Plain torch, on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packed import nonzero_bits

BLOCK = 2**24  # weights that are in the works at once: bounds the memory beside matrix and layout


def slots(
    dense: Tensor,  # [rows, columns] bfloat16 or float16
    n: int,
    m: int,
    keep: Tensor | None = None,  # bool as dense; None is all that is not +0.0
) -> tuple[Tensor, Tensor]:
    """Values [rows, columns / m, n] and their places in the group, uint8, increasing.

    Raises:
        ValueError: where a group keeps more than n, or m does not divide the columns.
    """
    rows, columns = dense.shape
    if columns % m:
        raise ValueError(f"{n}:{m} needs rows of a multiple of {m} weights, got {columns}")
    groups = dense.reshape(rows, columns // m, m)
    keep = nonzero_bits(groups) if keep is None else keep.reshape(groups.shape)
    full = keep.sum(-1, keepdim=True, dtype=torch.uint8) > n
    if bool(full.any()):
        keep = torch.where(full, groups != 0, keep)
        groups = groups.masked_fill(~keep, 0)  # a zero that gave way may be taken again, as +0.0
    kept = keep.sum(-1, keepdim=True, dtype=torch.uint8)
    if over := int((kept > n).sum()):
        raise ValueError(f"not {n}:{m}: {over} of {kept.numel()} groups keep more than {n}")
    free = (~keep).cumsum(-1, dtype=torch.uint8)  # how many free places lie up to here
    take = keep | (free <= n - kept.to(torch.int16))
    place = torch.arange(m, dtype=torch.uint8, device=dense.device).expand(groups.shape)
    shape = (rows, columns // m, n)
    return groups[take].reshape(shape), place[take].reshape(shape)


def from_slots(
    values: Tensor,  # [rows, groups, n] bfloat16 or float16
    places: Tensor,  # [rows, groups, n] uint8, distinct in each group
    m: int,
) -> Tensor:
    """The inverse of `slots`: dense [rows, groups * m]."""
    rows, groups, _ = values.shape
    bits = values.view(torch.int16)  # scattering floats may change the payload of a NaN
    dense = bits.new_zeros(rows, groups, m).scatter_(2, places.long(), bits)
    return dense.view(values.dtype).reshape(rows, groups * m)


def row_blocks(rows: int, columns: int, step: int) -> range:
    """First rows of blocks of about `BLOCK` weights, each of a multiple of `step` rows."""
    return range(0, rows, max(1, BLOCK // (columns * step)) * step)
