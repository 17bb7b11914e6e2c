"""Every matrix pruned to each of its levels, on disk: masks, and the values that the method has changed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llmprune.checkpoint.tensors import raw


@dataclass(frozen=True)
class Database:
    """Matrices by number, and their levels by number; the dense ones too.

    Attributes:
        folder: where the files are; it exists.
    """

    folder: Path

    def put_dense(self, matrix: int, weight: Tensor) -> None:
        """Keep a matrix [out, in] as it was."""
        self._write(self.folder / f"{matrix:06d}.dense", raw(weight.contiguous().cpu()))

    def put(self, matrix: int, level: int, keep: Tensor, weight: Tensor, dense: Tensor) -> None:
        """Keep a pruned matrix: its mask, bool [out, in], and kept values that are not those of `dense`."""
        stem = self.folder / f"{matrix:06d}-{level:03d}"
        bits = np.packbits(keep.contiguous().cpu().numpy())
        if not torch.equal(weight, dense.masked_fill(keep.logical_not(), 0)):
            self._write(stem.with_suffix(".values"), raw(weight[keep].contiguous().cpu()))
        self._write(stem.with_suffix(".mask"), memoryview(bits.tobytes()))

    def dense(self, matrix: int, like: Tensor) -> Tensor:
        """A matrix [out, in] as it was, in the dtype and on the device of `like`."""
        return self._values(self.folder / f"{matrix:06d}.dense", like).reshape(like.shape)

    def get(self, matrix: int, level: int, like: Tensor) -> Tensor:
        """A matrix pruned to a level, in the shape, dtype and on the device of `like`."""
        stem = self.folder / f"{matrix:06d}-{level:03d}"
        bits = np.unpackbits(np.fromfile(stem.with_suffix(".mask"), np.uint8), count=like.numel())
        keep = torch.from_numpy(bits).bool().reshape(like.shape).to(like.device)
        if not stem.with_suffix(".values").exists():
            return self.dense(matrix, like).masked_fill_(keep.logical_not(), 0)
        found = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        found[keep] = self._values(stem.with_suffix(".values"), like)
        return found

    def _values(self, path: Path, like: Tensor) -> Tensor:
        data = torch.from_numpy(np.fromfile(path, np.uint8))
        return data.view(like.dtype).to(like.device)

    def _write(self, path: Path, content: memoryview) -> None:
        """Durably: the journal says that it is there."""
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
