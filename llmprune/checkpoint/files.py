"""The files of a checkpoint, in a folder or on the Hub: which there are, and which tensor is where."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from llmprune.errors import CheckpointError
from llmprune.hub import failing

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
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
            CheckpointError: when it is no JSON object.
        """
        if name not in self.names:
            return {}
        try:
            found = json.loads(self.fetch(name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{name} of {self.source} cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise CheckpointError(f"{name} of {self.source} is no JSON object")
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
                f"{self.source} holds pickle files only ({pickles[0]}); {_CONVERT}"
            )
        raise CheckpointError(f"{self.source} holds no .safetensors file")

    def _indexed(self) -> dict[str, list[str] | None]:
        shards: dict[str, list[str] | None] = {}
        index = self.json(_INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise CheckpointError(f"{_INDEX} of {self.source} has no weight_map")
        for key, shard in index.items():
            path = PurePosixPath(str(shard).replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts:
                raise CheckpointError(
                    f"{_INDEX} of {self.source} names {shard!r}, outside of the checkpoint; "
                    "do not trust it"
                )
            if shard not in self.names:
                raise CheckpointError(
                    f"{shard} of {self.source} is missing; the index expects {key} in it: "
                    "copy or download it again"
                )
            keys = shards.setdefault(str(shard), [])
            assert keys is not None
            keys.append(str(key))
        return dict(sorted(shards.items()))


def find(source: str | Path, revision: str | None = None, token: str | None = None) -> Files:
    """The files of a folder, of one .safetensors file, or of a model on the Hub.

    Raises:
        CheckpointError: no such path and no Hub id, or a file of another kind.
        HubError: the Hub does not give it.
    """
    path, name = Path(source).expanduser(), str(source)
    if path.is_dir():
        inside = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        return Files(name, tuple(inside), path.joinpath)
    if path.is_file():
        if path.suffix != ".safetensors":
            why = _CONVERT if path.suffix in _PICKLES else "pass a folder or a .safetensors file"
            raise CheckpointError(f"{name} is no .safetensors file; {why}")
        return Files(name, (path.name,), path.parent.joinpath)
    if not _REPO.fullmatch(name):
        raise CheckpointError(
            f"no folder or file {name!r}, and no Hub id either (those read user/name)"
        )
    return _on_hub(name, revision, token)


def _on_hub(name: str, revision: str | None, token: str | None) -> Files:
    from huggingface_hub import HfApi, hf_hub_download

    after = "check the spelling, the network, or pass a local folder"
    with failing(f"no folder {name!r} here, and the Hub does not give it", after):
        info = HfApi(token=token).model_info(name, revision=revision)

    def fetch(file: str) -> Path:
        with failing(f"{file} of {name} could not be downloaded", "try again"):
            return Path(hf_hub_download(name, file, revision=info.sha, token=token))

    return Files(name, tuple(s.rfilename for s in info.siblings or ()), fetch)
