"""A sparse matrix with any mask times 1 to 16 tokens, in plain Triton: for any GPU.

Of a matrix the kernel reads the kept values and a bit for each weight, 9 bits per weight at half against 16
dense, and 1/8 for where the values of 256 columns begin. A matrix that keeps n of every 32 neighbours
(`16:32`) needs no such offsets.

A lane has four bits of a word of 32 columns. How many bits before them are 1 says where the values begin of
which theirs are the next, four at most. So a warp reads neighbouring values of four rows, and each lane goes
through words of several rows with the same inputs. The warps of a program, and with `split` several programs,
share out the columns. Sums are float32 and always in the same order.

Instruction slots per weight, counted for sm_90 (benchmarks/slots.py): 8.2 for one token, 7.6 at 16:32, 17.3
for eight tokens, 25.5 for sixteen. While it reads 9 bits at 90% of its bandwidth an H200 has 7.7, a 3090 24,
a 4090 51: it is made for cards with GDDR memory.

State: equal to the reference in Triton's interpreter, also for matrices that no tile divides; compiles
offline with Triton 3.6, 3.7 and 3.9 for sm_80 to sm_120 (tests/test_kernel_bitmap.py,
tests/test_kernel_bitmap_codegen.py, which hold the instructions per weight). **It has not run on a GPU**, its
speed is unknown, warps, rows and split are guesses. Layers are held for it where `unavailable`, which
compares it with the reference once on each GPU, and the table of measurements have nothing against it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import gpu
from .bitmap_layout import TURN, BitmapLayout, exact, pack_bitmap, pack_exact
from .nm_gemv import add_parts, by_column, on_device_of
from .packed import pack, unpack

TOKENS = 16  # at most
REVISION = 1  # to be raised with each change of speed: what was measured before is then void
_WARPS = 8  # of a program up to 8 tokens; a guess, not measured
_FEW_WARPS = 4  # for more: with 8, ptxas spills two words of a thread for sm_90 (triton 3.7.1)
_PROGRAMS = 264  # a split aims at two programs on each of an H200's 132 processors; not measured
_MANY_ROWS = 4  # that a lane goes through with the same inputs; 8 took no fewer slots (counted)
_FEW_ROWS = 2  # for more, whose sums fill its registers


@dataclass(frozen=True)
class Launch:
    """How so many tokens are taken.

    Attributes:
        wide: tokens of a tile, 16 bytes of float32 at most, which a lane reads at once.
        tiles: of inputs.
        rows: whose words a lane goes through with the same inputs.
        words: of a row that it goes through at once.
        warps: of a program, unless the caller says so.
    """

    wide: int
    tiles: int
    rows: int
    words: int
    warps: int

    @property
    def program(self) -> int:
        """Rows of a program."""
        return 4 * self.rows


def bitmap_gemv(
    x: Tensor,  # [tokens, columns], 1 to 16 tokens, dtype of the values
    layout: BitmapLayout,
    bias: Tensor | None = None,  # [rows]
    *,
    warps: int | None = None,
    split: int | None = None,
) -> Tensor:
    """The product x @ weight.T + bias, [tokens, rows] in the dtype of x; equals `bitmap_gemv_reference`.

    Needs CUDA tensors, or Triton's interpreter.

    Args:
        x: activations.
        layout: the weight.
        bias: any floating dtype.
        warps: of a program, a power of two: in how many parts it takes the columns; None is the default.
        split: programs that share the columns of the same rows; None chooses by the size of the matrix.

    Raises:
        ValueError: for another number of tokens, width or dtype.
    """
    _check_call(x, layout, bias)
    from .bitmap_triton import bitmap_kernel

    (rows, columns), tokens, turns = layout.shape, x.shape[0], layout.turns
    launch = launch_of(tokens)
    blocks, warps = -(-rows // launch.program), warps or launch.warps
    split = split or _split(blocks, -(-turns // warps))
    y = x.new_empty((tokens, rows))
    parts = y if split == 1 else x.new_empty((split, tokens, rows), dtype=torch.float32)
    x = torch.nn.functional.pad(x, (0, missing)) if (missing := -columns % TURN) else x
    with on_device_of(x):
        bitmap_kernel[(blocks, split)](
            layout.words,
            layout.values,
            layout.words if layout.offsets is None else layout.offsets,
            by_column(x, launch.wide * launch.tiles),
            y if bias is None else bias.contiguous(),
            parts,
            rows,
            turns,
            tokens,
            columns // 32 * layout.n,
            split,
            N=layout.n,
            ROWS=launch.rows,
            WORDS=launch.words,
            TOKENS=launch.wide,
            TILES=launch.tiles,
            WARPS=warps,
            EVEN=turns % warps == 0,
            BIAS=bias is not None and split == 1,
            num_warps=warps,
        )
        return y if split == 1 else add_parts(parts, y, bias)


def bitmap_gemv_reference(x: Tensor, layout: BitmapLayout, bias: Tensor | None = None) -> Tensor:
    """What `bitmap_gemv` equals, in plain torch: the dense product in float32."""
    _check_call(x, layout, bias)
    shift = None if bias is None else bias.float()
    dense = unpack(layout.packed).float()
    return torch.nn.functional.linear(x.float(), dense, shift).to(x.dtype)


def launch_of(tokens: int) -> Launch:
    """How the kernel takes so many tokens: as few slots as compile in seconds (counted)."""
    if tokens <= 4:
        return Launch(1 << (tokens - 1).bit_length(), 1, _MANY_ROWS, 4, _WARPS)
    if tokens <= 8:
        return Launch(4, 2, _FEW_ROWS, 2, _WARPS)
    return Launch(4, 4, _FEW_ROWS, 2, _FEW_WARPS)


@gpu.once
def unavailable(device: torch.device, n: int) -> str | None:
    """Why `bitmap_gemv` must not be used for n:32 (0: any mask) on `device`, in a few words, or None.

    Compiles the kernel and compares it with its reference, once for each device of a process.
    """
    if (why := gpu.missing(device)) is not None:
        return why
    return gpu.trial(device, lambda device: _wrong(device, n))


def _wrong(device: torch.device, n: int) -> str | None:
    """The first of a few small products that is not that of the reference."""
    random = torch.Generator().manual_seed(0)
    dtypes = (torch.bfloat16, torch.float16, *([] if n else [torch.float32]))
    for dtype in dtypes:
        for tokens, rows, columns, split in ((1, 32, 1024, 1), (7, 37, 736, 2)):
            shape = (rows, columns // 32, 32)
            keep = torch.rand(shape, generator=random).argsort(-1) < (n or 13)
            if not n:  # other rows keep other counts
                keep &= torch.rand(rows, 1, 1, generator=random) < torch.rand(
                    shape, generator=random
                )
            dense = torch.randn(shape, generator=random).masked_fill(~keep, 0).flatten(1)
            packed = pack(dense.to(device, dtype), keep.flatten(1).to(device))
            size = (rows, columns)
            layout = exact(pack_exact(packed, n), size, n, dtype) if n else pack_bitmap(packed)
            x = torch.randn(tokens, columns, generator=random).to(device, dtype)
            bias = torch.randn(rows, generator=random).to(device, dtype)
            y = bitmap_gemv(x, layout, bias, warps=2, split=split).float()
            expected = bitmap_gemv_reference(x, layout, bias).float()
            # Two roundings of the result, and a float32 sum in another order.
            allowed = expected.abs() * 2 * torch.finfo(dtype).eps + 1e-3 * expected.abs().max()
            if not bool(((y - expected).abs() <= allowed).all()):
                return f"{tokens} tokens, {n or 'any'} of 32, {list(size)} {dtype}"
    return None


def _split(blocks: int, turns: int) -> int:
    """Programs for the same rows: enough to fill a GPU, but a turn of the loop for each warp at least."""
    wanted = max(1, min(_PROGRAMS // blocks, turns, 16))
    return 1 << (wanted.bit_length() - 1)


def _check_call(x: Tensor, layout: BitmapLayout, bias: Tensor | None) -> None:
    rows, columns = layout.shape
    if x.ndim != 2 or not 0 < x.shape[0] <= TOKENS or x.shape[1] != columns:
        raise ValueError(f"bitmap takes x [1 to {TOKENS}, {columns}], got {list(x.shape)}")
    if x.dtype != layout.values.dtype or x.device != layout.values.device:
        raise ValueError(
            f"x is {x.dtype} on {x.device}, the weight {layout.values.dtype} on {layout.values.device}"
        )
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"the bias of {rows} rows has shape {list(bias.shape)}")
