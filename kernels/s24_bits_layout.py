"""A 2:4 matrix of whole numbers of few bits, in the order in which lanes of a warp feed it to tensor cores.

The order is that of `s24_layout`, and so are the words of places: of 256 columns of 16 rows a slab of 32
lanes x 4 words, behind it slabs of values. But where `s24_layout` has four words of two kept values for each
step of 32 columns, here two words have four (8 bits) or one has all eight (4 bits), so that what a lane reads
at once, 16 bytes, serves two or four steps. A register of two values, in the lower and the upper half of a
word, comes out of a word of few bits by a mask:

    8 bits   sign and magnitude. Of each half of a word, bit 15 and bits 0-6 are a value of one register; with
             its bytes swapped, of the next.
    4 bits   the number plus 8. Of each half, bits 4i to 4i + 3 are a value of register i.

Scales come along in the dtype of the inputs, for each pair of spans of columns that share one: of a lane the
rows g and g + 8 of the first span, then of the second (g = lane // 4). Where a row has one scale, it stands
for both, once for all columns. Of 2:4 that makes 5 bits per weight and 16 / columns, or 3 and 16 / 128.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import s24_layout
from .few_bits import FewBits, check_few, dense_whole, in_halves, top_of
from .packed import pack_bits, select, unpack_bits
from .s24_layout import COLUMNS, ROWS, TILES
from .slots import from_slots, row_blocks, slots

SPANS = (128, 64, 32)  # of columns that may share a scale: whole steps, the longest that fits
OFFSET = {torch.bfloat16: 128, torch.float16: 1024}
"""From here on the numbers of a dtype are 1 apart: that plus 127 has its last seven bits free."""


@dataclass(frozen=True)
class S24Bits:
    """A matrix as `s24_bits` reads it.

    Attributes:
        words: int32 [tiles of 16 rows, chunks of 256 columns, 1 + bits / 2, 32, 4], an even number of tiles;
            of rows and columns that the matrix has not, the numbers are zero.
        scales: of the dtype of weights and inputs [tiles, pairs of spans, 8, 4]; one pair of row scales.
        shape: (rows, columns) of the dense matrix.
        bits: 8 or 4.
        group: of neighbouring columns that share a scale, as it was given.
    """

    words: Tensor
    scales: Tensor
    shape: tuple[int, int]
    bits: int
    group: int

    @property
    def dtype(self) -> torch.dtype:
        """Bfloat16 or float16."""
        return self.scales.dtype

    @property
    def span(self) -> int:
        """Columns of a scale of the layout; 0 where a row has one."""
        return span_of(self.group, self.shape[1])

    @property
    def bytes(self) -> int:
        """What it takes."""
        return self.words.nbytes + self.scales.nbytes


def span_of(group: int, columns: int) -> int:
    """Columns of a scale in the layout; 0 where all of a row share one.

    Raises:
        ValueError: for groups that no number of steps of 32 columns makes up.
    """
    if group >= columns:
        return 0
    span = math.gcd(group, SPANS[0])
    if span not in SPANS:
        raise ValueError(f"s24_bits takes groups of whole rows or multiples of 32, not of {group}")
    return span


def pack_s24_bits(few: FewBits) -> S24Bits:
    """The layout of a matrix that keeps at most 2 of every 4 neighbours in a row; on its own device.

    Raises:
        ValueError: for another dtype than bfloat16 and float16, groups along columns or of another size than
            `span_of` takes, scales that the dtype does not hold, a number that no writer writes, or a matrix
            that is not 2:4.
    """
    check_few(few)
    if few.dtype not in OFFSET:
        raise ValueError(f"s24_bits takes bfloat16 or float16, got {few.dtype}")
    if few.axis != "rows":
        raise ValueError("s24_bits takes scales of groups along rows, these lie along columns")
    span, (rows, columns) = span_of(few.group, few.shape[1]), few.shape
    scales = _scales(few, span)
    chunks, tiles = -(-columns // COLUMNS), -(-rows // (ROWS * TILES)) * TILES
    words = few.bitmap.new_empty((tiles, chunks, 1 + few.bits // 2, 32, 4), dtype=torch.int32)
    words[:, :, :1] = s24_layout.NOTHING
    words[:, :, 1:] = _in_few(words.new_zeros(1, 1, 8, 32, 4), few.bits)
    whole = dense_whole(few)
    if int(whole.min()) < -top_of(few.bits):
        raise ValueError(f"a whole number of {few.bits} bits is below {-top_of(few.bits)}")
    blocks = row_blocks(rows, columns, ROWS)
    for row in blocks:
        stop = row + blocks.step
        keep = unpack_bits(few.bitmap[row:stop], columns)
        values, places = slots(whole[row:stop].to(torch.int16), 2, 4, keep)
        tile, count = row // ROWS, -(-len(values) // ROWS)
        halves = words.new_zeros((count, chunks, 9, 32, 4))
        s24_layout.write(halves, values, places)
        words[tile : tile + count, :, :1] = halves[:, :, :1]
        words[tile : tile + count, :, 1:] = _in_few(halves[:, :, 1:], few.bits)
    return S24Bits(words, scales, few.shape, few.bits, few.group)


def unpack_s24_bits(layout: S24Bits, bitmap: Tensor | None = None) -> FewBits:
    """The inverse, bit for bit.

    Args:
        layout: what to unpack.
        bitmap: of the matrix, where it keeps numbers that are 0; without it those are not kept.
    """
    rows, columns = layout.shape
    whole = whole_s24_bits(layout)
    bitmap = pack_bits(whole != 0) if bitmap is None else bitmap
    kept = select(whole, bitmap).to(torch.int8)
    groups = -(-columns // layout.group)
    step = layout.group // layout.span if layout.span else 1
    scales = _by_row(layout)[:rows, ::step][:, :groups].bfloat16()
    numbers = kept if layout.bits == 8 else in_halves(kept)
    return FewBits(numbers, scales, bitmap, layout.shape, layout.bits, layout.group, layout.dtype)


def whole_s24_bits(layout: S24Bits, ones: bool = False) -> Tensor:
    """The whole number of each weight, int16 [rows, columns]; `ones`: a 1 in each slot instead of it."""
    rows, columns = layout.shape
    out = layout.words.new_empty(layout.shape, dtype=torch.int16)
    blocks, groups = row_blocks(rows, columns, ROWS), columns // 4
    for row in blocks:
        words = layout.words[row // ROWS : (row + blocks.step) // ROWS]
        halves = torch.cat((words[:, :, :1], _in_halves_of(words[:, :, 1:], layout.bits)), 2)
        values, places = s24_layout.read(halves, torch.int16)
        values = torch.ones_like(values) if ones else values
        whole = from_slots(values[:, :groups], places[:, :groups], 4)
        out[row : row + blocks.step] = whole[: rows - row]
    return out


def dense_s24_bits(layout: S24Bits) -> Tensor:
    """The dense matrix, in plain torch; equals `expand_few`. On a GPU the host does not wait."""
    rows, columns = layout.shape
    whole, scales = whole_s24_bits(layout), _by_row(layout).float()
    out = whole.new_empty(layout.shape, dtype=layout.dtype)
    blocks = row_blocks(rows, columns, ROWS)
    for row in blocks:
        stop = min(row + blocks.step, rows)
        wide = scales[row:stop].repeat_interleave(layout.span or columns, 1)[:, :columns]
        out[row:stop] = wide.mul_(whole[row:stop])
    return out


def _scales(few: FewBits, span: int) -> Tensor:
    """As `S24Bits.scales`.

    Raises:
        ValueError: for scales that the dtype does not hold, or whose products with the offset it does not.
    """
    scales = few.scales.to(few.dtype)
    largest = scales.float() * OFFSET[few.dtype]
    if not torch.equal(scales.to(torch.bfloat16), few.scales) or bool(
        (largest > torch.finfo(few.dtype).max).any()
    ):
        raise ValueError(f"{few.dtype} does not hold the scales, or {OFFSET[few.dtype]} times them")
    rows, columns = few.shape
    tiles = -(-rows // (ROWS * TILES)) * TILES
    if span:
        wide = scales.repeat_interleave(few.group // span, 1)
        wide = pad(wide, (0, -(-columns // COLUMNS) * (COLUMNS // span) - wide.shape[1]))
    else:
        wide = scales.expand(-1, 2)
    wide = pad(wide, (0, 0, 0, tiles * ROWS - rows))
    # [tile, row // 8, row % 8 = g, pair, span of the pair]
    return wide.reshape(tiles, 2, 8, -1, 2).permute(0, 3, 2, 4, 1).reshape(tiles, -1, 8, 4)


def _by_row(layout: S24Bits) -> Tensor:
    """The inverse: [rows and more, spans and more], one span where a row has one scale."""
    tiles, pairs = layout.scales.shape[:2]
    wide = layout.scales.reshape(tiles, pairs, 8, 2, 2).permute(0, 4, 2, 1, 3)
    wide = wide.reshape(tiles * ROWS, 2 * pairs)
    return wide if layout.span else wide[:, :1]


def _in_few(words: Tensor, bits: int) -> Tensor:
    """Words [tiles, chunks, 8, 32, 4] of two whole numbers as int16, in words of few bits.

    The four words of a step become two, or one; those of neighbouring steps lie next to each other.
    """
    numbers = words.contiguous().view(torch.int16)
    if bits == 4:
        four = (numbers + 8).view(torch.int32)
        few = four[..., 0] | four[..., 1] << 4 | four[..., 2] << 8 | four[..., 3] << 12
    else:
        signed = torch.where(numbers < 0, -numbers | -(2**15), numbers).view(torch.int32)
        signed = signed.reshape(*words.shape[:-1], 2, 2)
        few = signed[..., 0] | _swapped(signed[..., 1])
    tiles, chunks = words.shape[:2]
    # [step of a slab, word of the step] are the words of a lane
    few = few.reshape(tiles, chunks, bits // 2, 16 // bits, 32, bits // 4)
    return few.transpose(3, 4).reshape(tiles, chunks, bits // 2, 32, 4)


def _in_halves_of(few: Tensor, bits: int) -> Tensor:
    """The inverse of `_in_few`."""
    tiles, chunks = few.shape[:2]
    few = few.reshape(tiles, chunks, bits // 2, 32, 16 // bits, bits // 4).transpose(3, 4)
    few = few.reshape(tiles, chunks, 8, 32, bits // 4)
    if bits == 4:
        four = torch.cat([few >> 4 * i & 0x000F000F for i in range(4)], -1)
        numbers = four.contiguous().view(torch.int16) - 8
    else:
        signed = torch.stack((few, _swapped(few)), -1).flatten(-2).view(torch.int16)
        numbers = torch.where(signed < 0, -(signed & 127), signed & 127)
    return numbers.view(torch.int32)


def _swapped(words: Tensor) -> Tensor:
    """The two bytes of each half in the other order."""
    return (words & 0x00FF00FF) << 8 | (words >> 8 & 0x00FF00FF)
