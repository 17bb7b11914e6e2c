"""Modules that hold packed weights, put into a model in the place of dense ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from llmprune.checkpoint.sparse import DTYPES
from llmprune.errors import CheckpointError
from llmprune.kernels.packed import Packed
from llmprune.runtime.experts import PackedModule
from llmprune.runtime.linear import SparseLinear, check_packed

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
    axis: str


def seatable(model: PreTrainedModel, parameter: str) -> bool:
    """Whether `parameter` can be kept packed: the weight of a linear layer that nothing else shares."""
    path, _, attribute = parameter.rpartition(".")
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if attribute != "weight" or parameter in tied or parameter in tied.values():
        return False
    module: Any = model.get_submodule(path)
    linear = type(module) is nn.Linear or type(module).__name__ == "Conv1D"
    return linear and module.weight.dtype in DTYPES.values()


def take_seats(model: PreTrainedModel, seats: Mapping[str, Seat]) -> None:
    """Replace the modules of the parameters `seats` names, on the meta device."""
    for parameter, seat in seats.items():
        path = parameter.rpartition(".")[0]
        module: Any = model.get_submodule(path)
        conv = type(module).__name__ == "Conv1D"
        rows, columns = module.weight.shape
        features, out = (rows, columns) if conv else (columns, rows)
        layer = SparseLinear(
            features,
            out,
            module.bias is not None,
            "meta",
            module.weight.dtype,
            kept=seat.kept,
            pattern=seat.pattern,
            axis=seat.axis,  # type: ignore[arg-type]
            transposed=conv,
        )
        model.set_submodule(path, layer.train(module.training))


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

    values: nn.Parameter
    bitmap: Tensor
    shape: tuple[int, ...]
    pattern: str
    axis: str

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
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            found[f"{name}.weight"] = Held(
                module.weight_values,
                module.weight_bitmap,
                module.shape,
                module.pattern,
                module.axis,
            )
        elif isinstance(module, PackedModule):
            for attribute, room in module.rooms.items():
                values = module.get_parameter(f"{attribute}_values")
                bitmap = module.get_buffer(f"{attribute}_bitmap")
                held = Held(values, bitmap, room.shape, room.pattern, room.axis)
                found[f"{name}.{attribute}"] = held
    return found
