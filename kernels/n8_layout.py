"""A 2:8, 3:8 or 4:8 matrix in the order in which the lanes of a warp feed it to dense tensor cores.

`mma.m16n8k16` multiplies 16 rows by 16 columns: a lane brings two neighbours of row g at 2t and two at
2t + 8, and the same of row g + 8 (PTX ISA, "Matrix fragments for mma.m16n8k16"; g = lane // 4, t = lane % 4).
The order of columns is free, as long as the inputs follow it. Here two instructions, a step, take 32 columns,
and what a lane brings of a row in both is one group: columns 8t to 8t + 7. So a lane decodes whole groups by
itself, and the inputs that it must bring are 16 bytes in their natural order.

A group is n values and a byte that tells by a bit for each column whether it is kept. Its values lie as two
stacks that grow towards each other: those of columns 0-3 from slot 0 upwards, those of columns 4-7 from slot
n - 1 downwards. Then neither half needs to know how many the other keeps.

256 columns of 16 rows are a chunk: a slab of 32 lanes x 4 words of bits, and 2n slabs of values.

    bits      word r serves steps 2r and 2r + 1: bit 8i + 4 (step % 2) + 2 (row // 8) + half is column i
              of a half
    values    of a step n words, one behind the other: 2n numbers of 16 bits, as `_ORDER` says

9 bits per weight at 4:8, 7 at 3:8, 5 at 2:8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .packed import Packed, pack, unpack, unpack_bits
from .slots import row_blocks, slots

ROWS, COLUMNS = 16, 256  # of a chunk
TILES = 2  # of 16 rows that a warp takes together; the rows are padded to whole pairs
_HALVES = (torch.bfloat16, torch.float16)
KEPT = (2, 3, 4)  # n that can be laid out
# Which of the numbers n * (row // 8) + slot comes where in a step. At 3:8 the two values that share a word
# are those of slot 0, that of row g in the upper half: one instruction then puts a zero below each.
_ORDER = {2: (0, 1, 2, 3), 3: (1, 2, 3, 0, 4, 5), 4: (0, 1, 2, 3, 4, 5, 6, 7)}


@dataclass(frozen=True)
class N8Layout:
    """A matrix as `n8_mma` reads it.

    Attributes:
        words: int32 [tiles of 16 rows, chunks of 256 columns, 1 + 2n, 32, 4], an even number of tiles; rows
            and columns that no matrix has are zero.
        shape: (rows, columns) of the dense matrix.
        dtype: bfloat16 or float16.
        n: of n:8.
    """

    words: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    n: int

    @property
    def bytes(self) -> int:
        """What it takes."""
        return self.words.nbytes


def pack_n8(packed: Packed, n: int) -> N8Layout:
    """The layout of a matrix that keeps at most n of every 8 neighbours in a row; on its own device.

    Raises:
        ValueError: for another n than 2, 3 and 4, another dtype than bfloat16 and float16, more than two
            dimensions, or a matrix that is not n:8.
    """
    if n not in KEPT:
        raise ValueError(f"n8_mma takes 2:8, 3:8 or 4:8, got {n}:8")
    if len(packed.shape) != 2:
        raise ValueError(f"n8_mma takes one matrix, got shape {list(packed.shape)}")
    if packed.values.dtype not in _HALVES:
        raise ValueError(f"n8_mma takes bfloat16 or float16, got {packed.values.dtype}")
    rows, columns = packed.shape
    dense = unpack(packed)
    tiles, chunks = -(-rows // (ROWS * TILES)) * TILES, -(-columns // COLUMNS)
    words = torch.zeros((tiles, chunks, 1 + 2 * n, 32, 4), dtype=torch.int32, device=dense.device)
    blocks = row_blocks(rows, columns, ROWS)
    for row in blocks:
        keep = unpack_bits(packed.bitmap[row : row + blocks.step], columns)
        values, places = slots(dense[row : row + blocks.step], n, 8, keep)
        _write(words[row // ROWS : (row + blocks.step) // ROWS], values, places)
    return N8Layout(words, (rows, columns), dense.dtype, n)


def unpack_n8(layout: N8Layout) -> Packed:
    """The inverse of `pack_n8`, bit for bit but for zeros as `slots` says; keeps what is not +0.0."""
    return pack(dense_n8(layout))


def dense_n8(layout: N8Layout, ones: bool = False) -> Tensor:
    """The dense matrix, in plain torch; `ones`: a 1 in each slot instead of its value."""
    rows, columns = layout.shape
    dense = layout.words.new_empty(layout.shape, dtype=layout.dtype)
    blocks = row_blocks(rows, columns, ROWS)
    for row in blocks:
        values, kept = _read(layout.words[row // ROWS : (row + blocks.step) // ROWS], layout.n)
        weights = kept.to(layout.dtype)
        if not ones:
            halves = kept.reshape(*kept.shape[:-1], 2, 4)
            before = halves.cumsum(-1) - halves.long()  # kept before it in its half
            before[..., 1, :] = layout.n - 1 - before[..., 1, :]
            slot = before.clamp_(0, layout.n - 1).flatten(-2)
            weights = torch.where(kept, values.gather(-1, slot), 0).view(layout.dtype)
        dense[row : row + blocks.step] = weights.flatten(1)[: rows - row, :columns]
    return dense


def _write(words: Tensor, values: Tensor, places: Tensor) -> None:
    """Write the slots [rows, groups, n] into the `words` of their tiles."""
    (tiles, chunks), (rows, groups, n) = words.shape[:2], values.shape
    tiles = min(tiles, -(-rows // ROWS))
    more = (0, 0, 0, chunks * COLUMNS // 8 - groups, 0, tiles * ROWS - rows)
    low = (places < 4).sum(-1, keepdim=True)  # kept in the lower half
    slot = torch.arange(n, device=words.device).expand(places.shape)
    slot = torch.where(slot < low, slot, n - 1 - slot + low)
    numbers = values.view(torch.int16)
    numbers = torch.empty_like(numbers).scatter_(-1, slot, numbers)
    # [tile, row // 8, g, chunk, step, t, slot] -> [tile, chunk, g, t, step, number of the step]
    numbers = pad(numbers, more).reshape(tiles, 2, 8, chunks, 8, 4, n).permute(0, 3, 2, 5, 4, 1, 6)
    numbers = _reordered(numbers.flatten(-2), _ORDER[n]).view(torch.int32)
    words[:tiles, :, 1:] = numbers.reshape(tiles, chunks, 32, 2 * n, 4).transpose(2, 3)
    kept = places.new_zeros(rows, groups, 8).scatter_(-1, places.long(), 1)
    # [tile, row // 8, g, chunk, step // 2, step % 2, t, half, i] -> bytes i of the words step // 2
    kept = pad(kept, more).reshape(tiles, 2, 8, chunks, 4, 2, 4, 2, 4)
    kept = kept.permute(0, 3, 2, 6, 4, 8, 5, 1, 7).flatten(-3)
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    of_byte = (kept << shifts).sum(-1, dtype=torch.uint8)
    words[:tiles, :, 0] = of_byte.view(torch.int32).reshape(tiles, chunks, 32, 4)


def _read(words: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Of whole tiles: values int16 [rows, groups, n] by slot, and which columns are kept, bool [.., 8]."""
    tiles, chunks = words.shape[:2]
    shape = (tiles * ROWS, chunks * COLUMNS // 8)
    numbers = words[:, :, 1:].transpose(2, 3).contiguous().view(torch.int16)
    numbers = numbers.reshape(tiles, chunks, 8, 4, 8, 2 * n)
    numbers = _reordered(numbers, sorted(range(2 * n), key=_ORDER[n].__getitem__))
    numbers = numbers.reshape(tiles, chunks, 8, 4, 8, 2, n).permute(0, 5, 2, 1, 4, 3, 6)
    of_byte = words[:, :, 0].contiguous().view(torch.uint8)
    of_byte = of_byte.reshape(tiles, chunks, 8, 4, 4, 4, 1)
    kept = (of_byte >> torch.arange(8, dtype=torch.uint8, device=words.device)) & 1
    kept = kept.reshape(tiles, chunks, 8, 4, 4, 4, 2, 2, 2).permute(0, 7, 2, 1, 4, 6, 3, 8, 5)
    return numbers.reshape(*shape, n), kept.reshape(*shape, 8).bool()


def _reordered(numbers: Tensor, order: Sequence[int]) -> Tensor:
    """The last dimension in another order; without a tensor of indices, for which the host would wait."""
    return torch.stack([numbers[..., i] for i in order], -1)
