"""Which matrices of a checkpoint are worth packing, and which pattern the zeros of each really keep.

Every candidate is read once, a few rows at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmprune.checkpoint import tensors, whole
from llmprune.checkpoint.census import Axis, Groups, cuts
from llmprune.checkpoint.decoder import axes, is_decoder
from llmprune.checkpoint.sparse import BITMAP, NAMES, SCALES, VALUES, WHOLE, Spec
from llmprune.checkpoint.tensors import Stored
from llmprune.kernels.packed import nonzero_bits

NM = tuple[int, int]
_NM = re.compile(r"([1-9][0-9]{0,3}):([1-9][0-9]{0,3})")
_TOGETHER = 10**4  # rows that are looked at together at most, so that groups of each m are whole
_DIMENSIONS = 8  # what docs/format.md allows
_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Rounding:
    """What llmprune.json says that kept weights were rounded to.

    Attributes:
        kind: `int8` or `int4`.
        group: columns that share a scale; 0 is a whole row.
    """

    kind: str
    group: int


def plan(
    stored: Mapping[str, Stored],
    model_type: str | None,
    recipe: Sequence[NM],
    tell: Callable[[str], None] = lambda key: None,
    rounding: Rounding | None = None,
) -> dict[str, Spec]:
    """The matrices of decoder blocks that take less when packed, by key.

    Args:
        stored: every tensor of a checkpoint.
        model_type: from config.json: some families store their matrices [in, out].
        recipe: every n:m of the run, of which a matrix has the first that it keeps, although another may
            be tighter.
        tell: told of every candidate before it is read.
        rounding: of the run; where it is proven, a matrix is stored in fewer bits.

    Raises:
        CheckpointError: for a file that cannot be read.
    """
    found = {}
    for key in candidates(stored):
        tell(key)
        ways = axes(model_type, True)
        spec = measure(stored[key], ways, recipe)
        if rounding is not None and not stored.keys() & {key + WHOLE, key + SCALES}:
            spec = _rounded(stored[key], spec, ways, recipe, rounding)
        if spec.bytes < stored[key].bytes:
            found[key] = spec
    return found


def candidates(stored: Mapping[str, Stored]) -> list[str]:
    """Keys of the matrices that may be packed."""
    return [
        key
        for key, entry in stored.items()
        if entry.dtype in NAMES
        and 2 <= len(entry.shape) <= _DIMENSIONS
        and min(entry.shape) > 0
        and is_decoder(key, entry.shape, True)
        and not stored.keys() & {key + VALUES, key + BITMAP}
    ]


def recipe_of(report: Mapping[str, object]) -> list[NM]:
    """Every n:m that llmprune.json says matrices were pruned to, the strictest first; none for a share."""
    recipe, layers = report.get("recipe"), report.get("layers")
    texts: list[object] = [recipe.get("sparsity")] if isinstance(recipe, Mapping) else []
    for layer in layers if isinstance(layers, list) else []:
        texts.append(layer.get("pattern") if isinstance(layer, Mapping) else None)
    known = {text for text in texts if isinstance(text, str)}
    matches = [match for text in known if (match := _NM.fullmatch(text))]
    found = {(int(m[1]), int(m[2])) for m in matches if int(m[1]) < int(m[2])}
    if math.lcm(*(m for _, m in found)) > _TOGETHER:
        return []
    return sorted(found, key=lambda nm: (nm[0] / nm[1], nm[1]))


def rounding_of(report: Mapping[str, object]) -> Rounding | None:
    """What llmprune.json says that the run rounded to; None where it says nothing that makes sense."""
    recipe = report.get("recipe")
    kind = recipe.get("quantize") if isinstance(recipe, Mapping) else None
    settings = recipe.get("quantize_settings") if isinstance(recipe, Mapping) else None
    group = settings.get("group") if isinstance(settings, Mapping) else None
    if not isinstance(kind, str) or kind not in _BITS or type(group) is not int or group < 0:
        return None
    return Rounding(kind, group)


def _rounded(
    stored: Stored, spec: Spec, ways: tuple[Axis, ...], recipe: Sequence[NM], rounding: Rounding
) -> Spec:
    """`spec` in fewer bits, where every weight is proven to be such a product and it takes less so."""
    for axis in sorted(ways, key=lambda way: way != spec.axis):  # that of the pattern first
        found = spec if axis == spec.axis else measure(stored, (axis,), recipe)
        length = spec.shape[-1 if axis == "rows" else -2]
        group = min(rounding.group, length) or length
        fewer = replace(found, bits=_BITS[rounding.kind], group=group)
        if fewer.bytes < spec.bytes and whole.proven(parts_of(stored, fewer), fewer):
            return fewer
    return spec


def measure(stored: Stored, ways: tuple[Axis, ...], recipe: Sequence[NM]) -> Spec:
    """Count the kept weights of a matrix and find its pattern; all but +0.0 is kept.

    Args:
        stored: [..., rows, columns].
        ways: orientations to try, the preferred one first.
        recipe: preferred to what is found: the first that holds.
    """
    named = [_Named(nm, stored.shape, axis) for nm in recipe for axis in ways]
    found = [Groups(stored.shape, axis) for axis in ways]
    kept = 0
    for part in parts(stored, math.lcm(*(m for _, m in recipe))):
        bits = nonzero_bits(part)
        kept += int(bits.sum())
        for each in named:
            each.add(bits)
        for groups in found:
            groups.add(bits)
    dtype = NAMES[stored.dtype]
    for each in named:
        if each.holds:
            return Spec(stored.shape, dtype, each.pattern, each.axis, kept)
    for groups in found:
        if tightest := groups.tightest():
            pattern = f"{tightest[0]}:{tightest[1]}"
            return Spec(stored.shape, dtype, pattern, groups.axis, kept)
    return Spec(stored.shape, dtype, "unstructured", ways[0], kept)


def parts_of(stored: Stored, spec: Spec) -> Iterator[Tensor]:
    """`parts` that cut no group of those that share a scale."""
    assert spec.group is not None
    return parts(stored, spec.group if spec.axis == "columns" else 1)


def parts(stored: Stored, group: int = 1) -> Iterator[Tensor]:
    """A matrix as rows [n, columns], a few megabytes at a time; see `llmprune.checkpoint.census.cuts`."""
    source = tensors.rows_of(stored)
    rows = stored.shape[-2] if len(stored.shape) > 1 else source.count
    for first, count in cuts(source.count, rows, source.columns, group):
        yield source.rows(first, count)


class _Named:
    """Whether every group of a matrix keeps at most n of m.

    Attributes:
        holds: so far.
    """

    def __init__(self, recipe: NM, shape: tuple[int, ...], axis: Axis) -> None:
        self.n, self.m = recipe
        self.axis = axis
        self.holds = shape[-1 if axis == "rows" else -2] % self.m == 0

    @property
    def pattern(self) -> str:
        return f"{self.n}:{self.m}"

    def add(self, bits: Tensor) -> None:
        """Look at `bits` [n, columns] bool."""
        if not self.holds:
            return
        grouped = bits if self.axis == "rows" else bits.T
        counts = grouped.reshape(math.prod(bits.shape) // self.m, self.m).sum(1, dtype=torch.int32)
        self.holds = int(counts.max()) <= self.n
