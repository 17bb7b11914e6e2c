"""What the kernels for few tokens share: all of them `Measured`, those that read n:m as words `Words`.

A layout of `Words` is [marker, words], or [marker, words, bitmap]. The marker is empty and tells the dtype. A
group that keeps fewer than n is filled up with +0.0, so the words tell which weights are kept, those that are
not +0.0, unless a kept weight is +0.0 itself. Then, if no group is filled up, all slots are kept, and the
marker is [0, 1]; else the bitmap tells.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from llmprune.kernels import gpu, measure, table
from llmprune.kernels.expanding import how
from llmprune.kernels.interface import Case, holds_values
from llmprune.kernels.packed import Packed, pack, select, unpack_bits
from llmprune.kernels.product import times
from llmprune.kernels.slots import row_blocks

HALVES = (torch.bfloat16, torch.float16)
PIECES = (
    4  # that a product is cut into at most, each of as many tokens as a kernel takes; not measured
)

L = TypeVar("L")


class Measured(ABC, Generic[L]):
    """A kernel for few tokens; for many, and for the backward, the matrix is expanded for cuBLAS.

    L is what it reads of a layout.
    """

    name: str
    about: str
    pattern: str
    """Of the matrices that it holds, for the table."""
    tokens: int
    """Up to how many the kernel takes at once."""
    revision: int
    """Of the kernel's code, for the table."""
    dtypes: Sequence[torch.dtype] = HALVES
    """Of the matrices that it holds."""

    @abstractmethod
    def unavailable(self, device: torch.device) -> str | None:
        """Why it must not be used on `device`, or None. Tries it once there, which the host waits for."""

    @abstractmethod
    def read(self, layout: Sequence[Tensor]) -> L:
        """What the kernel reads of a layout."""

    @abstractmethod
    def sample(
        self, device: torch.device, sides: tuple[int, int], dtype: torch.dtype
    ) -> tuple[Tensor, L]:
        """A random matrix (out, in), dense and as it is read, to be measured."""

    @abstractmethod
    def dense(self, words: L, shape: tuple[int, int], dtype: torch.dtype, slots: bool) -> Tensor:
        """The matrix; with `slots` a 1 in each slot instead of its value. The host does not wait."""

    @abstractmethod
    def product(
        self,
        x: Tensor,
        words: L,
        bias: Tensor | None,
        shape: tuple[int, int],
        warps: int | None = None,
        split: int | None = None,
    ) -> Tensor:
        """The product of few tokens, x [tokens, columns], by the kernel; None is its default."""

    @abstractmethod
    def splits(self, sides: tuple[int, int], warps: int) -> list[int]:
        """In how many parts it may be worth to split the columns of a matrix (out, in), 1 first."""

    def how(self, device: torch.device) -> str:
        """By what `dense` expands there, for people."""
        return how(device)

    def launches(self, device: torch.device) -> bool:
        """Whether `product` can run on tensors that lie there."""
        return gpu.launches(device)

    def unfit(self, case: Case) -> str | None:
        """Why it cannot be used at all, or None; may try it on the device."""
        return self.static(case) or self.unavailable(gpu.whole(case.device))

    def static(self, case: Case) -> str | None:
        """Why it cannot be used whatever the GPU, or None."""
        if (why := holds_values(case)) is not None:
            return why
        if case.trains:
            return "the weights are trained"
        if case.device.type != "cuda":
            return "needs an NVIDIA GPU"
        if case.dtype not in self.dtypes:
            known = [str(dtype).removeprefix("torch.") for dtype in (*self.dtypes, case.dtype)]
            return f"needs {', '.join(known[:-2])} or {known[-2]}, not {known[-1]}"
        return self._misfit(case)

    @abstractmethod
    def _misfit(self, case: Case) -> str | None:
        """What is wrong with the pattern or the shape."""

    def refuses(self, case: Case) -> str | None:
        """See `Kernel.refuses`."""
        return self.unfit(case) or self.slow(case)

    def slow(self, case: Case) -> str | None:
        """Why dense is better by what was measured, or None; only of a case that is not unfit."""
        matrix = self.matrix(gpu.whole(case.device), case.sides, case.dtype)
        if (why := measure.FAILED.get(matrix)) is not None:
            return why
        slow = table.current().slow(matrix)
        if slow is None:
            return None
        return f"measured slower than dense at {table.counted(slow.tokens)} ({slow.gain:.2f}x)"

    @property
    def most(self) -> int:
        """Up to how many tokens the kernel may be quicker than expanding, a piece of them at a time."""
        return PIECES * self.tokens

    def pieces(
        self,
        x: Tensor,
        words: L,
        bias: Tensor | None,
        shape: tuple[int, int],
        warps: int | None = None,
        split: int | None = None,
    ) -> Tensor:
        """The product of any tokens, as many at a time as the kernel takes."""
        cut = (x[i : i + self.tokens] for i in range(0, len(x), self.tokens))
        parts = [self.product(piece, words, bias, shape, warps, split) for piece in cut]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def matrix(
        self, device: torch.device, sides: tuple[int, int], dtype: torch.dtype
    ) -> table.Matrix:
        """How the table knows a matrix (out, in) that lies there."""
        return _matrix(self, device, sides, dtype)

    def timing(self, matrix: table.Matrix, tokens: int) -> table.Timing | None:
        """What was measured of the kernel for so many tokens or the next more, or None."""
        found = table.current().at(matrix, tokens)
        return found if found is not None and found.kernel_us is not None else None

    def launch(self, matrix: table.Matrix, tokens: int) -> tuple[int | None, int | None] | None:
        """Warps and split by which the kernel takes so many tokens; None where they are expanded."""
        if not 0 < tokens <= self.most:
            return None
        timing = self.timing(matrix, tokens)
        if timing is None:
            return (None, None) if tokens <= self.tokens else None
        return (timing.warps, timing.split) if timing.by_kernel else None

    def route(self, case: Case) -> str:
        """See `Kernel.route`."""
        matrix = self.matrix(gpu.whole(case.device), case.sides, case.dtype)
        timing = self.timing(matrix, case.tokens)
        by = f"expanded into scratch memory {self.how(case.device)}, then by cuBLAS"
        if self.launch(matrix, case.tokens) is not None:
            many = case.tokens > self.tokens
            by = f"by the kernel, {self.tokens} at a time" if many else "by the kernel"
        if not 0 < case.tokens <= self.most:
            return by
        if timing is None:
            return f"{by}; not measured{measure.left_out(matrix)}"
        dense = f"dense {timing.dense_us:.1f} us at {table.counted(timing.tokens)}"
        return f"{by}; measured: {timing.best:.1f} us, {dense}"

    def expanded(self, layout: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """See `Kernel.expanded`."""
        rows, columns = shape
        return self.dense(self.read(layout), (rows, columns), layout[0].dtype, False)

    def matmul(
        self,
        x: Tensor,
        layout: Sequence[Tensor],
        bias: Tensor | None,
        shape: Sequence[int],
        transposed: bool,
    ) -> Tensor:
        """See `Kernel.matmul`."""
        rows, columns = shape
        if not transposed and 0 < len(x) <= self.most and self.launches(x.device):
            matrix = self.matrix(x.device, (rows, columns), x.dtype)
            if (launch := self.launch(matrix, len(x))) is not None:
                return self.pieces(x, self.read(layout), bias, (rows, columns), *launch)
        return times(x, lambda: self.expanded(layout, shape), bias, shape, transposed)


class Words(Measured[Tensor]):
    """A kernel for n:m along the inputs."""

    n: int
    m: int

    @property
    def pattern(self) -> str:  # type: ignore[override]
        """See `Measured.pattern`."""
        return f"{self.n}:{self.m}"

    @abstractmethod
    def lay(self, packed: Packed) -> Tensor:
        """The words of a matrix."""

    def read(self, layout: Sequence[Tensor]) -> Tensor:
        """See `Measured.read`."""
        return layout[1]

    def sample(
        self, device: torch.device, sides: tuple[int, int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """See `Measured.sample`."""
        return measure.random_words(self, device, sides, dtype)

    def _misfit(self, case: Case) -> str | None:
        """What is wrong with the pattern or the shape."""
        if case.nm is None or not self.holds(*case.nm):
            return f"needs {self.n}:{self.m}, not {case.pattern}"
        if not case.along_inputs:
            return "needs groups along the inputs, these lie along the outputs"
        if case.sides[1] % self.m:
            return f"needs inputs in multiples of {self.m}, not {case.sides[1]}"
        if not min(case.sides):
            return "there are no weights"
        return None

    def holds(self, n: int, m: int) -> bool:
        """Whether a matrix that keeps at most n of every m can be laid out."""
        return (n, m) == (self.n, self.m)

    def prepare(self, packed: Packed) -> list[Tensor]:
        """See `Kernel.prepare`.

        Raises:
            ValueError: where a group keeps more than n, or for another dtype or shape than the kernel takes.
        """
        full, words = self._all_full(packed.bitmap, packed.shape), self.lay(packed)
        if bool((packed.values.detach().view(torch.int16) != 0).all()):
            return [packed.values.new_empty(0), words]
        if full:
            return [packed.values.new_empty(0, 1), words]
        return [packed.values.new_empty(0), words, packed.bitmap]

    def packed(self, layout: Sequence[Tensor], shape: Sequence[int]) -> Packed:
        """See `Kernel.packed`."""
        marker, words, *bitmap = layout
        rows, columns = shape
        dense = self.dense(words, (rows, columns), marker.dtype, False)
        if bitmap:
            return Packed(select(dense, bitmap[0]), bitmap[0], (rows, columns))
        keep = None
        if marker.dim() == 2:
            keep = self.dense(words, (rows, columns), marker.dtype, True) != 0
        return pack(dense, keep)

    def _all_full(self, bitmap: Tensor, shape: Sequence[int]) -> bool:
        """Whether each group keeps n."""
        rows, columns = shape
        if columns % self.m:
            raise ValueError(
                f"{self.n}:{self.m} needs rows of a multiple of {self.m} weights, got {columns}"
            )
        least = most = self.n
        blocks = row_blocks(rows, columns, 1)
        for row in blocks:
            bits = unpack_bits(bitmap[row : row + blocks.step], columns)
            kept = bits.reshape(-1, self.m).sum(1, dtype=torch.uint8)
            least, most = min(least, int(kept.min())), max(most, int(kept.max()))
        if most > self.n:
            raise ValueError(f"not {self.n}:{self.m}: a group keeps {most}")
        return least == self.n


@lru_cache(4096)
def _matrix(
    kernel: Measured[Any], device: torch.device, sides: tuple[int, int], dtype: torch.dtype
) -> table.Matrix:
    name, capability = gpu.identity(device)
    of = str(dtype).removeprefix("torch.")
    return table.Matrix(name, capability, kernel.name, kernel.revision, kernel.pattern, *sides, of)
