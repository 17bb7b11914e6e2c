"""Hidden states between two blocks: in memory while they fit, and always in a file that a rerun can read.

One *generation* is the output of one block for every batch. It is written batch by batch while the next
block's input is made, and takes the place of the generation before once it is whole and on the disk.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmprune.checkpoint import fingerprint
from llmprune.checkpoint.tensors import raw


class Activations:
    """One hidden state [batch, seqlen, width] for each batch.

    Attributes:
        folder: where the files are.
        rooms: devices, the first preferred, with the bytes of hidden states that may stay there; what fits
            nowhere is read from the file again.
        device: where they are given back.
    """

    def __init__(
        self,
        folder: Path,
        batches: int,
        rooms: Sequence[tuple[torch.device, int]],
        device: torch.device,
        name: str = "hidden",
    ) -> None:
        """`name` begins those of the files."""
        self.folder = folder
        self.name = name
        self.rooms = rooms
        self.device = device
        self._kept: list[Tensor | None] = [None] * batches
        self._room: list[int | None] = [None] * batches  # which of `rooms` each is in
        self._layout: list[tuple[tuple[int, ...], int]] = []  # shape and first byte, by batch
        self._dtype = torch.float32
        self._file: Path | None = None
        self._next: _Generation | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, batch: int) -> Tensor | None:
        """The input of the block for one batch; None before the first block."""
        kept = self._kept[batch]
        if kept is not None:
            return kept.to(self.device)
        if self._file is None:
            return None
        shape, start = self._layout[batch]
        return _read(self._file, start, shape, self._dtype).to(self.device)

    def __setitem__(self, batch: int, hidden: Tensor) -> None:
        """The output of the block for one batch, in the order of the batches.

        Raises:
            OSError: when it cannot be written.
        """
        if self._next is None:
            raise ValueError("begin() a generation before its hidden states are set")
        hidden = hidden.contiguous()  # as it is read back: results can depend on strides
        self._next.append(hidden)
        self._kept[batch] = self._room[batch] = None
        for number, (device, room) in enumerate(self.rooms):
            if self._used(number) + hidden.nbytes <= room:
                self._kept[batch], self._room[batch] = hidden.to(device), number
                break

    def _used(self, number: int) -> int:
        """Bytes in a room."""
        here = zip(self._kept, self._room, strict=True)
        return sum(kept.nbytes for kept, room in here if kept is not None and room == number)

    def begin(self, block: int) -> None:
        """Output of block `block` follows."""
        self._next = _Generation(self.folder / f"{self.name}-{block:05d}.bin")

    def commit(self) -> dict[str, Any]:
        """Wait until the new generation is on the disk; returns what `restore` needs."""
        made = self._next
        assert made is not None
        digest = made.close()
        self._next = None
        self._file, self._layout, self._dtype = made.path, made.layout, made.dtype
        return {
            "file": made.path.name,
            "sha256": digest,
            "dtype": str(made.dtype).removeprefix("torch."),
            "layout": [[list(shape), start] for shape, start in made.layout],
        }

    def forget_old(self) -> None:
        """Remove the generation before, once the journal knows of the new one."""
        for path in self.folder.glob(f"{self.name}-*.bin"):
            if path != self._file:
                with suppress(FileNotFoundError):
                    path.unlink()

    def restore(self, entry: dict[str, Any]) -> bool:
        """Take up a generation that an earlier run left; False when its file is not what it was."""
        path = self.folder / str(entry["file"])
        if not path.is_file() or fingerprint.digest(path) != entry["sha256"]:
            return False
        self._file, self._dtype = path, getattr(torch, str(entry["dtype"]))
        self._layout = [(tuple(shape), int(start)) for shape, start in entry["layout"]]
        self._kept, self._room = [None] * len(self._layout), [None] * len(self._layout)
        return True


class _Generation:
    """A file that is being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.layout: list[tuple[tuple[int, ...], int]] = []
        self.dtype = torch.float32
        self._at = 0
        self._digest = hashlib.sha256()
        self._file = path.open("wb", buffering=0)

    def append(self, hidden: Tensor) -> None:
        content = raw(hidden)
        self.dtype = hidden.dtype
        self.layout.append((tuple(hidden.shape), self._at))
        self._digest.update(content)
        self._at += len(content)
        while content:
            content = content[self._file.write(content) or 0 :]

    def close(self) -> str:
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()


def _read(path: Path, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor from a file, in memory of torch's own: results can depend on how memory is aligned."""
    out = torch.empty(shape, dtype=dtype)
    left = raw(out)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left:
            count = file.readinto(left)
            if not count:
                raise OSError(f"{path} is shorter than it was")
            left = left[count:]
    return out
