"""Checkpoints that lie, each made from a string of bytes, so that each can be made again.

A valid small Llama, dense or sparse, in one file or two, is spoilt in one to three places: the bytes of a
file, a safetensors header, its metadata, the tensors, the index, the JSON files, or the folder itself. The
files are written here by hand, without llmprune and without the safetensors library.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

INDEX = "model.safetensors.index.json"
SECRET = "secret"  # stands in every file outside of the folder
SIZES = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1, "I64": 8, "F64": 8}
PRUNED = {
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.k_proj.weight": (8, 8),
    "model.layers.0.self_attn.v_proj.weight": (8, 8),
    "model.layers.0.self_attn.o_proj.weight": (8, 8),
    "model.layers.0.mlp.gate_proj.weight": (12, 8),
    "model.layers.0.mlp.up_proj.weight": (12, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 12),
}
DENSE = {
    "model.embed_tokens.weight": (10, 8),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.0.post_attention_layernorm.weight": (8,),
    "model.norm.weight": (8,),
    "lm_head.weight": (10, 8),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 16,
    "tie_word_embeddings": False,
    "dtype": "float32",
}

TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "model": {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(10)}, "unk_token": "w0"},
}


class Choices:
    """Decisions read from bytes; when those are used up, each is the first option."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def below(self, n: int) -> int:
        """A number from 0 to n - 1."""
        width = 1 if n <= 256 else 4
        part = self._data[self._at : self._at + width]
        self._at += width
        return int.from_bytes(part, "little") % n

    def one(self, options: Sequence[T]) -> T:
        """One of several."""
        return options[self.below(len(options))]


class Raw(str):
    """JSON text that is written as it stands."""


@dataclass
class Sheet:
    """A safetensors file before it is written: header entries in order, whose names may repeat."""

    entries: list[list[Any]] = field(default_factory=list)
    data: bytearray = field(default_factory=bytearray)

    def add(self, name: str, dtype: str, shape: Sequence[int], content: bytes) -> None:
        """One more tensor."""
        begin = len(self.data)
        self.data += content
        about = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, len(self.data)]}
        self.entries.append([name, about])

    def get(self, name: str) -> Any:
        """What the header says of `name`, None where it says nothing."""
        return next((about for key, about in self.entries if key == name), None)

    def bytes(self) -> bytes:
        """The file."""
        pairs = (f"{json.dumps(k)}:{plain(v)}" for k, v in self.entries)
        text = ("{" + ",".join(pairs) + "}").encode()
        return struct.pack("<Q", len(text)) + text + bytes(self.data)


@dataclass
class Draft:
    """A folder before it is written.

    Attributes:
        sheets: safetensors files.
        objects: JSON files.
        changes: what to do to the files when they are there, in this order.
        parts: what was spoilt.
    """

    sheets: dict[str, Sheet]
    objects: dict[str, Any]
    changes: list[Callable[[Path], None]] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Make the folder, which is not there."""
        folder.mkdir()
        for name, sheet in self.sheets.items():
            (folder / name).write_bytes(sheet.bytes())
        for name, found in self.objects.items():
            (folder / name).write_text(plain(found), encoding="utf-8", errors="surrogatepass")
        for change in self.changes:
            try:
                change(folder)
            except (
                OSError,
                ValueError,
            ):  # an earlier change took the file, or no file bears that name
                continue


def plain(value: Any) -> str:
    """JSON text; what is `Raw` stands in it as it is."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{plain(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(plain, value)) + "]"
    return json.dumps(value)


def valid(
    *, sparse: bool, shards: int, dtype: str = "F32", axis: str = "rows", bits: int = 0
) -> Draft:
    """A checkpoint with nothing wrong: one file and no index, or two and an index; 0 bits are values."""
    draft: Draft = pickle.loads(_made(sparse, shards, dtype, axis, bits))
    return draft


@cache
def _made(sparse: bool, shards: int, dtype: str, axis: str, bits: int) -> bytes:
    """A valid checkpoint, pickled: the quickest copy."""
    rng = np.random.default_rng(0)
    names = list(PRUNED) + list(DENSE)
    sheets: dict[str, Sheet] = {}
    index: dict[str, str] = {}
    for i in range(shards):
        name = (
            "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        )
        sheet, specs = Sheet(), {}
        for key in names[i::shards]:
            shape = (PRUNED | DENSE)[key]
            weight = rng.standard_normal(shape).astype("<f4")
            if key not in PRUNED:
                sheet.add(key, dtype, shape, _stored(weight, dtype))
                continue
            keep = np.tile([True, False, False, True], weight.size // 4).reshape(shape)
            keep = keep if axis == "rows" else _down(keep)
            if not sparse:
                sheet.add(key, dtype, shape, _stored(np.where(keep, weight, 0), dtype))
                continue
            bitmap = np.packbits(keep, axis=-1, bitorder="little")
            if not specs:
                sheet.add(key, dtype, (0,), b"")
            specs[key] = {"shape": list(shape), "dtype": dtype, "pattern": "2:4", "axis": axis}
            if bits:
                specs[key] |= _whole(sheet, key, bits, shape, int(keep.sum()), axis)
            else:
                sheet.add(f"{key}_values", dtype, (int(keep.sum()),), _stored(weight[keep], dtype))
            sheet.add(f"{key}_bitmap", "U8", bitmap.shape, bitmap.tobytes())
        about: dict[str, Any] = {"format": "pt"}
        if specs:
            version = "2" if bits else "1"
            about |= {"llmprune.format_version": version, "llmprune.packed": specs}
        sheet.entries.insert(0, ["__metadata__", about])
        index |= {key: name for key, _ in sheet.entries[1:]}
        sheets[name] = sheet
    return pickle.dumps(Draft(sheets, _objects(sparse, index if shards > 1 else None)))


def _whole(
    sheet: Sheet, key: str, bits: int, shape: tuple[int, ...], kept: int, axis: str
) -> dict[str, int]:
    """Add whole numbers and scales to a file; gives what is said of them."""
    numbers = (np.arange(kept) % 15 - 7).astype(np.int8)
    rows, columns = shape
    groups = (rows, -(-columns // 3)) if axis == "rows" else (-(-rows // 3), columns)
    scales = np.linspace(0.25, 2, groups[0] * groups[1], dtype="<f4").reshape(groups)
    if bits == 8:
        sheet.add(f"{key}_whole", "I8", (kept,), numbers.tobytes())
    else:
        pairs = np.pad(numbers, (0, kept % 2)).astype(np.uint8).reshape(-1, 2) & 15
        halves = pairs[:, 0] | pairs[:, 1] << 4
        sheet.add(f"{key}_whole", "U8", halves.shape, halves.tobytes())
    sheet.add(f"{key}_scales", "BF16", groups, _stored(scales, "BF16"))
    return {"bits": bits, "group": 3, "kept": kept}


def _down(keep: np.ndarray) -> np.ndarray:
    """Groups of four rows that keep two, instead of columns."""
    pattern = np.array([True, False, False, True])
    return np.broadcast_to(pattern[np.arange(keep.shape[0]) % 4, None], keep.shape).copy()


def _stored(weight: np.ndarray, dtype: str) -> bytes:
    """Bytes of float32 numbers in another width; bfloat16 by cutting off."""
    if dtype == "BF16":
        return (weight.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return weight.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()


def _objects(sparse: bool, index: dict[str, str] | None) -> dict[str, Any]:
    objects: dict[str, Any] = {"config.json": dict(CONFIG), "tokenizer.json": TOKENIZER}
    objects["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if sparse:
        objects["config.json"]["quantization_config"] = {
            "quant_method": "llmprune",
            "format_version": 1,
        }
        objects["sparse.json"] = {
            "format_version": 1,
            "matrices": 7,
            "patterns": {"2:4": 7},
            "dense_bytes": 2176,
            "packed_bytes": 1168,
        }
    objects["llmprune.json"] = {"recipe": {"method": "magnitude", "sparsity": "2:4"}, "layers": []}
    if index is not None:
        objects[INDEX] = {"metadata": {"total_size": 1}, "weight_map": index}
    return objects


def finish(draft: Draft) -> Draft:
    """Metadata holds texts only: what is still an object in it becomes one."""
    for sheet in draft.sheets.values():
        about = sheet.get("__metadata__")
        if isinstance(about, dict) and isinstance(about.get("llmprune.packed"), dict):
            about["llmprune.packed"] = plain(about["llmprune.packed"])
    return draft


def outside(place: Path) -> Path:
    """A folder that nobody may open: a valid checkpoint, and files of every kind."""
    draft = finish(valid(sparse=False, shards=1))
    folder = place / "outside"
    draft.write(folder)
    for name in ("tokenizer.1.json", "secret.json", "evil.py", INDEX):
        (folder / name).write_text(json.dumps({"model_type": SECRET}))
    return folder


def link(target: str | Path, name: str) -> Callable[[Path], None]:
    """A change: `name` becomes a link to `target`."""

    def change(folder: Path) -> None:
        path = folder / name
        _remove(path)
        path.symlink_to(target)

    return change


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        path.rename(path.with_name(path.name + ".was"))
