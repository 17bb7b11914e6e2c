"""One tensor in a file: what it is, where it lies, and its bytes, read a range at a time.

Bytes are read into memory of our own and never mapped, so that what passes through counts once and is
gone when it is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llmprune.checkpoint.sparse import Spec
from llmprune.errors import CheckpointError, short

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Packed:
    """Where the parts of a packed matrix lie (docs/format.md).

    Attributes:
        spec: what the header says of the matrix.
        values: file of the kept values, or of the whole numbers that stand for them, and their first byte.
        bitmap: the same of the bitmap.
        scales: the same of the scales; None where there are none.
    """

    spec: Spec
    values: tuple[Path, int]
    bitmap: tuple[Path, int]
    scales: tuple[Path, int] | None = None


@dataclass(frozen=True)
class Stored:
    """One tensor in a file; a packed matrix looks as the dense one that it stands for.

    Attributes:
        file: path of the safetensors file; of a packed matrix, that of its values.
        dtype: as stored.
        shape: of the dense tensor.
        start: first byte in the file; of no meaning for a packed matrix.
        packed: where the parts of a packed matrix are; None for a dense tensor.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0
    packed: Packed | None = None

    @property
    def bytes(self) -> int:
        """Size of the dense tensor."""
        return size_of(self.dtype, self.shape)

    @property
    def bytes_in_file(self) -> int:
        """Size in the file."""
        return self.bytes if self.packed is None else self.packed.spec.bytes


def size_of(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return dtype.itemsize * math.prod(shape)


class Rows(Protocol):
    """A stored tensor as rows along its last dimension.

    Attributes:
        columns: length of a row.
        count: number of rows, all leading dimensions together.
    """

    columns: int
    count: int

    def rows(self, first: int, count: int) -> Tensor:
        """Rows [count, columns], from `first` on."""


class Plain:
    """The rows of a tensor that is stored as it is; one of fewer than two dimensions has rows of one."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        above = stored.shape[:-1] if len(stored.shape) > 1 else stored.shape
        self.count = math.prod(above)
        self.columns = stored.shape[-1] if len(stored.shape) > 1 else 1

    def rows(self, first: int, count: int) -> Tensor:
        """Rows [count, columns], from `first` on."""
        each, dtype = self.columns, self._stored.dtype
        start = self._stored.start + first * each * dtype.itemsize
        return read(self._stored.file, start, count * each, dtype).reshape(count, each)


def read(file: Path, start: int, count: int, dtype: torch.dtype) -> Tensor:
    """`count` elements that begin at byte `start` of `file`: [count].

    Raises:
        CheckpointError: when the file is shorter, or cannot be read.
    """
    out = torch.empty(count, dtype=dtype)
    rest, at = raw(out), start
    try:
        with file.open("rb", buffering=0) as opened:
            opened.seek(at)
            while rest:
                done = opened.readinto(rest)
                if not done:
                    raise CheckpointError(
                        f"{short(file, 200)} is cut short: it ends before byte "
                        f"{start + count * dtype.itemsize}; copy or download it again"
                    )
                rest = rest[done:]
    except OSError as error:
        raise CheckpointError(
            f"{short(file, 200)} cannot be read: {error.strerror or error}"
        ) from error
    return out


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, on the CPU and in order; shares its memory where it can."""
    flat: Any = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())
