"""A model that holds packed weights, as the tensors and the metadata of its files (docs/format.md)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    dot_natural_key,
    revert_weight_conversion,
)
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from llmprune.checkpoint.sparse import (
    BITMAP,
    NAMES,
    SCALES,
    VALUES,
    WHOLE,
    Spec,
    metadata,
    version_of,
)
from llmprune.errors import CheckpointError
from llmprune.kernels.few_bits import packed_few
from llmprune.kernels.packed import Packed, pack, unpack, unpack_bits
from llmprune.runtime.few_bits import FewBitsLinear
from llmprune.runtime.patterns import tightest
from llmprune.runtime.rows import rearranged
from llmprune.runtime.seats import few_weights, packed_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FEW = (WHOLE, SCALES, BITMAP)


@torch.no_grad()
def packed_state(
    model: PreTrainedModel, conversions: Sequence[Any] | None
) -> tuple[dict[str, Tensor], dict[str, str], int]:
    """Every tensor of the files by its key, the metadata that each of them gets, and the format's version.

    Args:
        model: holds packed weights.
        conversions: between files and model; None for those that transformers knows of the family.

    Raises:
        CheckpointError: for packed weights of a dtype that the format does not have.
    """
    state = _whole_state(model)
    held, few = packed_weights(model), few_weights(model)
    whole = {n: _Whole(layer, *(state.pop(n + part) for part in _FEW)) for n, layer in few.items()}
    packed = {n: Packed(state.pop(n + VALUES), state.pop(n + BITMAP), held[n].shape) for n in held}
    for name, matrix in packed.items():
        if matrix.values.dtype not in NAMES:
            raise CheckpointError(
                f"{name} is {matrix.values.dtype}, which the sparse format does not have: call "
                "model.to(torch.float32), or another of float32, bfloat16 and float16"
            )
    files, specs = dict[str, Tensor](), dict[str, Spec]()
    with _reverting(model, conversions) as used:
        for names in _converted(used, [*packed, *whole, *state]):
            if names.isdisjoint([*packed, *whole]):
                continue
            given = {n: whole.pop(n).packed() for n in names & whole.keys()}  # as values
            given |= {n: packed.pop(n) for n in names & packed.keys()}
            _add_converted(
                model, given | {n: state.pop(n) for n in names & state.keys()}, files, specs
            )
        shapes = {n: m.shape for n, m in packed.items()}
        for key, name in _renamed(
            model, shapes | {n: w.spec.shape for n, w in whole.items()}
        ).items():
            if name in whole:
                whole[name].add(key, files, specs)
            else:
                _add(key, packed[name], held[name].pattern, held[name].axis, files, specs)
        files |= revert_weight_conversion(model, state)
    ordered = sorted(files, key=dot_natural_key)  # so that both parts of a matrix are neighbours
    return {key: files[key] for key in ordered}, metadata(specs), version_of(specs.values())


@dataclass(frozen=True)
class _Whole:
    """A layer in whole numbers, and its tensors as they are to be saved."""

    layer: FewBitsLinear
    whole: Tensor
    scales: Tensor
    bitmap: Tensor

    @property
    def spec(self) -> Spec:
        """What a header says of it: in the dtype that it came in, as in another its products are others."""
        layer = self.layer
        about = NAMES[layer.rounded], layer.pattern, layer.axis
        return Spec(layer.shape, *about, layer.kept, layer.bits, layer.group)

    def packed(self) -> Packed:
        """The same in values."""
        found = packed_few(self.layer.formed([self.whole, self.scales, self.bitmap]))
        return Packed(found.values.to(self.layer.dtype), found.bitmap, found.shape)

    def add(self, key: str, files: dict[str, Tensor], specs: dict[str, Spec]) -> None:
        """See `_add`."""
        files |= {key + WHOLE: self.whole, key + SCALES: self.scales, key + BITMAP: self.bitmap}
        files[key] = self.scales.new_empty(1, dtype=self.layer.rounded)[:0]
        specs[key] = self.spec


def _whole_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's tensors by name: tied ones once, and those that lie on a disk read from there."""
    state = dict(model.state_dict())
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    state = remove_tied_weights_from_state_dict(state, model)
    return {n: load_offloaded_parameter(model, n) if t.is_meta else t for n, t in state.items()}


@contextmanager
def _reverting(model: PreTrainedModel, conversions: Sequence[Any] | None) -> Iterator[list[Any]]:
    """While open, transformers undoes `conversions` for this model; gives them."""
    if conversions is None:  # as transformers chooses them for a model that came from no file
        known = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [c for c in known if not isinstance(c, PrefixChange)]
    before, model._weight_conversions = model._weight_conversions, list(conversions)
    try:
        yield model._weight_conversions
    finally:
        model._weight_conversions = before


def _converted(conversions: Sequence[Any], names: Sequence[str]) -> list[set[str]]:
    """Which parameters are converted, and which of them together, when they are saved."""
    reverse = [
        c.reverse_transform() for c in reversed(conversions) if isinstance(c, WeightConverter)
    ]
    found: dict[str, set[str]] = {}
    for name in names:
        for converter in reverse:
            key, pattern = converter.rename_source_key(name)
            if pattern is not None:
                found.setdefault(key, set()).add(name)
                break
    return list(found.values())


def _renamed(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """File key to parameter, of those that are only renamed."""
    probes = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    names = {id(probe): name for name, probe in probes.items()}
    return {key: names[id(t)] for key, t in revert_weight_conversion(model, probes).items()}


def _add_converted(
    model: PreTrainedModel,
    weights: Mapping[str, Packed | Tensor],
    files: dict[str, Tensor],
    specs: dict[str, Spec],
) -> None:
    """Add what transformers makes of parameters that it converts together, packed again.

    A matrix that lost no weight stays dense: it was dense before it was merged with others.
    """
    for key, packed in _reverted(model, weights).items():
        if len(packed.values) == math.prod(packed.shape):
            files[key] = unpack(packed)
        else:
            bits = unpack_bits(packed.bitmap, packed.shape[-1])
            _add(key, packed, *tightest(bits, ("rows", "columns")), files, specs)


def _reverted(model: PreTrainedModel, weights: Mapping[str, Packed | Tensor]) -> dict[str, Packed]:
    """The matrices of the files, of parameters of which some are packed."""
    packed = {n: w if isinstance(w, Packed) else pack(w) for n, w in weights.items()}
    moved = rearranged(packed, lambda tensors: revert_weight_conversion(model, tensors))
    if moved is not None:
        return moved
    masks = {n: unpack_bits(w.bitmap, w.shape[-1]) for n, w in packed.items()}
    kept = revert_weight_conversion(model, masks)
    dense = revert_weight_conversion(model, {n: unpack(w) for n, w in packed.items()})
    return {key: pack(weight, kept[key].contiguous()) for key, weight in dense.items()}


def _add(
    key: str,
    packed: Packed,
    pattern: str,
    axis: str,
    files: dict[str, Tensor],
    specs: dict[str, Spec],
) -> None:
    """Add the parts of a packed matrix, what is said of it, and the guard under its dense name."""
    values = packed.values
    files |= {key + VALUES: values, key + BITMAP: packed.bitmap}
    # in memory of its own: what shares memory would be written into one and the same file
    files[key] = values.new_empty(1)[:0]
    specs[key] = Spec(packed.shape, NAMES[values.dtype], pattern, axis, len(values))
