"""Dense matrices from whole numbers of few bits on a GPU, without the host waiting: for cuBLAS and backwards.

As `expanding` for what is held in values: Triton kernels, each equal to a function in plain torch, which
stands in where Triton is missing or fails its trial: `expand_few`, `dense_s24_bits`.

State: equal to those, bit for bit, in Triton's interpreter; compiles offline for sm_80 to sm_120
(tests/test_kernel_few_expand.py). **It has not run on a GPU**; block sizes are guesses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import gpu
from .few_bits import FewBits, check_few, expand_few
from .nm_gemv import on_device_of
from .packed import pack_bits
from .s24_bits_layout import S24Bits, dense_s24_bits, pack_s24_bits
from .s24_layout import COLUMNS, ROWS

_BYTES = (
    128  # of a bitmap that a program reads at once: a byte to each lane of four warps; not measured
)
NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


def from_few(few: FewBits) -> Tensor:
    """The dense matrix [rows, columns] by Triton; equals `expand_few`.

    Raises:
        ValueError: for parts that do not fit each other.
    """
    check_few(few)
    from .expand_triton import count_kernel
    from .few_expand_triton import few_kernel

    rows, columns = few.shape
    bitmap, whole = few.bitmap.contiguous(), few.whole.contiguous()
    out = bitmap.new_empty(few.shape, dtype=few.dtype)
    if not out.numel():
        return out
    counts, width = bitmap.new_empty(rows, dtype=torch.int32), bitmap.shape[1]
    with on_device_of(bitmap):
        count_kernel[(rows,)](bitmap, counts, width, BYTES=_BYTES)
        few_kernel[(rows,)](
            bitmap,
            whole,
            few.scales.contiguous(),
            counts,
            counts.cumsum(0, dtype=torch.int64),
            out.view(torch.int16 if few.dtype.itemsize == 2 else torch.int32),
            columns,
            width,
            len(whole) * (8 // few.bits),
            few.scales.shape[1],
            few.group,
            BITS=few.bits,
            ALONG=few.axis == "columns",
            DTYPE=NAMES[few.dtype],
            BYTES=_BYTES,
        )
    return out


def from_s24_bits(layout: S24Bits) -> Tensor:
    """The dense matrix [rows, columns] by Triton; equals `dense_s24_bits`."""
    from .few_expand_triton import bits_kernel

    rows, columns = layout.shape
    out = layout.words.new_empty(layout.shape, dtype=layout.dtype)
    chunks = -(-columns // COLUMNS)
    with on_device_of(out):
        bits_kernel[(-(-rows // ROWS), chunks)](
            layout.words,
            layout.scales,
            out.view(torch.int64),
            rows,
            columns // 4,
            chunks,
            BITS=layout.bits,
            SPAN=layout.span,
            DTYPE=NAMES[layout.dtype],
        )
    return out


def dense_of_few(held: FewBits | S24Bits) -> Tensor:
    """The dense matrix [rows, columns], bit for bit, the quickest way that works where it is."""
    if isinstance(held, FewBits):
        by_triton = unavailable(gpu.whole(held.bitmap.device)) is None
        return from_few(held) if by_triton else expand_few(held)
    by_triton = unavailable(gpu.whole(held.words.device)) is None
    return from_s24_bits(held) if by_triton else dense_s24_bits(held)


def how(device: torch.device) -> str:
    """By what `dense_of_few` expands there, for people."""
    why = unavailable(gpu.whole(device))
    return "by Triton" if why is None else f"by plain torch ({why})"


@gpu.once
def unavailable(device: torch.device) -> str | None:
    """Why Triton must not expand on `device`, in a few words, or None. Tries it once there."""
    if (why := gpu.missing(device)) is not None:
        return why
    return gpu.trial(device, _wrong)


def _wrong(device: torch.device) -> str | None:
    """The first of a few small expansions that is not that of plain torch."""
    random = torch.Generator().manual_seed(0)
    keep = torch.rand(20, 70, 4, generator=random).argsort(-1) < 2
    scales = torch.rand(20, 3, generator=random).bfloat16()
    for bits, dtype in ((8, torch.bfloat16), (4, torch.float16)):
        whole = torch.randint(-7, 8, (20 * 140,), generator=random, dtype=torch.int8)
        if bits == 4:
            whole = (whole[::2] & 15 | whole[1::2] << 4).view(torch.uint8)
        group, of = (280, scales[:, :1]) if bits == 8 else (128, 1 + scales)
        few = FewBits(whole, of, pack_bits(keep.flatten(1)), (20, 280), bits, group, dtype)
        expected = expand_few(few).to(device)
        few = few.to(device)
        found = {"the bitmap": from_few(few), "s24_bits": from_s24_bits(pack_s24_bits(few))}
        for name, given in found.items():
            if not torch.equal(given.view(torch.int16), expected.view(torch.int16)):
                return f"the expansion of int{bits} for {name}"
    return None
