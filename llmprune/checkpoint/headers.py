"""What all files of a checkpoint say of their tensors, taken together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llmprune.checkpoint.sparse import BITMAP, VALUES, Entry, Spec, specs
from llmprune.checkpoint.tensors import opened
from llmprune.errors import CheckpointError, short


@dataclass(frozen=True)
class Headers:
    """The tensors of a checkpoint, none of them read.

    Attributes:
        packed: the packed matrices by their dense names.
        dense: the names of all other tensors.
    """

    packed: dict[str, Spec]
    dense: frozenset[str]


def read_headers(files: Iterable[Path]) -> Headers:
    """The headers of all safetensors files of a checkpoint.

    A matrix's two tensors may lie in two files, and several files may describe it: transformers splits a
    model where a file is full, and writes the same description into each.

    Raises:
        CheckpointError: a file cannot be read, or is no valid sparse file (docs/format.md).
    """
    tensors: dict[str, Entry] = {}
    abouts: list[tuple[Path, dict[str, str]]] = []
    for path in files:
        with opened(path) as file:
            abouts.append((path, dict(file.metadata() or {})))
            for key in file.keys():  # noqa: SIM118, a file is no dictionary
                if key in tensors:
                    raise CheckpointError(
                        f"{short(path.name)} holds {short(key)}, and another file does, too; get them again"
                    )
                entry = file.get_slice(key)
                tensors[key] = str(entry.get_dtype()), tuple(entry.get_shape())
    packed: dict[str, Spec] = {}
    for path, about in abouts:
        for name, spec in specs(path.name, about, tensors).items():
            if packed.setdefault(name, spec) != spec:
                raise CheckpointError(
                    f"{short(path.name)} and another file describe {short(name)} differently; get them again"
                )
    parts = {name + part for name in packed for part in (VALUES, BITMAP, "")}
    return Headers(packed, frozenset(tensors.keys() - parts))
