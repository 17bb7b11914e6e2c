"""A sparse checkpoint on its way into a model that transformers loads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llmprune.checkpoint.headers import Headers
from llmprune.errors import CheckpointError, ModelError
from llmprune.runtime.routes import GUARD, Routes, find_routes
from llmprune.runtime.seats import hold_pattern, packed_weights, take_seats
from llmprune.runtime.unpacking import Names, Unpacking, transforms

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Arrival:
    """What is remembered between the two ends of loading.

    Attributes:
        routes: where every tensor goes.
        expected: dtype and shape of every tensor of the model, by name.
    """

    routes: Routes
    expected: dict[str, tuple[torch.dtype, torch.Size]]

    @classmethod
    def prepare(
        cls,
        model: PreTrainedModel,
        transforms: Sequence[Any],
        headers: Headers,
        keep: bool,
        dtype: torch.dtype | None,
    ) -> Arrival:
        """Put modules that hold packed weights into `model`, and find the way of every tensor.

        Args:
            model: on the meta device, dense.
            transforms: those that transformers will apply to the files' tensors.
            headers: what the files hold.
            keep: whether what can stay packed does.
            dtype: that the model is loaded in.

        Raises:
            CheckpointError: for a matrix whose shape is another than the model's.
        """
        routes = find_routes(model, transforms, headers, keep)
        take_seats(model, routes.seats)
        known = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = known | {rf"{re.escape(GUARD)}$"}
        return cls(routes, _expected(model, model._get_dtype_plan(dtype or model.dtype)))

    def may_vary(self, name: str) -> bool:
        """Whether a tensor may have another shape than the model has room for.

        How many weights of a part of a matrix are kept is known only once it has been taken apart.
        """
        return name in self.routes.groups

    def transforms(self, own: Sequence[Any]) -> list[Any]:
        """The transforms of the family, with ours among them."""
        return transforms(self.routes, own)

    @torch.no_grad()
    def finish(self, model: PreTrainedModel) -> list[Any]:
        """Hold what was loaded against what was promised; gives the family's conversions that were used.

        transformers 5.17 neither checks nor casts tensors of a quantised model whose names were changed.

        Raises:
            ModelError: for a tensor that does not fit the config.
            CheckpointError: for values and a bitmap that do not fit each other.
        """
        if self.routes.flaws:
            raise CheckpointError(f"{self.routes.flaws[0]}; copy or download it again")
        for name, (dtype, shape) in self.expected.items():
            tensor = model.get_parameter_or_buffer(name)
            if tensor.shape != shape and not self.may_vary(name):
                raise ModelError(
                    f"{name} has shape {list(tensor.shape)}, its config asks for {list(shape)}"
                )
            if tensor.is_floating_point() and tensor.dtype != dtype and not tensor.is_meta:
                tensor.data = tensor.data.to(dtype)
        for name, held in packed_weights(model).items():
            held.check(name)
            held.values.requires_grad_(False)  # trained only when asked for
        for name, pattern in self.routes.patterns.items():
            hold_pattern(model, name, pattern)
        used = model._weight_conversions or ()
        return [t for t in used if not isinstance(t, Names | Unpacking)]


def _expected(
    model: PreTrainedModel, plan: Mapping[str, torch.dtype]
) -> dict[str, tuple[torch.dtype, torch.Size]]:
    expected = {}
    for name, tensor in model.state_dict().items():
        special = (dtype for pattern, dtype in plan.items() if re.search(pattern, name))
        expected[name] = next(special, tensor.dtype), tensor.shape
    return expected
