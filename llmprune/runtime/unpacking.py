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

from llmprune.checkpoint.sparse import BITMAP, SCALES, VALUES, WHOLE, Spec
from llmprune.checkpoint.unpack import WEIGHTS_AT_ONCE
from llmprune.checkpoint.whole import flaw, rows_of_scales, spread
from llmprune.errors import CheckpointError, short
from llmprune.kernels.few_bits import of_halves, products
from llmprune.kernels.packed import Packed, count, nonzero_bits, pack, unpack, unpack_bits
from llmprune.runtime.fit import check_packed
from llmprune.runtime.routes import Group, Part, Routes
from llmprune.runtime.rows import rearranged


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
        packed, dense = _collected(group, input_dict, self.routes.flaws)
        found = (
            self._kept(group, packed)
            or self._moved(group, packed, dense, model)
            or self._converted(group, packed, dense, model)
        )
        out: dict[str, Tensor] = {}
        for target, weight in found.items():
            if tuple(weight.shape) != self.routes.shapes[target]:
                raise CheckpointError(
                    f"{target} comes out as {list(weight.shape)}, its config asks for "
                    f"{list(self.routes.shapes[target])}"
                )
            if isinstance(weight, Packed):
                wanted = model.get_parameter_or_buffer(target + VALUES).dtype
                out[target + VALUES] = weight.values.to(wanted)
                out[target + BITMAP] = weight.bitmap
            else:
                out[target] = weight.to(model.get_parameter_or_buffer(target).dtype)
        return out

    def _kept(
        self, group: Group, packed: Mapping[str, Packed]
    ) -> Mapping[str, Packed | Tensor] | None:
        """A matrix that only gets another name; None for everything else."""
        origin = group.origins[0]
        if group.converter is not None or origin.targets[0] not in self.routes.seats:
            return None
        return {origin.targets[0]: packed[origin.name]}

    def _moved(
        self, group: Group, packed: Mapping[str, Packed], dense: Mapping[str, Tensor], model: Any
    ) -> Mapping[str, Packed | Tensor] | None:
        """Everything packed all the way; None where that cannot be."""
        targets = {target for origin in group.origins for target in origin.targets}
        if group.converter is None or not targets <= self.routes.seats.keys():
            return None
        like = next(iter(packed.values())).values
        given = {name: pack(weight.to(like.dtype)) for name, weight in dense.items()}
        found = rearranged({**packed, **given}, lambda tensors: _convert(group, tensors, model))
        held = {(o.spec.pattern, o.spec.axis) if o.spec else None for o in group.origins}
        if found is not None and len(held) == 1 and (one := held.pop()) and one[1] == "rows":
            self.routes.patterns |= dict.fromkeys(found, one[0])
        return found

    def _converted(
        self, group: Group, packed: Mapping[str, Packed], dense: Mapping[str, Tensor], model: Any
    ) -> Mapping[str, Packed | Tensor]:
        """Expanded, converted, and packed again where it is to be."""
        expanded = {name: unpack(matrix) for name, matrix in packed.items()}
        weights = _convert(group, {**expanded, **dense}, model)
        seats = weights.keys() & self.routes.seats.keys()
        if not seats:
            return weights
        masks = {n: nonzero_bits(weight.contiguous()) for n, weight in dense.items()}
        for name, matrix in packed.items():
            masks[name] = unpack_bits(matrix.bitmap, matrix.shape[-1])
        keep = _convert(group, masks, model)
        return {n: pack(w, keep[n]) if n in seats else w for n, w in weights.items()}


def _collected(
    group: Group, parts: Mapping[str, Sequence[Tensor]], flaws: list[str]
) -> tuple[dict[str, Packed], dict[str, Tensor]]:
    """The packed and the dense matrices of a group, by name in the files.

    What is wrong with one in fewer bits goes to `flaws`, to be raised when all is loaded: transformers hides
    what is raised here.

    Raises:
        CheckpointError: for values and bitmaps that do not fit each other.
    """
    specs = {o.name: o.spec for o in group.origins if o.spec is not None}
    plain = [name for name, spec in specs.items() if spec.bits is None]
    few = [name for name, spec in specs.items() if spec.bits is not None]
    values = _named(plain, VALUES, parts.get(Part.VALUES, ()))
    whole = _named(few, WHOLE, parts.get(Part.WHOLE, ()))
    scales = _named(few, SCALES, parts.get(Part.SCALES, ()))
    bitmaps = _named(list(specs), BITMAP, parts.get(Part.BITMAP, ()))
    for name in few:
        try:
            values[name] = _products(whole[name], scales[name], bitmaps[name], specs[name])
        except CheckpointError as error:
            flaws.append(f"{short(name)}: {error}")
            values[name] = whole[name].new_empty(0, dtype=specs[name].torch_dtype)
            bitmaps[name] = torch.zeros_like(bitmaps[name])
    rest = [o.name for o in group.origins if o.spec is None]
    dense = _named(rest, "", parts.get(Part.DENSE, ()))
    packed = {n: Packed(values[n], bitmaps[n], spec.shape) for n, spec in specs.items()}
    for matrix in packed.values():
        check_packed(matrix)
    return packed, dense


def _products(whole: Tensor, scales: Tensor, bitmap: Tensor, spec: Spec) -> Tensor:
    """The values that whole numbers and scales stand for, some rows at a time.

    Raises:
        CheckpointError: for parts that do not fit each other.
    """
    numbers = whole if spec.bits == 8 else of_halves(whole)
    if len(numbers) > spec.kept and bool(numbers[spec.kept :].any()):
        raise CheckpointError("half a byte behind the last whole number is not 0")
    numbers = numbers[: spec.kept]
    if scales.dtype != torch.bfloat16:
        raise CheckpointError(f"scales arrive as {scales.dtype}, not as they are stored")
    assert spec.bits is not None
    if why := flaw(numbers, scales, spec.bits):
        raise CheckpointError(why)
    like = torch.zeros((), device=bitmap.device).expand(spec.kept)  # of that length, and no memory
    check_packed(Packed(like, bitmap, spec.shape))
    tall, flat = bitmap.flatten(0, -2), scales.flatten(0, -2)
    out = numbers.new_empty(spec.kept, dtype=spec.torch_dtype)
    step, done = max(1, WEIGHTS_AT_ONCE // spec.shape[-1]), 0
    for first in range(0, len(tall), step):
        part = tall[first : first + step]
        end = done + count(part)
        begin = int(rows_of_scales(spec, first, 1))
        wide = spread(flat[begin:], spec, first, len(part))
        out[done:end] = products(numbers[done:end], wide, part, spec.torch_dtype)
        done = end
    return out


def _named(names: Sequence[str], part: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The tensors that were collected for one part, by matrix: transformers goes through sorted keys."""
    ordered = sorted(names, key=lambda name: dot_natural_key(name + part))
    return dict(zip(ordered, tensors, strict=True))


def _convert(group: Group, tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """What transformers' own operations make of a group's matrices, by parameter."""
    first = group.origins[0].targets[0]
    if group.converter is None:
        return {first: tensors[group.origins[0].name]}
    converter = deepcopy(group.converter)
    for origin in group.origins:
        converter.add_tensor(first, origin.name, origin.pattern, tensors[origin.name])
    found = converter.convert(first, model=model, config=model.config)
    return {name: t[0] if isinstance(t, list) else t for name, t in found.items()}
