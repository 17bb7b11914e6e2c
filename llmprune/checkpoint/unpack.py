"""Read a packed matrix from its file, any range of rows at a time.

The bitmap is looked at once before a value is used: as many one bits as there are values, and none behind
the last column. What is remembered of it is how many weights are kept before every few thousand rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from llmprune.checkpoint.stored import Stored, read
from llmprune.errors import CheckpointError, short
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
            values = self._values(offset, kept)
            place = start - first
            unpack(Packed(values, bitmap, (rows, self.columns)), out[place : place + rows])
            offset += kept
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

    def _values(self, first: int, count: int) -> Tensor:
        file, start = self._at.values
        dtype = self._stored.dtype
        return read(file, start + first * dtype.itemsize, count, dtype)

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
