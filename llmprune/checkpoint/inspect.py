"""What a checkpoint's files really hold: sparsity, pattern, dtype and size of every tensor.

Shard by shard and tensor by tensor; no model is built and no code of the checkpoint runs. A zero is
a zero, whoever put it there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llmprune.checkpoint.file_census import TensorCensus as TensorCensus
from llmprune.checkpoint.file_census import read
from llmprune.checkpoint.files import find
from llmprune.checkpoint.sparse import DTYPES, FEWER_BITS, FORMAT_VERSION
from llmprune.checkpoint.target import size
from llmprune.checkpoint.tensors import header, packed
from llmprune.errors import short
from llmprune.progress import interval


@dataclass(frozen=True)
class Inspection:
    """What the files of a checkpoint hold.

    Attributes:
        source: what was asked for.
        model_type: from config.json, or None without one.
        tensors: every tensor, in the order of files and names.
        files: number of safetensors files.
        bytes: their size on disk.
    """

    source: str
    model_type: str | None
    tensors: tuple[TensorCensus, ...]
    files: int
    bytes: int

    @property
    def decoder(self) -> list[TensorCensus]:
        """The matrices of the decoder blocks."""
        return [t for t in self.tensors if t.decoder]

    @property
    def sparsity(self) -> float:
        """Share of zeros in the decoder matrices."""
        return _share(self.decoder)

    @property
    def pattern(self) -> str | None:
        """The n:m that every decoder matrix holds, or None.

        Along either axis: experts may be stored the other way round than the rest.
        """
        held = {t.pattern for t in self.decoder}
        return next(iter(held)) if len(held) == 1 else None

    @property
    def sparse(self) -> dict[str, Any] | None:
        """Version, number and bytes of the packed matrices; None where there are none."""
        found = [t for t in self.tensors if t.packed]
        if not found:
            return None
        dense = sum(t.weights * DTYPES[t.dtype].itemsize for t in found)
        packed = sum(t.bytes for t in found)
        return {
            "format_version": FEWER_BITS if any(t.bits for t in found) else FORMAT_VERSION,
            "matrices": len(found),
            "dense_bytes": dense,
            "packed_bytes": packed,
            "ratio": packed / dense,
            "bits_per_weight": 8 * packed / sum(t.weights for t in found),
            "kinds": dict(sorted(Counter(t.kept_as for t in found).items())),
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types, with the totals."""
        return {
            "source": self.source,
            "model_type": self.model_type,
            "files": self.files,
            "bytes": self.bytes,
            "sparse": self.sparse,
            "decoder": {**_totals(self.decoder), "pattern": self.pattern},
            "everything": _totals(self.tensors),
            "kinds": {kind: _totals(found) for kind, found in self._kinds().items()},
            "tensors": [{**asdict(t), "sparsity": _share([t])} for t in self.tensors],
        }

    def layers(self) -> str:
        """A row per decoder matrix, in the order of the blocks, for a terminal."""
        ordered = sorted(
            self.decoder,
            key=lambda t: [(len(p), p) if p.isdecimal() else (0, "") for p in t.name.split(".")],
        )
        names = [short(t.name.removesuffix(".weight"), 120) for t in ordered]
        width = max(map(len, names), default=0)
        return "\n".join(
            f"{name:<{width}} {'x'.join(map(str, t.shape)):>14} {_share([t]):>8.2%}  {_held([t])}{t.stored}"
            for name, t in zip(names, ordered, strict=True)
        )

    def table(self) -> str:
        """A row per kind of decoder matrix, then the totals, for a terminal."""
        row = "{:<28} {:>6} {:>16} {:>8} {:>9}  {}".format
        lines = [row("matrix", "count", "shape", "dtype", "sparsity", "pattern")]
        for kind, found in self._kinds().items():
            shapes = {"x".join(map(str, t.shape)) for t in found}
            dtypes = {t.dtype for t in found}
            lines.append(
                row(
                    short(kind[-28:], 28),
                    len(found),
                    shapes.pop() if len(shapes) == 1 else "several",
                    dtypes.pop() if len(dtypes) == 1 else "several",
                    f"{_share(found):.2%}",
                    _held(found),
                )
            )
        for name, some in (("decoder matrices", self.decoder), ("everything", self.tensors)):
            weights = f"{sum(t.weights for t in some):,}"
            what = _held(some) if some is not self.tensors else ""
            lines.append(row(name, len(some), weights, "", f"{_share(some):.2%}", what).rstrip())
        files = "file" if self.files == 1 else "files"
        dtypes_held = ", ".join(sorted({t.dtype for t in self.tensors}))
        lines.append(f"{size(self.bytes)} in {self.files} {files}, {dtypes_held}")
        if sparse := self.sparse:
            lines.append(
                f"stored sparse (format version {sparse['format_version']}): {sparse['matrices']} packed "
                f"matrices take {size(sparse['packed_bytes'])}, {sparse['ratio']:.4f} of the "
                f"{size(sparse['dense_bytes'])} that they would take dense"
            )
            held = ", ".join(f"{kind} in {count}" for kind, count in sparse["kinds"].items())
            lines.append(f"{sparse['bits_per_weight']:.3f} bits per weight of these: {held}")
        return "\n".join(lines)

    def _kinds(self) -> dict[str, list[TensorCensus]]:
        kinds: dict[str, list[TensorCensus]] = {}
        for tensor in self.decoder:
            kinds.setdefault(tensor.kind, []).append(tensor)
        return kinds


def inspect(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    progress: bool = False,
) -> Inspection:
    """Read a checkpoint and say what it holds; the largest tensor is what it takes of memory.

    Args:
        source: a folder, one .safetensors file, or a model on the Hub, whose files are downloaded
            to the cache one after the other.
        revision: branch, tag or commit on the Hub.
        token: for a private model; None takes the one that is logged in.
        progress: show a bar after two seconds.

    Raises:
        CheckpointError: nothing there, no safetensors, a missing or damaged file, a broken index.
        HubError: the Hub does not give it.
    """
    files = find(source, revision, token)
    model_type = files.json("config.json").get("model_type")
    shards = files.shards()
    headers = [header(files.fetch(shard)) for shard in shards]
    matrices = packed(headers)
    tensors: list[TensorCensus] = []
    total = sum(head.file.stat().st_size for head in headers)
    bar = tqdm(
        unit="tensor", desc="inspecting", delay=2, disable=not progress, mininterval=interval()
    )
    with bar:
        for head, keys in zip(headers, shards.values(), strict=True):
            for tensor in read(str(source), head, matrices, keys, model_type):
                tensors.append(tensor)
                bar.update()
    return Inspection(str(source), model_type, tuple(tensors), len(shards), total)


def _share(tensors: Iterable[TensorCensus]) -> float:
    found = list(tensors)
    return sum(t.zeros for t in found) / max(1, sum(t.weights for t in found))


def _totals(tensors: Iterable[TensorCensus]) -> dict[str, Any]:
    found = list(tensors)
    zeros, weights = sum(t.zeros for t in found), sum(t.weights for t in found)
    return {
        "tensors": len(found),
        "weights": weights,
        "zeros": zeros,
        "sparsity": _share(found),
        "bytes": sum(t.bytes for t in found),
        "patterns": dict(Counter(_named(t) for t in found)),
    }


def _named(tensor: TensorCensus) -> str:
    """`2:4`, `2:4 down the columns`, or `none`."""
    if tensor.pattern is None:
        return "none"
    return tensor.pattern + (" down the columns" if tensor.axis == "columns" else "")


def _held(tensors: Iterable[TensorCensus]) -> str:
    """Which patterns some tensors hold, in words."""
    counts = Counter(_named(t) for t in tensors)
    total = counts.total()
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} in {count} of {total}" for name, count in counts.most_common())
