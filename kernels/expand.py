"""The kernel that runs everywhere: expand rows into a buffer, multiply, forget.

On a CPU the buffer holds `TILE` weights, so that no dense copy of a matrix is alive. Elsewhere it holds
the whole matrix for as long as the product takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llmprune.kernels.expanding import dense_of, how
from llmprune.kernels.interface import Case, holds_values
from llmprune.kernels.packed import Packed, row_starts, select, unpack_rows
from llmprune.kernels.product import times

# Weights expanded at a time on a CPU: 1 MiB of bfloat16, what a core's L2 cache holds. The products
# alone, dense [4096, 4096] bfloat16 cut into tiles, one core of an EPYC: 16 times less took twice as
# long, 8 times more 0.8 to 0.9 of the time, by more memory.
TILE = 1 << 19


class Expand:
    """Multiplies by the expanded rows. Its layout is the storage form: values and bitmap."""

    name = "expand"
    about = "expands the weights into a buffer, a tile at a time on a CPU, and multiplies"

    def unfit(self, case: Case) -> str | None:
        """Takes everything that has values."""
        return holds_values(case)

    def refuses(self, case: Case) -> str | None:
        """Takes everything that has values."""
        return holds_values(case)

    def route(self, case: Case) -> str:
        """See `Kernel.route`."""
        if case.device.type == "cpu":
            return "expanded a tile at a time"
        return f"expanded into scratch memory {how(case.device)}, then by cuBLAS"

    def prepare(self, packed: Packed) -> list[Tensor]:
        """No copy: [values, bitmap]."""
        return [packed.values, packed.bitmap]

    def packed(self, layout: Sequence[Tensor], shape: Sequence[int]) -> Packed:
        """No copy either."""
        values, bitmap = layout
        return Packed(values, bitmap, tuple(shape))

    def expanded(self, layout: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """See `Kernel.expanded`."""
        return dense_of(self.packed(layout, shape))

    def matmul(
        self,
        x: Tensor,
        layout: Sequence[Tensor],
        bias: Tensor | None,
        shape: Sequence[int],
        transposed: bool,
    ) -> Tensor:
        """See `Kernel.matmul`."""
        packed = self.packed(layout, shape)
        if x.device.type != "cpu":
            return times(x, lambda: dense_of(packed), bias, shape, transposed)
        return tiled(x, tiles(packed), bias, shape, transposed)


Tiles = Iterator[tuple[int, int, Tensor]]
"""First row, last row and the dense weights of the rows between them, in turn."""


def tiled(
    x: Tensor, parts: Tiles, bias: Tensor | None, shape: Sequence[int], transposed: bool
) -> Tensor:
    """Give x @ S.T + bias, or with `transposed` x @ S + bias, from tiles of S [rows, columns]."""
    rows, columns = shape
    return _from_rows(x, parts, bias, columns) if transposed else _to_rows(x, parts, bias, rows)


def _to_rows(x: Tensor, parts: Tiles, bias: Tensor | None, rows: int) -> Tensor:
    """Give x @ S.T + bias: each tile of rows gives outputs of its own."""
    out = x.new_empty(x.shape[0], rows)
    for first, last, tile in parts:
        part = None if bias is None else bias[first:last]
        out[:, first:last] = torch.nn.functional.linear(x, tile, part)
    return out


def _from_rows(x: Tensor, parts: Tiles, bias: Tensor | None, columns: int) -> Tensor:
    """Give x @ S + bias: each tile of rows adds to all outputs, in float32 for half types.

    One product would round once, at the end; so does this.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(x.shape[0], columns, dtype=wide, device=x.device)
    if bias is not None:
        out += bias
    for first, last, tile in parts:
        out.addmm_(x[:, first:last].to(wide), tile.to(wide))
    return out.to(x.dtype)


def values_gradient(left: Tensor, right: Tensor, packed: Packed) -> Tensor:
    """left.T @ right at the kept positions: [kept], of the dtype of the values.

    Args:
        left: [tokens, rows].
        right: [tokens, columns].
        packed: its values are read for dtype and device only.
    """
    gradient = torch.empty_like(packed.values)
    for first, last, begin, end in ranges(packed.bitmap, packed.shape, [len(packed.values)]):
        part = torch.mm(left[:, first:last].T, right)
        gradient[begin:end] = select(part, packed.bitmap[first:last])
    return gradient


def tiles(packed: Packed) -> Tiles:
    """The dense matrix, tile by tile.

    The weights of a tile [rows, columns] lie in one buffer, which the next tile overwrites.

    Raises:
        RuntimeError: when the bitmap counts other than values.
    """
    buffer: Tensor | None = None
    for first, last, begin, _ in ranges(packed.bitmap, packed.shape, [len(packed.values)]):
        if buffer is None:
            buffer = packed.values.new_empty(last - first, packed.shape[1])
        tile = buffer[: last - first]
        yield first, last, unpack_rows(packed, first, last, begin, tile)


def ranges(
    bitmap: Tensor, shape: Sequence[int], kept: Sequence[int]
) -> Iterator[tuple[int, int, int, int]]:
    """First and last row of each tile, and where among what is kept theirs begin and end.

    Args:
        bitmap: of a matrix [rows, columns].
        shape: (rows, columns).
        kept: how many weights may be kept.

    Raises:
        RuntimeError: when the bitmap counts other than one of these.
    """
    rows, columns = shape
    starts = row_starts(bitmap)
    if (ones := int(starts[-1])) not in kept:
        raise RuntimeError(
            f"a bitmap of {list(bitmap.shape)} does not count {kept[-1]} values, but {ones}"
        )
    at_once = rows if bitmap.device.type != "cpu" else max(1, TILE // max(1, columns))
    for first in range(0, rows, max(1, at_once)):
        last = min(first + at_once, rows)
        yield first, last, int(starts[first]), int(starts[last])
