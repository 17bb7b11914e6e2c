"""What the headers of sparse files say of their packed matrices (docs/format.md), checked.

Nothing of the tensors is read here, and nothing is reserved: a header that lies is refused by what the
headers themselves say.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from llmprune.errors import CheckpointError, short
from llmprune.kernels.packed import bitmap_shape, packed_bytes

FORMAT_VERSION, FEWER_BITS = 1, 2
"""Of files whose matrices all have values, and of those in which one has whole numbers of few bits."""
QUANT_METHOD = "llmprune"
CONFIG_GUARD = "this checkpoint is in llmprune's sparse format: run `import llmprune` first"
"""What `config.json` gives as `transformers_weights` (docs/format.md, The guard)."""
VALUES, BITMAP, WHOLE, SCALES = "_values", "_bitmap", "_whole", "_scales"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_VERSION_KEY, _PACKED_KEY = "llmprune.format_version", "llmprune.packed"
_PATTERN = re.compile(r"unstructured|([1-9][0-9]{0,3}):([1-9][0-9]{0,3})")
_LARGEST = 2**63 - 1  # what an offset can reach
_WIDEST = 4  # bytes of a float32
_KEYS = {"shape", "dtype", "pattern", "axis"}
_FEWER_KEYS = {*_KEYS, "bits", "group", "kept"}
_DIMENSIONS = 8  # more than any weight has; torch stops at 64

Entry = tuple[str, Sequence[int]]
"""dtype as safetensors names it, and shape."""


@dataclass(frozen=True)
class Spec:
    """What a header says of one packed matrix.

    Attributes:
        shape: (..., rows, columns) of the dense tensor.
        dtype: `BF16`, `F16` or `F32`.
        pattern: `n:m` or `unstructured`; a claim, until the bitmap has been looked at.
        axis: `rows` where the groups lie along the last dimension, `columns` along the one before.
        kept: number of kept values.
        bits: 8 or 4, of the whole numbers that stand for them; None where they are stored themselves.
        group: neighbours along `axis` that share a scale; None without whole numbers.
    """

    shape: tuple[int, ...]
    dtype: str
    pattern: str
    axis: str
    kept: int
    bits: int | None = None
    group: int | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """What the names of its tensors end with."""
        return (VALUES, BITMAP) if self.bits is None else (WHOLE, SCALES, BITMAP)

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """Of the scales; of no meaning without whole numbers."""
        group = self.group or 1
        if self.axis == "rows":
            return (*self.shape[:-1], -(-self.shape[-1] // group))
        return (*self.shape[:-2], -(-self.shape[-2] // group), self.shape[-1])

    @property
    def numbers(self) -> Entry:
        """Dtype and shape of the tensor that stands for the kept weights."""
        if self.bits is None:
            return self.dtype, (self.kept,)
        return ("I8", (self.kept,)) if self.bits == 8 else ("U8", (-(-self.kept // 2),))

    @property
    def weights(self) -> int:
        """Number of weights of the dense tensor."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the values."""
        return DTYPES[self.dtype]

    @property
    def bytes(self) -> int:
        """What the matrix takes in the file."""
        if self.bits is None:
            return packed_bytes(self.shape, self.kept, self.torch_dtype.itemsize)
        scales = math.prod(self.scales_shape) * torch.bfloat16.itemsize
        return packed_bytes(self.shape, self.numbers[1][0], 1) + scales


def version_of(specs: Iterable[Spec]) -> int:
    """The version of what holds these packed matrices."""
    return FEWER_BITS if any(spec.bits is not None for spec in specs) else FORMAT_VERSION


def settings(version: int = FORMAT_VERSION) -> dict[str, Any]:
    """The `quantization_config` of a folder in this format."""
    return {"quant_method": QUANT_METHOD, "format_version": version}


def take_from(config: Any) -> bool:
    """Whether a transformers config names this format; if so, the name is taken out.

    Raises:
        CheckpointError: for another version of the format.
    """
    found = getattr(config, "quantization_config", None)
    if not isinstance(found, Mapping) or found.get("quant_method") != QUANT_METHOD:
        return False
    check_version("config.json", found.get("format_version"))
    del config.quantization_config
    if getattr(config, "transformers_weights", None) == CONFIG_GUARD:
        del config.transformers_weights
    return True


def check_version(file: str, version: object) -> None:
    """Whether this llmprune reads `version` of the format, which `file` names.

    Raises:
        CheckpointError: when it does not.
    """
    if str(version) not in (str(FORMAT_VERSION), str(FEWER_BITS)):
        raise CheckpointError(
            f"{short(file)} is in version {short(repr(version), 20)} of the sparse format; this llmprune "
            f"reads versions {FORMAT_VERSION} and {FEWER_BITS}: update llmprune, or write the file again"
        )


def metadata(specs: Mapping[str, Spec]) -> dict[str, str]:
    """The `__metadata__` of a file that holds the packed matrices `specs`, by dense name."""
    entries = {}
    for name, spec in specs.items():
        entries[name] = asdict(spec)
        if spec.bits is None:  # the length of the values says how many are kept
            del entries[name]["kept"], entries[name]["bits"], entries[name]["group"]
    plain = {"format": "pt"}
    if not specs:
        return plain
    packed = json.dumps(entries, separators=(",", ":"), sort_keys=True)
    return {**plain, _VERSION_KEY: str(version_of(specs.values())), _PACKED_KEY: packed}


def specs(file: str, about: Mapping[str, str], tensors: Mapping[str, Entry]) -> dict[str, Spec]:
    """The packed matrices of a file by dense name; empty for a dense file.

    Args:
        file: what errors call it.
        about: its `__metadata__`.
        tensors: dtype and shape of each of its tensors.

    Raises:
        CheckpointError: for another version of the format, or anything that docs/format.md forbids.
    """
    if _PACKED_KEY not in about and _VERSION_KEY not in about:
        return {}
    check_version(file, about.get(_VERSION_KEY))
    try:
        entries = json.loads(about.get(_PACKED_KEY, ""), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise _broken(file, f"llmprune.packed is no JSON ({short(error)})") from error
    if not isinstance(entries, dict):
        raise _broken(file, "llmprune.packed is no JSON object")
    fewer = str(about[_VERSION_KEY]) == str(FEWER_BITS)
    for name, entry in entries.items():
        few = isinstance(entry, dict) and "bits" in entry
        needed = (VALUES, BITMAP, WHOLE, SCALES) if few else (VALUES, BITMAP)
        if any(name + part in entries for part in needed) or name == "__metadata__":
            raise _broken(file, f"{short(name)} is a matrix, and another name needs its place")
        if few and not fewer:
            raise _broken(file, f"{short(name)} is in fewer bits, which version 1 does not know")
    return {name: _spec(file, name, entry, tensors) for name, entry in entries.items()}


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key stands twice: which one counts would be anybody's guess."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _spec(file: str, name: str, entry: Any, tensors: Mapping[str, Entry]) -> Spec:
    """One entry of `llmprune.packed`, held against the tensors that it is about."""
    spec = _said(file, name, entry, tensors)
    there = {part: tensors.get(name + part) for part in spec.parts}
    for part, found in there.items():
        if found is None:
            raise _broken(file, f"{short(name)} lacks its {part} tensor")
    wanted = {BITMAP: ("U8", bitmap_shape(spec.shape)), SCALES: ("BF16", spec.scales_shape)}
    for part, found in there.items():
        dtype, shape = wanted.get(part, spec.numbers)
        assert found is not None
        if found[0] != dtype or tuple(found[1]) != tuple(shape):
            raise _broken(
                file, f"the {part[1:]} of {short(name)} is {found[0]} {short(list(found[1]))}"
            )
    if spec.kept > spec.weights:
        raise _broken(file, f"{short(name)} keeps {spec.kept} of {spec.weights} weights")
    if tuple(tensors.get(name, ("", (0,)))[1]) != (0,):
        raise _broken(file, f"{short(name)} is both packed and dense")
    if spec.bits is not None and name + VALUES in tensors:
        raise _broken(file, f"{short(name)} has both values and whole numbers")
    return spec


def _said(file: str, name: str, entry: Any, tensors: Mapping[str, Entry]) -> Spec:
    """What one entry of `llmprune.packed` says, each word by itself."""
    few = isinstance(entry, dict) and "bits" in entry
    if not isinstance(entry, dict) or set(entry) != (_FEWER_KEYS if few else _KEYS):
        more = ", and with bits group and kept" if few else ""
        raise _broken(file, f"{short(name)} needs shape, dtype, pattern and axis{more}")
    shape, dtype, pattern, axis = (entry[k] for k in ("shape", "dtype", "pattern", "axis"))
    if not _possible(shape):
        raise _broken(file, f"{short(name)} has shape {short(shape)}")
    if dtype not in NAMES.values():
        raise _broken(file, f"{short(name)} has dtype {short(dtype)}")
    if axis not in ("rows", "columns"):
        raise _broken(file, f"{short(name)} has axis {short(axis)}")
    length = shape[-1 if axis == "rows" else -2]
    if not isinstance(pattern, str) or not _fits(pattern, length):
        raise _broken(file, f"{short(name)} of shape {shape} has pattern {short(pattern)}")
    if not few:
        values = tensors.get(name + VALUES, ("", (0,)))[1]
        kept = values[0] if len(values) == 1 else -1  # which no tensor has
        return Spec(tuple(shape), dtype, pattern, axis, kept)
    for key, least, most in (("bits", 4, 8), ("group", 1, length), ("kept", 0, _LARGEST)):
        if type(entry[key]) is not int or not least <= entry[key] <= most:
            raise _broken(file, f"{short(name)} of shape {shape} has {key} {short(entry[key])}")
    if entry["bits"] not in (4, 8):
        raise _broken(file, f"{short(name)} has bits {entry['bits']}")
    return Spec(tuple(shape), dtype, pattern, axis, entry["kept"], entry["bits"], entry["group"])


def _possible(shape: Any) -> bool:
    """Whether a tensor can have this shape: few whole numbers (True is none), whose product is an offset."""
    if not isinstance(shape, list) or not 2 <= len(shape) <= _DIMENSIONS:
        return False
    whole = all(type(n) is int and 0 < n <= _LARGEST for n in shape)
    return whole and math.prod(shape) * _WIDEST <= _LARGEST


def _fits(pattern: str, length: int) -> bool:
    """Whether groups of `pattern` can lie along a dimension."""
    if not (found := _PATTERN.fullmatch(pattern)):
        return False
    return pattern == "unstructured" or (
        int(found[1]) < int(found[2]) and length % int(found[2]) == 0
    )


def _broken(file: str, why: str) -> CheckpointError:
    return CheckpointError(f"{short(file)} is no valid sparse file: {why}; get it again")
