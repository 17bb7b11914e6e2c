"""The files of an output checkpoint, laid out before the first weight is known.

Every key, shape and dtype is known from the start, so the headers and the places of all tensors are too:
a block is written into its place as soon as it is done, and the files are whole when the last one is.
Of a packed matrix (docs/format.md) the number of kept weights has to be known beforehand, too, and in fewer
bits the group that shares a scale.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from llmprune.checkpoint.sparse import BITMAP, SCALES, VALUES, WHOLE, Spec, metadata
from llmprune.checkpoint.tensors import DTYPES, Stored, raw, size_of
from llmprune.checkpoint.whole import stored_parts
from llmprune.kernels.packed import bitmap_shape, pack

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
READ_AT_ONCE = 2**24

Planned = tuple[str, torch.dtype, tuple[int, ...]]
"""Key, dtype and shape of a tensor; the dense ones of a packed matrix."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies.

    Attributes:
        shard: file name.
        start: first byte in the file.
        dtype: that it is stored in.
        shape: of the tensor.
    """

    shard: str
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        return size_of(self.dtype, self.shape)


class Shards:
    """Output files in which tensors are written in place.

    Attributes:
        folder: where the files are.
        places: every key with its place; of a packed matrix, those of its parts.
        packed: the matrices that are stored packed, by their dense keys.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[Planned],
        max_shard_size: int,
        packed: Mapping[str, Spec] | None = None,
    ) -> None:
        """Plan the files for `tensors` (key, dtype, shape), in this order, none above the size.

        A tensor that is larger by itself gets a file of its own. What `packed` names is stored packed, its
        parts in one file.
        """
        self.folder = folder
        self.packed = dict(packed or {})
        self.places: dict[str, Place] = {}
        self._headers: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        self._touched: set[str] = set()
        files = _split(tensors, max_shard_size, self.packed)
        for number, members in enumerate(files, 1):
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            self._lay_out(_SINGLE if len(files) == 1 else name, members)

    def _lay_out(self, shard: str, members: Sequence[Planned]) -> None:
        inside = {key: self.packed[key] for key, _, _ in members if key in self.packed}
        rows = [row for member in members for row in _rows(member, inside)]
        rows.sort(key=lambda m: -m[1].itemsize)  # so that each begins aligned
        header: dict[str, object] = {"__metadata__": metadata(inside)}
        offset, local = 0, []
        for key, dtype, shape in rows:
            place = Place(shard, offset, dtype, shape)
            end = offset + place.bytes
            header[key] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, end],
            }
            local.append((key, place))
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._headers[shard] = struct.pack("<Q", len(text)) + text
        begin = len(self._headers[shard])
        self._sizes[shard] = begin + offset
        for key, place in local:
            self.places[key] = Place(shard, begin + place.start, place.dtype, place.shape)

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(self._sizes.values())

    def create(self) -> None:
        """Make the files, at full size: a disk that is too small says so now and not at the end.

        Files that are there and of the right size are kept; what is in them is for the journal to say.

        Raises:
            OSError: when there is no room.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for shard, header in self._headers.items():
            handle = os.open(self.folder / shard, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if os.fstat(handle).st_size != self._sizes[shard]:
                    os.ftruncate(handle, self._sizes[shard])
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(handle, 0, self._sizes[shard])
                os.pwrite(handle, header, 0)
                os.fsync(handle)
            finally:
                os.close(handle)
        if len(self._headers) > 1:
            text = json.dumps(self._index(), indent=2, sort_keys=True)
            (self.folder / _INDEX).write_text(text + "\n", encoding="utf-8")

    def _index(self) -> dict[str, object]:
        total = sum(place.bytes for place in self.places.values())
        shards = {key: place.shard for key, place in self.places.items()}
        return {"metadata": {"total_size": total}, "weight_map": shards}

    def write(self, key: str, pieces: Iterable[Tensor]) -> str:
        """Put a tensor, given in slices along its first dimension, into its place.

        Returns:
            sha256 of its bytes.

        Raises:
            OSError: when it cannot be written.
        """
        with Filling(self, key) as file:
            for piece in pieces:
                file.add(piece)
        return file.digest.hexdigest()

    def write_packed(self, key: str, pieces: Iterable[Tensor]) -> None:
        """Put a matrix that `packed` names, given as dense rows [n, columns], into its places.

        Args:
            key: its dense name.
            pieces: in fewer bits, along columns, of whole groups.

        Raises:
            CheckpointError: in fewer bits, for weights that have no scales; others than were planned with.
            OSError: when it cannot be written.
        """
        if self.packed[key].bits is not None:
            self._write_whole(key, pieces)
            return
        with Filling(self, key + VALUES) as values, Filling(self, key + BITMAP) as bitmap:
            for piece in pieces:
                part = pack(piece)
                values.add(part.values)
                bitmap.add(part.bitmap)

    def _write_whole(self, key: str, pieces: Iterable[Tensor]) -> None:
        names = (key + WHOLE, key + SCALES, key + BITMAP)
        with ExitStack() as stack:
            files = [stack.enter_context(Filling(self, name)) for name in names]
            for part in stored_parts(key, pieces, self.packed[key]):
                for file, tensor in zip(files, part, strict=True):
                    file.add(tensor)

    def flush(self) -> None:
        """Wait until everything written is on the disk."""
        for shard in sorted(self._touched):
            handle = os.open(self.folder / shard, os.O_RDWR)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        self._touched.clear()

    def digest(self, key: str) -> str | None:
        """sha256 of what lies in a tensor's place; None when the file is missing or too short."""
        place = self.places[key]
        path = self.folder / place.shard
        if not path.is_file() or path.stat().st_size != self._sizes[place.shard]:
            return None
        found, left = hashlib.sha256(), place.bytes
        with path.open("rb", buffering=0) as file:
            file.seek(place.start)
            while left and (chunk := file.read(min(left, READ_AT_ONCE))):
                found.update(chunk)
                left -= len(chunk)
        return None if left else found.hexdigest()

    def stored(self) -> dict[str, Stored]:
        """The tensors as a reader finds them; of files without packed matrices."""
        return {
            key: Stored(self.folder / place.shard, place.dtype, place.shape, place.start)
            for key, place in self.places.items()
        }


class Filling:
    """One tensor of an output file while it is written, piece by piece.

    Attributes:
        digest: sha256 of what has been written.
    """

    def __init__(self, shards: Shards, key: str) -> None:
        self._key, self._place = key, shards.places[key]
        self._path = shards.folder / self._place.shard
        self._at = self._place.start
        self.digest = hashlib.sha256()
        shards._touched.add(self._place.shard)

    def __enter__(self) -> Self:
        self._file = self._path.open("r+b", buffering=0)
        return self

    def add(self, piece: Tensor) -> None:
        """Write what comes next.

        Raises:
            OSError: when it cannot be written.
            ValueError: for more than was planned: another tensor lies behind.
        """
        content = raw(piece.to(self._place.dtype))
        if self._at + len(content) > self._place.start + self._place.bytes:
            raise ValueError(f"{self._key}: more than the planned {self._place.bytes} bytes given")
        self.digest.update(content)
        self._at += _write_all(self._file.fileno(), content, self._at)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._file.close()
        given = self._at - self._place.start
        if kind is None and given != self._place.bytes:
            raise ValueError(f"{self._key}: {given} bytes given, {self._place.bytes} planned")


def _rows(member: Planned, packed: Mapping[str, Spec]) -> list[Planned]:
    """What the header of a file lists for one tensor; `packed` are all packed matrices of that file."""
    key, dtype, shape = member
    if key not in packed:
        return [member]
    guard: list[Planned] = [(key, dtype, (0,))] if key == min(packed) else []
    spec = packed[key]
    name, count = spec.numbers
    bitmap = (key + BITMAP, torch.uint8, bitmap_shape(shape))
    if spec.bits is None:
        return [*guard, (key + VALUES, dtype, tuple(count)), bitmap]
    whole = (key + WHOLE, DTYPES[name], tuple(count))
    return [*guard, (key + SCALES, torch.bfloat16, spec.scales_shape), whole, bitmap]


def _split(
    tensors: Sequence[Planned], most: int, packed: Mapping[str, Spec]
) -> list[list[Planned]]:
    """Consecutive tensors in as few files as their order allows."""
    files: list[list[Planned]] = [[]]
    size = 0
    for key, dtype, shape in tensors:
        mine = packed[key].bytes if key in packed else size_of(dtype, shape)
        if files[-1] and size + mine > most:
            files.append([])
            size = 0
        files[-1].append((key, dtype, shape))
        size += mine
    return files


def _write_all(handle: int, content: memoryview, at: int) -> int:
    """Write all of `content` at `at`: one call may take less (2 GiB at most on Linux)."""
    done = 0
    while done < len(content):
        done += os.pwrite(handle, content[done : done + 2**30], at + done)
    return done
