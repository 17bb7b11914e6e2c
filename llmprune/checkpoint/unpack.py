"""Read a packed matrix from its file, any range of rows at a time.

The bitmap is looked at once before a value is used: as many one bits as there are values, and none behind
the last column. What is remembered of it is how many weights are kept before every few thousand rows. Whole
numbers and scales are looked at whenever they are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from llmprune.checkpoint.stored import Stored, read
from llmprune.checkpoint.whole import flaw, rows_of_scales, spread
from llmprune.errors import CheckpointError, short
from llmprune.kernels.few_bits import of_halves, products
from llmprune.kernels.packed import Packed, unpack
from llmprune.kernels.packed import count as ones_in

WEIGHTS_AT_ONCE = 2**21  # unpacked together: a few MB with all temporaries


class Unpacker:
    """The rows of a packed matrix; several matrices ([experts, rows, columns]) are one tall one."""

    def __init__(self, stored: Stored) -> None:
        """Check the bitmap of `stored`, which is packed.

        Raises:
            CheckpointError: when bitmap and values disagree, or the file cannot be read.
        """
        assert stored.packed is not None
        self._stored, self._at = stored, stored.packed
        *above, self.columns = stored.shape
        self.count = math.prod(above)
        self._width = -(-self.columns // 8)
        self._step = max(1, WEIGHTS_AT_ONCE // self.columns)
        self._before = [0]  # kept weights before row 0, step, 2 step, ...
        for first, rows in self._steps(0, self.count):
            self._before.append(self._before[-1] + self._checked(self._bitmap(first, rows)))
        if self._before[-1] != self._at.spec.kept:
            raise self._broken(
                f"{self._before[-1]} bits are set in a bitmap, and there are {self._at.spec.kept} values"
            )

    def rows(self, first: int, count: int) -> Tensor:
        """Rows [count, columns], from `first` on."""
        out = torch.empty(count, self.columns, dtype=self._stored.dtype)
        offset = self._offset(first)
        for start, rows in self._steps(first, count):
            bitmap = self._bitmap(start, rows)
            kept = ones_in(bitmap)
            values = self._values(offset, kept, start, bitmap)
            place = start - first
            unpack(Packed(values, bitmap, (rows, self.columns)), out[place : place + rows])
            offset += kept
        return out

    def values(self) -> Tensor:
        """The kept weights of all rows: [kept]."""
        out = torch.empty(self._at.spec.kept, dtype=self._stored.dtype)
        done = 0
        for start, rows in self._steps(0, self.count):
            bitmap = self._bitmap(start, rows)
            kept = ones_in(bitmap)
            out[done : done + kept].copy_(self._values(done, kept, start, bitmap))
            done += kept
        return out

    def _steps(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """(first, rows) of parts that are small enough to be unpacked together."""
        for start in range(first, first + count, self._step):
            yield start, min(self._step, first + count - start)

    def _offset(self, row: int) -> int:
        """How many weights are kept before `row`."""
        part, rest = divmod(row, self._step)
        begun = self._before[part]
        return begun + ones_in(self._bitmap(part * self._step, rest)) if rest else begun

    def _bitmap(self, first: int, count: int) -> Tensor:
        file, start = self._at.bitmap
        flat = read(file, start + first * self._width, count * self._width, torch.uint8)
        return flat.reshape(count, self._width)

    def _values(self, first: int, count: int, row: int, bitmap: Tensor) -> Tensor:
        """`count` kept weights from number `first` on, which are those of the rows `bitmap` from `row` on."""
        dtype = self._stored.dtype
        if self._at.spec.bits is not None:
            whole, scales = self._whole(first, count), self._scales(row, len(bitmap))
            if why := flaw(whole, scales, self._at.spec.bits):
                raise self._broken(why)
            return products(whole, spread(scales, self._at.spec, row, len(bitmap)), bitmap, dtype)
        file, start = self._at.values
        return read(file, start + first * dtype.itemsize, count, dtype)

    def _whole(self, first: int, count: int) -> Tensor:
        """`count` whole numbers from number `first` on: int8."""
        file, start = self._at.values
        spec = self._at.spec
        if spec.bits == 8:
            return read(file, start + first, count, torch.int8)
        before, last = first // 2, -(-(first + count) // 2)
        numbers = of_halves(read(file, start + before, last - before, torch.uint8))
        if first + count == spec.kept and spec.kept % 2 and int(numbers[-1]):
            raise self._broken("half a byte behind the last whole number is not 0")
        return numbers[first - 2 * before :][:count]

    def _scales(self, row: int, count: int) -> Tensor:
        """All scales that `count` rows from `row` on need: bfloat16."""
        assert self._at.scales is not None
        file, start = self._at.scales
        places, width = rows_of_scales(self._at.spec, row, count), self._at.spec.scales_shape[-1]
        first, last = int(places[0]), int(places[-1]) + 1
        at = start + first * width * torch.bfloat16.itemsize
        return read(file, at, (last - first) * width, torch.bfloat16).view(-1, width)

    def _checked(self, bitmap: Tensor) -> int:
        """The number of one bits, once it is known that there are none behind the last column."""
        spare = 8 * self._width - self.columns
        if spare and bool((bitmap[:, -1] >> (8 - spare)).any()):
            raise self._broken("bits are set behind the last column of a bitmap")
        return ones_in(bitmap)

    def _broken(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{short(self._stored.file, 200)} is damaged: {why} (a matrix of shape "
            f"{list(self._stored.shape)}); copy or download it again"
        )
