"""A writer of docs/format.md made of numpy and safetensors alone, to hold llmprune's reader against."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: what `==` does not see of minus zero and NaN."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def equal(left: Tensor, right: Tensor) -> bool:
    """Same shape, dtype and bits."""
    same = left.shape == right.shape and left.dtype == right.dtype
    return same and torch.equal(bits(left), bits(right))


def parts(name: str, dense: Tensor, keep: Tensor | None = None) -> dict[str, Tensor]:
    """The two tensors that stand for `dense`."""
    view = dense.view(torch.int16 if dense.element_size() == 2 else torch.int32)
    kept = (view != 0) if keep is None else keep
    bitmap = np.packbits(kept.numpy(), axis=-1, bitorder="little")
    return {f"{name}_values": dense[kept], f"{name}_bitmap": torch.from_numpy(bitmap)}


def entry(dense: Tensor, pattern: str = "unstructured", axis: str = "rows") -> dict[str, object]:
    """What the header says of `dense`."""
    return {
        "shape": list(dense.shape),
        "dtype": NAMES[dense.dtype],
        "pattern": pattern,
        "axis": axis,
    }


def save_packed(
    path: Path, packed: dict[str, Tensor], plain: dict[str, Tensor], **metadata: str
) -> Path:
    """One file with `packed` matrices and `plain` tensors; `metadata` replaces what is said of them."""
    content = dict(plain)
    for name, dense in packed.items():
        content |= parts(name, dense)
    if packed:
        content[min(packed)] = torch.empty(0, dtype=packed[min(packed)].dtype)
    entries = {name: entry(dense) for name, dense in packed.items()}
    about = {"llmprune.format_version": "1", "llmprune.packed": json.dumps(entries)}
    about |= {key.replace("__", "."): value for key, value in metadata.items()}
    save_file(content, path, {"format": "pt", **about})
    return path


def pack_folder(source: Path, out: Path, chosen: Callable[[str, Tensor], bool]) -> Path:
    """A dense checkpoint as a sparse one; matrices that are `chosen` are packed."""
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "llmprune", "format_version": 1}
    (out / "config.json").write_text(json.dumps(config))
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        packed = {k: v for k, v in tensors.items() if v.ndim > 1 and chosen(k, v)}
        save_packed(path, packed, {k: v for k, v in tensors.items() if k not in packed})
    if (index := out / "model.safetensors.index.json").is_file():
        table = json.loads(index.read_text())
        where = {k: p.name for p in sorted(out.glob("*.safetensors")) for k in load_file(p)}
        index.write_text(json.dumps({**table, "weight_map": where}))
    return out
