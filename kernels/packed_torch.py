"""`packed` in plain torch: the truth that compiled code is held against, and what runs on a GPU.

Rows of a matrix are all that is known here: [rows, columns], bitmaps [rows, ceil(columns / 8)].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_TILE = 2**24  # weights expanded at a time, each of which takes about 20 bytes here; not measured


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory for what is about to be written, of the dtype and on the device of `like`."""
    return like.new_empty(shape)


def pack_bits(
    bits: Tensor,  # bool [rows, columns]
) -> Tensor:
    """Uint8 [rows, ceil(columns / 8)], least significant bit first, padded with 0."""
    width = -(-bits.shape[-1] // 8)
    padded = torch.nn.functional.pad(bits, (0, 8 * width - bits.shape[-1]))
    place = torch.arange(8, dtype=torch.uint8, device=bits.device)
    eights = padded.to(torch.uint8).reshape(*bits.shape[:-1], width, 8) << place
    return eights.sum(dim=-1, dtype=torch.uint8)


def unpack_bits(bitmap: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_bits`: bool [rows, columns]."""
    place = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    bits = (bitmap.unsqueeze(-1) >> place) & 1
    return bits.flatten(-2)[..., :columns].bool()


def count(bitmap: Tensor) -> int:
    """Number of one bits: how often each byte occurs, times its own."""
    ones = torch.tensor([byte.bit_count() for byte in range(256)], device=bitmap.device)
    step, total = max(1, _TILE // max(1, bitmap.shape[1])), 0
    for begin in range(0, len(bitmap), step):
        seen = torch.bincount(bitmap[begin : begin + step].flatten(), minlength=256)
        total += int((seen * ones).sum())
    return total


def row_starts(bitmap: Tensor) -> Tensor:
    """Int64 [rows + 1]: the number of one bits before each row, and of all."""
    counts = unpack_bits(bitmap, 8 * bitmap.shape[-1]).sum(dim=-1)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def pack(
    words: Tensor,  # int16 or int32 [rows, columns]
    keep: Tensor | None,  # bool [rows, columns]
) -> tuple[Tensor, Tensor]:
    """Words that are kept, row by row, and their bitmap; without `keep`, all that are not 0.

    Raises:
        ValueError: if a word outside `keep` is not 0.
    """
    bits = words != 0 if keep is None else keep
    if keep is not None and (stray := int(((words != 0) & ~keep).sum())):
        raise ValueError(f"{stray} weights outside the mask are not +0.0")
    return words[bits], pack_bits(bits)


def select(words: Tensor, bitmap: Tensor) -> Tensor:
    """Words of [rows, columns] whose bit is 1, row by row."""
    return words[unpack_bits(bitmap, words.shape[1])]


def expand(
    bitmap: Tensor,  # uint8 [rows, width]
    columns: int,
    values: Tensor,  # int16 or int32 [kept]
    first: int,
    out: Tensor,  # as values [rows, columns]
) -> None:
    """Write the dense rows whose first kept value is values[first].

    The host waits for nothing, and so nothing is raised: where the bitmap asks for more values than there
    are, the last is repeated.
    """
    if not values.numel():
        out.zero_()
        return
    before: int | Tensor = first
    rows = max(1, _TILE // max(1, columns))
    for begin in range(0, len(bitmap), rows):
        bits = unpack_bits(bitmap[begin : begin + rows], columns)
        rank = bits.flatten().cumsum(0) + (before - 1)
        found = values[rank.clamp_(0, values.numel() - 1)].view_as(bits)
        out[begin : begin + rows] = torch.where(bits, found, 0)
        before = rank[-1] + 1
