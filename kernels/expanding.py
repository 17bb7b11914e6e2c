"""Dense matrices from what layers hold on a GPU, without the host waiting: for cuBLAS, and for `weight`.

Triton kernels, each equal to a function in plain torch, which stands in where Triton is missing or fails its
trial: `packed_torch.expand`, `dense_s24`, `dense_n8`, `dense_gemv`.

State: equal to those, bit for bit, in Triton's interpreter; compiles offline for sm_80 to sm_120
(tests/test_kernel_expanding.py, tests/test_kernel_codegen.py). **It has not run on a GPU**; block sizes are
guesses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import gpu
from .gemv_layout import LANES, GemvLayout, dense_gemv, pack_gemv
from .n8_layout import N8Layout, dense_n8, pack_n8
from .nm_gemv import on_device_of
from .packed import Packed, pack, unpack_rows
from .s24_layout import COLUMNS, ROWS, S24Layout, dense_s24, pack_s24

_BYTES = (
    128  # of a bitmap that a program reads at once: a byte to each lane of four warps; not measured
)
_UNITS = (
    32  # of two or four weights that a program of `gemv_kernel` writes of each row; not measured
)
_WORD = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def from_bitmap(packed: Packed) -> Tensor:
    """The dense matrix [rows, columns], bit for bit, by Triton; equals `packed.unpack_rows` of all rows."""
    from .expand_triton import bitmap_kernel, count_kernel

    rows, columns = packed.shape
    values, bitmap = packed.values.detach().contiguous(), packed.bitmap.contiguous()
    out = values.new_empty((rows, columns))
    if not out.numel():
        return out
    counts = bitmap.new_empty(rows, dtype=torch.int32)
    word, width = _WORD[values.element_size()], bitmap.shape[1]
    with on_device_of(values):
        count_kernel[(rows,)](bitmap, counts, width, BYTES=_BYTES)
        ends = counts.cumsum(0, dtype=torch.int64)
        bitmap_kernel[(rows,)](
            bitmap,
            values.view(word),
            counts,
            ends,
            out.view(word),
            columns,
            width,
            len(values),
            BYTES=_BYTES,
        )
    return out


def from_s24(layout: S24Layout) -> Tensor:
    """The dense matrix [rows, columns] by Triton; equals `dense_s24` of one matrix."""
    from .expand_triton import s24_kernel

    rows, columns = layout.shape
    out = layout.words.new_empty(layout.shape, dtype=layout.dtype)
    chunks = -(-columns // COLUMNS)
    with on_device_of(out):
        s24_kernel[(-(-rows // ROWS), chunks)](
            layout.words, out.view(torch.int64), rows, columns // 4, chunks
        )
    return out


def from_n8(layout: N8Layout) -> Tensor:
    """The dense matrix [rows, columns] by Triton; equals `dense_n8`."""
    from .n8_triton import n8_kernel

    rows, columns = layout.shape
    out = layout.words.new_empty(layout.shape, dtype=layout.dtype)
    chunks = layout.words.shape[1]
    with on_device_of(out):
        n8_kernel[(-(-rows // ROWS), chunks)](
            layout.words, out.view(torch.int64), rows, columns // 4, chunks, N=layout.n
        )
    return out


def from_gemv(layout: GemvLayout) -> Tensor:
    """The dense matrix [rows, columns] by Triton; equals `dense_gemv`."""
    from .expand_triton import gemv_kernel

    (rows, columns), chunk = layout.shape, layout.chunk
    out = layout.words.new_empty(layout.shape, dtype=layout.dtype)
    units = columns // (2 if chunk.m == 2 else 4)
    with on_device_of(out):
        gemv_kernel[(-(-rows // LANES), -(-units // _UNITS))](
            layout.words,
            out.view(torch.int32 if chunk.m == 2 else torch.int64),
            rows,
            units,
            layout.words.shape[1],
            N=chunk.n,
            M=chunk.m,
            BITS=chunk.bits,
            VALUES=chunk.values,
            UNITS=_UNITS,
        )
    return out


def dense_of(packed: Packed | S24Layout | N8Layout | GemvLayout) -> Tensor:
    """The dense matrix [rows, columns], bit for bit, the quickest way that works where it is."""
    if isinstance(packed, Packed):
        values = packed.values
        if unavailable(gpu.whole(values.device)) is None and values.element_size() in _WORD:
            return from_bitmap(packed)
        return unpack_rows(packed, 0, packed.shape[0], 0)
    by_triton = unavailable(gpu.whole(packed.words.device)) is None
    if isinstance(packed, S24Layout):
        return from_s24(packed) if by_triton else dense_s24(packed)[0]
    if isinstance(packed, N8Layout):
        return from_n8(packed) if by_triton else dense_n8(packed)
    return from_gemv(packed) if by_triton else dense_gemv(packed)


def how(device: torch.device) -> str:
    """By what `dense_of` expands there, for people."""
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
    groups = torch.randn(40, 72, 4, generator=random)
    dense = groups.scatter(-1, groups.abs().topk(2, dim=-1, largest=False).indices, 0)
    packed = pack(dense.flatten(1).bfloat16().to(device))
    expected = unpack_rows(packed, 0, 40, 0)
    gemv = pack_gemv(packed, 2, 4)
    found = {
        "bitmap": from_bitmap(packed),
        "s24_mma": from_s24(pack_s24(packed)),
        "nm_gemv": from_gemv(gemv),
        "n8_mma": from_n8(pack_n8(packed, 4)),
    }
    for name, given in found.items():
        if not torch.equal(given.view(torch.int16), expected.view(torch.int16)):
            return f"the expansion for {name}"
    return None
