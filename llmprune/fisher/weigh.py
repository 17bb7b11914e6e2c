"""Let rows of a matrix compete by what an error in their outputs weighs, in any method.

A method lowers ||(W - B) X||^2, in which an error of each output counts the same. Where output i counts s_i
times as much, it is the same method that prunes s_i w_i, row by row, and what it gives is divided by s_i
again. Rows by themselves, and groups of n:m, prune the same with it and without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmprune.fisher.known import Known
from llmprune.methods.base import Pruned
from llmprune.model import Matrix
from llmprune.pattern import Pattern, Unstructured

Solve = Callable[[Sequence[Tensor], Any, Pattern], Iterator[Pruned]]
"""Prunes weights [out, in] that read one input, with its statistics: `Method.prune_together`."""


def weighed(
    solve: Solve, matrices: Sequence[Matrix], stats: Any, pattern: Pattern, known: Known | None
) -> Iterator[Pruned]:
    """What `solve` makes of `matrices`, in which rows weigh what is `known` of them."""
    dense = [m.weight for m in matrices]
    scales = [known.scale(m) if known and compete(pattern) else None for m in matrices]
    scaled = [w if s is None else w.float() * s for w, s in zip(dense, scales, strict=True)]
    results = solve(scaled, stats, pattern)
    for before, by, scale, found in zip(dense, scaled, scales, results, strict=True):
        if scale is None:
            yield found
        else:
            # a weight that a method leaves as it was stays so to the bit
            weight = torch.where(found.weight == by, before.float(), found.weight / scale)
            yield replace(found, weight=weight.to(before.dtype))


def compete(pattern: Pattern) -> bool:
    """Whether weights of several rows compete."""
    return isinstance(pattern, Unstructured) and pattern.within != "row"
