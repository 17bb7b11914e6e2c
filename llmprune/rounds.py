"""Which matrices of a block are observed together, so that their statistics fit into memory.

Every expert has statistics of its own: the Gram matrices of 256 experts of width 7168 are 53 GB. Where the
statistics of a block do not fit, its last matrices are observed and pruned first, then those before them, and
the block is run once for each round. The result is the same: what a matrix gives reaches none before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmprune.methods.base import Method
from llmprune.model import Matrix


def of_statistics(matrices: Sequence[Matrix], method: Method[Any]) -> int:
    """Bytes of what `method` learns of the inputs of `matrices`.

    Matrices that share an input share its statistics; which do is known only once the block has run, so
    that every matrix of the same width in the same module is taken to share; experts share nothing.
    """
    return sum(_bytes(method, m.shape[1]) for m in {_input(m): m for m in matrices}.values())


def _input(matrix: Matrix) -> tuple[str, int | None, int]:
    return matrix.name.rpartition(".")[0], matrix.expert, matrix.shape[1]


def _bytes(method: Method[Any], features: int) -> int:
    empty = method.stats.empty(features, torch.device("meta"))
    return sum(v.numel() * v.element_size() for v in vars(empty).values() if isinstance(v, Tensor))


def rounds(order: Sequence[Matrix], method: Method[Any], room: int | None) -> list[list[Matrix]]:
    """The matrices of one block in the groups that are observed together, the last first.

    Args:
        order: all that are to be pruned, in the order in which the block uses them.
        method: that learns of their inputs.
        room: bytes that statistics may take at once; None is any number. Neighbours that share
            an input are never parted.
    """
    found: list[list[Matrix]] = [[]]
    inputs: set[tuple[str, int | None, int]] = set()
    used = 0
    for matrix in reversed(order):
        more = 0 if _input(matrix) in inputs else _bytes(method, matrix.shape[1])
        together = found[-1] and _input(found[-1][-1]) == _input(matrix)
        if room is not None and found[-1] and not together and used + more > room:
            found.append([])
            inputs, used = set(), 0
            more = _bytes(method, matrix.shape[1])
        found[-1].append(matrix)
        inputs.add(_input(matrix))
        used += more
    return [group[::-1] for group in found]


def least_statistics(here: Sequence[Matrix], method: Method[Any]) -> int:
    """Bytes of the largest round where every matrix has one of its own."""
    return max((_bytes(method, m.shape[1]) for m in here), default=0)
