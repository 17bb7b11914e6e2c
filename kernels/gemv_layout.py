"""An n:m matrix in the order in which `nm_gemv` reads it: a row to each lane, chunks of columns.

A chunk holds, for each of 32 rows, words of places and behind them words of values, two in each; the lane is
the last dimension, so that a warp reads whole lines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .packed import Packed, pack, unpack, unpack_bits
from .slots import from_slots, row_blocks, slots

LANES = 32
_FEWEST = 16  # values of a row in a chunk, at least: what one turn of the loop has to read


@dataclass(frozen=True)
class Chunk:
    """What a lane reads in one turn: whole groups of a row that fill whole words."""

    n: int
    m: int

    @property
    def bits(self) -> int:
        """Of a place in its group."""
        return 2 if self.m <= 4 else 4

    @property
    def values(self) -> int:
        """Kept values of a row: whole groups, and whole words of places."""
        least = math.lcm(self.n, 32 // self.bits)
        return least * -(-_FEWEST // least)

    @property
    def columns(self) -> int:
        """Weights of a row."""
        return self.values // self.n * self.m

    @property
    def meta(self) -> int:
        """Words of places; those of values follow, two in each."""
        return self.values * self.bits // 32

    @property
    def words(self) -> int:
        """Of 32 bits, of a row."""
        return self.meta + self.values // 2


@dataclass(frozen=True)
class GemvLayout:
    """A matrix as `nm_gemv` reads it.

    Attributes:
        words: int32 [ceil(rows / 32), chunks, words of a chunk, 32], a lane's row last; rows and columns
            that no matrix has are zero.
        shape: (rows, columns) of the dense matrix.
        dtype: bfloat16 or float16.
        chunk: the n:m and what follows from it.
    """

    words: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    chunk: Chunk

    @property
    def bytes(self) -> int:
        """What it takes."""
        return self.words.nbytes


def pack_gemv(packed: Packed, n: int, m: int) -> GemvLayout:
    """The layout of a matrix that keeps at most n of every m neighbours in a row; on its own device.

    Raises:
        ValueError: for another dtype than bfloat16 and float16, an m other than 2, 4, 8 or 16, an n:m that
            takes no less than the dense matrix, more than two dimensions, or a matrix that is not n:m.
    """
    _check(packed, n, m)
    rows, columns = packed.shape
    chunk = Chunk(n, m)
    chunks = -(-columns // chunk.columns)
    dense = unpack(packed)
    words = torch.zeros(
        (-(-rows // LANES), chunks, chunk.words, LANES), dtype=torch.int32, device=dense.device
    )
    blocks = row_blocks(rows, columns, LANES)
    for row in blocks:
        keep = unpack_bits(packed.bitmap[row : row + blocks.step], columns)
        values, places = slots(dense[row : row + blocks.step], n, m, keep)
        into = words[row // LANES : (row + blocks.step) // LANES]
        _fill(into, values, places, chunk)
    return GemvLayout(words, (rows, columns), dense.dtype, chunk)


def _fill(words: Tensor, values: Tensor, places: Tensor, chunk: Chunk) -> None:
    """Write the slots [rows, groups, n] of whole row blocks into their `words`."""
    blocks, chunks = words.shape[:2]
    rows, groups, n = values.shape
    pad = (0, 0, 0, chunks * (chunk.values // n) - groups, 0, blocks * LANES - rows)
    values = torch.nn.functional.pad(values, pad).reshape(blocks, LANES, chunks, chunk.values)
    places = torch.nn.functional.pad(places, pad).reshape(blocks, LANES, chunks, chunk.meta, -1)
    words[:, :, chunk.meta :] = values.view(torch.int32).permute(0, 2, 3, 1)
    meta = torch.zeros_like(places[..., 0], dtype=torch.int32)
    for i in range(32 // chunk.bits):
        meta |= places[..., i].to(torch.int32) << (chunk.bits * i)
    words[:, :, : chunk.meta] = meta.permute(0, 2, 3, 1)


def unpack_gemv(layout: GemvLayout) -> Packed:
    """The inverse of `pack_gemv`, bit for bit but for zeros as `slots` says; keeps what is not +0.0."""
    return pack(dense_gemv(layout))


def dense_gemv(layout: GemvLayout, ones: bool = False) -> Tensor:
    """The dense matrix, in plain torch; `ones`: a 1 in each slot instead of its value."""
    rows, columns = layout.shape
    chunk = layout.chunk
    dense = torch.empty(layout.shape, dtype=layout.dtype, device=layout.words.device)
    blocks = row_blocks(rows, columns, LANES)
    for row in blocks:
        words = layout.words[row // LANES : (row + blocks.step) // LANES].permute(0, 3, 1, 2)
        lanes = words.shape[0] * LANES
        values = words[..., chunk.meta :].contiguous().view(layout.dtype)
        if ones:
            values = torch.ones_like(values)
        shifts = torch.arange(0, 32, chunk.bits, dtype=torch.int32, device=words.device)
        places = (words[..., : chunk.meta, None] >> shifts) & ((1 << chunk.bits) - 1)
        shape = (lanes, -1, chunk.n)
        groups = columns // chunk.m
        whole = from_slots(
            values.reshape(shape)[:, :groups], places.reshape(shape)[:, :groups], chunk.m
        )
        dense[row : row + blocks.step] = whole[: rows - row]
    return dense


def _check(packed: Packed, n: int, m: int) -> None:
    if m not in (2, 4, 8, 16) or not 0 < n < m:
        raise ValueError(f"nm_gemv takes m of 2, 4, 8 or 16 and 0 < n < m, got {n}:{m}")
    if (16 + Chunk(n, m).bits) * n >= 16 * m:
        raise ValueError(
            f"with the places of its values, {n}:{m} takes no less than the dense matrix"
        )
    if len(packed.shape) != 2:
        raise ValueError(f"nm_gemv takes one matrix, got shape {list(packed.shape)}")
    if packed.values.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"nm_gemv takes bfloat16 or float16, got {packed.values.dtype}")
