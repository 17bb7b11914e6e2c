"""A matrix as `bitmap` reads it: values row by row and a bit for each weight, nearly as they are stored.

A turn is 256 columns, eight words of 32 bits for each row. Rows of words are padded with zero bits to whole
turns, which takes no copy where those of the bitmap are whole turns already. To the values come a few behind
the last, for the kernel looks at four at once.

Any mask: an offset for each turn of a row says where its values begin, 1/8 of a bit per weight. So each warp
begins where it likes, and no turn waits for the one before. `n:32`: every 32 columns have n values, nothing
needs an offset, and one tensor holds all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .packed import DTYPES, Packed, check, pack_bits, unpack, unpack_bits
from .slots import row_blocks, slots

WORD = 32  # columns
TURN = 256  # columns that a warp takes at once: 16 or 56 turns of common rows, even for 8 warps
BEHIND = 4  # values that must lie behind those of a turn
_WIDE = 2**31  # values from which on offsets are int64
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class BitmapLayout:
    """A matrix as the kernel reads it.

    Attributes:
        values: [kept and a few more] of the dtype of the matrix, row by row. With `n` they are those of all
            groups of 32 columns, n each.
        words: int32 [rows, 8 * turns], a bit for each column, the lowest first; the rest is 0.
        offsets: int32 [rows, turns], where in `values` those of a turn begin, or int64 if they are many; None
            with `n`.
        shape: (rows, columns) of the dense matrix.
        n: how many of 32 are kept; 0 is any number.
    """

    values: Tensor
    words: Tensor
    offsets: Tensor | None
    shape: tuple[int, int]
    n: int = 0

    @property
    def turns(self) -> int:
        """Of a row."""
        return self.words.shape[1] * WORD // TURN

    @property
    def bytes(self) -> int:
        """What it takes."""
        parts = (self.values, self.words, self.offsets)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def packed(self) -> Packed:
        """The matrix as it is stored; what fills up groups of `n` is kept there. No copy of the values."""
        rows, columns = self.shape
        bitmap = self.words.view(torch.uint8)[:, : -(-columns // 8)].contiguous()
        kept = rows * columns // WORD * self.n if self.n else len(self.values) - BEHIND
        return Packed(self.values[:kept], bitmap, self.shape)


def pack_bitmap(packed: Packed) -> BitmapLayout:
    """The layout of a matrix with any mask, on its own device.

    Raises:
        ValueError: for another dtype than bfloat16, float16 and float32, more or less than two dimensions, no
            weights, or a bitmap that does not fit the values.
    """
    if len(packed.shape) != 2 or packed.values.dtype not in DTYPES:
        raise ValueError(
            f"bitmap takes one matrix of bfloat16, float16 or float32, got {packed.values.dtype} "
            f"{list(packed.shape)}"
        )
    check(packed)
    rows, columns = packed.shape
    if not rows * columns:
        raise ValueError(f"there are no weights in {list(packed.shape)}")
    words = _words(packed.bitmap)
    counts = ones(words).view(rows, -1, TURN // WORD).sum(-1)
    offsets = (counts.flatten().cumsum(0).view_as(counts) - counts).contiguous()
    if len(packed.values) < _WIDE:
        offsets = offsets.to(torch.int32)
    behind = packed.values.new_zeros(BEHIND)
    return BitmapLayout(
        torch.cat([packed.values.detach(), behind]), words, offsets, (rows, columns)
    )


def unpack_bitmap(layout: BitmapLayout) -> Packed:
    """The inverse of `pack_bitmap`, bit for bit, in memory of its own."""
    seen = layout.packed
    return Packed(seen.values.clone(), seen.bitmap.clone(), seen.shape)


def pack_exact(packed: Packed, n: int) -> Tensor:
    """A matrix that keeps at most n of every 32 neighbours in a row, as one tensor: what `exact` reads.

    A group that keeps fewer is filled up with +0.0 as `slots` does: values and bits of the words say so.

    Returns:
        int32: the values, two in each; room for those that a turn looks at behind the last; the words.

    Raises:
        ValueError: for another dtype than bfloat16 and float16, an n:32 that takes no less than the dense
            matrix, more than two dimensions, or a matrix that is not n:32.
    """
    _check_exact(packed, n)
    rows, columns = packed.shape
    dense = unpack(packed)
    found, bitmap = list[Tensor](), list[Tensor]()
    blocks = row_blocks(rows, columns, 1)
    for row in blocks:
        keep = unpack_bits(packed.bitmap[row : row + blocks.step], columns)
        values, places = slots(dense[row : row + blocks.step], n, WORD, keep)
        bits = torch.zeros(*values.shape[:2], WORD, dtype=torch.bool, device=dense.device)
        bits.scatter_(2, places.long(), True)
        found.append(values.flatten())
        bitmap.append(pack_bits(bits.flatten(1)))
    room = 2 * _room(rows, columns, n) - rows * columns // WORD * n
    values = torch.cat([*found, dense.new_zeros(room)])
    return torch.cat([values.view(torch.int32), _words(torch.cat(bitmap)).flatten()])


def exact(words: Tensor, shape: tuple[int, int], n: int, dtype: torch.dtype) -> BitmapLayout:
    """What `pack_exact` gave for a matrix (rows, columns) as the kernel reads it; no copy."""
    room = _room(*shape, n)
    return BitmapLayout(words[:room].view(dtype), words[room:].view(shape[0], -1), None, shape, n)


def bits_per_weight(kept: float, itemsize: int = 2, n: int = 0) -> float:
    """Of a matrix that keeps a share `kept`, or n of 32."""
    return 8 * itemsize * n / WORD + 1 if n else 8 * itemsize * kept + 1 + 32 / TURN


def ones(words: Tensor) -> Tensor:
    """How many bits of each int32 are 1: int32 of its shape."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return (words * 0x01010101) >> 24


def _words(
    bitmap: Tensor,  # uint8 [rows, width]
) -> Tensor:
    """Int32 [rows, 8 * turns]; the same memory where that is possible."""
    if missing := -bitmap.shape[1] % (TURN // 8):
        bitmap = torch.nn.functional.pad(bitmap, (0, missing))
    elif not bitmap.is_contiguous() or bitmap.data_ptr() % 4:
        bitmap = bitmap.clone(memory_format=torch.contiguous_format)
    return bitmap.view(torch.int32)


def _room(rows: int, columns: int, n: int) -> int:
    """Words of 32 bits for the values of n:32 and what is looked at behind them; 16 bytes divide it."""
    least = rows * columns // WORD * n + TURN // WORD * n + BEHIND
    return -(-least // 8) * 4


def _check_exact(packed: Packed, n: int) -> None:
    if len(packed.shape) != 2 or packed.values.dtype not in _HALVES:
        raise ValueError(
            f"bitmap n:32 takes one matrix of bfloat16 or float16, got {packed.values.dtype} "
            f"{list(packed.shape)}"
        )
    if not 0 < n < WORD or bits_per_weight(0, n=n) >= 16:
        raise ValueError(f"with its bitmap, {n}:32 takes no less than the dense matrix")
