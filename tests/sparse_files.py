"""Write a checkpoint in the sparse format (docs/format.md) with none of the code that is tested."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
GUARD = "this checkpoint is in llmprune's sparse format: run `import llmprune` first"


def prune(model: Any, share: float = 0.5, *, seed: int = 0, least: int = 2) -> None:
    """Set a random share of every matrix of the blocks to zero, in place."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= least and ("layers." in name or ".h." in name):
            gone = torch.rand(parameter.shape, generator=random) < share
            parameter.data[gone] = 0


def packed(dense: Tensor) -> tuple[Tensor, Tensor]:
    """(values, bitmap) of a dense tensor; what is not +0.0 is kept."""
    words = dense.contiguous().view(torch.int32 if dense.element_size() == 4 else torch.int16)
    keep = words != 0
    bits = np.packbits(keep.numpy(), axis=-1, bitorder="little")
    return dense[keep], torch.from_numpy(bits)


def sparse_folder(
    model: Any, folder: Path, *, names: Iterable[str] | None = None, shard: str = "50GB"
) -> Path:
    """Save `model` by transformers, then pack what is half zeros (or `names`) in each of the files."""
    model.save_pretrained(folder, max_shard_size=shard)
    wanted = None if names is None else set(names)
    for file in sorted(folder.glob("*.safetensors")):
        _pack_file(file, wanted)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        found = json.loads(index.read_text())
        found["weight_map"] = {
            key: file.name
            for file in sorted(folder.glob("*.safetensors"))
            for key in load_file(file)
        }
        index.write_text(json.dumps(found))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "llmprune", "format_version": 1}
    config["transformers_weights"] = GUARD
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _pack_file(file: Path, wanted: set[str] | None) -> None:
    out: dict[str, Tensor] = {}
    about: dict[str, Mapping[str, Any]] = {}
    for name, tensor in load_file(file).items():
        half = tensor.dim() >= 2 and (tensor == 0).float().mean() > 0.25
        if not (half if wanted is None else name in wanted):
            out[name] = tensor
            continue
        out[f"{name}_values"], out[f"{name}_bitmap"] = packed(tensor)
        about[name] = {
            "shape": list(tensor.shape),
            "dtype": NAMES[tensor.dtype],
            "pattern": "unstructured",
            "axis": "rows",
        }
        if len(about) == 1:
            out[name] = tensor.new_empty(0)
    told = {"llmprune.format_version": "1", "llmprune.packed": json.dumps(about)} if about else {}
    save_file(out, file, metadata={"format": "pt", **told})
