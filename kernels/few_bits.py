"""A packed matrix of which each kept weight is a whole number times a scale that neighbours share.

What docs/format.md stores as "Fewer bits: version 2", in memory, and what it stands for: the product, which
float32 holds exactly, rounded once to the dtype of the weights. Files and kernels both mean this.

Plain torch, on any device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import packed_torch
from .packed import Packed, bitmap_shape, count, select, unpack
from .slots import row_blocks

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class FewBits:
    """A packed matrix whose kept weights are whole numbers times scales.

    Attributes:
        whole: of the kept weights, row-major: int8 [kept] of 8 bits; of 4, uint8 [ceil(kept / 2)], two in a
            byte, the first in its low half, in two's complement; the half behind an odd one is 0.
        scales: bfloat16 [rows, ceil(columns / group)], along columns [ceil(rows / group), columns]; finite
            and without a sign.
        bitmap: uint8 [rows, ceil(columns / 8)], as `Packed.bitmap`.
        shape: (rows, columns) of the dense matrix.
        bits: 8 or 4.
        group: neighbours along `axis` that share a scale, 1 to the length of the dimension.
        dtype: bfloat16, float16 or float32, of the weights it stands for and of inputs.
        axis: `rows` where the groups of scales lie along the last dimension, or `columns`.
    """

    whole: Tensor
    scales: Tensor
    bitmap: Tensor
    shape: tuple[int, int]
    bits: int
    group: int
    dtype: torch.dtype
    axis: str = "rows"

    @property
    def bytes(self) -> int:
        """What its tensors take."""
        return self.whole.nbytes + self.scales.nbytes + self.bitmap.nbytes

    def to(self, device: torch.device | str) -> FewBits:
        """The same on `device`."""
        moved = {n: getattr(self, n).to(device) for n in ("whole", "scales", "bitmap")}
        return replace(self, **moved)


def top_of(bits: int) -> int:
    """The largest whole number; the smallest is its negative."""
    return int(2 ** (bits - 1) - 1)


def in_halves(whole: Tensor) -> Tensor:
    """Whole numbers [n] of 4 bits two in a byte: [ceil(n / 2)] uint8, the first in the low half."""
    pairs = pad(whole, (0, len(whole) % 2)).view(torch.uint8).view(-1, 2)
    return (pairs[:, 0] & 15) | (pairs[:, 1] << 4)


def of_halves(halves: Tensor) -> Tensor:
    """The inverse: [2 n] int8 of [n] uint8, with the half behind the last number where they are odd."""
    low, high = (halves << 4).view(torch.int8) >> 4, halves.view(torch.int8) >> 4
    return torch.stack((low, high), 1).view(-1)


def products(whole: Tensor, wide: Tensor, bitmap: Tensor, dtype: torch.dtype) -> Tensor:
    """The kept weights [kept], row by row.

    Args:
        whole: [kept] int8.
        wide: [rows, columns] float32, the scale of each weight.
        bitmap: [rows, ceil(columns / 8)] uint8, as many one bits as there are whole numbers.
        dtype: that the products, exact in float32, are rounded to.
    """
    return select(wide, bitmap).mul_(whole).to(dtype)


def check_few(few: FewBits) -> None:
    """Hold shapes, dtypes and devices against each other; no element is read.

    Raises:
        ValueError: where they contradict each other.
    """
    rows, columns = few.shape
    along = {"rows": columns, "columns": rows}.get(few.axis, 0)
    if few.bits not in (4, 8) or few.dtype not in _DTYPES or not 0 < few.group <= max(1, along):
        raise ValueError(
            f"no matrix in fewer bits: {few.bits} bits, {few.dtype}, groups of {few.group} along "
            f"{few.axis} of {list(few.shape)}"
        )
    groups = -(-along // few.group)
    scales = (rows, groups) if few.axis == "rows" else (groups, columns)
    wanted = {
        "whole": (torch.int8 if few.bits == 8 else torch.uint8, (len(few.whole),)),
        "scales": (torch.bfloat16, scales),
        "bitmap": (torch.uint8, bitmap_shape(few.shape)),
    }
    for name, (dtype, shape) in wanted.items():
        tensor: Tensor = getattr(few, name)
        if (tensor.dtype, tuple(tensor.shape), tensor.device) != (dtype, shape, few.whole.device):
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; it must be {dtype} "
                f"{list(shape)} on {few.whole.device}"
            )


def numbers_of(few: FewBits) -> Tensor:
    """The whole numbers, int8 [kept]; of 4 bits the half behind an odd one comes with them."""
    return few.whole if few.bits == 8 else of_halves(few.whole)


def scale_of_each(few: FewBits, start: int = 0, stop: int | None = None) -> Tensor:
    """The scale of each weight of rows start to stop, kept or not: [rows, columns] float32."""
    stop = few.shape[0] if stop is None else stop
    if few.axis == "rows":
        wide = few.scales[start:stop].float().repeat_interleave(few.group, 1)
        return wide[:, : few.shape[1]]
    first = start // few.group
    wide = few.scales[first : -(-stop // few.group)].float().repeat_interleave(few.group, 0)
    return wide[start - first * few.group :][: stop - start]


def dense_whole(few: FewBits) -> Tensor:
    """The whole number of each weight, 0 where none is kept: int8 [rows, columns]. The host does not wait."""
    check_few(few)
    out = few.bitmap.new_empty(few.shape, dtype=torch.int8)
    packed_torch.expand(few.bitmap, few.shape[1], numbers_of(few), 0, out)
    return out


def expand_few(few: FewBits) -> Tensor:
    """The dense matrix [rows, columns] in `few.dtype`. On a GPU the host does not wait.

    Raises:
        ValueError: for parts that do not fit each other; on a CPU also where the bitmap has another number of
            one bits than there are whole numbers.
    """
    if few.bitmap.device.type == "cpu":
        return unpack(packed_few(few))
    return expand_unasked(few)


def expand_unasked(few: FewBits) -> Tensor:
    """As `expand_few` on a GPU: of whole numbers that a bitmap asks for in vain the last repeats."""
    whole = dense_whole(few)
    out = whole.new_empty(few.shape, dtype=few.dtype)
    blocks = row_blocks(*few.shape, 1) if out.numel() else range(0)
    for row in blocks:  # where none is kept, 0 times a scale is +0.0
        stop = min(row + blocks.step, few.shape[0])
        out[row:stop] = scale_of_each(few, row, stop).mul_(whole[row:stop])
    return out


def packed_few(few: FewBits) -> Packed:
    """The same matrix in values of `few.dtype`; on a GPU the host waits.

    Raises:
        ValueError: as `expand_few`.
    """
    check_few(few)
    numbers, kept = numbers_of(few), count(few.bitmap)
    if len(numbers) - kept not in ((0,) if few.bits == 8 else (0, 1)):
        raise ValueError(
            f"the bitmap has {kept} one bits, and there are {len(numbers)} whole numbers"
        )
    values = products(numbers[:kept], scale_of_each(few), few.bitmap, few.dtype)
    return Packed(values, few.bitmap, few.shape)


def pack_few(packed: Packed, scales: Tensor, bits: int, group: int, axis: str = "rows") -> FewBits:
    """The whole numbers of which `packed` holds the products with `scales`, proven bit for bit.

    Args:
        packed: a matrix in bfloat16, float16 or float32.
        scales: bfloat16, as `FewBits.scales`.
        bits: 8 or 4.
        group: neighbours along `axis` that share a scale.
        axis: `rows` or `columns`.

    Raises:
        ValueError: for a weight that is no such product, or parts that do not fit each other.
    """
    if len(packed.shape) != 2:
        raise ValueError(f"whole numbers stand for one matrix, not {list(packed.shape)}")
    rows, columns = packed.shape
    empty = packed.bitmap.new_empty(0, dtype=torch.int8 if bits == 8 else torch.uint8)
    few = FewBits(
        empty, scales, packed.bitmap, (rows, columns), bits, group, packed.values.dtype, axis
    )
    check_few(few)
    wide = select(scale_of_each(few), packed.bitmap)
    steps = torch.where(wide > 0, packed.values.float() / wide, 0).round_()
    whole = steps.clamp_(-top_of(bits), top_of(bits)).to(torch.int8)
    again, values = wide.mul_(whole).to(few.dtype), packed.values.detach()
    if not torch.equal(again.view(torch.uint8), values.contiguous().view(torch.uint8)):
        raise ValueError(f"a weight is no whole number of {bits} bits times its scale")
    return replace(few, whole=whole if bits == 8 else in_halves(whole))
