"""Which parameter of a model each tensor of a sparse checkpoint goes to, and by what way.

A packed matrix T of the files (docs/format.md) has two tensors, `T_values` and `T_bitmap`, which no table of
transformers knows. What becomes of a dense T is asked of transformers itself, once per matrix:

- it only gets another name P: then `T_values` is `P_values` and `T_bitmap` is `P_bitmap`, as the module that
  keeps P packed calls them;
- it is converted (experts that are merged, transposed, ...), or P is to be dense: then the parts are
  collected and unpacked, transformers' own operations are run on the result, and what comes out is packed
  again where P is kept packed (`llmprune.runtime.unpacking`). So it is of a T in fewer bits, whose
  `T_whole`, `T_scales` and `T_bitmap` become values on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from llmprune.checkpoint.headers import Headers
from llmprune.checkpoint.sparse import BITMAP, SCALES, VALUES, WHOLE, Spec
from llmprune.errors import CheckpointError
from llmprune.runtime.patterns import UNSTRUCTURED
from llmprune.runtime.seats import Seat, seatable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GUARD = ".llmprune_guard"
"""What the empty tensors that keep other programs out are renamed to; no parameter is called so."""


class Part(StrEnum):
    """What is collected of the matrices of a group; the values are source patterns of a transform."""

    VALUES = "llmprune:values"
    BITMAP = "llmprune:bitmap"
    WHOLE = "llmprune:whole"
    SCALES = "llmprune:scales"
    DENSE = "llmprune:dense"
    GUARD = "llmprune:guard"


_PARTS = {VALUES: Part.VALUES, BITMAP: Part.BITMAP, WHOLE: Part.WHOLE, SCALES: Part.SCALES}


@dataclass(frozen=True)
class Origin:
    """A matrix of the files.

    Attributes:
        name: its dense name in the files.
        targets: the parameters of the dense model that it becomes, or becomes a part of.
        pattern: the source pattern of the conversion that takes it; None where it only gets its name.
        spec: what the header says of it; None for a dense one.
    """

    name: str
    targets: tuple[str, ...]
    pattern: str | None
    spec: Spec | None


@dataclass
class Group:
    """Matrices that become one parameter together, or several.

    Attributes:
        converter: the conversion of transformers; None where there is nothing to do but unpack.
        origins: the matrices, in the order of transformers.
    """

    converter: WeightConverter | None
    origins: list[Origin] = field(default_factory=list)


@dataclass
class Routes:
    """Where everything goes.

    Attributes:
        seats: the parameters that the model keeps packed.
        shapes: of the dense model's parameters and buffers.
        names: file key, as transformers' renamings leave it, to the name in the model.
        collected: file key, likewise, to the name in the model and the part that it is.
        groups: by the name in the model under which their parts are collected.
        flaws: what was found to be wrong with matrices while they were loaded.
        patterns: `n:m` along the last dimension, by parameter, of those that are whole rows of such matrices.
    """

    seats: dict[str, Seat]
    shapes: dict[str, tuple[int, ...]]
    names: dict[str, str] = field(default_factory=dict)
    collected: dict[str, tuple[str, Part]] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    flaws: list[str] = field(default_factory=list)
    patterns: dict[str, str] = field(default_factory=dict)

    @property
    def fewer(self) -> bool:
        """Whether scales are among what is collected."""
        return any(part is Part.SCALES for _, part in self.collected.values())

    def __deepcopy__(self, memo: Any) -> Routes:
        return self  # transformers copies a conversion for each parameter that it makes


def find_routes(
    model: PreTrainedModel, transforms: Sequence[Any], headers: Headers, keep: bool
) -> Routes:
    """Lay every tensor's way.

    Args:
        model: dense, on the meta device.
        transforms: those that transformers will apply to the files' tensors.
        headers: what the files hold.
        keep: whether what can stay packed does; else all of it is unpacked.

    Raises:
        CheckpointError: for a matrix whose shape is another than the model's.
    """
    trace = _Trace(model, transforms)
    origins = [o for o in (trace.origin(n, s) for n, s in headers.packed.items()) if o]
    mixed = {o.targets for o in origins if o.pattern is not None}
    dense = (trace.origin(name, None) for name in headers.dense)
    origins += [o for o in dense if o and o.pattern is not None and o.targets in mixed]
    origins.sort(key=lambda o: dot_natural_key(o.name))
    wanted: dict[str, list[Origin]] = {}
    for origin in origins:
        for target in origin.targets:
            wanted.setdefault(target, []).append(origin)
    packable = seatable(model) if keep else set()
    seats = {t: _seat(found) for t, found in wanted.items() if t in packable}
    routes = Routes(seats, trace.shapes)
    for origin in origins:
        _lay(routes, trace, origin)
    return routes


def _seat(origins: Sequence[Origin]) -> Seat:
    """What a parameter that is made of `origins` needs."""
    specs = [o.spec for o in origins if o.spec is not None]
    shared = len(specs[0].shape), specs[0].pattern, specs[0].axis
    alike = len(specs) == len(origins) and all(
        (len(s.shape), s.pattern, s.axis) == shared for s in specs
    )
    plain = alike and origins[0].pattern is None
    kept = sum(s.kept // len(o.targets) for s, o in zip(specs, origins, strict=False))
    if not plain:
        return Seat(kept, UNSTRUCTURED, "rows")
    return Seat(kept, specs[0].pattern, "rows" if specs[0].axis == "rows" else "columns")


def _lay(routes: Routes, trace: _Trace, origin: Origin) -> None:
    """The way of one matrix."""
    name, first = origin.name, origin.targets[0]
    spec = origin.spec
    if spec is not None and origin.pattern is None and spec.shape != trace.shapes[first]:
        raise CheckpointError(
            f"{name} has shape {list(spec.shape)}, its config asks for {list(trace.shapes[first])}"
        )
    few = spec is not None and spec.bits is not None
    if origin.pattern is None and first in routes.seats and not few:
        for part in (VALUES, BITMAP):
            routes.names[trace.arrives(name + part)] = first + part
        routes.names[trace.arrives(name)] = name + GUARD
        return
    place = first + VALUES if first in routes.seats else first
    converter = None if origin.pattern is None else trace.converter(origin.pattern)
    routes.groups.setdefault(place, Group(converter)).origins.append(origin)
    parts = {name: Part.DENSE}
    if spec is not None:
        parts = {name + part: _PARTS[part] for part in spec.parts} | {name: Part.GUARD}
    for key, part in parts.items():
        routes.collected[trace.arrives(key)] = place, part


class _Trace:
    """Follows names from the files into a dense model, as transformers does."""

    def __init__(self, model: PreTrainedModel, transforms: Sequence[Any]) -> None:
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._by_pattern = {p: c for c in self._converters for p in c.source_patterns}
        self._prefix = model.base_model_prefix
        self._state = model.state_dict()
        self.shapes = {name: tuple(t.shape) for name, t in self._state.items()}

    def origin(self, name: str, spec: Spec | None) -> Origin | None:
        """What becomes of the dense tensor `name`, or None where the model has no place for it."""
        target, pattern = self._renamed(name, self._renamings, self._converters)
        if target not in self._state and name in self._state:
            target, pattern = self._renamed(name, [], [])
        if target not in self._state:
            return None
        if pattern is None:
            return Origin(name, (target,), None, spec)
        first, *more = self._by_pattern[pattern].target_patterns
        others = (target.replace(first, other) for other in more)
        return Origin(name, (target, *others), pattern, spec)

    def converter(self, pattern: str) -> WeightConverter:
        """The conversion that has a source pattern."""
        return self._by_pattern[pattern]

    def arrives(self, key: str) -> str:
        """What the family's renamings make of a file key."""
        for renaming in self._renamings:
            key, _ = renaming.rename_source_key(key)
        return key

    def _renamed(
        self, name: str, renamings: list[Any], converters: list[Any]
    ) -> tuple[str, str | None]:
        target, pattern = rename_source_key(name, renamings, converters, self._prefix, self._state)
        return str(target), pattern
