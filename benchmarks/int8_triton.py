"""Device code of `baselines.Int8Linear`: a dense int8 matrix times few tokens. Importing it imports triton.

torch's own operator for it takes a thread for each output on a GPU, which nobody would compare with.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmprune.kernels.nm_gemv import add_parts, on_device_of

TOKENS = 64  # at most
_PROGRAMS = 528  # a split aims at four programs on each of an H200's 132 processors; not measured

# Arguments stay without types: Triton looks the names in annotations up as globals of the kernel,
# and refuses every one but its own.


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    weight,  # int8 [rows, columns]
    scale,  # float32 [rows]
    x,  # [tokens, columns]
    y,  # [tokens, rows]; with PARTS float32 [split, tokens, rows]
    rows,
    columns,
    share,  # columns that a program takes
    tokens,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # of a turn
    WIDE: tl.constexpr,  # tokens; 1, or what tl.dot takes
    FLOAT: tl.constexpr,  # multiply in float32: the interpreter multiplies the bits of bfloat16
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,  # COLUMNS divides the columns
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, WIDE)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, columns)
    at = weight + row.to(tl.int64)[:, None] * columns
    lanes = tl.zeros([ROWS, COLUMNS if WIDE == 1 else WIDE], tl.float32)
    for start in range(begin, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        some, near = (row < rows)[:, None], (column < end)[:, None]
        if not EVEN:  # a mask along the columns has the compiler read byte by byte
            some &= (column < end)[None, :]
        w = tl.load(at + column[None, :], mask=some, other=0)
        if WIDE == 1:
            v = tl.load(x + column, mask=column < end, other=0).to(tl.float32)
        else:
            near = near & (token < tokens)[None, :]
            v = tl.load(x + token[None, :] * columns + column[:, None], mask=near, other=0)
        if FLOAT:
            w = w.to(tl.float32)
            v = v.to(tl.float32)
        else:
            w = w.to(
                x.dtype.element_ty
            )  # by bytes, where a conversion to float32 takes a unit of its own
        if WIDE == 1:
            lanes += w.to(tl.float32) * v[None, :]
        else:
            lanes = tl.dot(w, v, lanes)
    sums = tl.sum(lanes, 1)[:, None] if WIDE == 1 else lanes
    sums *= tl.load(scale + row, mask=row < rows, other=0)[:, None]
    if PARTS:
        y += tl.program_id(1).to(tl.int64) * tokens * rows
    to = y + token.to(tl.int64)[None, :] * rows + row[:, None]
    inside = (row < rows)[:, None] & (token < tokens)[None, :]
    tl.store(to, sums.to(y.dtype.element_ty), mask=inside)


def int8_mm(
    x: Tensor,  # [tokens, columns], 1 to 64 tokens
    weight: Tensor,  # int8 [rows, columns]
    scale: Tensor,  # float32 [rows]
) -> Tensor:
    """The product x @ (weight * scale).T, [tokens, rows] in the dtype of x."""
    (rows, columns), tokens = weight.shape, len(x)
    height, turn, wide = (8, 512, 1) if tokens == 1 else (64, 128, max(16, _power(tokens)))
    blocks, turns = -(-rows // height), -(-columns // turn)
    share = -(-turns // max(1, min(_PROGRAMS // blocks, turns // 2)))
    split = -(-turns // share)
    y = x.new_empty(tokens, rows)
    parts = y if split == 1 else x.new_empty((split, tokens, rows), dtype=torch.float32)
    with on_device_of(x):
        _kernel[(blocks, split)](
            weight,
            scale,
            x.contiguous(),
            parts,
            rows,
            columns,
            share * turn,
            tokens,
            ROWS=height,
            COLUMNS=turn,
            WIDE=wide,
            FLOAT=not x.is_cuda,
            PARTS=split > 1,
            EVEN=columns % turn == 0,
            num_warps=4,
            num_stages=4,
        )
        return y if split == 1 else add_parts(parts, y, None)


def _power(tokens: int) -> int:
    """The least power of two that is not less."""
    return 1 << (tokens - 1).bit_length()
