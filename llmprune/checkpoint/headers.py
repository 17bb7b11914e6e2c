"""What all files of a checkpoint say of their tensors, taken together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.checkpoint.sparse import Spec
from llmprune.checkpoint.tensors import header, names_of, packed


@dataclass(frozen=True)
class Headers:
    """The tensors of a checkpoint, none of them read.

    Attributes:
        packed: the packed matrices by their dense names.
        dense: the names of all other tensors.
    """

    packed: dict[str, Spec]
    dense: frozenset[str]

    def __deepcopy__(self, memo: Any) -> Headers:
        return self  # nothing in it changes, and transformers copies the configs that hold it


def read_headers(files: Iterable[Path]) -> Headers:
    """The headers of all safetensors files of a checkpoint.

    Raises:
        CheckpointError: a file cannot be read, or is no valid sparse file (docs/format.md).
    """
    heads = [header(path) for path in files]
    found = packed(heads)
    specs = {n: s.packed.spec for n, s in found.items() if s.packed is not None}
    hidden = {key for parts in map(names_of, found, found.values()) for key in parts}
    return Headers(specs, frozenset({key for head in heads for key in head.entries} - hidden))
