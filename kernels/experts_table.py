"""How the table of measurements knows the matrices of experts."""

from __future__ import annotations

from functools import lru_cache

import torch

from llmprune.kernels import gpu, s24_experts, table
from llmprune.kernels.interface import Mixture

NAME = "s24_experts"  # of the form that is measured
Shape = tuple[int, int, int]


def matrix_of(case: Mixture) -> table.Matrix:
    """How the table knows the matrices of a parameter."""
    shape = (case.experts, *case.sides)
    return known_as(gpu.whole(case.device), shape, case.dtype, case.each)


@lru_cache(4096)
def known_as(device: torch.device, shape: Shape, dtype: torch.dtype, chosen: int) -> table.Matrix:
    """How the table knows matrices (experts, out, in), of which a token is routed to so many."""
    name, capability = gpu.identity(device)
    experts, rows, columns = shape
    kernel = f"{NAME} {experts} x {chosen}"
    of = str(dtype).removeprefix("torch.")
    return table.Matrix(name, capability, kernel, s24_experts.REVISION, "2:4", rows, columns, of)


def timing_of(matrix: table.Matrix, tokens: int) -> table.Timing | None:
    """What was measured for so many tokens or the next more, else for the most."""
    known = table.current().timings.get(matrix)
    if not known:
        return None
    return table.current().at(matrix, tokens) or known[max(known)]
