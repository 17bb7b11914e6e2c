"""Which parameters of a model stay packed, and room made for them before they are loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmprune.checkpoint.census import Axis
from llmprune.checkpoint.sparse import DTYPES
from llmprune.errors import CheckpointError
from llmprune.experts import fused
from llmprune.kernels.packed import Packed, bitmap_shape
from llmprune.runtime.experts import PackedModule, hold
from llmprune.runtime.fit import check_packed
from llmprune.runtime.linear import SparseLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Seat:
    """What a model has to make room for.

    Attributes:
        kept: number of kept values; an estimate where conversions share them out.
        pattern: `n:m` or `unstructured`.
        axis: `rows` or `columns`.
    """

    kept: int
    pattern: str
    axis: Axis


def seatable(model: PreTrainedModel) -> set[str]:
    """The parameters that can stay packed: of linear layers and fused experts, shared with nothing else."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    found = set()
    for path, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        names = ["weight"] if linear else [name for name, _ in fused(module)]
        for name in names:
            parameter = module._parameters.get(name)
            if parameter is None or parameter.dtype not in DTYPES.values():
                continue
            if owners[id(parameter)] == 1:
                found.add(f"{path}.{name}")
    return found - tied.keys() - set(tied.values())


def take_seats(model: PreTrainedModel, seats: Mapping[str, Seat]) -> None:
    """Have a model on the meta device hold the parameters `seats` packed."""
    for parameter, seat in seats.items():
        path, _, name = parameter.rpartition(".")
        module: Any = model.get_submodule(path)
        dense = module._parameters[name]
        conv = type(module).__name__ == "Conv1D"
        values = torch.empty(seat.kept, dtype=dense.dtype, device="meta")
        bitmap = torch.empty(bitmap_shape(dense.shape), dtype=torch.uint8, device="meta")
        packed = Packed(values, bitmap, tuple(dense.shape))
        if type(module) is nn.Linear or conv:
            layer = SparseLinear.from_packed(packed, module.bias, seat.pattern, seat.axis, conv)
            model.set_submodule(path, layer.train(module.training))
        else:
            hold(module, name, packed, seat.pattern, seat.axis)


def hold_pattern(model: nn.Module, parameter: str, pattern: str) -> None:
    """Have a packed parameter be known to hold a pattern along its last dimension."""
    path, _, name = parameter.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, PackedModule):
        module.rooms[name] = replace(module.rooms[name], pattern=pattern, axis="rows")
    elif isinstance(module, SparseLinear):
        module.pattern, module.axis = pattern, "rows"


@dataclass(frozen=True)
class Held:
    """A weight that a model holds packed.

    Attributes:
        values: [kept] parameter.
        bitmap: [..., rows, ceil(columns / 8)] uint8.
        shape: of the dense weight.
        pattern: `n:m` or `unstructured`.
        axis: `rows` or `columns`.
    """

    values: Tensor
    bitmap: Tensor
    shape: tuple[int, ...]
    pattern: str
    axis: Axis

    def check(self, name: str) -> None:
        """Refuse values and a bitmap that do not fit each other.

        Raises:
            CheckpointError: naming the weight.
        """
        try:
            check_packed(Packed(self.values, self.bitmap, self.shape))
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}; get the checkpoint again") from None


def packed_weights(model: nn.Module) -> dict[str, Held]:
    """The weights that `model` holds packed, by the names that they would have in a dense one."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, SparseLinear):
            found[f"{path}.weight"] = Held(
                module.weight_values,
                module.weight_bitmap,
                module.shape,
                module.pattern,
                module.axis,
            )
        elif isinstance(module, PackedModule):
            for name, room in module.rooms.items():
                packed = module.packed(name)
                found[f"{path}.{name}"] = Held(
                    packed.values, packed.bitmap, packed.shape, room.pattern, room.axis
                )
    return found
