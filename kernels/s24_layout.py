"""A 2:4 matrix in the order in which the lanes of a warp feed it to sparse tensor cores.

`mma.sp.m16n8k32` multiplies 16 rows by 32 columns of a 2:4 matrix: a lane brings four words of two kept
values each, and of every four lanes two bring a word of places. PTX ISA, "Matrix fragments for sparse
mma.m16n8k32", says which (g = lane // 4, t = lane % 4; a group is four columns, eight of them a step):

    word r of the values     row g + 8 (r % 2), group t + 4 (r // 2)
    places, selector f       lanes t = 2f and 2f + 1, each of four groups: 16 bits of row g, 16 of row g + 8

The order of groups within a step is free, as long as the inputs follow it. Here the instruction's group q
is group 4 (q % 2) + q // 2 of the matrix: then a lane that reads 16 bytes of inputs in their natural order
has half of what it must bring, and its neighbour the other half.

256 columns of 16 rows are a chunk: a slab of 32 lanes x 4 words of places, whose word r serves steps 2r
(selector 0) and 2r + 1 (selector 1), and eight slabs of values, one for each step. 9 bits per weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .packed import Packed, pack, unpack, unpack_bits
from .slots import from_slots, row_blocks, slots

ROWS, COLUMNS = 16, 256  # of a chunk
TILES = 2  # of 16 rows that a warp takes together; the rows are padded to whole pairs
NOTHING = 0x44444444  # places 0 and 1, where there is no matrix: they have to increase


@dataclass(frozen=True)
class S24Layout:
    """A matrix, or a gate and an up matrix of equal shape, as `s24_mma` reads them.

    Attributes:
        words: int32 [tiles of 16 rows, chunks of 256 columns, 9, 32, 4], an even number of tiles; rows and
            columns that no matrix has are zero. Of a gate and an up matrix, tiles alternate.
        shape: (rows, columns) of the dense matrix, of one of two.
        dtype: bfloat16 or float16.
        gated: whether it holds gate and up.
    """

    words: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    gated: bool = False

    @property
    def bytes(self) -> int:
        """What it takes."""
        return self.words.nbytes


def pack_s24(packed: Packed) -> S24Layout:
    """The layout of a matrix that keeps at most 2 of every 4 neighbours in a row; on its own device.

    Raises:
        ValueError: for another dtype than bfloat16 and float16, more than two dimensions, or a matrix that is
            not 2:4.
    """
    return _pack([packed], TILES)


def pack_gate_up(gate: Packed, up: Packed) -> S24Layout:
    """The layout from which one product gives silu(x @ gate.T) * (x @ up.T).

    Raises:
        ValueError: as `pack_s24`, and for two that differ in shape, dtype or device.
    """
    for what in ("shape", "dtype", "device"):
        a, b = (getattr(m if what == "shape" else m.values, what) for m in (gate, up))
        if a != b:
            raise ValueError(f"gate and up differ in {what}: {a} and {b}")
    return _pack([gate, up], 1)


def unpack_s24(layout: S24Layout) -> list[Packed]:
    """The inverse: one matrix, or gate and up; bit for bit but for zeros as `slots` says."""
    return [pack(matrix) for matrix in dense_s24(layout)]


def dense_s24(layout: S24Layout, ones: bool = False) -> list[Tensor]:
    """The dense matrices, in plain torch; `ones`: a 1 in each slot instead of its value."""
    rows, columns = layout.shape
    matrices = 2 if layout.gated else 1
    dense = [layout.words.new_empty(layout.shape, dtype=layout.dtype) for _ in range(matrices)]
    for i, matrix in enumerate(dense):
        tiles = layout.words[i::matrices]
        blocks = row_blocks(rows, columns, ROWS)
        for row in blocks:
            values, places = read(tiles[row // ROWS : (row + blocks.step) // ROWS], layout.dtype)
            values = torch.ones_like(values) if ones else values
            groups = columns // 4
            whole = from_slots(values[:, :groups], places[:, :groups], 4)
            matrix[row : row + blocks.step] = whole[: rows - row]
    return dense


def _pack(matrices: list[Packed], even: int) -> S24Layout:
    """Tiles of the matrices in turn; of each a multiple of `even`."""
    for packed in matrices:
        if len(packed.shape) != 2:
            raise ValueError(f"s24_mma takes one matrix, got shape {list(packed.shape)}")
        if packed.values.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"s24_mma takes bfloat16 or float16, got {packed.values.dtype}")
    rows, columns = matrices[0].shape
    tiles = -(-rows // (ROWS * even)) * even
    words = torch.zeros(
        (tiles * len(matrices), -(-columns // COLUMNS), 9, 32, 4),
        dtype=torch.int32,
        device=matrices[0].values.device,
    )
    for i, packed in enumerate(matrices):
        dense = unpack(packed)
        into = words[i :: len(matrices)]
        into[:, :, 0] = NOTHING
        blocks = row_blocks(rows, columns, ROWS)
        for row in blocks:
            keep = unpack_bits(packed.bitmap[row : row + blocks.step], columns)
            values, places = slots(dense[row : row + blocks.step], 2, 4, keep)
            write(into[row // ROWS : (row + blocks.step) // ROWS], values, places)
    return S24Layout(words, (rows, columns), matrices[0].values.dtype, len(matrices) == 2)


def write(words: Tensor, values: Tensor, places: Tensor) -> None:
    """Write the slots [rows, groups, 2], values of 16 bits, into the `words` of their tiles."""
    rows, groups, _ = values.shape
    chunks = words.shape[1]
    tiles = -(-rows // ROWS)
    pad = (0, 0, 0, chunks * COLUMNS // 4 - groups, 0, tiles * ROWS - rows)
    values = torch.nn.functional.pad(values, pad).view(torch.int32)
    # [tile, row // 8, row % 8 = g, chunk, step, t % 2, word // 2, t // 2]
    values = values.reshape(tiles, 2, 8, chunks, 8, 2, 2, 2).permute(0, 3, 4, 2, 7, 5, 6, 1)
    words[:tiles, :, 1:] = values.reshape(tiles, chunks, 8, 32, 4)
    of_group = places[..., 0] | places[..., 1] << 2
    of_group = torch.nn.functional.pad(of_group, pad[2:], value=4)  # places 0 and 1
    # [tile, row // 8, g, chunk, word, t // 2, j % 2, t % 2, j // 2] of group j of the four of a lane
    of_group = of_group.reshape(tiles, 2, 8, chunks, 4, 2, 2, 2, 2)
    of_group = of_group.permute(0, 3, 2, 5, 7, 4, 1, 8, 6).reshape(tiles, chunks, 32, 4, 8)
    meta = torch.zeros(of_group.shape[:-1], dtype=torch.int32, device=words.device)
    for j in range(8):  # four groups of row g, four of row g + 8
        meta |= of_group[..., j].to(torch.int32) << (4 * j)
    words[:tiles, :, 0] = meta


def read(words: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The inverse of `write`: slots [tiles * 16, chunks * 64, 2]."""
    tiles, chunks = words.shape[:2]
    shape = (tiles * ROWS, chunks * COLUMNS // 4, 2)
    values = words[:, :, 1:].reshape(tiles, chunks, 8, 8, 2, 2, 2, 2)
    values = values.permute(0, 7, 3, 1, 2, 5, 6, 4).reshape(*shape[:2], 1)
    shifts = torch.arange(0, 32, 2, dtype=torch.int32, device=words.device)
    places = (words[:, :, 0, :, :, None] >> shifts) & 3
    places = places.reshape(tiles, chunks, 8, 2, 2, 4, 2, 2, 2, 2)
    places = places.permute(0, 6, 2, 1, 5, 3, 8, 4, 7, 9)
    return values.contiguous().view(dtype), places.reshape(shape)
