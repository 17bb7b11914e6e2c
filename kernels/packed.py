"""A matrix as its kept values and one bit per weight: what docs/format.md stores, in memory.

On a CPU through compiled loops on torch's threads (`packed_cpu`), elsewhere through plain torch
(`packed_torch`), which is also the truth that the loops are held against. Importing this imports no numba.

Nothing here trusts a bitmap: one that asks for more values than there are, as in a damaged or malicious
checkpoint, never leads outside of memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import packed_torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Packed:
    """A packed tensor.

    Attributes:
        values: [kept] bfloat16, float16 or float32, row-major; float64 too, which no file holds.
        bitmap: [..., rows, ceil(columns / 8)] uint8, least significant bit first; 1 is kept.
        shape: (..., rows, columns) of the dense tensor.
    """

    values: Tensor
    bitmap: Tensor
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What both tensors take."""
        return self.values.nbytes + self.bitmap.nbytes

    def to(self, device: torch.device | str) -> Packed:
        """The same on `device`."""
        return Packed(self.values.to(device), self.bitmap.to(device), self.shape)


def bitmap_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the bitmap of a dense tensor of shape [..., rows, columns]."""
    return (*shape[:-1], -(-shape[-1] // 8))


def packed_bytes(shape: Sequence[int], kept: int, itemsize: int) -> int:
    """Bytes of a packed tensor of which `kept` weights of `itemsize` bytes stay."""
    return kept * itemsize + math.prod(bitmap_shape(shape))


def nonzero_bits(dense: Tensor) -> Tensor:
    """Bool, True where a weight is anything but +0.0: minus zero and NaN are kept."""
    return _words(dense) != 0


def pack(dense: Tensor, keep: Tensor | None = None) -> Packed:
    """Pack `dense` [..., rows, columns], bit for bit.

    Args:
        dense: bfloat16, float16 or float32, two dimensions or more.
        keep: bool, as `dense`: what to keep, zeros among it too; None keeps all that is not +0.0.

    Raises:
        ValueError: for another dtype or shape, or a weight outside `keep` that is not +0.0.
    """
    if dense.dtype not in DTYPES or dense.ndim < 2:
        raise ValueError(f"cannot pack {dense.dtype} of shape {list(dense.shape)}")
    if keep is not None:
        if keep.dtype != torch.bool or keep.shape != dense.shape or keep.device != dense.device:
            raise ValueError(
                f"the mask is {keep.dtype} {list(keep.shape)} on {keep.device}; it must be torch.bool "
                f"{list(dense.shape)} on {dense.device}"
            )
        keep = _matrix(keep.detach())
    words, bitmap = _room(dense).pack(_matrix(_words(dense)), keep)
    shape = tuple(dense.shape)
    return Packed(words.view(dense.dtype), bitmap.view(bitmap_shape(shape)), shape)


def unpack(packed: Packed, out: Tensor | None = None) -> Tensor:
    """The dense tensor, bit for bit.

    Args:
        packed: what to expand. On a GPU the host waits for its check.
        out: where to write it: of its shape, dtype and device, rows next to each other.

    Raises:
        ValueError: where `check` would, or for another `out`.
    """
    _fits(packed)
    rows = math.prod(packed.shape[:-1])
    if out is None:
        out = _empty(packed.shape, packed.values)
    if tuple(out.shape) != tuple(packed.shape):
        raise ValueError(f"out is {list(out.shape)}, the packed tensor {list(packed.shape)}")
    if packed.values.device.type != "cpu":
        check(packed)
    flat = out.detach().view(rows, packed.shape[-1])
    end = _expand(packed, 0, rows, 0, flat)
    if end is not None and end != packed.values.numel():
        raise _disagree(end, packed.values.numel())
    return out


def unpack_rows(
    packed: Packed, start: int, stop: int, first: int, out: Tensor | None = None
) -> Tensor:
    """Dense rows start to stop of the tensor seen as one tall matrix.

    Whoever goes through a matrix tile by tile carries `first` along:
    `first += count(bitmap rows of the tile)`, or takes it from `row_starts`.

    Args:
        packed: where they come from.
        start: first row.
        stop: behind the last row.
        first: index in `packed.values` of the first kept value of row `start`.
        out: [stop - start, columns], of the dtype and device of the values: where to write them.

    Returns:
        `out`, or a new tensor.

    Raises:
        ValueError: for rows or an `out` that do not fit, and on a CPU if the bitmap asks for more values than
            there are. On a GPU that would make the host wait: call `check` once, beforehand.
    """
    rows = math.prod(packed.shape[:-1])
    if not 0 <= start <= stop <= rows or not 0 <= first <= packed.values.numel():
        raise ValueError(
            f"rows {start} to {stop} from value {first} on are not among {rows} rows and "
            f"{packed.values.numel()} values"
        )
    shape = (stop - start, packed.shape[-1])
    if out is None:
        out = _empty(shape, packed.values)
    if tuple(out.shape) != shape:
        raise ValueError(f"out is {list(out.shape)}, the rows are {list(shape)}")
    _expand(packed, start, stop, first, out.detach())
    return out


def count(bitmap: Tensor) -> int:
    """Number of one bits of a uint8 tensor [..., rows, width].

    In plain torch everywhere: who only loads and checks is spared the import of numba.
    """
    if bitmap.dtype != torch.uint8 or bitmap.ndim < 2:
        raise ValueError(f"no bitmap: {bitmap.dtype} of shape {list(bitmap.shape)}")
    _holds_weights(bitmap)
    return packed_torch.count(_matrix(bitmap))


def row_starts(bitmap: Tensor) -> Tensor:
    """Where each row's values begin: int64 [rows + 1] on the device of the bitmap, the last is their number.

    Args:
        bitmap: uint8 [..., rows, width]; rows are those of all leading dimensions, one after the other.
    """
    if bitmap.dtype != torch.uint8 or bitmap.ndim < 2:
        raise ValueError(f"no bitmap: {bitmap.dtype} of shape {list(bitmap.shape)}")
    found: Tensor = _room(bitmap).row_starts(_matrix(bitmap))
    return found


def check(packed: Packed) -> None:
    """Hold a packed tensor that comes from outside against docs/format.md.

    Raises:
        ValueError: if its tensors do not fit its shape, its one bits are not as many as its values, or bits
            behind the last column are not 0.
    """
    _fits(packed)
    left = packed.shape[-1] % 8
    if left and bool((packed.bitmap[..., -1] >> left).any()):
        raise ValueError("bits behind the last column are 1")
    if (ones := count(packed.bitmap)) != packed.values.numel():
        raise _disagree(ones, packed.values.numel())


def pack_bits(bits: Tensor) -> Tensor:
    """Bool [..., columns] as uint8 [..., ceil(columns / 8)], least significant bit first, padded with 0."""
    packed: Tensor = _room(bits).pack_bits(_matrix(bits))
    return packed.view(bitmap_shape(bits.shape))


def unpack_bits(bitmap: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_bits`: bool [..., columns]."""
    if bitmap.dtype != torch.uint8 or bitmap.shape[-1] != -(-columns // 8):
        raise ValueError(f"no bitmap of {columns} columns: {bitmap.dtype} {list(bitmap.shape)}")
    bits: Tensor = _room(bitmap).unpack_bits(_matrix(bitmap), columns)
    return bits.view(*bitmap.shape[:-1], columns)


def select(dense: Tensor, bitmap: Tensor) -> Tensor:
    """Elements of `dense` [..., rows, columns] whose bit is 1, row-major: what `Packed.values` holds.

    Raises:
        ValueError: for a bitmap of another shape or device, or with bits behind the last column.
    """
    if bitmap.dtype != torch.uint8 or tuple(bitmap.shape) != bitmap_shape(dense.shape):
        raise ValueError(
            f"a bitmap {bitmap.dtype} {list(bitmap.shape)} is none of a tensor {list(dense.shape)}"
        )
    if bitmap.device != dense.device:
        raise ValueError(f"the tensor is on {dense.device}, the bitmap is on {bitmap.device}")
    found: Tensor = _room(dense).select(_matrix(_words(dense)), _matrix(bitmap))
    return found.view(dense.dtype)


def _expand(packed: Packed, start: int, stop: int, first: int, out: Tensor) -> int | None:
    """Write rows into `out` [rows, columns]; index of the first value not used, where that is known."""
    _fits(packed)
    if out.dtype != packed.values.dtype or out.device != packed.values.device:
        raise ValueError(
            f"out is {out.dtype} on {out.device}, the values are {packed.values.dtype} on "
            f"{packed.values.device}"
        )
    if out.stride(1) != 1 and out.shape[1] > 1:
        raise ValueError("the rows of out must be contiguous")
    columns, values = packed.shape[-1], packed.values.detach().contiguous()
    bitmap = _matrix(packed.bitmap)[start:stop]
    end: int | None = _room(out).expand(bitmap, columns, _words(values), first, _words(out))
    return end


def _fits(packed: Packed) -> None:
    """Raise where dtypes, shapes and devices contradict each other; reads no weight."""
    values, bitmap = packed.values, packed.bitmap
    if len(packed.shape) < 2 or tuple(bitmap.shape) != bitmap_shape(packed.shape):
        raise ValueError(f"a bitmap {list(bitmap.shape)} is none of a tensor {list(packed.shape)}")
    known = values.dtype in (*DTYPES, torch.float64)
    if bitmap.dtype != torch.uint8 or not known or values.ndim != 1:
        raise ValueError(
            f"values are {values.dtype} {list(values.shape)} and the bitmap is {bitmap.dtype}"
        )
    _holds_weights(values)
    if values.device != bitmap.device:
        raise ValueError(f"values are on {values.device}, the bitmap is on {bitmap.device}")


def _disagree(ones: int, values: int) -> ValueError:
    return ValueError(f"the bitmap has {ones} one bits, and there are {values} values")


def _words(dense: Tensor) -> Tensor:
    """The bits of each weight as a whole number."""
    return dense.detach().view(_BITS[dense.element_size()])


def _empty(shape: Sequence[int], values: Tensor) -> Tensor:
    fresh: Tensor = _room(values).empty(shape, values.detach())
    return fresh


def _matrix(tensor: Tensor) -> Tensor:
    """The tensor as [rows, last dimension]; a view where its strides allow it."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _holds_weights(tensor: Tensor) -> None:
    if tensor.device.type == "meta":
        raise ValueError("a tensor on the device meta has a shape but no weights")


def _room(tensor: Tensor) -> Any:
    """The module that works where `tensor` is."""
    _holds_weights(tensor)
    if tensor.device.type != "cpu":
        return packed_torch
    from . import packed_cpu

    return packed_cpu
