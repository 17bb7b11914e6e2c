"""X^T X of a layer's inputs: half of it, in float32 sums, straight from half precision.

Products of two bfloat16 or float16 numbers are exact in float32, and tensor cores add them up in
float32. torch offers no product of half precision with a float32 result; widened first, as in the twin,
the same goes without tensor cores. The kernel takes float32 inputs, too, and never as TF32; but there
torch's own product needs the same instructions, and it is what runs.

State: equal to its twin to the rounding of sums in Triton's interpreter; compiles offline for sm_80 to
sm_100 without spills, its products on tensor cores (tests/test_kernel_gram.py). **It has not run on a
GPU**; the sizes of its tiles are guesses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import gpu
from .nm_gemv import on_device_of
from .solver import Race, Solver

PANEL = 256  # columns of a product of the twin; of 256 to 2048 the fastest on two CPU cores
CHUNK = 2048  # tokens of half precision that the twin widens at a time
DTYPES = (torch.bfloat16, torch.float16)  # inputs for which the kernel is chosen
TILES = {"I": 128, "J": 128, "T": 64, "TOGETHER": 8, "warps": 8, "stages": 3}  # not measured
WIDE_TILES = {
    "I": 64,
    "J": 64,
    "T": 32,
    "TOGETHER": 8,
    "warps": 4,
    "stages": 2,
}  # float32; likewise


def add_gram(
    sums: Tensor,  # [features, features] float32, contiguous; changed
    x: Tensor,  # [tokens, features] of any floating dtype
) -> None:
    """Add x^T x to `sums` on and above the diagonal, multiplied and summed in float32.

    What then stands below the diagonal has no meaning. By the kernel where it may be used (`solver.py`), else
    by `add_reference`.
    """
    if x.dtype in DTYPES and sums.is_contiguous() and GRAM.used(x.device):
        add_kernel(sums, x)
    else:
        add_reference(sums, x)


def add_reference(sums: Tensor, x: Tensor) -> None:
    """What `add_kernel` equals, in plain torch: products of panels of columns, down to the diagonal."""
    chunk = max(1, len(x)) if x.dtype == torch.float32 else CHUNK
    features = len(sums)
    for start in range(0, len(x), chunk):
        wide = x[start : start + chunk].float()
        for first in range(0, features, PANEL):
            p = slice(first, min(first + PANEL, features))
            sums[: p.stop, p].addmm_(wide[:, : p.stop].T, wide[:, p])


def add_kernel(sums: Tensor, x: Tensor) -> None:
    """`add_gram` by Triton, which leaves what is below the diagonal as it is.

    Needs CUDA tensors, or Triton's interpreter. Sums are always in the same order.

    Raises:
        ValueError: for inputs that are not bfloat16, float16 or float32, or shapes that do not fit together.
    """
    from .gram_triton import gram_kernel

    if x.dtype not in (*DTYPES, torch.float32):
        raise ValueError(f"inputs are bfloat16, float16 or float32, got {x.dtype}")
    if x.ndim != 2 or sums.shape != (x.shape[1],) * 2 or sums.dtype != torch.float32:
        raise ValueError(
            f"sums are float32 [features, features] for inputs [tokens, features], got "
            f"{sums.dtype} {list(sums.shape)} for {list(x.shape)}"
        )
    if not sums.is_contiguous():
        raise ValueError("sums must be contiguous")
    tokens, features = x.shape
    if not x.numel():
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    tiles = dict(WIDE_TILES if x.dtype == torch.float32 else TILES)
    warps, stages = tiles.pop("warps"), tiles.pop("stages")
    grid = (-(-features // tiles["I"]) * -(-features // tiles["J"]),)
    with on_device_of(x):
        gram_kernel[grid](
            x,
            sums,
            tokens,
            features,
            x.stride(0),
            **tiles,
            WIDEN=gpu.interpreted(),
            num_warps=warps,
            num_stages=stages,
        )


def _wrong(device: torch.device) -> str | None:
    """The first of a few small products that is not that of plain torch."""
    random = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        for tokens, features in ((100, 72), (33, 131)):
            x = torch.randn(tokens, features, generator=random).to(device, dtype)
            ours, theirs = (torch.ones(features, features, device=device) for _ in range(2))
            add_kernel(ours, x)
            add_reference(theirs, x)
            wide = x.float().abs()
            allowed = 2e-6 * (wide.T @ wide) * tokens**0.5 + 1e-6
            if not bool((((ours - theirs).abs() - allowed).triu() <= 0).all()):
                return f"{tokens} tokens of {features} features in {dtype}"
    return None


def _race(device: torch.device) -> Race:
    x = torch.ones(2048, 2048, device=device, dtype=torch.bfloat16)
    sums = torch.zeros(2048, 2048, device=device)
    return lambda: add_kernel(sums, x), lambda: add_reference(sums, x)


GRAM = Solver("gram", _wrong, _race)
