"""The files of an output checkpoint, laid out before the first weight is known.

Every key, shape and dtype is known from the start, so the headers and the places of all tensors are too:
a block is written into its place as soon as it is done, and the files are whole when the last one is.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmprune.checkpoint.tensors import DTYPES, Stored, raw, size_of

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
READ_AT_ONCE = 2**24


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
        places: every key with its place.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
        max_shard_size: int,
    ) -> None:
        """Plan the files for `tensors` (key, dtype, shape), in this order, none above the size.

        A tensor that is larger by itself gets a file of its own.
        """
        self.folder = folder
        self.places: dict[str, Place] = {}
        self._headers: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        self._touched: set[str] = set()
        files = _split(tensors, max_shard_size)
        for number, members in enumerate(files, 1):
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            self._lay_out(_SINGLE if len(files) == 1 else name, members)

    def _lay_out(self, shard: str, members: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        members = sorted(members, key=lambda m: -m[1].itemsize)  # so that each begins aligned
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset, local = 0, []
        for key, dtype, shape in members:
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
        place = self.places[key]
        digest = hashlib.sha256()
        at = place.start
        with (self.folder / place.shard).open("r+b", buffering=0) as file:
            for piece in pieces:
                content = raw(piece.to(place.dtype))
                digest.update(content)
                at += _write_all(file.fileno(), content, at)
        if at != place.start + place.bytes:
            raise ValueError(f"{key}: {at - place.start} bytes given, {place.bytes} planned")
        self._touched.add(place.shard)
        return digest.hexdigest()

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
        """The tensors as a reader finds them."""
        return {
            key: Stored(self.folder / place.shard, place.dtype, place.shape, place.start)
            for key, place in self.places.items()
        }


def _split(
    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], most: int
) -> list[list[tuple[str, torch.dtype, tuple[int, ...]]]]:
    """Consecutive tensors in as few files as their order allows."""
    files: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    size = 0
    for key, dtype, shape in tensors:
        mine = size_of(dtype, shape)
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
