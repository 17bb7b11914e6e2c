"""The tensors of a checkpoint's files: where each one is, and its values when they are asked for.

Only headers are read until then. A packed matrix (docs/format.md) is found under its dense name, with its
dense shape, and is unpacked as it is read.
"""

from __future__ import annotations

import json
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
from llmprune.checkpoint.sparse import BITMAP, SCALES, Entry, once, specs
from llmprune.checkpoint.stored import DTYPES as DTYPES
from llmprune.checkpoint.stored import Packed, Plain, Rows
from llmprune.checkpoint.stored import Stored as Stored
from llmprune.checkpoint.stored import raw as raw
from llmprune.checkpoint.stored import size_of as size_of
from llmprune.checkpoint.unpack import Unpacker
from llmprune.errors import CheckpointError, short

_DIMENSIONS, _WIDEST = 64, 16  # torch's limit; bytes of the widest element
ROWS_AT_ONCE = 2**26  # bytes of a tensor that are copied at a time


@dataclass(frozen=True)
class Header:
    """What one file says of its tensors.

    Attributes:
        file: path of the safetensors file.
        about: its `__metadata__`.
        entries: dtype, shape and data_offsets (from the beginning of the file) of each tensor.
    """

    file: Path
    about: dict[str, str]
    entries: dict[str, dict[str, Any]]


def index(files: Files) -> dict[str, Stored]:
    """Every tensor of a checkpoint by its key, packed matrices under their dense names.

    Raises:
        CheckpointError: a file is missing, damaged or of a dtype that is not read here.
    """
    headers = [header(files.fetch(shard)) for shard in files.shards()]
    found = packed(headers)
    hidden = {key for parts in map(names_of, found, found.values()) for key in parts}
    for head in headers:
        for key in head.entries.keys() - hidden:
            entry = head.entries[key]
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(
                    f"{short(key)} in {short(head.file.name)} is stored as {entry['dtype']}, which "
                    "llmprune does not prune; convert the checkpoint to bfloat16 first"
                )
            dtype, start = DTYPES[entry["dtype"]], entry["data_offsets"][0]
            found[key] = Stored(head.file, dtype, tuple(entry["shape"]), start)
    return dict(sorted(found.items()))


def packed(headers: Sequence[Header]) -> dict[str, Stored]:
    """The packed matrices of a checkpoint, of which these are all headers.

    The parts of a matrix may lie in two files, and several files may describe it: transformers splits a
    model where a file is full, and writes the same description into each.

    Raises:
        CheckpointError: for anything that docs/format.md forbids.
    """
    places: dict[str, tuple[Path, int]] = {}
    plain: dict[str, Entry] = {}
    twice: dict[str, Path] = {}
    for head in headers:
        for key, entry in head.entries.items():
            if key in places:
                twice[key] = head.file
            places[key] = head.file, entry["data_offsets"][0]
            plain[key] = entry["dtype"], entry["shape"]
    found: dict[str, Stored] = {}
    for head in headers:
        for key, spec in specs(head.file.name, head.about, plain).items():
            numbers, bitmap = places[key + spec.parts[0]], places[key + BITMAP]
            scales = None if spec.bits is None else places[key + SCALES]
            where = Packed(spec, numbers, bitmap, scales)
            stored = Stored(where.values[0], spec.torch_dtype, spec.shape, packed=where)
            if found.setdefault(key, stored) != stored:
                raise CheckpointError(
                    f"{short(head.file.name)} and another file describe {short(key)} differently; get "
                    "them again"
                )
    for key, stored in found.items():
        if not found.keys().isdisjoint(names_of(key, stored)[1:]):
            raise CheckpointError(f"{short(key)} is packed, and so is a part of it; get it again")
    if found and twice:
        key, file = min(twice.items())
        raise CheckpointError(
            f"{short(file.name)} holds {short(key)}, and another file does, too; get them again"
        )
    return found


def names_of(key: str, stored: Stored) -> list[str]:
    """What the files may hold of a packed matrix: its dense name, then its parts."""
    assert stored.packed is not None
    return [key, *(key + part for part in stored.packed.spec.parts)]


def header(path: Path) -> Header:
    """The header of a file.

    Raises:
        CheckpointError: when it is no whole safetensors file.
    """
    with opened(path) as file:  # its reader checks that offsets fit shapes and fill the file
        about = dict(file.metadata() or {})
    try:
        with path.open("rb") as plain:
            length = int.from_bytes(plain.read(8), "little")
            entries = json.loads(plain.read(length), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the header of {short(path.name)} cannot be read ({short(error)}); get it again"
        ) from error
    entries.pop("__metadata__", None)
    for key, entry in entries.items():
        if not _possible(entry["shape"]):
            raise CheckpointError(
                f"{short(key)} in {short(path.name)} has shape {short(entry['shape'])}, which torch "
                "cannot hold; get it again"
            )
        entry["data_offsets"] = [8 + length + offset for offset in entry["data_offsets"]]
    return Header(path, about, entries)


def _possible(shape: list[int]) -> bool:
    """Whether torch can hold a tensor of this shape: one without elements has strides, too."""
    longest = math.prod(max(1, n) for n in shape[:_DIMENSIONS])
    return len(shape) <= _DIMENSIONS and longest * _WIDEST < 2**63


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
                f"{short(self.path, 200)} cannot be read ({short(error, 160)}); it is damaged or cut "
                "short: copy or download it again"
            ) from error

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)


class Later:
    """A tensor that is read when it is asked for, as `later[...]`: what transformers does with a slice.

    One is read at a time, whatever thread asks, so that what is not yet widened stays small.
    """

    _one = threading.Lock()

    def __init__(self, stored: Stored, dtype: torch.dtype | None = None) -> None:
        """`dtype` is what to widen or narrow it to; None keeps the stored one."""
        self.stored = stored
        self.dtype = dtype

    def __getitem__(self, everything: Any) -> Tensor:
        """A copy, on the CPU."""
        with self._one:
            return load(self.stored, self.dtype)


def load(stored: Stored, dtype: torch.dtype | None = None) -> Tensor:
    """A whole tensor, in `dtype` or as it is stored."""
    out = torch.empty(stored.shape, dtype=dtype or stored.dtype)
    if not stored.shape:
        return out.copy_(next(pieces(stored)))
    place = 0
    for piece in pieces(stored):
        out[place : place + len(piece)].copy_(piece)  # exact for a lone NaN, unlike an assignment
        place += len(piece)
    return out


def read_rows(stored: Stored, rows: Tensor) -> Tensor:
    """Rows `rows` [n] int64, ascending, of a matrix: [n, columns] in its stored dtype."""
    out = torch.empty(len(rows), stored.shape[-1], dtype=stored.dtype)
    source = rows_of(stored)
    for place, row in enumerate(rows.tolist()):
        out[place].copy_(source.rows(row, 1)[0])
    return out


def pieces(stored: Stored, most: int = ROWS_AT_ONCE) -> Iterator[Tensor]:
    """A tensor in slices along its first dimension, of `most` bytes together or a single one."""
    source = rows_of(stored)
    if not stored.shape or not stored.bytes:
        yield source.rows(0, source.count).reshape(stored.shape)
        return
    length, *inner = stored.shape
    within = math.prod(inner[:-1])
    step = max(1, most // (stored.bytes // length))
    for start in range(0, length, step):
        count = min(step, length - start)
        yield source.rows(start * within, count * within).reshape(count, *inner)


def rows_of(stored: Stored) -> Rows:
    """What gives any range of rows of a tensor; of several matrices, one after the other."""
    return Unpacker(stored) if stored.packed is not None else Plain(stored)


def same(left: Stored, right: Stored) -> bool:
    """Whether two stored tensors hold the same values."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    both = zip(pieces(left), pieces(right), strict=True)
    return all(torch.equal(a, b) for a, b in both)
