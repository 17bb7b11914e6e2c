"""The kernel that runs everywhere: expand rows into a buffer, multiply, forget.

On a CPU the buffer holds `TILE` weights, so that no dense copy of a matrix is alive. Elsewhere it holds
the whole matrix for as long as the product takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llmprune.kernels.interface import Case
from llmprune.kernels.packed import Packed, unpack_bits

# Weights expanded at a time on a CPU: 1 MiB of bfloat16, what a core's L2 cache holds. The products
# alone, dense [4096, 4096] bfloat16 cut into tiles, one core of an EPYC: 16 times less took twice as
# long, 8 times more 0.8 to 0.9 of the time, by more memory.
TILE = 1 << 19


class Expand:
    """Multiplies by the expanded rows. Its layout is the storage form: values and bitmap."""

    name = "expand"
    about = "expands the weights into a buffer, a tile at a time on a CPU, and multiplies"

    def refuses(self, case: Case) -> str | None:
        """Takes everything."""
        return None

    def prepare(self, packed: Packed) -> list[Tensor]:
        """No copy: [values, bitmap]."""
        return [packed.values, packed.bitmap]

    def packed(self, layout: Sequence[Tensor], shape: Sequence[int]) -> Packed:
        """No copy either."""
        values, bitmap = layout
        return Packed(values, bitmap, tuple(shape))

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
        return _from_rows(x, packed, bias) if transposed else _to_rows(x, packed, bias)


def _to_rows(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """Give x @ S.T + bias: each tile of rows gives outputs of its own."""
    out = x.new_empty(x.shape[0], packed.shape[0])
    for first, last, tile, _ in tiles(packed):
        part = None if bias is None else bias[first:last]
        out[:, first:last] = torch.nn.functional.linear(x, tile, part)
    return out


def _from_rows(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """Give x @ S + bias: each tile of rows adds to all outputs, in float32 for half types.

    One product would round once, at the end; so does this.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(x.shape[0], packed.shape[1], dtype=wide, device=x.device)
    if bias is not None:
        out += bias
    for first, last, tile, _ in tiles(packed):
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
    offset = 0
    for first, last, _, bits in tiles(packed, expand=False):
        part = torch.mm(left[:, first:last].T, right)[bits]
        gradient[offset : offset + len(part)] = part
        offset += len(part)
    return gradient


def tiles(packed: Packed, expand: bool = True) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """First row, last row, their dense weights and which are kept, tile by tile.

    The weights [rows, columns] lie in one buffer, which the next tile overwrites; without `expand`,
    there are none.

    Raises:
        RuntimeError: when the bitmap counts other than values.
    """
    rows, columns = packed.shape
    at_once = rows if packed.bitmap.device.type != "cpu" else max(1, TILE // max(1, columns))
    buffer = packed.values.new_empty(min(rows, at_once) if expand else 0, columns)
    offset = 0
    for first in range(0, rows, max(1, at_once)):
        last = min(first + at_once, rows)
        bits = unpack_bits(packed.bitmap[first:last], columns)
        kept = int(bits.sum())
        values = packed.values[offset : offset + kept]
        if len(values) != kept:
            break
        offset += kept
        tile = buffer[: last - first] if expand else buffer
        if expand:
            tile.zero_().masked_scatter_(bits, values)
        yield first, last, tile, bits
    if offset != len(packed.values):
        raise RuntimeError(
            f"a bitmap of {list(packed.bitmap.shape)} does not count {len(packed.values)} values"
        )
