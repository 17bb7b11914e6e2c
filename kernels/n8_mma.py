"""A 2:8, 3:8 or 4:8 matrix times 1 to 64 tokens: decoded in registers, multiplied by dense tensor cores.

What bounds a product of so few tokens is reading the weights: 5, 7 or 9 bits for each, by `n8_layout`,
against 16 dense. A lane owns whole groups of 8 neighbours and decodes them by whole-number arithmetic and
byte permutes, straight into the fragments that the tensor cores want: no table, no other lane and no shared
memory takes part. Inputs are read in their natural order, 16 bytes to a lane. At 8 tokens the loop takes 2.8
instructions per weight at 4:8, 2.5 at 3:8 and 2.3 at 2:8, where an H200 has 7.7, 6.0 and 4.3 while it reads.

Programs, warps and split share out the matrix as those of `s24_mma` do; sums are float32, always in the same
order.

State: the source of the kernel, its inline assembly included, gives the products of float64 when an emulator
of the instructions runs it on a CPU (tests/gluon_on_cpu.py, tests/test_kernel_n8_mma.py), and what it decodes
is the matrix bit for bit; it compiles with Triton 3.7 for sm_80, 86, 89, 90, 100 and 120 (3.6 and 3.9: for
sm_80, 90 and 100), with neither spills nor shared memory in the loop (tests/test_kernel_n8_codegen.py). **It
has not run on a GPU.** Its speed is unknown, warps and split are guesses. Layers are held for it where
`unavailable`, which compares it with the reference once on each GPU, and the table of measurements have
nothing against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import gpu
from .n8_layout import COLUMNS, TILES, N8Layout, dense_n8, pack_n8
from .nm_gemv import add_parts, on_device_of
from .packed import pack
from .s24_mma import words_of
from .sharing import TOKENS as TOKENS
from .sharing import check_call, shared_out

REVISION = 1  # to be raised with each change of speed: what was measured before is then void


def n8_mma(
    x: Tensor,  # [tokens, columns], 1 to 64 tokens, dtype of the layout
    layout: N8Layout,
    bias: Tensor | None = None,  # [rows]
    *,
    warps: int | None = None,
    split: int | None = None,
) -> Tensor:
    """The product x @ weight.T + bias, [tokens, rows] in the dtype of x; equals `n8_mma_reference`.

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
    from .n8_gluon import n8_kernel

    rows, tokens = layout.shape[0], x.shape[0]
    tiles, chunks = layout.words.shape[:2]
    how = shared_out(tokens, tiles, chunks, warps, split)
    y = x.new_empty((tokens, rows))
    parts = how.parts(y, rows)
    with on_device_of(x):
        n8_kernel[(how.programs, how.split)](
            layout.words,
            words_of(x, chunks * COLUMNS),
            y if bias is None else bias.contiguous(),
            parts,
            chunks,
            how.share,
            tokens,
            rows,
            N=layout.n,
            WARPS=how.warps,
            ACROSS=how.across,
            TILES=TILES,
            EIGHTS=how.eights,
            HALF="bf16" if layout.dtype is torch.bfloat16 else "f16",
            ALL=how.whole,
            BIAS=bias is not None and how.split == 1,
            PARTS=how.split > 1,
            num_warps=how.warps,
        )
        return y if how.split == 1 else add_parts(parts, y, bias)


def n8_mma_reference(x: Tensor, layout: N8Layout, bias: Tensor | None = None) -> Tensor:
    """What `n8_mma` equals, in plain torch: the dense product in float32."""
    _check_call(x, layout, bias)
    shift = None if bias is None else bias.float()
    return torch.nn.functional.linear(x.float(), dense_n8(layout).float(), shift).to(x.dtype)


@gpu.once
def unavailable(device: torch.device, n: int) -> str | None:
    """Why `n8_mma` must not be used for n:8 on `device`, in a few words, or None.

    Compiles the kernel and compares it with its reference, once for each device of a process.
    """
    return gpu.without_gluon(device) or gpu.trial(device, lambda device: _wrong(device, n))


def _wrong(device: torch.device, n: int) -> str | None:
    """The first of a few small products that is not that of the reference."""
    random = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        for tokens, rows, columns, split in _TRIALS:
            groups = torch.randn(rows, columns // 8, 8, generator=random)
            least = groups.abs().topk(8 - n, dim=-1, largest=False).indices
            dense = groups.scatter(-1, least, 0)
            dense *= torch.rand(dense.shape, generator=random) < 0.9  # some groups keep fewer
            layout = pack_n8(pack(dense.flatten(1).to(device, dtype)), n)
            x = torch.randn(tokens, columns, generator=random).to(device, dtype)
            bias = torch.randn(rows, generator=random).to(device, dtype)
            y = n8_mma(x, layout, bias, split=split).float()
            expected = n8_mma_reference(x, layout, bias).float()
            # Two roundings of the result, and a float32 sum in another order.
            allowed = expected.abs() * 2 * torch.finfo(dtype).eps + 1e-3 * expected.abs().max()
            if not bool(((y - expected).abs() <= allowed).all()):
                return f"[{tokens}, {columns}] x [{rows}, {columns}] {n}:8 {dtype}"
    return None


_TRIALS = [(1, 32, 2048, 1), (20, 120, 1104, 2)]  # tokens, rows, columns, split


def _check_call(x: Tensor, layout: N8Layout, bias: Tensor | None) -> None:
    check_call("n8_mma", x, layout.words, bias, layout.shape, layout.dtype)
