"""Pack a model's pruned matrices in memory, and expand them again: one matrix at a time, in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.checkpoint.census import Axis
from llmprune.errors import ConfigError, ModelError
from llmprune.kernels.packed import DTYPES, Packed, nonzero_bits, pack, packed_bytes
from llmprune.model import Matrix, matrices
from llmprune.runtime.experts import PackedModule, hold, release
from llmprune.runtime.laid_out import prepare, tell_expanded
from llmprune.runtime.linear import SparseLinear
from llmprune.runtime.patterns import tightest


@dataclass(frozen=True)
class Swapped:
    """What `sparsify` or `densify` did.

    Attributes:
        patterns: the parameters that were packed or expanded, such as `model.layers.0.mlp.up_proj.weight`,
            and the pattern of each, `n:m` or `unstructured`.
        left: the parameters that `sparsify` looked at and left dense, and why.
        dense_bytes: what the former take dense.
        packed_bytes: what they take packed.
    """

    patterns: dict[str, str]
    left: dict[str, str]
    dense_bytes: int
    packed_bytes: int

    def __str__(self) -> str:
        """One line."""
        kinds = Counter(self.patterns.values())
        told = ", ".join(f"{count} x {pattern}" for pattern, count in kinds.most_common())
        left = f"; {len(self.left)} left dense" if self.left else ""
        return (
            f"{len(self.patterns)} matrices ({told or 'none'}): {self.dense_bytes:,} bytes dense, "
            f"{self.packed_bytes:,} packed{left}"
        )


@torch.no_grad()
def sparsify(
    model: nn.Module,
    targets: Sequence[str] = (),
    ignore: Sequence[str] = (),
    masks: Mapping[str, Tensor] | None = None,
) -> Swapped:
    """Have a pruned model hold its matrices packed, in place, bit for bit.

    Packed are those matrices of the decoder blocks that take less memory so, one after the other: at any
    time, there is one matrix more than before. A parameter of fused experts counts as one. What shares its
    memory with another parameter stays dense. The weights of -0.0 that a mask leaves when it is
    multiplied are weights to be kept; give `masks`, or make them zeros by `weight += 0` before.

    Args:
        model: a transformers model whose weights are in memory.
        targets: what to look at instead, as of `llmprune.prune`; what is named is packed even if it gets
            larger.
        ignore: what to leave dense, as of `llmprune.prune`.
        masks: what to keep, zeros among it too, by matrix: bool [out, in], as `llmprune.masks` gives;
            of a matrix that has none, all but zeros.

    Returns:
        What was packed, and what was left and why.

    Raises:
        ConfigError: when a mask fits no matrix, or its matrix holds a weight outside of it.
        ModelError: when nothing could be packed, or the weights are not in memory.
    """
    parts = _parameters(matrices(model, targets, ignore))
    masks = dict(masks or {})
    _check_masks(masks, parts)
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    patterns, left, sizes = dict[str, str](), dict[str, str](), [0, 0]
    for name in list(parts):
        part = parts.pop(name)  # nothing here may keep a dense matrix alive
        keep, before = _stacked(part, masks), part[0].parameter.nbytes
        if why := _unfit(part[0].parameter, keep, owners, bool(targets)):
            left[name] = why
            continue
        patterns[name], after = _pack_one(model, part[0], keep)
        sizes = [sizes[0] + before, sizes[1] + after]
        del part
    if not patterns:
        raise ModelError(f"nothing could be packed: {_summary(left)}; is this model pruned?")
    _mark(model, packed=True)
    prepare(model)
    tell_expanded(model)
    return Swapped(patterns, left, *sizes)


@torch.no_grad()
def densify(model: nn.Module) -> Swapped:
    """Undo `sparsify`: every packed matrix is an ordinary parameter again, bit for bit.

    A model without packed matrices is left as it is. The parameters require gradients, as those of any
    fresh model.
    """
    patterns, sizes = dict[str, str](), [0, 0]

    def count(name: str, packed: Packed, pattern: str, bytes: int) -> None:
        patterns[name] = pattern
        sizes[0] += packed.values.element_size() * int(torch.Size(packed.shape).numel())
        sizes[1] += bytes

    packed = (SparseLinear, PackedModule)
    for path in [n for n, m in model.named_modules() if isinstance(m, packed)]:
        module = model.get_submodule(
            path
        )  # by name: a list of modules would keep them all in memory
        if isinstance(module, SparseLinear):
            count(f"{path}.weight", module.packed, module.pattern, module.bytes)
            _exchange(model, module, module.to_linear())
        elif isinstance(module, PackedModule):
            for name, room in list(module.rooms.items()):
                found = module.packed(name)
                count(f"{path}.{name}", found, room.pattern, found.bytes)
                release(module, name)
    _mark(model, packed=False)
    return Swapped(patterns, {}, *sizes)


def _mark(model: nn.Module, packed: bool) -> None:
    """Have `save_pretrained` write the sparse format, or the dense one."""
    from transformers import PreTrainedModel

    from llmprune.runtime import quantizer

    if isinstance(model, PreTrainedModel):
        (quantizer.attach if packed else quantizer.detach)(model)


def _parameters(chosen: Sequence[Matrix]) -> dict[str, list[Matrix]]:
    """The matrices of each dense parameter: one, or those of the experts that were chosen."""
    parts: dict[str, list[Matrix]] = {}
    for matrix in chosen:
        if not matrix.packed:
            parts.setdefault(matrix.parameter_name, []).append(matrix)
    if not parts:
        raise ModelError("every matrix is packed already")
    return parts


def _check_masks(masks: Mapping[str, Tensor], parts: Mapping[str, Sequence[Matrix]]) -> None:
    """Refuse masks before anything is packed."""
    known = {m.name: m for part in parts.values() for m in part}
    for name, mask in masks.items():
        if name not in known:
            raise ConfigError(f"a mask is for {name}, which is no matrix that could be packed")
        weight = known[name].weight
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            raise ConfigError(
                f"the mask of {name} is {mask.dtype} {list(mask.shape)}; give bool {list(weight.shape)}"
            )
        if outside := int(((weight != 0) & ~mask.to(weight.device)).sum()):
            raise ConfigError(f"{name} has {outside} weights outside of its mask that are not zero")


def _stacked(part: Sequence[Matrix], masks: Mapping[str, Tensor]) -> Tensor | None:
    """The mask of a parameter in its own layout; None where no mask is given for it."""
    given = {m: masks[m.name] for m in part if m.name in masks}
    if not given:
        return None
    whole = part[0].parameter != 0
    for matrix, mask in given.items():
        matrix.part(whole).copy_(mask)
    return whole


def _unfit(dense: Tensor, keep: Tensor | None, owners: Counter[int], named: bool) -> str | None:
    """Why a parameter stays dense, or None."""
    if owners[id(dense)] > 1:
        return "shared"
    if dense.is_meta:
        raise ModelError(
            "weights are not in memory (device meta); load the model without offloading"
        )
    if dense.dtype not in DTYPES:
        return f"of {str(dense.dtype).removeprefix('torch.')}"
    kept = int((nonzero_bits(dense) if keep is None else keep).sum())
    if named or packed_bytes(dense.shape, kept, dense.element_size()) < dense.nbytes:
        return None
    signed = keep is None and kept > int(dense.count_nonzero())
    return "not smaller when packed" + (", for their zeros are -0.0" if signed else "")


def _pack_one(model: nn.Module, matrix: Matrix, keep: Tensor | None) -> tuple[str, int]:
    """Put the packed form in the place of a parameter; gives its pattern and what it takes in bytes."""
    dense: Tensor = matrix.parameter.detach()
    if keep is not None:
        dense = dense + 0  # minus zero and zero make zero: outside of a mask, both are the same
    packed = pack(dense, keep)
    axes: tuple[Axis, ...] = ("columns", "rows") if matrix.transposed else ("rows", "columns")
    pattern, axis = tightest(nonzero_bits(dense) if keep is None else keep, axes)
    module: Any = matrix.module
    conv = type(module).__name__ == "Conv1D"
    if matrix.expert is None and (conv or type(module) is nn.Linear):
        layer = SparseLinear.from_packed(packed, module.bias, pattern, axis, conv)
        _exchange(model, module, layer.train(module.training))
    else:  # experts, and linear layers that families have given a forward of their own
        hold(module, matrix.attribute, packed, pattern, axis, matrix.transposed)
    return pattern, packed.bytes


def _exchange(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is in the model, and let it take over its hooks."""
    for key, value in old.__dict__.items():
        if key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            new.__dict__[key] = value
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _summary(left: Mapping[str, str]) -> str:
    """Such as `224 matrices are not smaller when packed`."""
    return ", ".join(f"{n} matrices {why}" for why, n in Counter(left.values()).most_common())
