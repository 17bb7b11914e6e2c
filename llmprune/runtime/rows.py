"""Move whole rows of packed matrices without expanding them.

Most of what families do to weights when they load them (experts are stacked, gate and up are set one below
the other, a fused matrix is taken apart) moves whole rows. Where rows go is found by doing it to a tensor of
row numbers, two columns wide; bitmaps and values then follow, row by row.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate

import torch
from torch import Tensor

from llmprune.kernels.packed import Packed

Change = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
"""Makes tensors by name of tensors by name."""


def rearranged(sources: Mapping[str, Packed], change: Change) -> dict[str, Packed] | None:
    """What `change` makes of packed tensors, packed; None where it does more than move rows.

    Args:
        sources: of the same number of columns and one dtype, by name.
        change: given dense tensors of these shapes, or ones of other columns.
    """
    columns = {source.shape[-1] for source in sources.values()}
    if len(columns) != 1:
        return None
    numbers, rows = dict[str, Tensor](), 0
    for name, source in sources.items():
        count = math.prod(source.shape[:-1])
        both = torch.arange(2 * rows, 2 * (rows + count)).reshape(*source.shape[:-1], 2)
        numbers[name], rows = both, rows + count
    try:
        changed = change(numbers)
    except (RuntimeError, ValueError, IndexError):
        return None  # it needs the real columns
    orders = {name: _order(tensor) for name, tensor in changed.items()}
    values = [source.values for source in sources.values()]
    bitmaps = [source.bitmap.flatten(0, -2) for source in sources.values()]
    starts = _starts(bitmaps)
    found = {}
    for name, order in orders.items():
        if order is None:
            return None
        shape = (*changed[name].shape[:-1], *columns)
        found[name] = _taken(order, values, torch.cat(bitmaps), starts, shape)
    return found


def _order(changed: Tensor) -> Tensor | None:
    """The old number of each new row: int64 [rows]; None where more than rows was moved."""
    if changed.dim() < 2 or changed.shape[-1] != 2:
        return None
    left, right = changed.reshape(-1, 2).unbind(1)
    whole = bool((left % 2 == 0).all()) and torch.equal(right, left + 1)
    return left // 2 if whole else None


def _starts(bitmaps: list[Tensor]) -> Tensor:
    """Where each row's values begin among those of all sources: int64 [rows + 1] on the CPU."""
    counts = [_ones(part) for bitmap in bitmaps for part in torch.split(bitmap, _step(bitmap))]
    return torch.nn.functional.pad(torch.cat(counts).cumsum(0), (1, 0))


def _step(bitmap: Tensor) -> int:
    """Rows to count at a time: torch widens what it sums."""
    return max(1, 2**20 // bitmap.shape[-1])


def _ones(bitmap: Tensor) -> Tensor:
    """One bits of each row: int64 [rows] on the CPU. Compiled code would count faster, and takes 100 MB."""
    twos = bitmap - ((bitmap >> 1) & 0x55)
    fours = (twos & 0x33) + ((twos >> 2) & 0x33)
    return ((fours + (fours >> 4)) & 0x0F).sum(dim=-1, dtype=torch.int64).cpu()


def _taken(
    order: Tensor, values: list[Tensor], bitmap: Tensor, starts: Tensor, shape: tuple[int, ...]
) -> Packed:
    """The rows `order` of all sources, as a packed tensor of `shape`."""
    breaks = (order.diff() != 1).nonzero().flatten() + 1
    runs = [part for part in order.tensor_split(breaks) if len(part)]
    ends = list(accumulate(len(part) for part in values))
    pieces: list[Tensor] = []
    for run in runs:
        pieces += _between(values, ends, int(starts[run[0]]), int(starts[run[-1] + 1]))
    rows = bitmap[order.to(bitmap.device)].reshape(*shape[:-1], bitmap.shape[-1])
    return Packed(torch.cat(pieces or [values[0][:0]]), rows, shape)


def _between(values: list[Tensor], ends: list[int], start: int, stop: int) -> Iterator[Tensor]:
    """Values `start` to `stop` of all sources, of which each ends at `ends`."""
    place = bisect_right(ends, start)
    while start < stop:
        before = ends[place] - len(values[place])
        until = min(stop, ends[place])
        yield values[place][start - before : until - before]
        start, place = until, place + 1
