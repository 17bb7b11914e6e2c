"""A sparse n:m matrix times 1 to 8 tokens, in plain Triton: for any GPU, and for any n of m up to 16.

What bounds a product of so few tokens is reading the weights. Of an n:m matrix the kernel reads n values of
16 bits and n places of 2 bits (m up to 4) or 4 bits (m of 8 and 16) per group: 9 bits per weight at 2:4,
10 at 4:8 and 8:16, against 16 dense.

A lane owns a row, and the 32 lanes of a warp the same columns of 32 rows. So all that a warp gathers of x
lies within one group, a few neighbouring bytes, and no lane needs what another holds. The warps of a program,
and with `split` several programs, share out the columns. Sums are float32 and always in the same order.

State: equal to the reference in Triton's interpreter, also for matrices that no tile divides; compiles
offline with Triton 3.6, 3.7 and 3.9 for sm_80 to sm_120, with neither shared memory nor spills in the loop
(tests/test_kernel_nm_gemv.py, tests/test_kernel_codegen.py, which hold the instructions per weight).
**It has not run on a GPU**, its speed is unknown, the warps and the split are guesses, and nothing
dispatches to it yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .packed import Packed, pack, unpack
from .slots import from_slots, row_blocks, slots

TOKENS = 8  # at most
LANES = 32
_WARPS = 8  # of a program; a guess, not measured
_PROGRAMS = 264  # a split aims at two programs on each of an H200's 132 processors; not measured
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
        values, places = slots(dense[row : row + blocks.step], n, m)
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
    rows, columns = layout.shape
    chunk = layout.chunk
    dense = torch.empty(layout.shape, dtype=layout.dtype, device=layout.words.device)
    blocks = row_blocks(rows, columns, LANES)
    for row in blocks:
        words = layout.words[row // LANES : (row + blocks.step) // LANES].permute(0, 3, 1, 2)
        lanes = words.shape[0] * LANES
        values = words[..., chunk.meta :].contiguous().view(layout.dtype)
        shifts = torch.arange(0, 32, chunk.bits, dtype=torch.int32, device=words.device)
        places = (words[..., : chunk.meta, None] >> shifts) & ((1 << chunk.bits) - 1)
        shape = (lanes, -1, chunk.n)
        groups = columns // chunk.m
        whole = from_slots(
            values.reshape(shape)[:, :groups], places.reshape(shape)[:, :groups], chunk.m
        )
        dense[row : row + blocks.step] = whole[: rows - row]
    return pack(dense)


def nm_gemv(
    x: Tensor,  # [tokens, columns], 1 to 8 tokens, dtype of the layout
    layout: GemvLayout,
    bias: Tensor | None = None,  # [rows]
    *,
    warps: int = _WARPS,
    split: int | None = None,
) -> Tensor:
    """The product x @ weight.T + bias, [tokens, rows] in the dtype of x; equals `nm_gemv_reference`.

    Needs CUDA tensors, or Triton's interpreter.

    Args:
        x: activations.
        layout: the weight.
        bias: any floating dtype.
        warps: of a program, a power of two: in how many parts it takes the columns.
        split: programs that share the columns of 32 rows; None chooses by the size of the matrix.

    Raises:
        ValueError: for another number of tokens, width or dtype.
    """
    _check_call(x, layout, bias)
    from .nm_gemv_triton import gemv_kernel

    chunk, (rows, columns), tokens = layout.chunk, layout.shape, x.shape[0]
    blocks, chunks = layout.words.shape[:2]
    split = split or _split(blocks, -(-chunks // warps))
    wide, tiles = _tokens(tokens)
    even = chunks % warps == 0 and chunks * chunk.columns == columns
    y = x.new_empty((tokens, rows))
    parts = y if split == 1 else x.new_empty((split, tokens, rows), dtype=torch.float32)
    with on_device_of(x):
        gemv_kernel[(blocks, split)](
            layout.words,
            _by_column(x, wide * tiles),
            y if bias is None else bias.contiguous(),
            parts,
            rows,
            columns,
            chunks,
            tokens,
            N=chunk.n,
            M=chunk.m,
            BITS=chunk.bits,
            VALUES=chunk.values,
            TOKENS=wide,
            TILES=tiles,
            WARPS=warps,
            SPLIT=split,
            EVEN=even,
            BFLOAT=layout.dtype is torch.bfloat16,
            BIAS=bias is not None and split == 1,
            num_warps=warps,
        )
        return y if split == 1 else add_parts(parts, y, bias)


def nm_gemv_reference(x: Tensor, layout: GemvLayout, bias: Tensor | None = None) -> Tensor:
    """What `nm_gemv` equals, in plain torch: the dense product in float32."""
    _check_call(x, layout, bias)
    weight = unpack(unpack_gemv(layout)).float()
    shift = None if bias is None else bias.float()
    return torch.nn.functional.linear(x.float(), weight, shift).to(x.dtype)


def on_device_of(x: Tensor) -> torch.cuda.device:
    """Where x is, during a launch: Triton launches on the current device. Without effect on a CPU."""
    return torch.cuda.device(x.device.index if x.is_cuda else -1)


def add_parts(
    parts: Tensor,  # float32 [split, tokens, rows]
    y: Tensor,  # [tokens, rows], or [tokens, rows / 2] if gated; written
    bias: Tensor | None,  # [rows]
    gated: bool = False,
) -> Tensor:
    """Sum `parts` in their order, add `bias`; gated: silu(first half of the rows) * second half. Gives y."""
    from .split_triton import add_kernel

    split, tokens, rows = parts.shape
    out, block = y.shape[1], 256
    add_kernel[(-(-out // block), tokens)](
        parts,
        parts if bias is None else bias.contiguous(),
        y,
        out,
        tokens * rows,
        SPLIT=split,
        BIAS=bias is not None,
        GATED=gated,
        BLOCK=block,
    )
    return y


def _tokens(tokens: int) -> tuple[int, int]:
    """(tokens of a tile, tiles): a lane reads a tile of x at once, 16 bytes at most."""
    return (1 << (min(tokens, 4) - 1).bit_length(), 1 if tokens <= 4 else 2)


def _by_column(x: Tensor, wide: int) -> Tensor:
    """X [tokens, columns] as [columns, wide], zeros behind the last token.

    One token stays as it is. More become float32, which spares a conversion per weight and token.
    """
    if wide == 1:
        return x.contiguous()
    by_column = x.new_zeros((x.shape[1], wide), dtype=torch.float32)
    by_column[:, : x.shape[0]] = x.T
    return by_column


def _split(blocks: int, turns: int) -> int:
    """Programs for each 32 rows: enough to fill a GPU, but two turns of the loop for each at least."""
    wanted = max(1, min(_PROGRAMS // blocks, turns // 2, 16))
    return 1 << (wanted.bit_length() - 1)


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


def _check_call(x: Tensor, layout: GemvLayout, bias: Tensor | None) -> None:
    rows, columns = layout.shape
    if x.ndim != 2 or not 0 < x.shape[0] <= TOKENS or x.shape[1] != columns:
        raise ValueError(f"nm_gemv takes x [1 to {TOKENS}, {columns}], got {list(x.shape)}")
    if x.dtype != layout.dtype or x.device != layout.words.device:
        raise ValueError(
            f"x is {x.dtype} on {x.device}, the weight {layout.dtype} on {layout.words.device}"
        )
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"the bias of {rows} rows has shape {list(bias.shape)}")
