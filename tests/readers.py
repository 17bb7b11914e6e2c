"""Everything of llmprune that reads a checkpoint, each called as a program would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from hostile import INDEX

import llmprune
from llmprune import loading
from llmprune.checkpoint import convert, files, sparse, tensors
from llmprune.checkpoint.inspect import inspect
from llmprune.checkpoint.skeleton import open_shelf
from llmprune.errors import ConfigError

Reader = Callable[[Path, Path], object]


def listing(folder: Path, scratch: Path) -> object:
    """The files, what the index says of them, and the JSON beside them."""
    found = files.find(folder)
    names = ("config.json", "sparse.json", "llmprune.json", INDEX)
    return [found.json(name) for name in names], found.shards()


def values(folder: Path, scratch: Path) -> object:
    """Every tensor; of matrices, two rows once more."""
    found = tensors.index(files.find(folder))
    for stored in found.values():
        assert tensors.Later(stored)[...].nbytes == stored.bytes
        if len(stored.shape) == 2 and stored.shape[0] > 1:
            tensors.read_rows(stored, torch.tensor([0, 1]))
    return found


def inspection(folder: Path, scratch: Path) -> object:
    """`python -m llmprune inspect`, in all its forms."""
    found = inspect(folder)
    text = json.dumps(found.as_dict()) + found.table() + found.layers()
    odd = [c for c in text if not c.isprintable() and c != "\n"]
    assert not odd, f"prints {odd[0]!r}"
    return text.encode()


def one_file(folder: Path, scratch: Path) -> object:
    """A safetensors file by its own path; a link that someone names is that person's choice."""
    there = [p for p in sorted(folder.glob("*.safetensors")) if not p.is_symlink()]
    path = next(iter(there), folder / "model.safetensors")
    if path.is_symlink():
        return None
    return inspect(path).as_dict()


def specs(folder: Path, scratch: Path) -> object:
    """What the headers say of packed matrices."""
    found = files.find(folder)
    said = []
    for shard in found.shards():
        with tensors.opened(found.fetch(shard)) as file:
            entries = {}
            for key in file.keys():  # noqa: SIM118
                entry = file.get_slice(key)
                entries[key] = (str(entry.get_dtype()), entry.get_shape())
            said.append(sparse.specs(shard, file.metadata() or {}, entries))
    return said


def config(folder: Path, scratch: Path) -> object:
    """What `--model` looks at first, and the tokenizer."""
    source = loading.check(str(folder))
    return loading.tokenizer(source)


def model(folder: Path, scratch: Path) -> object:
    """`--model` in memory: transformers reads the files."""
    return loading.open_model(loading.check(str(folder)), device="cpu")


def shelf(folder: Path, scratch: Path) -> object:
    """`--model` from disk to disk: a model without weights."""
    return open_shelf(loading.check(str(folder)), dtype=None, device=torch.device("cpu"))


def converted(folder: Path, scratch: Path) -> object:
    """`python -m llmprune convert`, to the format that it is not in."""
    target = scratch / "out"
    try:
        convert.convert(folder, target, "dense")
    except ConfigError:  # it is dense
        convert.convert(folder, target, "sparse")
    there = list(target.rglob("*"))
    assert not [p for p in there if p.is_symlink()], "writes a link"
    assert sorted(p.name for p in scratch.iterdir()) == ["out"], (
        "leaves something beside the target"
    )
    return {key: tensors.load(stored) for key, stored in tensors.index(files.find(target)).items()}


def packed_model(folder: Path, scratch: Path) -> object:
    """`llmprune.load`."""
    return llmprune.load(folder, "cpu", progress=False)


def expanded_model(folder: Path, scratch: Path) -> object:
    """`llmprune.load` of a dense model."""
    return llmprune.load(folder, "cpu", sparse=False, progress=False)


READERS: dict[str, Reader] = {
    "files": listing,
    "tensors": values,
    "inspect": inspection,
    "specs": specs,
}

SLOW: dict[str, Reader] = {  # those that build a model, and what the others have nearly seen
    "inspect one file": one_file,
    "convert": converted,
    "config": config,
    "model": model,
    "load": packed_model,
    "load dense": expanded_model,
    "shelf": shelf,
}
