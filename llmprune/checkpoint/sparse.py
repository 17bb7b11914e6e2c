"""What the headers of sparse files say of their packed matrices (docs/format.md), checked.

Nothing of the tensors is read here, and nothing is reserved: a header that lies is refused by what the
headers themselves say.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from llmprune.errors import CheckpointError, short
from llmprune.kernels.packed import bitmap_shape, packed_bytes

FORMAT_VERSION = 1
QUANT_METHOD = "llmprune"
CONFIG_GUARD = "this checkpoint is in llmprune's sparse format: run `import llmprune` first"
"""What `config.json` gives as `transformers_weights` (docs/format.md, The guard)."""
VALUES, BITMAP = "_values", "_bitmap"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_VERSION_KEY, _PACKED_KEY = "llmprune.format_version", "llmprune.packed"
_PATTERN = re.compile(r"unstructured|([1-9][0-9]{0,3}):([1-9][0-9]{0,3})")
_LARGEST = 2**63 - 1  # what an offset can reach
_WIDEST = 4  # bytes of a float32
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
    """

    shape: tuple[int, ...]
    dtype: str
    pattern: str
    axis: str
    kept: int

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
        return packed_bytes(self.shape, self.kept, self.torch_dtype.itemsize)


def settings() -> dict[str, Any]:
    """The `quantization_config` of a folder in this format."""
    return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION}


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
    if str(version) != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{short(file)} is in version {short(repr(version), 20)} of the sparse format; this llmprune "
            f"reads version {FORMAT_VERSION}: update llmprune, or write the file again"
        )


def metadata(specs: Mapping[str, Spec]) -> dict[str, str]:
    """The `__metadata__` of a file that holds the packed matrices `specs`, by dense name."""
    entries = {}
    for name, spec in specs.items():
        entries[name] = asdict(spec)
        del entries[name]["kept"]  # the length of the values says it
    plain = {"format": "pt"}
    if not specs:
        return plain
    packed = json.dumps(entries, separators=(",", ":"), sort_keys=True)
    return {**plain, _VERSION_KEY: str(FORMAT_VERSION), _PACKED_KEY: packed}


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
    for name in entries:
        if any(name + part in entries for part in (VALUES, BITMAP)) or name == "__metadata__":
            raise _broken(file, f"{short(name)} is a matrix, and another name needs its place")
    return {name: _spec(file, name, entry, tensors) for name, entry in entries.items()}


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key stands twice: which one counts would be anybody's guess."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _spec(file: str, name: str, entry: Any, tensors: Mapping[str, Entry]) -> Spec:
    """One entry of `llmprune.packed`, held against the tensors that it is about."""
    if not isinstance(entry, dict) or set(entry) != {"shape", "dtype", "pattern", "axis"}:
        raise _broken(file, f"{short(name)} needs shape, dtype, pattern and axis")
    shape, dtype, pattern, axis = (entry[k] for k in ("shape", "dtype", "pattern", "axis"))
    if not _possible(shape):
        raise _broken(file, f"{short(name)} has shape {short(shape)}")
    if dtype not in NAMES.values():
        raise _broken(file, f"{short(name)} has dtype {short(dtype)}")
    if axis not in ("rows", "columns"):
        raise _broken(file, f"{short(name)} has axis {short(axis)}")
    if not isinstance(pattern, str) or not _fits(pattern, shape[-1 if axis == "rows" else -2]):
        raise _broken(file, f"{short(name)} of shape {shape} has pattern {short(pattern)}")
    values, bitmap = tensors.get(name + VALUES), tensors.get(name + BITMAP)
    if values is None or bitmap is None:
        raise _broken(
            file, f"{short(name)} lacks its {VALUES if values is None else BITMAP} tensor"
        )
    if bitmap[0] != "U8" or tuple(bitmap[1]) != bitmap_shape(shape):
        raise _broken(file, f"the bitmap of {short(name)} is {bitmap[0]} {short(bitmap[1])}")
    if values[0] != dtype or len(values[1]) != 1 or values[1][0] > math.prod(shape):
        raise _broken(file, f"the values of {short(name)} are {values[0]} {short(values[1])}")
    if tuple(tensors.get(name, ("", (0,)))[1]) != (0,):
        raise _broken(file, f"{short(name)} is both packed and dense")
    return Spec(tuple(shape), dtype, pattern, axis, values[1][0])


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
