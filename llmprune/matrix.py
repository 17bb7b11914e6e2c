"""One prunable weight of a model, wherever and however it is stored."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmprune import experts
from llmprune.runtime.linear import SparseLinear


@dataclass(frozen=True)
class Matrix:
    """One prunable weight.

    Attributes:
        name: full module name, such as `model.layers.0.mlp.up_proj`; for an expert of a fused parameter
            `model.layers.0.mlp.experts.3.gate_up_proj`, as if it were a module of its own.
        module: the module that holds it.
        transposed: whether it is stored [in, out].
        block: index of the decoder block, or None for a matrix outside of them.
        attribute: name of the parameter in the module.
        expert: which slice of a fused parameter it is, or None for a parameter of two dimensions.
    """

    name: str
    module: nn.Module
    transposed: bool
    block: int | None
    attribute: str = "weight"
    expert: int | None = None

    @property
    def packed(self) -> bool:
        """Whether the module holds it packed; it is read by expanding, and cannot be written."""
        return not isinstance(self.module._parameters.get(self.attribute), nn.Parameter)

    @property
    def parameter(self) -> nn.Parameter:
        """The whole parameter, in its own layout: [experts, ., .] where experts are fused."""
        parameter = getattr(self.module, self.attribute)
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @property
    def parameter_name(self) -> str:
        """The parameter's name in the model, as `named_parameters` gives it."""
        if self.expert is None:
            return f"{self.name}.{self.attribute}"
        return f"{experts.owner(self.name, self.attribute)}.{self.attribute}"

    @property
    def number(self) -> int | None:
        """Which expert it belongs to, fused or a module of its own; None where every token comes."""
        return experts.number(self.name) if self.expert is None else self.expert

    @property
    def siblings(self) -> str:
        """One name for the same matrix of all experts of a block."""
        if self.expert is not None:
            return self.parameter_name
        return re.sub(r"\bexperts\.\d+\.", "experts.", self.name)

    @property
    def weight(self) -> Tensor:
        """The weight as [out, in], sharing memory with the model unless it is packed."""
        weight = self._stored()
        return weight.T if self.transposed else weight

    def part(self, whole: Tensor) -> Tensor:
        """Its own part, as [out, in], of a tensor in the layout of the whole parameter; shares memory."""
        own = whole if self.expert is None else whole[self.expert]
        return own.T if self.transposed else own

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out, features = self.weight.shape
        return out, features

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Put `weight` [out, in] into the model."""
        self._stored().copy_(weight.T if self.transposed else weight)

    def _stored(self) -> Tensor:
        """The weight in its own layout, outside of autograd."""
        if self.packed:
            return self._expanded()
        parameter = self.parameter.data
        return parameter if self.expert is None else parameter[self.expert]

    @torch.no_grad()
    def _expanded(self) -> Tensor:
        """A packed weight in its own layout, in new memory."""
        if isinstance(self.module, SparseLinear):
            return self.module.expanded()
        view = getattr(self.module, self.attribute)
        dense: Tensor = (view if self.expert is None else view[self.expert]).expanded()
        return dense
