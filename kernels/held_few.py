"""What layers of few bits are held in where no kernel reads whole numbers: expanded at each call, or dense.

A layout is [marker, whole, scales, bitmap]; that of `dense` has the dense matrix behind them, as whole
cannot be found again from it. The marker is empty, its dtype is that of the weights, and its shape says what
the tensors do not: (0, neighbours that share a scale, axis, dtype that products are rounded to first).

State: tested on a CPU. **On a GPU it has not run.**
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmprune.kernels.dense import room_for
from llmprune.kernels.expand import Tiles, ranges, tiled
from llmprune.kernels.few_bits import FewBits, dense_whole, in_halves, of_halves
from llmprune.kernels.few_expand import dense_of_few, how
from llmprune.kernels.interface import Case
from llmprune.kernels.packed import DTYPES, Packed, pack_bits, unpack_bits, unpack_rows
from llmprune.kernels.product import times

_AXES = ("rows", "columns")


def layout_of(few: FewBits, dtype: torch.dtype) -> list[Tensor]:
    """[marker, whole, scales, bitmap] of a matrix whose weights are brought to `dtype`; copies nothing."""
    about = (0, few.group, _AXES.index(few.axis), DTYPES.index(few.dtype))
    return [few.whole.new_empty(about, dtype=dtype), few.whole, few.scales, few.bitmap]


def few_of(layout: Sequence[Tensor], shape: Sequence[int]) -> FewBits:
    """The matrix [rows, columns] of a layout; copies nothing."""
    marker, whole, scales, bitmap = layout[:4]
    _, group, axis, rounded = marker.shape
    bits = 8 if whole.dtype is torch.int8 else 4
    size = (shape[0], shape[1])
    return FewBits(whole, scales, bitmap, size, bits, group, DTYPES[rounded], _AXES[axis])


class ExpandFew:
    """Multiplies by whole numbers times scales, expanded at each call."""

    def __init__(self, bits: int) -> None:
        """Of 8 or 4."""
        self.bits, self.name = bits, f"expand int{bits}"
        self.about = f"expands int{bits} times scales into a buffer, a tile at a time on a CPU"

    def unfit(self, case: Case) -> str | None:
        """Takes everything of its bits."""
        return other_bits(case, self.bits)

    def refuses(self, case: Case) -> str | None:
        """Takes everything of its bits."""
        return other_bits(case, self.bits)

    def route(self, case: Case) -> str:
        """See `Kernel.route`."""
        if case.device.type == "cpu":
            return "expanded a tile at a time"
        return f"expanded into scratch memory {how(case.device)}, then by cuBLAS"

    def prepare(self, few: FewBits) -> list[Tensor]:
        """No copy."""
        return layout_of(few, few.dtype)

    def packed(self, layout: Sequence[Tensor], shape: Sequence[int]) -> FewBits:
        """No copy either."""
        return few_of(layout, shape)

    def expanded(self, layout: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """See `Kernel.expanded`."""
        few, dtype = few_of(layout, shape), layout[0].dtype
        if few.whole.device.type != "cpu":
            return dense_of_few(few).to(dtype)
        out = few.whole.new_empty(tuple(shape), dtype=dtype)
        for first, last, tile in tiles(few):
            out[first:last] = tile
        return out

    def matmul(
        self,
        x: Tensor,
        layout: Sequence[Tensor],
        bias: Tensor | None,
        shape: Sequence[int],
        transposed: bool,
    ) -> Tensor:
        """See `Kernel.matmul`."""
        few, dtype = few_of(layout, shape), layout[0].dtype
        if x.device.type != "cpu":
            return times(x, lambda: dense_of_few(few).to(dtype), bias, shape, transposed)
        parts = ((first, last, tile.to(dtype)) for first, last, tile in tiles(few))
        return tiled(x, parts, bias, shape, transposed)


class DenseFew:
    """Multiplies the dense matrix, beside the whole numbers: 21 bits per weight of int8 2:4, 19 of int4."""

    def __init__(self, bits: int, slower: Callable[[Case], bool]) -> None:
        """Chosen where `slower` says of a case that its kernel was measured slower than this."""
        self.bits, self.name, self._slower = bits, f"dense int{bits}", slower
        self.about = (
            f"multiplies the dense matrix, beside int{bits} and scales: more memory than dense"
        )

    def unfit(self, case: Case) -> str | None:
        """Why a layer cannot be held dense, or None."""
        return other_bits(case, self.bits) or other_dtype(case)

    def refuses(self, case: Case) -> str | None:
        """See `Kernel.refuses`."""
        if (why := self.unfit(case)) is not None:
            return why
        if not self._slower(case):
            return "no kernel for it was measured slower"
        return None if room_for(case) else "would leave less than a tenth of the GPU's memory"

    def route(self, case: Case) -> str:
        """See `Kernel.route`."""
        return "dense, by cuBLAS"

    def prepare(self, few: FewBits) -> list[Tensor]:
        """See `Kernel.prepare`."""
        layout = layout_of(few, few.dtype)
        return [*layout, ExpandFew(self.bits).expanded(layout, few.shape)]

    def packed(self, layout: Sequence[Tensor], shape: Sequence[int]) -> FewBits:
        """See `Kernel.packed`."""
        return few_of(layout, shape)

    def expanded(self, layout: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """See `Kernel.expanded`."""
        return layout[4].clone()

    def matmul(
        self,
        x: Tensor,
        layout: Sequence[Tensor],
        bias: Tensor | None,
        shape: Sequence[int],
        transposed: bool,
    ) -> Tensor:
        """See `Kernel.matmul`."""
        return times(x, lambda: layout[4], bias, shape, transposed)


def other_bits(case: Case, bits: int) -> str | None:
    """Why a kernel of whole numbers of `bits` refuses a layer, or None."""
    if case.bits == bits:
        return None
    return f"holds int{bits}, and these are {'values' if case.bits is None else f'int{case.bits}'}"


def other_dtype(case: Case) -> str | None:
    """Why whole numbers times scales are not the weights of a layer, or None."""
    if case.rounded == case.dtype:
        return None
    rounded, dtype = (str(t).removeprefix("torch.") for t in (case.rounded, case.dtype))
    return f"the weights are rounded to {rounded}, as they are stored, before they are {dtype}"


def tiles(few: FewBits) -> Tiles:
    """The dense matrix, of `few.dtype`, tile by tile.

    The weights of a tile [rows, columns] lie in one buffer, which the next tile overwrites.

    Raises:
        RuntimeError: when the bitmap counts other than whole numbers.
    """
    columns, count = few.shape[1], len(few.whole)
    kept = [count] if few.bits == 8 else [2 * count - 1, 2 * count]
    buffer: Tensor | None = None
    for first, last, begin, end in ranges(few.bitmap, few.shape, kept):
        if buffer is None:
            buffer = few.whole.new_empty(last - first, columns, dtype=few.dtype)
        tile = buffer[: last - first]
        values = _between(few, begin, end).to(few.dtype)  # exact: they have seven bits
        packed = Packed(values, few.bitmap[first:last], (last - first, columns))
        yield first, last, scaled(unpack_rows(packed, 0, last - first, 0, tile), few, first)


def _between(few: FewBits, begin: int, end: int) -> Tensor:
    """The whole numbers from `begin` to `end` of all that are kept: int8."""
    if few.bits == 8:
        return few.whole[begin:end]
    bytes = few.whole[begin // 2 : -(-end // 2)]
    return of_halves(bytes)[begin % 2 :][: end - begin]


def scaled(tile: Tensor, few: FewBits, first: int) -> Tensor:
    """Whole numbers [n, columns], those of the rows from `first` on, times their scales, in place.

    Products of half types are float32 ones that are rounded once, on a CPU and on a GPU, and float32 holds
    these exactly.
    """
    if few.axis == "columns":
        rows = torch.arange(first, first + len(tile), device=tile.device) // few.group
        return tile.mul_(few.scales[rows])
    scales = few.scales[first : first + len(tile)]
    groups = tile.shape[1] // few.group
    whole = groups * few.group
    tile[:, :whole].view(len(tile), groups, few.group).mul_(scales[:, :groups, None])
    if whole < tile.shape[1]:
        tile[:, whole:].mul_(scales[:, -1:])
    return tile


def transposed_few(few: FewBits) -> FewBits:
    """The transpose, whole numbers and all."""
    rows, columns = few.shape
    keep = unpack_bits(few.bitmap, columns).T.contiguous()
    whole = dense_whole(few).T[keep]
    return FewBits(
        whole if few.bits == 8 else in_halves(whole),
        few.scales.T.contiguous(),
        pack_bits(keep),
        (columns, rows),
        few.bits,
        few.group,
        few.dtype,
        "rows" if few.axis == "columns" else "columns",
    )
