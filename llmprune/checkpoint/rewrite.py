"""Write the tensors of a checkpoint anew, packed or dense, and compare the files with what they came from.

Everything passes through memory a few rows at a time: 4 million weights of one tensor, or 32 of its rows
where those are more, with a few copies of that.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune.checkpoint import tensors
from llmprune.checkpoint.census import cuts
from llmprune.checkpoint.files import find
from llmprune.checkpoint.packing import parts, parts_of
from llmprune.checkpoint.shards import Shards
from llmprune.checkpoint.sparse import FEWER_BITS, FORMAT_VERSION, Spec
from llmprune.checkpoint.target import size
from llmprune.checkpoint.tensors import Stored, raw
from llmprune.errors import CheckpointError


@dataclass(frozen=True)
class Sizes:
    """What a checkpoint takes dense and packed.

    Attributes:
        patterns: number of packed matrices by pattern.
        dense_bytes: of the packed matrices, were they dense.
        packed_bytes: of the packed matrices as they are; safetensors headers are not counted.
        all_dense: of all tensors, were none packed.
        fewer: number of matrices whose kept weights are whole numbers, by kind; none where all have values.
    """

    patterns: dict[str, int]
    dense_bytes: int
    packed_bytes: int
    all_dense: int
    fewer: dict[str, int] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """Of the format."""
        return FEWER_BITS if self.fewer else FORMAT_VERSION

    @property
    def matrices(self) -> int:
        """Number of packed matrices."""
        return sum(self.patterns.values())

    @property
    def all_packed(self) -> int:
        """Of all tensors as they are."""
        return self.all_dense - self.dense_bytes + self.packed_bytes

    def as_dict(self) -> dict[str, Any]:
        """The content of sparse.json."""
        return {
            "format_version": self.version,
            "matrices": self.matrices,
            "patterns": self.patterns,
            **({"fewer_bits": self.fewer} if self.fewer else {}),
            "dense_bytes": self.dense_bytes,
            "packed_bytes": self.packed_bytes,
        }

    def rows(self) -> str:
        """The rows of the table in the model card."""
        kinds = (
            (f"{self.matrices} packed matrices", self.dense_bytes, self.packed_bytes),
            ("everything", self.all_dense, self.all_packed),
        )
        return "\n".join(
            f"| {name} | {size(dense)} | {size(packed)} ({packed / dense:.4f}) |"
            for name, dense, packed in kinds
        )


def sizes(stored: Mapping[str, Stored], packed: Mapping[str, Spec]) -> Sizes:
    """Of a checkpoint `stored`, where the matrices `packed` are."""
    patterns = Counter(spec.pattern for spec in packed.values())
    fewer = Counter(f"int{spec.bits}" for spec in packed.values() if spec.bits is not None)
    return Sizes(
        dict(sorted(patterns.items())),
        sum(stored[key].bytes for key in packed),
        sum(spec.bytes for spec in packed.values()),
        sum(entry.bytes for entry in stored.values()),
        dict(sorted(fewer.items())),
    )


def plan_shards(
    folder: Path, stored: Mapping[str, Stored], packed: Mapping[str, Spec], max_shard_size: int
) -> Shards:
    """The files that `write` will write, in an order that does not depend on how `stored` is cut up."""
    order = sorted(stored.items(), key=lambda entry: _natural(entry[0]))
    planned = [(key, entry.dtype, entry.shape) for key, entry in order]
    return Shards(folder, planned, max_shard_size, packed)


def write(stored: Mapping[str, Stored], shards: Shards, tell: Callable[[str], None]) -> None:
    """Bring every tensor of `stored` into `shards`, read the files back and compare bit for bit.

    Raises:
        CheckpointError: for a file that cannot be read, or one that does not hold what was written.
        OSError: when something cannot be written.
    """
    shards.create()
    for key, entry in stored.items():
        tell(f"writing {key}")
        if key in shards.packed:
            spec = shards.packed[key]
            shards.write_packed(key, parts(entry) if spec.bits is None else parts_of(entry, spec))
        else:
            shards.write(key, _slices(entry))
    shards.flush()
    written = tensors.index(find(shards.folder))
    if written.keys() != stored.keys():
        key = min(written.keys() ^ stored.keys())
        raise CheckpointError(f"the written files are not what was read: {key} is not in both")
    for key, entry in stored.items():
        tell(f"comparing {key}")
        if not same_bits(entry, written[key]):
            raise CheckpointError(f"the written files are not what was read: {key} differs")


def same_bits(left: Stored, right: Stored) -> bool:
    """Whether two tensors have the same shape, dtype and bits."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    both = zip(_slices(left), _slices(right), strict=True)
    return all(raw(a) == raw(b) for a, b in both)


def _slices(stored: Stored) -> Iterator[Tensor]:
    """Any tensor as rows, a few megabytes at a time."""
    source = tensors.rows_of(stored)
    for first, count in cuts(source.count, max(1, source.count), source.columns):
        yield source.rows(first, count)


def _natural(key: str) -> list[tuple[bool, int, str]]:
    """Sorts block 10 behind block 9."""
    pieces = re.split(r"(\d+)", key)
    return [(p.isdecimal(), len(p) if p.isdecimal() else 0, p) for p in pieces]
