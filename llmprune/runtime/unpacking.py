"""The transforms that bring packed matrices into a model, run by transformers among a family's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
)

from llmprune.checkpoint.sparse import BITMAP, VALUES
from llmprune.errors import CheckpointError
from llmprune.kernels.packed import Packed, nonzero_bits, pack, unpack, unpack_bits
from llmprune.runtime.linear import check_packed
from llmprune.runtime.routes import Group, Part, Routes


def transforms(routes: Routes, own: Sequence[Any]) -> list[Any]:
    """The transforms of a family with ours among them, where each meets what it knows."""
    renamings = [t for t in own if isinstance(t, WeightRenaming)]
    rest = [t for t in own if not isinstance(t, WeightRenaming)]
    return [*renamings, Names(routes), Unpacking(routes), *rest]


class Names(WeightRenaming):  # type: ignore[misc]
    """Gives the parts of packed matrices the names that they have in the model."""

    __slots__ = ("routes",)

    def __init__(self, routes: Routes) -> None:
        super().__init__("llmprune:file", "llmprune:model")
        self.routes = routes

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """(name in the model, what matched), or the key itself and None."""
        name = self.routes.names.get(source_key)
        return (source_key, None) if name is None else (name, source_key)


class Unpacking(WeightConverter):  # type: ignore[misc]
    """Collects what has to be unpacked to be converted."""

    __slots__ = ("routes",)

    def __init__(self, routes: Routes) -> None:
        super().__init__([str(part) for part in Part], "llmprune:model", [_Unpack(routes)])
        self.routes = routes

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """(name in the model, part), or the key itself and None."""
        return self.routes.collected.get(source_key, (source_key, None))


class _Unpack(ConversionOps):  # type: ignore[misc]
    """Unpacks, converts as the family does, and packs again."""

    def __init__(self, routes: Routes) -> None:
        self.routes = routes

    def __repr__(self) -> str:
        return "llmprune.Unpack"

    @property
    def reverse_op(self) -> ConversionOps:
        """Saving has its own way; see `llmprune.runtime.saving`."""
        raise NotImplementedError("sparse checkpoints are saved through their quantizer")

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        full_layer_name: str,
        model: Any,
        config: Any = None,
        missing_keys: Any = None,
    ) -> dict[str, Tensor]:
        """The parameters of one group by name, in the dtypes that the model holds them in."""
        group = self.routes.groups[full_layer_name]
        weights, masks = _unpacked(group, input_dict)
        dense = _converted(group, weights, model)
        keep = _converted(group, masks, model) if dense.keys() & self.routes.seats.keys() else {}
        out: dict[str, Tensor] = {}
        for target, weight in dense.items():
            if tuple(weight.shape) != self.routes.shapes[target]:
                raise CheckpointError(
                    f"{target} comes out as {list(weight.shape)}, its config asks for "
                    f"{list(self.routes.shapes[target])}"
                )
            if target not in self.routes.seats:
                out[target] = weight.to(model.get_parameter_or_buffer(target).dtype)
                continue
            packed = pack(weight, keep[target])
            wanted = model.get_parameter_or_buffer(target + VALUES).dtype
            out[target + VALUES] = packed.values.to(wanted)
            out[target + BITMAP] = packed.bitmap
        return out


def _unpacked(
    group: Group, parts: Mapping[str, Sequence[Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, kept or not) of every matrix of a group, by its name in the files.

    Raises:
        CheckpointError: for values and bitmaps that do not fit each other.
    """
    packed = [o.name for o in group.origins if o.spec is not None]
    dense = [o.name for o in group.origins if o.spec is None]
    values = _named(packed, VALUES, parts.get(Part.VALUES, ()))
    bitmaps = _named(packed, BITMAP, parts.get(Part.BITMAP, ()))
    weights = _named(dense, "", parts.get(Part.DENSE, ()))
    masks = {name: nonzero_bits(weight.contiguous()) for name, weight in weights.items()}
    for origin in group.origins:
        if origin.spec is not None:
            name, shape = origin.name, origin.spec.shape
            matrix = Packed(values.pop(name), bitmaps.pop(name), shape)
            check_packed(matrix)
            weights[name] = unpack(matrix)
            masks[name] = unpack_bits(matrix.bitmap, shape[-1])
    return weights, masks


def _named(names: Sequence[str], part: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The tensors that were collected for one part, by matrix: transformers goes through sorted keys."""
    ordered = sorted(names, key=lambda name: dot_natural_key(name + part))
    return dict(zip(ordered, tensors, strict=True))


def _converted(group: Group, tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """What transformers' own operations make of a group's matrices, by parameter."""
    first = group.origins[0].targets[0]
    if group.converter is None:
        return {first: tensors[group.origins[0].name]}
    converter = deepcopy(group.converter)
    for origin in group.origins:
        converter.add_tensor(first, origin.name, origin.pattern, tensors[origin.name])
    found = converter.convert(first, model=model, config=model.config)
    return {name: t[0] if isinstance(t, list) else t for name, t in found.items()}
