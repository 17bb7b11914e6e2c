"""A 2:4 matrix of int8 or int4 numbers times 1 to 64 tokens on sparse tensor cores.

What bounds a product of so few tokens is reading the weights: 5 bits of each with int8, 3.1 with int4 and a
scale for every 128 columns, where `s24_mma` reads 9. Inputs stay bfloat16 or float16. The numbers become such
halves in registers, by masks and fused multiplications (`s24_bits_gluon`), and go with the same words of
places into the same instruction as those of `s24_mma`; rows and columns are shared out as there.

**Scales are multiplied in before the tensor cores, not after**: then the kernel multiplies by exactly the
weights that the file stands for, each rounded once, as the expanded matrix and any other kernel do. With int8
that costs nothing: the fused multiplication that takes the offset of the magic number away brings the scale
in. With int4 it is 0.25 slots of a dense weight; sums of their own for each 128 columns, scaled afterwards,
would take 0.06 for every 8 tokens: less up to 16 tokens, as much at 32, more at 64.

Counted for sm_90 with triton 3.7.1 (tests/test_kernel_s24_bits_codegen.py), slots of each dense weight at 8,
16, 32 and 64 tokens: 1.3, 1.7, 2.4 and 3.8 with int8, of 4.3 that an H200 has while it reads; 1.5, 1.8, 2.0
and 4.0 with int4, of 2.7. So 64 tokens of int4 are bound by instructions, not by memory.

State: as `s24_mma`; the source of the kernel, its inline assembly included, gives the products of float64
when an emulator of the instructions runs it on a CPU (tests/test_kernel_s24_bits.py), and it compiles for
sm_80 to sm_120 without spills. **It has not run on a GPU.** Its speed is unknown, warps and split are
guesses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import gpu
from .few_bits import FewBits
from .nm_gemv import add_parts, on_device_of
from .packed import pack_bits
from .s24_bits_layout import S24Bits, dense_s24_bits, pack_s24_bits
from .s24_layout import COLUMNS, TILES
from .s24_mma import unavailable as without_tensor_cores
from .s24_mma import words_of
from .sharing import TOKENS as TOKENS
from .sharing import check_call, eights_of, shared_out

REVISION = 1  # to be raised with each change of speed: what was measured before is then void


def s24_bits(
    x: Tensor,  # [tokens, columns], 1 to 64 tokens, dtype of the layout
    layout: S24Bits,
    bias: Tensor | None = None,  # [rows]
    *,
    warps: int | None = None,
    split: int | None = None,
) -> Tensor:
    """The product x @ weight.T + bias, [tokens, rows] in the dtype of x; equals `s24_bits_reference`.

    Needs CUDA tensors on a device that `unavailable` finds nothing against.

    Args:
        x: activations.
        layout: the weight.
        bias: any floating dtype.
        warps: of a program, a power of two; None is the default.
        split: programs that share the columns of some rows; None chooses by the size of the matrix.

    Raises:
        ValueError: for another number of tokens, width or dtype.
    """
    _check_call(x, layout, bias)
    from .s24_bits_gluon import bits_kernel

    rows, tokens = layout.shape[0], x.shape[0]
    tiles, chunks = layout.words.shape[:2]
    each = tiles_of_warp(layout.bits, eights_of(tokens), tiles)
    how = shared_out(tokens, tiles, chunks, warps, split, each=each)
    y = x.new_empty((tokens, rows))
    parts = how.parts(y, rows)
    with on_device_of(x):
        bits_kernel[(how.programs, how.split)](
            layout.words,
            layout.scales.view(torch.int16),
            words_of(x, chunks * COLUMNS),
            y if bias is None else bias.contiguous(),
            parts,
            chunks,
            how.share,
            tokens,
            rows,
            WARPS=how.warps,
            ACROSS=how.across,
            TILES=each,
            EIGHTS=how.eights,
            BITS=layout.bits,
            SPAN=layout.span,
            HALF="bf16" if layout.dtype is torch.bfloat16 else "f16",
            ALL=how.whole,
            BIAS=bias is not None and how.split == 1,
            PARTS=how.split > 1,
            num_warps=how.warps,
        )
        return y if how.split == 1 else add_parts(parts, y, bias)


def tiles_of_warp(bits: int, eights: int, tiles: int) -> int:
    """How many tiles of 16 rows a warp takes with the same inputs.

    At 32 tokens, bringing inputs takes most of the instructions, and a warp has registers for the sums of
    four tiles: 2.0 slots of a weight instead of 2.6 (counted), of 2.7. At 64 it has not.
    """
    return 2 * TILES if bits == 4 and eights == 4 and tiles % (2 * TILES) == 0 else TILES


def s24_bits_reference(x: Tensor, layout: S24Bits, bias: Tensor | None = None) -> Tensor:
    """What `s24_bits` equals, in plain torch: the dense product in float32."""
    _check_call(x, layout, bias)
    weight = dense_s24_bits(layout).float()
    shift = None if bias is None else bias.float()
    return torch.nn.functional.linear(x.float(), weight, shift).to(x.dtype)


@gpu.once
def unavailable(device: torch.device) -> str | None:
    """Why `s24_bits` must not be used on `device`, in a few words, or None.

    Compiles the kernel and compares it with its reference, once for each device of a process. Where
    `s24_mma`, whose instruction it uses, does not work, neither does this.
    """
    return without_tensor_cores(device) or gpu.trial(device, _wrong)


def _wrong(device: torch.device) -> str | None:
    """The first of a few small products that is not that of the reference."""
    random = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        for tokens, rows, columns, bits, group, split in _TRIALS:
            few = _random(rows, columns, bits, group, dtype, random)
            layout = pack_s24_bits(few.to(device))
            x = torch.randn(tokens, columns, generator=random).to(device, dtype)
            bias = torch.randn(rows, generator=random).to(device, dtype)
            y = s24_bits(x, layout, bias, split=split).float()
            expected = s24_bits_reference(x, layout, bias).float()
            # Two roundings of the result, and a float32 sum in another order.
            allowed = expected.abs() * 2 * torch.finfo(dtype).eps + 1e-3 * expected.abs().max()
            if not bool(((y - expected).abs() <= allowed).all()):
                return f"[{tokens}, {columns}] x [{rows}, {columns}] int{bits} {dtype}"
    return None


# tokens, rows, columns, bits, group, split
_TRIALS = [
    (1, 32, 2048, 8, 2048, 1),
    (20, 120, 1100, 8, 64, 2),
    (9, 40, 1100, 4, 128, 1),
    (32, 64, 2048, 4, 32, 1),
]


def _random(
    rows: int, columns: int, bits: int, group: int, dtype: torch.dtype, random: torch.Generator
) -> FewBits:
    """A 2:4 matrix of random whole numbers and scales."""
    keep = torch.rand(rows, columns // 4, 4, generator=random).argsort(-1) < 2
    top = 2 ** (bits - 1)
    whole = torch.randint(1 - top, top, (rows * columns // 2,), generator=random, dtype=torch.int8)
    scales = (1 + torch.rand(rows, -(-columns // group), generator=random)).bfloat16() / 64
    numbers = whole if bits == 8 else (whole[::2] & 15 | whole[1::2] << 4).view(torch.uint8)
    bitmap = pack_bits(keep.flatten(1))
    return FewBits(numbers, scales, bitmap, (rows, columns), bits, group, dtype)


def _check_call(x: Tensor, layout: S24Bits, bias: Tensor | None) -> None:
    check_call("s24_bits", x, layout.words, bias, layout.shape, layout.dtype)
