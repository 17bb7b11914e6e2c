"""Parameters as transforms change them: read in float64, rounded once to the dtype they are saved in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmprune.errors import NumericalError
from llmprune.matrix import Matrix

AT_ONCE = 2**24  # numbers widened to float64 at a time: 128 MB


@dataclass(frozen=True)
class Cell:
    """A parameter, or one expert's part of it, by the module that holds it: weights may come and go.

    Attributes:
        name: of the parameter in the model.
        module: the module that holds it.
        attribute: name of the parameter in the module.
        stored: dtype it is saved in; what is written is rounded to it.
        transposed: whether a matrix is stored [in, out]; it is seen as [out, in].
        expert: which slice of a fused parameter it is.
    """

    name: str
    module: nn.Module
    attribute: str
    stored: torch.dtype
    transposed: bool = False
    expert: int | None = None

    @property
    def view(self) -> Tensor:
        """The parameter [out, in], or [out] of a bias, in the model's own memory and outside of autograd."""
        whole: Tensor = getattr(self.module, self.attribute).data
        part = whole if self.expert is None else whole[self.expert]
        return part.T if self.transposed else part

    def get(self) -> Tensor:
        """A copy in float64."""
        return self.view.double()

    def put(self, value: Tensor, rows: slice = slice(None)) -> None:
        """Write `value` over `rows`, rounded.

        Raises:
            NumericalError: when the stored dtype cannot hold it.
        """
        own = self.view[rows]
        if own.is_meta:  # on the shelf, and not needed now
            return
        rounded = value.to(own.dtype)
        if self.stored.itemsize < own.dtype.itemsize:
            rounded = rounded.to(self.stored).to(own.dtype)
        if not bool(rounded.isfinite().all()):
            raise NumericalError(f"{self.name} gets weights that {self.stored} cannot hold")
        own.copy_(rounded)

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Put `function` of each few rows [n, in] in float64 in their place."""
        view = self.view
        if view.is_meta:
            return
        step = max(1, AT_ONCE // max(1, view[0].numel()))
        for start in range(0, len(view), step):
            rows = slice(start, start + step)
            self.put(function(view[rows].double()), rows)

    def scale(self, factors: Tensor) -> None:
        """Multiply each column by its factor [in]."""
        self.change(lambda rows: rows * factors)

    def turn_inputs(self, turn: Tensor) -> None:
        """W R for an orthogonal R [in, in]."""
        self.change(lambda rows: rows @ turn)

    def turn_outputs(self, turn: Tensor) -> None:
        """R^T W for an orthogonal R [out, out]; R^T b of a bias."""
        if self.view.dim() == 1:
            self.put(turn.T @ self.get())
            return
        step = max(1, AT_ONCE // len(self.view))
        for start in range(0, self.view.shape[1], step):
            columns = slice(start, start + step)
            flipped = Cell(self.name, self.module, self.attribute, self.stored, not self.transposed,
                           self.expert)  # fmt: skip
            flipped.put(self.view[:, columns].double().T @ turn, columns)


@dataclass(frozen=True)
class Site:
    """A matrix with its bias.

    Attributes:
        name: of the matrix.
        weight: [out, in].
        bias: [out], or None.
    """

    name: str
    weight: Cell
    bias: Cell | None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out, features = self.weight.view.shape
        return out, features

    def cells(self) -> Iterator[Cell]:
        """Weight and bias."""
        yield self.weight
        if self.bias is not None:
            yield self.bias


def site(matrix: Matrix, dtypes: Mapping[str, torch.dtype]) -> Site:
    """A matrix of the model as a site; `dtypes` that parameters are saved in, by name."""
    owner, attribute = matrix.module, matrix.attribute
    name = matrix.parameter_name
    own = getattr(owner, attribute).dtype
    weight = Cell(name, owner, attribute, dtypes.get(name, own), matrix.transposed, matrix.expert)
    said = "bias" if matrix.expert is None else f"{attribute}_bias"
    bias = None
    if isinstance(getattr(owner, said, None), nn.Parameter):
        called = f"{name.removesuffix(attribute)}{said}"
        bias = Cell(called, owner, said, dtypes.get(called, own), False, matrix.expert)
    return Site(matrix.name, weight, bias)
