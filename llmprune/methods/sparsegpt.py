"""SparseGPT: remove weights column by column and let the rest of each row make up for them.

Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1. With G = X^T X (damped) and G^-1 = U^T U, the
cheapest weights by (w / U_jj)^2 go, and each removal's error w / U_jj is spread over the columns to
the right. Columns are solved `block` at a time; the comparison group is one such block over all rows.

Deliberate differences from the paper's code (IST-DASLab/sparsegpt, commit 147d215):
- Counts are exact. Theirs removes one weight too many per column block, and every weight that ties
  with it. Here the sweep removes that one too, and it comes back once the block has been passed on,
  with the value that suits its finished row best: the layer error is never above theirs, and the masks
  of later blocks stay theirs too (99.9% of them on a 5M-parameter Llama; brought back earlier, the
  change of one weight in 32,768 grows from block to block and turns three in a thousand at 70%).
- Features that were zero on every token do not count in the mean that damping is a share of.
- The Gram matrix is a plain sum (theirs is scaled by 2/N, which cancels), and U comes from one
  Cholesky factorisation in reversed order, in float64.
- A Gram matrix that is not positive definite gets its damping raised tenfold, reported, up to a limit.
- `within=row` asks the same of each row, block by block; `within=matrix` chooses the whole mask before
  the sweep, from the weights as given.
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
            raise ConfigError(
                f"damping is a share of the mean diagonal, 0 to 1, got {self.damping:g}"
            )
        if self.block < 1:
            raise ConfigError(f"block is a number of columns, at least 1, got {self.block}")

    def resolve(self, pattern: Pattern) -> Pattern:
        """The comparison group is one column block of this method's own width."""
        return pattern.resolved(self.within, self.block)

    def prune(self, weight: Tensor, stats: Gram, pattern: Pattern) -> Pruned:
        """Sweep the columns of `weight` [out, in] from left to right."""
        factor = stats.inverse_factor(self.damping)
        dense = weight.float()
        w = dense.clone()
        w[:, factor.dead] = 0
        keep, spare = self._sweep(w, factor.upper, pattern)
        w.mul_(keep)
        passed_on = w.to(weight.dtype, copy=True)
        for row, column in spare.tolist():
            _bring_back(w, dense, stats.column(column), row, column)
        keep[spare[:, 0], spare[:, 1]] = True
        notes = {"damping": factor.damping} if factor.raised else {}
        return Pruned(w.to(weight.dtype), keep, notes, passed_on if len(spare) else None)

    def _sweep(self, w: Tensor, upper: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """Prune and update `w` [out, in] float32 in place.

        Returns:
            The keep mask, bool [out, in]; and the weights that the sweep removed beyond the count,
            [n, 2] int64 rows and columns.
        """
        columns = w.shape[1]
        diagonal = upper.diagonal()
        keep = torch.ones_like(w, dtype=torch.bool)
        spare = [torch.empty(0, 2, dtype=torch.int64, device=w.device)]
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
                keep[:, start:end], more = _keep_block(score, start, pattern)
                spare.append(more + more.new_tensor([0, start]))
            # columns lie in rows of `wt`, so that every step reads and writes memory in order
            wt = w[:, start:end].T.contiguous()
            kt = keep[:, start:end].T.contiguous()
            errors = _solve(wt, kt, upper[start:end, start:end], pattern)
            w[:, start:end] = wt.T
            keep[:, start:end] = kt.T
            if end < columns:
                w[:, end:].addmm_(errors.T, upper[start:end, end:], alpha=-1)
        return keep, torch.cat(spare)


def _solve(wt: Tensor, kt: Tensor, u: Tensor, pattern: Pattern) -> Tensor:
    """Sweep one column block, transposed: `wt` and its mask `kt` [width, out] change in place.

    For n:m the mask is chosen here, group by group, from the weights as they then are.

    Returns:
        The error of each removed weight over U_jj, [width, out] float32.
    """
    width = len(wt)
    errors = torch.empty_like(wt)
    for j in range(width):
        if isinstance(pattern, NM) and j % pattern.m == 0:
            d = u.diagonal()[j : j + pattern.m, None]
            group = (wt[j : j + pattern.m] / d).square()
            kt[j : j + pattern.m] = pattern.keep(group.T.contiguous()).T
        torch.mul(wt[j], ~kt[j], out=errors[j]).div_(u[j, j])
        if j + 1 < width:
            wt[j + 1 :].addr_(u[j, j + 1 :], errors[j], alpha=-1)
    return errors


def _keep_block(score: Tensor, start: int, pattern: Unstructured) -> tuple[Tensor, Tensor]:
    """What one column block keeps, by its `score` [out, width]; it begins at column `start`.

    Returns:
        The mask that the sweep works with, bool [out, width]; and what that mask removes beyond the
        count, [n, 2] int64 rows and columns.
    """
    rows, width = score.shape
    if (
        pattern.within == "row"
    ):  # what the row has lost by the end of the block, less what it lost before
        quota = pattern.removed(start + width) - pattern.removed(start)
        return keep_highest(score, quota), torch.empty(0, 2, dtype=torch.int64, device=score.device)
    removed = pattern.removed(rows * width)
    exact = keep_highest(score.reshape(1, -1), removed).reshape(rows, width)
    paper = score > score[exact].min()  # `<=` the next score goes too: one too many, more on ties
    spare = (exact & ~paper).nonzero()
    if len(spare) > 1:  # ties, such as weights that were zero before: nothing is owed to them
        return exact, spare[:0]
    return paper, spare


def _bring_back(w: Tensor, dense: Tensor, gram: Tensor, row: int, column: int) -> None:
    """Give the pruned weight w[row, column] the value that minimises its finished row's error.

    With E = dense - w, the error E G E^T has its minimum along this one weight at a step of
    (E G)_column / G_column,column. `gram` [in] is that column of G.
    """
    scale = float(gram[column])
    if scale > 0:
        w[row, column] += (dense[row] - w[row]) @ gram / scale
