"""A 2:4 matrix times 1 to 64 tokens on sparse tensor cores, without decoding anything.

What bounds a product of so few tokens is reading the weights. Tensor cores of compute capability 8.0 and
newer take a 2:4 matrix as 9 bits per weight; `s24_layout` lays it out in exactly the order in which the lanes
of a warp feed it to the instruction. Inputs are read in their natural order, 16 bytes to a lane, and
neighbouring lanes trade halves. The loop takes half an instruction per weight at 8 tokens and 3 at 64, where
an H200 has 7.7 while it reads.

The warps of a program share out the columns; from 9 tokens on groups of them do, whose warps take rows of
their own. With `split` several programs share the columns, too. Sums are float32, always in the same order.
Of a gate and an up matrix laid out together, one product gives silu(gate) * up, in float32 up to the end:
closer to the truth than a model that rounds gate and up in between.

State: the source of the kernel, its inline assembly included, gives the products of float64 when an emulator
of the instructions runs it on a CPU (tests/gluon_on_cpu.py, tests/test_kernel_s24_mma.py); places are ordered
as torch orders them for CUTLASS; it compiles with Triton 3.6, 3.7 and 3.9 for sm_80, 86, 89, 90, 100 and 120,
with neither spills nor shared memory in the loop (tests/test_kernel_codegen.py). **It has not run on a
GPU.** Its speed is unknown, warps and split are guesses. Layers are held for it where `unavailable`, which
compares it with the reference once on each GPU, and the table of measurements have nothing against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import gpu
from .nm_gemv import add_parts, on_device_of
from .packed import pack
from .s24_layout import COLUMNS, TILES, S24Layout, dense_s24, pack_gate_up, pack_s24
from .sharing import TOKENS as TOKENS
from .sharing import check_call, shared_out

REVISION = 2  # to be raised with each change of speed: what was measured before is then void


def s24_mma(
    x: Tensor,  # [tokens, columns], 1 to 64 tokens, dtype of the layout
    layout: S24Layout,
    bias: Tensor | None = None,  # [rows], gated [2 * rows]: of gate, then of up
    *,
    warps: int | None = None,
    split: int | None = None,
) -> Tensor:
    """The product x @ weight.T + bias, [tokens, rows] in the dtype of x; equals `s24_mma_reference`.

    Gated: silu(x @ gate.T + bias) * (x @ up.T + bias).

    Needs CUDA tensors on a device that `unavailable` finds nothing against.

    Args:
        x: activations.
        layout: the weight, or gate and up.
        bias: any floating dtype.
        warps: of a program, a power of two; None is the default.
        split: programs that share the columns of some rows; None chooses by the size of the matrix.

    Raises:
        ValueError: for another number of tokens, width or dtype.
    """
    _check_call(x, layout, bias)
    from .s24_gluon import s24_kernel

    rows, tokens = layout.shape[0], x.shape[0]
    tiles, chunks = layout.words.shape[:2]
    how = shared_out(tokens, tiles, chunks, warps, split, together=layout.gated)
    y = x.new_empty((tokens, rows))
    parts = how.parts(y, rows * (2 if layout.gated else 1))
    with on_device_of(x):
        s24_kernel[(how.programs, how.split)](
            layout.words,
            words_of(x, chunks * COLUMNS),
            y if bias is None else bias.contiguous(),
            parts,
            chunks,
            how.share,
            tokens,
            rows,
            WARPS=how.warps,
            ACROSS=how.across,
            TILES=TILES,
            EIGHTS=how.eights,
            HALF="bf16" if layout.dtype is torch.bfloat16 else "f16",
            ALL=how.whole,
            BIAS=bias is not None and how.split == 1,
            GATED=layout.gated,
            PARTS=how.split > 1,
            num_warps=how.warps,
        )
        return y if how.split == 1 else add_parts(parts, y, bias, layout.gated)


def s24_mma_reference(x: Tensor, layout: S24Layout, bias: Tensor | None = None) -> Tensor:
    """What `s24_mma` equals, in plain torch: the dense product in float32."""
    _check_call(x, layout, bias)
    weight = torch.cat(dense_s24(layout)).float()
    y = torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
    if layout.gated:
        gate, up = y.chunk(2, dim=1)
        y = torch.nn.functional.silu(gate) * up
    return y.to(x.dtype)


@gpu.once
def unavailable(device: torch.device) -> str | None:
    """Why `s24_mma` must not be used on `device`, in a few words, or None.

    Compiles the kernel and compares it with its reference, once for each device of a process.
    """
    return gpu.without_gluon(device) or gpu.trial(device, _wrong)


def _wrong(device: torch.device) -> str | None:
    """The first of a few small products that is not that of the reference."""
    random = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        for tokens, rows, columns, split, gated in _TRIALS:
            dense = torch.randn(2, rows, columns // 4, 4, generator=random)
            dense[..., 1:3] *= torch.rand(dense[..., 1:3].shape, generator=random) < 0.5
            least = dense.abs().topk(2, dim=-1, largest=False).indices
            packed = [pack(m.to(device)) for m in dense.scatter(-1, least, 0).flatten(2).to(dtype)]
            layout = pack_gate_up(*packed) if gated else pack_s24(packed[0])
            x = torch.randn(tokens, columns, generator=random).to(device, dtype)
            bias = torch.randn(rows * (2 if gated else 1), generator=random).to(device, dtype)
            y = s24_mma(x, layout, bias, split=split).float()
            expected = s24_mma_reference(x, layout, bias).float()
            # Two roundings of the result, and a float32 sum in another order.
            allowed = expected.abs() * 2 * torch.finfo(dtype).eps + 1e-3 * expected.abs().max()
            if not bool(((y - expected).abs() <= allowed).all()):
                return f"[{tokens}, {columns}] x [{rows}, {columns}] {dtype}, gated={gated}"
    return None


# tokens, rows, columns, split, gated
_TRIALS = [(1, 32, 2048, 1, False), (20, 120, 1100, 2, False), (33, 40, 2048, 1, True)]


def words_of(x: Tensor, columns: int) -> Tensor:
    """X as int32 [tokens, columns / 2], filled up with zeros, on an address that 16 bytes divide."""
    if x.shape[1] < columns:
        x = torch.nn.functional.pad(x, (0, columns - x.shape[1]))
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    return x.view(torch.int32)


def _check_call(x: Tensor, layout: S24Layout, bias: Tensor | None) -> None:
    rows, columns = layout.shape
    sides = (rows * (2 if layout.gated else 1), columns)
    check_call("s24_mma", x, layout.words, bias, sides, layout.dtype)
