"""What a kernel for packed matrices has to offer, and what the choice of one may depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llmprune.kernels.packed import Packed


@dataclass(frozen=True)
class Case:
    """One product of inputs with a packed matrix.

    Attributes:
        shape: (rows, columns) of the stored matrix.
        kept: number of its kept weights.
        dtype: of weights and inputs.
        device: where both are.
        pattern: `n:m`, which every group holds, or `unstructured`.
        axis: `rows` where the groups lie along the last dimension of the stored matrix, or `columns`.
        transposed: whether it is stored [in, out], as GPT-2's Conv1D does, not [out, in].
        tokens: rows of the inputs.
        trains: whether the kept values require a gradient.
    """

    shape: tuple[int, int]
    kept: int
    dtype: torch.dtype
    device: torch.device
    pattern: str
    axis: str
    transposed: bool
    tokens: int
    trains: bool

    @property
    def along_inputs(self) -> bool:
        """Whether the groups of m lie along the inputs, as kernels for n:m need it."""
        return self.axis == ("columns" if self.transposed else "rows")

    @property
    def sides(self) -> tuple[int, int]:
        """(out, in)."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def nm(self) -> tuple[int, int] | None:
        """The pattern as (n, m), or None for unstructured."""
        n, colon, m = self.pattern.partition(":")
        return (int(n), int(m)) if colon else None


class Kernel(Protocol):
    """One way to multiply by a packed matrix; `llmprune.kernels.choice` holds them all.

    A layer holds its weights in the layout of one kernel and in no other form. What it then does for few
    and for many tokens, `matmul` decides at each call.
    """

    @property
    def name(self) -> str:
        """What the operator and `explain` call it."""

    @property
    def about(self) -> str:
        """How it does it, in one line."""

    def unfit(self, case: Case) -> str | None:
        """Why a layer cannot be held in its layout at all, in a few words, or None."""

    def refuses(self, case: Case) -> str | None:
        """Why a layer cannot or should not be held in its layout, in a few words, or None.

        Whatever `case.tokens` says: a layer is held in one layout for all numbers of tokens.
        """

    def route(self, case: Case) -> str:
        """What `matmul` does for `case.tokens`, in a few words."""

    def prepare(self, packed: Packed) -> list[Tensor]:
        """The matrix in the layout that `matmul` reads, on the device where it is.

        The first tensor is of the dtype of the weights, if need be an empty one that says so.

        Raises:
            ValueError: for a matrix that `refuses` would have refused.
        """

    def packed(self, layout: Sequence[Tensor], shape: Sequence[int]) -> Packed:
        """The inverse of `prepare`, bit for bit: what a state_dict holds. The host may wait for it."""

    def expanded(self, layout: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The dense matrix as it was given to `prepare`, in new memory. On a GPU the host does not wait."""

    def matmul(
        self,
        x: Tensor,
        layout: Sequence[Tensor],
        bias: Tensor | None,
        shape: Sequence[int],
        transposed: bool,
    ) -> Tensor:
        """Inputs x [tokens, in] times the matrix: [tokens, out] in new memory.

        Any number of tokens, zero among them, and both ways: the backward calls it with `transposed`
        turned around. On a GPU the host does not wait, and a CUDA graph may record it.

        Args:
            x: of the dtype and on the device of the layout.
            layout: what `prepare` gave.
            bias: [out], or None.
            shape: (rows, columns) of the matrix that was given to `prepare`.
            transposed: whether the rows are the inputs: x @ S; else x @ S.T.
        """


class Sparse(Protocol):
    """A layer on packed weights.

    One that holds a layout says so by an attribute `kernel`, the name of the kernel whose layout it is.
    """

    def case(self, tokens: int) -> Case:
        """What a kernel would be asked to do for inputs of so many tokens."""


@dataclass(frozen=True)
class Mixture(Case):
    """The products of one parameter of fused experts; `shape` is that of each of its stored matrices.

    Attributes:
        experts: how many there are.
        each: to how many of them a token is routed.
    """

    experts: int
    each: int
