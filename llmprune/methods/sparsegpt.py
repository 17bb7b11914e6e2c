"""SparseGPT: remove weights column by column and let the rest of each row make up for them.

Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1. With G = X^T X (damped) and G^-1 = U^T U, the
cheapest weights by (w / U_jj)^2 go, and each removal's error w / U_jj is spread over the columns to
the right. Columns are solved `block` at a time; the comparison group is one such block over all rows.

Deliberate differences from the paper's code (IST-DASLab/sparsegpt, commit 147d215): counts are exact
(theirs removes one weight too many per column block, more on ties); features that were zero on every token do
not count in the mean that damping is a share of; G is a plain sum (theirs is scaled by 2/N, which cancels); U
comes from one Cholesky in reversed order; a Gram matrix that is not positive definite gets its damping
raised tenfold, reported, up to a limit. `within=row` asks the same of each row, block by block;
`within=matrix` chooses the whole mask before the sweep, from the weights as given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.errors import ConfigError
from llmprune.methods.base import Method, Pruned, register
from llmprune.pattern import NM, Pattern, Unstructured, Within, keep_highest
from llmprune.stats import Gram


@register("sparsegpt")
@dataclass(frozen=True)
class SparseGPT(Method[Gram]):
    """Optimal-brain-surgeon pruning with one shared inverse per input."""

    damping: float = 0.01  # added to the diagonal, a share of its mean: the paper's value
    block: int = 128  # columns solved together: the paper's value

    stats: ClassVar[type[Gram]] = Gram
    within: ClassVar[Within] = "columns"
    paper: ClassVar[str] = "Frantar and Alistarh 2023, arXiv 2301.00774"

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= 1:
            raise ConfigError(f"damping is a share of the mean diagonal, 0 to 1, got {self.damping:g}")
        if self.block < 1:
            raise ConfigError(f"block is a number of columns, at least 1, got {self.block}")

    def prune(self, weight: Tensor, stats: Gram, pattern: Pattern) -> Pruned:
        """Sweep the columns of `weight` [out, in] from left to right."""
        factor = stats.inverse_factor(self.damping)
        w = weight.float().clone()
        w[:, factor.dead] = 0
        keep = self._sweep(w, factor.upper, pattern)
        notes = {"damping": factor.damping} if factor.raised else {}
        return Pruned(w.mul_(keep).to(weight.dtype), keep, notes)

    def _sweep(self, w: Tensor, upper: Tensor, pattern: Pattern) -> Tensor:
        """Prune and update `w` [out, in] float32 in place; returns the keep mask."""
        rows, columns = w.shape
        diagonal = upper.diagonal()
        keep = torch.ones_like(w, dtype=torch.bool)
        chosen = isinstance(pattern, Unstructured) and pattern.within == "matrix"
        if chosen:
            keep = pattern.keep((w / diagonal).square())
        width = self.block
        if isinstance(pattern, NM):  # groups must not straddle two blocks
            width = max(pattern.m, width - width % pattern.m)
        for start in range(0, columns, width):
            end = min(start + width, columns)
            if isinstance(pattern, Unstructured) and not chosen:
                score = (w[:, start:end] / diagonal[start:end]).square()
                keep[:, start:end] = _keep_block(score, start, pattern)
            u = upper[start:end, start:end]
            # columns lie in rows of `wt`, so that every step reads and writes memory in order
            wt = w[:, start:end].T.contiguous()
            kt = keep[:, start:end].T.contiguous()
            errors = torch.empty_like(wt)
            for j in range(end - start):
                if isinstance(pattern, NM) and j % pattern.m == 0:
                    d = diagonal[start + j : start + j + pattern.m, None]
                    group = (wt[j : j + pattern.m] / d).square()
                    kt[j : j + pattern.m] = pattern.keep(group.T.contiguous()).T
                torch.mul(wt[j], ~kt[j], out=errors[j]).div_(u[j, j])
                if j + 1 < end - start:
                    wt[j + 1 :].addr_(u[j, j + 1 :], errors[j], alpha=-1)
            w[:, start:end] = wt.T
            keep[:, start:end] = kt.T
            if end < columns:
                w[:, end:].addmm_(errors.T, upper[start:end, end:], alpha=-1)
        return keep


def _keep_block(score: Tensor, start: int, pattern: Unstructured) -> Tensor:
    """Keep mask of one column block's `score` [out, width], which begins at column `start`."""
    rows, width = score.shape
    if pattern.within == "row":  # what the row has lost by the end of the block, less what it lost before
        quota = pattern.removed(start + width) - pattern.removed(start)
        return keep_highest(score, quota)
    return keep_highest(score.reshape(1, -1), pattern.removed(rows * width)).reshape(rows, width)
