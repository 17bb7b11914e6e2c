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
**It has not run on a GPU**, its speed is unknown, the warps and the split are guesses. Layers are held for it
where `unavailable`, which compares it with the reference once on each GPU, and the table of measurements have
nothing against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import gpu
from .gemv_layout import GemvLayout, dense_gemv, pack_gemv
from .packed import pack

TOKENS = 8  # at most
REVISION = 1  # to be raised with each change of speed: what was measured before is then void
_WARPS = 8  # of a program; a guess, not measured
_PROGRAMS = 264  # a split aims at two programs on each of an H200's 132 processors; not measured


def nm_gemv(
    x: Tensor,  # [tokens, columns], 1 to 8 tokens, dtype of the layout
    layout: GemvLayout,
    bias: Tensor | None = None,  # [rows]
    *,
    warps: int | None = None,
    split: int | None = None,
) -> Tensor:
    """The product x @ weight.T + bias, [tokens, rows] in the dtype of x; equals `nm_gemv_reference`.

    Needs CUDA tensors, or Triton's interpreter.

    Args:
        x: activations.
        layout: the weight.
        bias: any floating dtype.
        warps: of a program, a power of two: in how many parts it takes the columns; None is the default.
        split: programs that share the columns of 32 rows; None chooses by the size of the matrix.

    Raises:
        ValueError: for another number of tokens, width or dtype.
    """
    _check_call(x, layout, bias)
    from .nm_gemv_triton import gemv_kernel

    chunk, (rows, columns), tokens = layout.chunk, layout.shape, x.shape[0]
    blocks, chunks = layout.words.shape[:2]
    warps = warps or _WARPS
    split = split or _split(blocks, -(-chunks // warps))
    wide, tiles = _tokens(tokens)
    even = chunks % warps == 0 and chunks * chunk.columns == columns
    y = x.new_empty((tokens, rows))
    parts = y if split == 1 else x.new_empty((split, tokens, rows), dtype=torch.float32)
    with on_device_of(x):
        gemv_kernel[(blocks, split)](
            layout.words,
            by_column(x, wide * tiles),
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
    weight = dense_gemv(layout).float()
    shift = None if bias is None else bias.float()
    return torch.nn.functional.linear(x.float(), weight, shift).to(x.dtype)


@gpu.once
def unavailable(device: torch.device, n: int, m: int) -> str | None:
    """Why `nm_gemv` must not be used for n:m on `device`, in a few words, or None.

    Compiles the kernel and compares it with its reference, once for each device of a process.
    """
    if (why := gpu.missing(device)) is not None:
        return why
    return gpu.trial(device, lambda device: _wrong(device, n, m))


def _wrong(device: torch.device, n: int, m: int) -> str | None:
    """The first of a few small products that is not that of the reference."""
    random = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        for tokens, rows, groups, split in ((1, 32, 64, 1), (7, 40, 33, 2)):
            dense = torch.randn(rows, groups, m, generator=random)
            least = dense.abs().topk(m - n, dim=-1, largest=False).indices
            dense = dense.scatter(-1, least, 0).flatten(1).to(dtype)
            layout = pack_gemv(pack(dense.to(device)), n, m)
            x = torch.randn(tokens, groups * m, generator=random).to(device, dtype)
            bias = torch.randn(rows, generator=random).to(device, dtype)
            y = nm_gemv(x, layout, bias, warps=2, split=split).float()
            expected = nm_gemv_reference(x, layout, bias).float()
            # Two roundings of the result, and a float32 sum in another order.
            allowed = expected.abs() * 2 * torch.finfo(dtype).eps + 1e-3 * expected.abs().max()
            if not bool(((y - expected).abs() <= allowed).all()):
                return f"{tokens} tokens of {n}:{m} {list(dense.shape)} {dtype}"
    return None


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


def by_column(x: Tensor, wide: int) -> Tensor:
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
