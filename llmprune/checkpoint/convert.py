"""The `convert` command: the same checkpoint in the sparse format, or dense again.

Nothing but its storage changes: every tensor is compared bit for bit with what it came from before the
result is put in place.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from llmprune import notice
from llmprune.checkpoint import packing, rewrite, sparse, tensors
from llmprune.checkpoint.files import Files, find
from llmprune.checkpoint.rewrite import Sizes
from llmprune.checkpoint.sparse import Spec
from llmprune.checkpoint.target import check_target, resolve, settle, size, staged
from llmprune.checkpoint.tensors import Stored
from llmprune.errors import CheckpointError, ConfigError
from llmprune.progress import Bar

Format = Literal["dense", "sparse"]
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
_MADE = ("config.json", "sparse.json", "README.md")  # written anew
_SLACK = 2**20  # bytes for headers, the index and sparse.json


@dataclass(frozen=True)
class Conversion:
    """What was done.

    Attributes:
        source: folder or Hub id that was read.
        target: folder that was written.
        to: format of the target.
        sizes: what it takes in either format.
        values: packed matrices that are stored as values, although the run says that it has rounded.
    """

    source: str
    target: str
    to: Format
    sizes: Sizes
    values: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types."""
        sizes = self.sizes
        return {
            "source": self.source,
            "target": self.target,
            "format": self.to,
            **sizes.as_dict(),
            **({"not_in_fewer_bits": list(self.values)} if self.values else {}),
            "bytes": {"dense": sizes.all_dense, "sparse": sizes.all_packed},
        }

    def text(self) -> str:
        """What was done, for a terminal."""
        sizes = self.sizes
        held = ", ".join(f"{name} in {count}" for name, count in sizes.patterns.items())
        before, after = sizes.all_dense, sizes.all_packed
        if self.to == "dense":
            before, after = after, before
        return (
            f"{sizes.matrices} matrices ({held}): {size(sizes.dense_bytes)} dense, "
            f"{size(sizes.packed_bytes)} packed ({sizes.packed_bytes / sizes.dense_bytes:.4f})\n"
            f"all weights: {size(before)} -> {size(after)} ({after / before:.4f})\n"
            f"{self._fewer()}saved to {self.target}, compared bit for bit with {self.source}"
        )

    def _fewer(self) -> str:
        """A line on fewer bits, where a matrix is in them or could have been."""
        if not self.sizes.fewer and not self.values:
            return ""
        held = ", ".join(f"{kind} in {count}" for kind, count in self.sizes.fewer.items())
        line = f"fewer bits: {held or 'in none'}\n"
        if not self.values:
            return line
        return (
            f"{line}{len(self.values)} matrices keep their values, such as {self.values[0]}: they were to be "
            "rounded, and no scales give them bit for bit, or none that take less\n"
        )


def convert(
    source: str | Path,
    target: Path,
    to: Format,
    *,
    revision: str | None = None,
    token: str | None = None,
    max_shard_size: int = 5 * 10**9,
    overwrite: bool = False,
    progress: bool = False,
) -> Conversion:
    """Write the checkpoint `source` to `target` in the other format.

    Args:
        source: a folder, or a model on the Hub, whose files are downloaded to the cache.
        target: folder to write; its parents are made.
        to: `sparse` packs the matrices of the decoder blocks that take less so; `dense` expands all.
        revision: branch, tag or commit on the Hub.
        token: for a private model; None takes the one that is logged in.
        max_shard_size: bytes of the largest file, as it is written.
        overwrite: whether to replace a checkpoint that is there.
        progress: show a bar after two seconds.

    Raises:
        ConfigError: for a source in that format, or with nothing to pack; for a target that is not free.
        CheckpointError: for a source that cannot be read or is quantised; when the target cannot be written.
        HubError: the Hub does not give it.
    """
    settle(resolve(target))
    check_target(target, overwrite, 0, source)
    files = find(source, revision, token)
    work = _Source(files, _config(files), tensors.index(files))
    with Bar(3 * len(work.stored), f"to {to}", unit="tensor", enabled=progress) as bar:

        def tell(doing: str) -> None:
            bar.step(0, 1, doing)

        packed = work.packed(to, tell)
        found = rewrite.sizes(work.stored, packed)
        check_target(target, overwrite, work.need(found, to), source)
        bar.expect(2 * len(work.stored))
        try:
            with staged(target, overwrite) as folder:
                work.write(folder, packed if to == "sparse" else {}, max_shard_size, tell)
        except OSError as error:
            raise CheckpointError(
                f"{target} could not be written: {error.strerror or error}; nothing is left of it"
            ) from error
    return Conversion(str(source), str(target), to, found, work.in_values(packed, to))


def pack_folder(
    source: Path, target: Path, max_shard_size: int, name: str, *, progress: bool = False
) -> Sizes:
    """Write the dense checkpoint in the folder `source` to the folder `target` in the sparse format.

    Args:
        source: whose files are trusted to be whole.
        target: folder that holds no checkpoint; made where it is not there.
        max_shard_size: bytes of the largest file.
        name: what the card says to load it by.
        progress: show a bar after two seconds.

    Raises:
        ConfigError: when there is nothing to pack.
        CheckpointError: when the written files are not what was read.
        OSError: when something cannot be written.
    """
    files = find(source)
    work = _Source(files, _config(files), tensors.index(files), name)
    with Bar(3 * len(work.stored), "packing", unit="tensor", enabled=progress) as bar:

        def tell(doing: str) -> None:
            bar.step(0, 1, doing)

        packed = work.packed("sparse", tell)
        bar.expect(2 * len(work.stored))
        work.write(target, packed, max_shard_size, tell)
    return rewrite.sizes(work.stored, packed)


@dataclass(frozen=True)
class _Source:
    """The checkpoint that is read: its files, config.json, and every tensor."""

    files: Files
    config: Mapping[str, Any]
    stored: Mapping[str, Stored]
    name: str = notice.ANYWHERE

    def packed(self, to: Format, tell: Callable[[str], None]) -> dict[str, Spec]:
        """The matrices that are packed in the sparse one of the two checkpoints.

        Raises:
            ConfigError: when there is nothing to do.
        """
        name = self.files.source
        there = {k: s.packed.spec for k, s in self.stored.items() if s.packed is not None}
        if to == "dense":
            if not there:
                raise ConfigError(f"{name} is dense already; --format sparse packs it")
            return there
        if there:
            raise ConfigError(f"{name} is sparse already; --format dense expands it")
        report, kind = self.files.json("llmprune.json"), self.config.get("model_type")
        found = packing.plan(
            self.stored,
            kind,
            packing.recipe_of(report),
            lambda key: tell(f"counting {key}"),
            packing.rounding_of(report),
        )
        if not found:
            raise ConfigError(
                f"{name} has no matrix in its decoder blocks that would take less when packed: too few "
                "weights are zero; prune it first (python -m llmprune --model ... --sparsity 0.5 --save ...)"
            )
        return found

    def in_values(self, packed: Mapping[str, Spec], to: Format) -> tuple[str, ...]:
        """The matrices that are packed as values, where the run says that it has rounded."""
        if to == "dense" or packing.rounding_of(self.files.json("llmprune.json")) is None:
            return ()
        return tuple(key for key, spec in packed.items() if spec.bits is None)

    def need(self, sizes: Sizes, to: Format) -> int:
        """Bytes of the result."""
        beside = sum(self.files.fetch(name).stat().st_size for name in self._beside())
        return beside + _SLACK + (sizes.all_packed if to == "sparse" else sizes.all_dense)

    def _beside(self) -> list[str]:
        """What is copied: everything but weights, hidden files and what is made anew."""
        found = []
        for name in self.files.names:
            path = PurePosixPath(name)
            hidden = any(part.startswith(".") for part in path.parts)
            index = path.name.endswith(".index.json")
            if not hidden and not index and name not in _MADE and path.suffix not in _WEIGHTS:
                found.append(name)
        return found

    def write(
        self, folder: Path, packed: Mapping[str, Spec], most: int, tell: Callable[[str], None]
    ) -> None:
        """Fill `folder` with the result, where the matrices `packed` are, in files of `most` bytes."""
        shards = rewrite.plan_shards(folder, self.stored, packed, most)
        rewrite.write(self.stored, shards, tell)
        self._describe(folder, rewrite.sizes(self.stored, packed) if packed else None)

    def _describe(self, folder: Path, sizes: Sizes | None) -> None:
        """Everything but weights; README.md says first what a sparse checkpoint needs."""
        for name in self._beside():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.files.fetch(name), folder / name)
        write_config(folder, self.config, sizes)
        card = ""
        if "README.md" in self.files.names:
            with suppress(UnicodeDecodeError):
                card = self.files.fetch("README.md").read_text(encoding="utf-8")
        card = notice.to_dense(card)
        if sizes is not None:
            card = notice.to_sparse(card, self.name, sizes.rows())
        if card.strip():  # of a checkpoint without a card, the notice was all there was
            (folder / "README.md").write_text(card, encoding="utf-8")


def write_config(folder: Path, config: Mapping[str, Any], sizes: Sizes | None) -> None:
    """config.json, and sparse.json beside it where `sizes` are those of packed matrices.

    Raises:
        OSError: when they cannot be written.
    """
    plain = dict(config)
    plain.pop("quantization_config", None)
    if plain.get("transformers_weights") == sparse.CONFIG_GUARD:
        del plain["transformers_weights"]
    if sizes is not None:
        plain["quantization_config"] = sparse.settings(sizes.version)
        plain["transformers_weights"] = sparse.CONFIG_GUARD
        _write_json(folder / "sparse.json", sizes.as_dict())
    _write_json(folder / "config.json", plain)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _config(files: Files) -> dict[str, Any]:
    """config.json of a checkpoint that can be converted."""
    if "config.json" not in files.names:
        raise CheckpointError(
            f"{files.source} has no config.json; pass the folder or Hub id of a transformers checkpoint"
        )
    config = files.json("config.json")
    found = config.get("quantization_config")
    method = found.get("quant_method") if isinstance(found, dict) else found
    if found is not None and method != sparse.QUANT_METHOD:
        raise CheckpointError(
            f"{files.source} is quantised ({method}); only checkpoints in float32, bfloat16 or float16 are "
            "converted"
        )
    return config
