"""Where hidden states and gradients wait between two blocks: in main memory or in files."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor


class InMemory:
    """Tensors between blocks, of one group of windows after the other, in main memory."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, int], Tensor] = {}

    def put(self, what: str, group: int, tensor: Tensor) -> None:
        """Keep `what` of a group, in the place of what was kept before."""
        self._tensors[what, group] = tensor.cpu()

    def take(self, what: str, group: int) -> Tensor:
        """What was kept of it."""
        return self._tensors[what, group]

    def forget(self, what: str) -> None:
        """Give the memory of `what` back, if any was kept."""
        for key in [key for key in self._tensors if key[0] == what]:
            del self._tensors[key]


class OnDisk:
    """Tensors in files that go with their folder.

    Attributes:
        folder: for them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, what: str, group: int, tensor: Tensor) -> None:
        """Write `what` of a group, in the place of what was written before."""
        from safetensors.torch import save_file

        save_file({"tensor": tensor.cpu().contiguous()}, self._file(what, group))

    def take(self, what: str, group: int) -> Tensor:
        """Read it."""
        from safetensors.torch import load_file

        return load_file(self._file(what, group))["tensor"]

    def forget(self, what: str) -> None:
        """Give the room of `what` back, if any was written."""
        for file in self.folder.glob(f"{what}-*.safetensors"):
            file.unlink()

    def _file(self, what: str, group: int) -> Path:
        return self.folder / f"{what}-{group}.safetensors"


Kept = InMemory | OnDisk
