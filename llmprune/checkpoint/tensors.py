"""The tensors of a checkpoint's files: where each one is, and its values when they are asked for.

Only headers are read until then. What is read is copied out of the file and the file closed again, so
that no mapped page outlives the block that needed it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmprune.checkpoint.files import Files
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
ROWS_AT_ONCE = 2**26  # bytes of a tensor that are copied at a time


@dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    Attributes:
        file: path of the safetensors file.
        dtype: as stored.
        shape: as stored.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return size_of(self.dtype, self.shape)


def size_of(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return dtype.itemsize * math.prod(shape)


def index(files: Files) -> dict[str, Stored]:
    """Every tensor of a checkpoint by its key.

    Raises:
        CheckpointError: a file is missing, damaged or of a dtype that is not read here.
    """
    found: dict[str, Stored] = {}
    for shard in files.shards():
        path = files.fetch(shard)
        with opened(path) as file:
            for key in sorted(file.keys()):
                entry = file.get_slice(key)
                name = str(entry.get_dtype())
                if name not in DTYPES:
                    raise CheckpointError(
                        f"{key} in {path.name} is stored as {name}, which llmprune does not prune; "
                        "convert the checkpoint to bfloat16 first"
                    )
                found[key] = Stored(path, DTYPES[name], tuple(entry.get_shape()))
    return found


class opened:
    """`safe_open` for the CPU, whose errors name the file and say what to do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        try:
            opener: Any = safe_open
            self._file: Any = opener(self.path, framework="pt", device="cpu")
            return self._file.__enter__()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{short(self.path, 200)} cannot be read ({short(error, 160)}); it is damaged: copy or "
                "download it again"
            ) from error

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)


class Later:
    """A tensor that is read when it is asked for, as `later[...]`: what transformers does with a slice.

    One is read at a time, whatever thread asks, so that what is mapped or not yet widened stays small.
    """

    _one = threading.Lock()

    def __init__(self, stored: Stored, key: str, dtype: torch.dtype | None) -> None:
        """`dtype` is what to widen or narrow it to; None keeps the stored one."""
        self.stored = stored
        self.key = key
        self.dtype = dtype

    def __getitem__(self, everything: Any) -> Tensor:
        """A copy, on the CPU."""
        with self._one, opened(self.stored.file) as file:
            found: Tensor = file.get_tensor(self.key)
            return found.to(self.dtype or found.dtype, copy=True)


def read_rows(stored: Stored, key: str, rows: Tensor) -> Tensor:
    """Rows `rows` [n] int64, ascending, of a matrix: [n, columns] in its stored dtype."""
    out = torch.empty(len(rows), *stored.shape[1:], dtype=stored.dtype)
    with opened(stored.file) as file:
        entry = file.get_slice(key)
        for place, row in enumerate(rows.tolist()):
            out[place] = entry[row : row + 1][0]
    return out


def pieces(stored: Stored, key: str) -> Iterator[Tensor]:
    """A tensor in slices along its first dimension, small enough to pass through memory."""
    with opened(stored.file) as file:
        if not stored.shape or stored.bytes <= ROWS_AT_ONCE:
            yield file.get_tensor(key)
            return
        entry = file.get_slice(key)
        step = max(1, ROWS_AT_ONCE // (stored.bytes // stored.shape[0]))
        for start in range(0, stored.shape[0], step):
            yield entry[start : start + step]


def same(left: tuple[Stored, str], right: tuple[Stored, str]) -> bool:
    """Whether two stored tensors hold the same values."""
    if left[0].shape != right[0].shape or left[0].dtype != right[0].dtype:
        return False
    both = zip(pieces(*left), pieces(*right), strict=True)
    return all(torch.equal(a, b) for a, b in both)


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, on the CPU and in order; shares its memory where it can."""
    flat: Any = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())
