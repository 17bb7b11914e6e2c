"""Matrices of few bits for tests: whole numbers, scales, and a mask of any kind."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmprune.kernels.few_bits import FewBits, in_halves, top_of
from llmprune.kernels.packed import pack_bits
from llmprune.runtime.few_bits import FewBitsLinear


def few(
    shape: tuple[int, int] = (12, 24),
    bits: int = 4,
    group: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    axis: str = "rows",
    *,
    pattern: bool = True,
    seed: int = 0,
) -> tuple[FewBits, int]:
    """A matrix, and how many weights it keeps: 2:4 along `axis`, or any half of them, an odd number."""
    random = torch.Generator().manual_seed(seed)
    wide = shape if axis == "rows" else shape[::-1]
    if pattern:
        keep = torch.rand(wide[0], wide[1] // 4, 4, generator=random).argsort(-1) < 2
        keep = keep.reshape(wide)
    else:
        keep = torch.rand(wide, generator=random) < 0.5
        keep[0] = False  # a row of nothing
        keep[-1, -1] ^= int(keep.sum()) % 2 == 0
    groups = -(-wide[1] // group)
    scales = torch.rand(wide[0], groups, generator=random).mul_(0.1).add_(0.001).bfloat16()
    scales[0, 0] = 0
    keep, scales = (keep, scales) if axis == "rows" else (keep.T, scales.T)
    top = top_of(bits)
    numbers = torch.randint(-top, top + 1, (int(keep.sum()),), generator=random).to(torch.int8)
    whole = numbers if bits == 8 else in_halves(numbers)
    bitmap = pack_bits(keep.contiguous())
    return FewBits(whole, scales.contiguous(), bitmap, shape, bits, group, dtype, axis), len(
        numbers
    )


def dense_of(few: FewBits) -> Tensor:
    """What it stands for, by float64 alone: rounded once."""
    rows, columns = few.shape
    places = torch.arange(columns if few.axis == "rows" else rows) // few.group
    wide = few.scales.double()[:, places] if few.axis == "rows" else few.scales.double()[places]
    bits = (few.bitmap[:, :, None] >> torch.arange(8)) & 1
    keep = bits.reshape(rows, -1)[:, :columns].bool()
    numbers = few.whole.double()
    if few.bits == 4:
        halves = torch.stack((few.whole & 15, few.whole >> 4), 1).flatten().double()
        numbers = torch.where(halves > 7, halves - 16, halves)
    exact = torch.zeros(few.shape, dtype=torch.float64)
    exact[keep] = numbers[: int(keep.sum())] * wide[keep]
    return exact.to(few.dtype)


def layer(
    bits: int = 4, transposed: bool = False, bias: bool = True, **options: object
) -> FewBitsLinear:
    """A layer of 24 inputs and 12 outputs, in eval mode."""
    shape, axis = ((24, 12), "columns") if transposed else ((12, 24), "rows")
    matrix, kept = few(shape, bits, axis=axis, **options)  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(1)
    given = nn.Parameter(torch.randn(12, generator=random).to(matrix.dtype)) if bias else None
    pattern = "2:4" if options.get("pattern", True) else "unstructured"
    return FewBitsLinear(matrix, kept, given, pattern, transposed).eval()
