"""Rotations and permutations of the values of an attention, head by head."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.transforms.cells import Cell
from llmprune.transforms.inner import Values


class HeadGrams:
    """X^T X of each head's part of the inputs X [tokens, heads * width].

    Attributes:
        gram: [heads, width, width] float32.
    """

    def __init__(self, heads: int, width: int, device: torch.device) -> None:
        self.gram = torch.zeros(heads, width, width, device=device)

    def add(self, inputs: Tensor) -> None:
        """Add a batch [..., heads * width]."""
        x = inputs.detach().float().reshape(-1, len(self.gram), self.gram.shape[1])
        self.gram += torch.einsum("thi,thj->hij", x, x)


def turn_values(values: Values, turn: Tensor) -> None:
    """Turn the values of each key-value head by its own [heads, width, width] float64."""
    last = values.first + values.heads * values.width
    for cell in values.source.cells():
        rows = slice(values.first, last)
        own = cell.view[rows].double().reshape(values.heads, values.width, -1)
        cell.put((turn.mT @ own).reshape(cell.view[rows].shape), rows)
    _columns(values.out.weight, values, turn)


def _columns(cell: Cell, values: Values, turn: Tensor) -> None:
    def change(rows: Tensor) -> Tensor:
        own = rows.reshape(-1, values.heads, values.group, values.width)
        return torch.einsum("rhgi,hik->rhgk", own, turn).reshape(rows.shape)

    cell.change(change)
