"""The files of a checkpoint, in a folder or on the Hub: which there are, and which tensor is where."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from llmprune.errors import CheckpointError, short
from llmprune.hub import failing

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGEST_JSON = 100_000_000  # bytes; safetensors reads no longer header either
_CONVERT = (
    "only safetensors are read; convert it once, where you trust it: "
    "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
)


@dataclass(frozen=True)
class Files:
    """A checkpoint's files.

    Attributes:
        source: what was asked for.
        names: every file, relative to the checkpoint.
        fetch: gives the local path of one of them, downloading it first where it must.
    """

    source: str
    names: tuple[str, ...]
    fetch: Callable[[str], Path]

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file as a dictionary, an empty one where there is none.

        Raises:
            CheckpointError: when it is no JSON object, or lies outside of the checkpoint.
        """
        if name not in self.names:
            return {}
        path = self.fetch(name)
        try:
            if (size := path.stat().st_size) > _LARGEST_JSON:
                raise CheckpointError(
                    f"{name} of {self.source} has {size:,} bytes; no more than {_LARGEST_JSON:,} are read"
                )
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{name} of {self.source} cannot be read ({short(error, 160)}); get it again"
            ) from error
        if not isinstance(found, dict):
            raise CheckpointError(f"{name} of {self.source} is no JSON object; get it again")
        return found

    def shards(self) -> dict[str, list[str] | None]:
        """The safetensors files, each with the tensors that the index promises in it, or None.

        Raises:
            CheckpointError: there are none, or the index is broken, leaves the folder, or names a
                file that is not there.
        """
        if _SINGLE in self.names:  # before the index, which an earlier save may have left behind
            return {_SINGLE: None}
        if _INDEX in self.names:
            return self._indexed()
        if found := [n for n in self.names if n.endswith(".safetensors") and "/" not in n]:
            return dict.fromkeys(found)
        if pickles := [n for n in self.names if n.endswith(_PICKLES)]:
            raise CheckpointError(
                f"{self.source} holds pickle files only ({short(pickles[0])}); {_CONVERT}"
            )
        raise CheckpointError(f"{self.source} holds no .safetensors file")

    def _indexed(self) -> dict[str, list[str] | None]:
        shards: dict[str, list[str]] = {}
        index = self.json(_INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise CheckpointError(f"{_INDEX} of {self.source} has no weight_map; get it again")
        there = frozenset(self.names)
        for key, shard in index.items():
            if not isinstance(shard, str):
                raise CheckpointError(
                    f"{_INDEX} of {self.source} names {short(shard)} as the file of {short(key)}; "
                    "get it again"
                )
            path = PurePosixPath(shard.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts:
                raise CheckpointError(
                    f"{_INDEX} of {self.source} names {short(shard)!r}, outside of the checkpoint; "
                    "do not trust it"
                )
            if not shard.endswith(".safetensors"):  # transformers would unpickle it
                raise CheckpointError(
                    f"{_INDEX} of {self.source} names {short(shard)}, which is no .safetensors file; "
                    f"{_CONVERT}"
                )
            if shard not in there:
                raise CheckpointError(
                    f"{short(shard)} of {self.source} is missing; the index expects {short(key)} in "
                    "it: copy or download it again"
                )
            shards.setdefault(shard, []).append(key)
        return dict(sorted(shards.items()))


def find(source: str | Path, revision: str | None = None, token: str | None = None) -> Files:
    """The files of a folder, of one .safetensors file, or of a model on the Hub.

    Raises:
        CheckpointError: no such path and no Hub id, or a file of another kind.
        HubError: the Hub does not give it.
    """
    path, name = Path(source).expanduser(), str(source)
    if path.is_dir():
        return Files(short(name, 200), tuple(sorted(_listed(path))), partial(_inside, path))
    if path.is_file():
        if path.suffix != ".safetensors":
            why = _CONVERT if path.suffix in _PICKLES else "pass a folder or a .safetensors file"
            raise CheckpointError(f"{short(name, 200)} is no .safetensors file; {why}")
        return Files(short(name, 200), (path.name,), path.parent.joinpath)
    if not _REPO.fullmatch(name):
        raise CheckpointError(
            f"no folder or file {short(name, 200)!r}, and no Hub id either (those read user/name)"
        )
    return _on_hub(name, revision, token)


def check_folder(folder: Path) -> None:
    """Refuse a local checkpoint that leads out of its folder, before others open its files.

    transformers follows links, and joins the folder with what the index and tokenizer_config.json name.

    Raises:
        CheckpointError: for such a checkpoint, and one without safetensors.
    """
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            _inside(folder, Path(place, name).relative_to(folder).as_posix())
    found = find(folder)
    found.shards()
    if "adapter_config.json" in found.names:  # transformers would put it on the model
        raise CheckpointError(
            f"{folder} holds an adapter beside the model; merge it into the model"
        )
    tokenizers = found.json("tokenizer_config.json").get("fast_tokenizer_files") or []
    if not isinstance(tokenizers, list) or not {str(t) for t in tokenizers} <= {*found.names}:
        raise CheckpointError(
            f"tokenizer_config.json of {folder} names {short(tokenizers)} as its fast_tokenizer_files, "
            "which are not all there; take the entry out"
        )


def _listed(folder: Path) -> Iterator[str]:
    """Every regular file below `folder`, or link to one; links to folders are not followed."""
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            try:
                regular = path.is_file()
            except OSError:  # a link into a folder that we may not look into
                continue
            if regular:
                yield path.relative_to(folder).as_posix()


def _inside(folder: Path, name: str) -> Path:
    """The path of a file of a checkpoint in `folder`.

    A link is followed to where the checkpoint is: into the folder, or from a snapshot in the cache of
    the Hub's client, which is made of links, to the blobs beside it.

    Raises:
        CheckpointError: for a link to anywhere else, which might be a file that is nobody's business.
    """
    real, home = Path(os.path.realpath(folder / name)), Path(os.path.realpath(folder))
    homes = [home]
    for snapshot in (home, *home.parents):
        repo = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repo.name.startswith("models--"):
            homes += [repo / "blobs", repo.parent / "blobs"]  # the second one is for all models
    if not any(real.is_relative_to(h) for h in homes):
        raise CheckpointError(
            f"{short(name)} of {folder} is a link to {short(real)}, outside of the checkpoint; if you "
            "trust it, put a copy in its place"
        )
    return folder / name


def _on_hub(name: str, revision: str | None, token: str | None) -> Files:
    from huggingface_hub import HfApi, hf_hub_download

    after = "check the spelling, the network, or pass a local folder"
    with failing(f"no folder {name!r} here, and the Hub does not give it", after):
        info = HfApi(token=token).model_info(name, revision=revision)

    def fetch(file: str) -> Path:
        with failing(f"{file} of {name} could not be downloaded", "try again"):
            return Path(hf_hub_download(name, file, revision=info.sha, token=token))

    return Files(name, tuple(s.rfilename for s in info.siblings or ()), fetch)
