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


class Kernel(Protocol):
    """One way to multiply by a packed matrix; `llmprune.kernels.choice` holds them all."""

    @property
    def name(self) -> str:
        """What the operator and `explain` call it."""

    @property
    def about(self) -> str:
        """How it does it, in one line."""

    def refuses(self, case: Case) -> str | None:
        """Why it cannot or should not do it, in a few words, or None."""

    def prepare(self, packed: Packed) -> list[Tensor]:
        """The matrix in the layout that `matmul` reads, on the device where it is."""

    def packed(self, layout: Sequence[Tensor], shape: Sequence[int]) -> Packed:
        """The inverse of `prepare`, bit for bit: what a state_dict holds."""

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
        turned around.

        Args:
            x: of the dtype and on the device of the layout.
            layout: what `prepare` gave.
            bias: [out], or None.
            shape: (rows, columns) of the stored matrix.
            transposed: whether the rows are the inputs: x @ S; else x @ S.T.
        """
