"""Put a pruned block into the output files, in the checkpoint's own layout, and read it back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.checkpoint import tensors
from llmprune.checkpoint.layout import to_files
from llmprune.checkpoint.shelf import Shelf
from llmprune.checkpoint.verify import check_matrix, expectations
from llmprune.errors import CheckpointError, NumericalError
from llmprune.model import Matrix
from llmprune.prune_matrix import Done, Task
from llmprune.refine.settings import Repair
from llmprune.refine.tuned import tunable
from llmprune.workplace import Workplace


@dataclass(frozen=True)
class Delivery:
    """From the model's parameters into the output files.

    Attributes:
        shelf: the model.
        work: where the output is.
        task: what was decided.
    """

    shelf: Shelf
    work: Workplace
    task: Task

    def write(
        self, parameters: Mapping[str, Tensor], wanted: set[str], files: Sequence[str]
    ) -> dict[str, str]:
        """Put parameters (by name) into the output; of `files`, what they do not cover is copied."""
        shards, written = self.work.shards, {}
        for key, value in to_files(self.shelf.model, self.shelf.stored, parameters, wanted).items():
            if key not in shards.places:
                continue  # stored as another one
            rounded = value.to(shards.places[key].dtype)
            if rounded.is_floating_point() and not bool(rounded.isfinite().all()):
                raise NumericalError(
                    f"{key} holds weights that {rounded.dtype} cannot; try --dtype bfloat16"
                )
            written[key] = shards.write(key, [rounded])
        for key in sorted(set(files) - written.keys()):
            if key in shards.places:
                written[key] = shards.write(key, tensors.pieces(self.shelf.stored[key]))
        shards.flush()
        return written

    def block(self, index: int, done: Sequence[Done]) -> dict[str, str]:
        """Write a block that is loaded, load it from the output as any reader does, and compare.

        Returns:
            sha256 of each tensor in the files, by key.

        Raises:
            CheckpointError: when what is read back is not what was decided.
            OSError: when it cannot be written.
        """
        wanted = {d.matrix.parameter_name for d in done}
        written = self.write(self._loaded(index), wanted, self.shelf.keys(index))
        before = self._digests(index)
        self.shelf.release(index)
        self.shelf.load(index, self.work.shards.stored())
        for name, digest in self._digests(index).items():
            if before[name] != digest:
                raise CheckpointError(
                    f"the written file is not what was decided: {name} reads back otherwise"
                )
        self._check_counts(done)
        return written

    def _loaded(self, index: int) -> dict[str, Tensor]:
        """The parameters of a block by their names in the model; whoever keeps them keeps their memory."""
        prefix = f"{self.shelf.prefix}.{index}."
        return {prefix + n: p for n, p in self.shelf.layers[index].named_parameters()}

    def _digests(self, index: int) -> dict[str, str]:
        """sha256 of each parameter of a block, as it is stored."""
        dtypes = self._file_dtypes(index)
        return {name: _digest(p, dtypes.get(name)) for name, p in self._loaded(index).items()}

    def _check_counts(self, done: Sequence[Done]) -> None:
        reports = [d.report for d in done]
        exact = self.task.method.exact
        for each, entry in zip(
            done, expectations(reports, self.task.pattern, exact=exact), strict=True
        ):
            check_matrix(entry, each.matrix.weight)

    def _file_dtypes(self, index: int) -> dict[str, torch.dtype]:
        """Stored dtype of each parameter of a block, by the first tensor that feeds it."""
        found: dict[str, torch.dtype] = {}
        for key in self.shelf.keys(index):
            if key in self.work.shards.places:
                found.setdefault(self.shelf.target(key), self.work.shards.places[key].dtype)
        return found

    def outside(self, matrices: Sequence[Matrix]) -> list[str]:
        """File keys of matrices in no block."""
        named = {m.parameter_name: m.parameter for m in matrices}
        return list(to_files(self.shelf.model, self.shelf.stored, _bare(named), set(named)))


def _digest(parameter: Tensor, dtype: torch.dtype | None) -> str:
    """sha256 of a parameter as it is stored."""
    rounded = parameter.detach().to("cpu", dtype or parameter.dtype)
    return hashlib.sha256(tensors.raw(rounded)).hexdigest()


def check_layout(shelf: Shelf, chosen: Sequence[Matrix], repair: Repair | None = None) -> None:
    """Refuse, before any work, what will change and cannot be put back into the checkpoint's own layout.

    Raises:
        ModelError: naming the parameter.
    """
    for index in sorted({m.block for m in chosen if m.block is not None}):
        prefix = f"{shelf.prefix}.{index}."
        named = {prefix + n: p for n, p in shelf.layers[index].named_parameters()}
        wanted = {m.parameter_name for m in chosen if m.block == index}
        if repair is not None:
            pruned = {id(m.parameter) for m in chosen if m.block == index}
            wanted |= {name for name, _ in tunable(shelf.model, index, pruned, repair.tune)}
        to_files(shelf.model, shelf.stored, _bare(named), wanted)
    outside = {m.parameter_name: m.parameter for m in chosen if m.block is None}
    to_files(shelf.model, shelf.stored, _bare(outside), set(outside))


def _bare(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the same shapes without content."""
    return {name: torch.empty(p.shape, device="meta") for name, p in parameters.items()}
