"""A model on a shelf as a place for transforms, and the transformed model as a checkpoint of its own.

One block is in memory at a time. What has been decided is done to each block as it is read, in float64, and
rounded to the dtype of the files, so that what is written is, bit for bit, what happens in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from llmprune.activations import Activations
from llmprune.checkpoint import tensors
from llmprune.checkpoint.layout import to_files
from llmprune.checkpoint.shards import Planned, Shards
from llmprune.checkpoint.shelf import Shelf
from llmprune.checkpoint.tensors import Stored
from llmprune.memory import SLACK, Budget, of_model
from llmprune.transforms.apply import Looks, Place, separate, settle_tie
from llmprune.transforms.base import Change
from llmprune.walk import HiddenStates, Walker


class OnShelf(Place):
    """A model whose weights are in files; `folder` takes hidden states that memory has no room for."""

    def __init__(
        self, shelf: Shelf, dtypes: Mapping[str, torch.dtype], budget: Budget, folder: Path
    ) -> None:
        super().__init__(shelf.model, dtypes)
        self.shelf, self.budget, self.folder = shelf, budget, folder
        self._made: list[tuple[Change, Looks]] = []

    def begin(self, walker: Walker) -> None:
        """Read the embeddings of the tokens in use."""
        self._rest(torch.cat([b.flatten() for b in walker.batches]), head=False)

    def end(self, walker: Walker) -> None:
        """Read the last norm and the output head too."""
        self._rest(torch.cat([b.flatten() for b in walker.batches]), head=True)

    def _rest(self, ids: Tensor | None, *, head: bool) -> None:
        self.shelf.release_rest()
        self.shelf.load_rest(ids, head=head)
        for change, looks in self._made:
            change.outside(looks.outside)

    @contextmanager
    def loaded(self, index: int) -> Iterator[None]:
        """While open, block `index` is in memory, changed as far as has been decided."""
        self.shelf.load(index)
        try:
            for change, looks in self._made:
                change.block(looks.blocks[index])
            yield
        finally:
            self.shelf.release(index)

    def hidden(self, walker: Walker) -> HiddenStates:
        """In memory while they fit beside a block, and in files."""
        device = self.shelf.device
        block = max(of_model(layer) for layer in self.layers)
        rooms = [(device, self.budget.device - 2 * block - SLACK)]  # a copy while changes are tried
        if device.type != "cpu":
            rooms.append((torch.device("cpu"), self.budget.memory - SLACK))
        return Activations(self.folder, len(walker.batches), rooms, device)

    def advance(self, hidden: HiddenStates, index: int, outputs: Iterable[Tensor]) -> None:
        """Replace the inputs of block `index` by its outputs."""
        assert isinstance(hidden, Activations)
        hidden.begin(index)
        for b, output in enumerate(outputs):
            hidden[b] = output
        hidden.commit()
        hidden.forget_old()

    def make(self, change: Change, looks: Looks) -> None:
        """Do it to everything that is read from now on."""
        self._made.append((change, looks))

    def untied(self) -> bool:
        """Whether an output head that was an embedding has become a matrix of its own."""
        self._rest(torch.zeros(1, dtype=torch.int64), head=True)
        found = any(
            looks.outside.head is not None and looks.outside.tied and separate(looks.outside)
            for _, looks in self._made
        )
        self.shelf.release_rest()
        return found

    def write(self, shards: Shards) -> None:
        """Write the changed model into the files of `shards`.

        Raises:
            OSError: when something cannot be written.
        """
        left = dict(self.shelf.stored)
        for index in range(len(self.layers)):
            with self.loaded(index):
                prefix = f"{self.prefix}.{index}."
                named = {prefix + n: p for n, p in self.layers[index].named_parameters()}
                self._write(shards, named, left)
        self._rest(None, head=True)
        outside = {
            n: p
            for n, p in self.model.named_parameters(remove_duplicate=False)
            if not n.startswith(f"{self.prefix}.")
        }
        self._write(shards, outside, left)
        for _, looks in self._made:
            settle_tie(self.model, looks.outside)
        self.shelf.release_rest()
        for key in sorted(left.keys() & shards.places.keys()):
            shards.write(key, tensors.pieces(self.shelf.stored[key]))
        shards.flush()

    def _write(self, shards: Shards, named: Mapping[str, Tensor], left: dict[str, Stored]) -> None:
        found = dict(to_files(self.model, self.shelf.stored, named, set()))
        for name, value in named.items():  # an output head that was an embedding has no key there
            if name in shards.places and name not in self.shelf.stored:
                found[name] = value
        for key, value in found.items():
            if key in shards.places:
                shards.write(key, [value.detach()])
                left.pop(key, None)


def planned(shelf: Shelf, layout: Sequence[Planned], *, untied: bool) -> list[Planned]:
    """What the transformed checkpoint holds: `layout`, and what was tied where it gets weights of its own."""
    found = list(layout)
    keys = {shelf.target(key): key for key in shelf.keys(None)}
    for name, source in shelf.tied.items() if untied else ():
        dtype, shape = next((d, s) for k, d, s in layout if k == keys[source])
        found.append((keys.get(name, name), dtype, shape))
    return found
