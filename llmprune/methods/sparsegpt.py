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
  Cholesky factorisation in reversed order, up to 1024 features in float64 (llmprune/factor.py).
- Matrices that read one input are swept as one; their comparison groups stay their own.
- A Gram matrix that is not positive definite gets its damping raised tenfold, reported, up to a limit.
- `within=row` asks the same of each row, block by block; `within=matrix` chooses the whole mask before
  the sweep, from the weights as given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmprune.errors import ConfigError
from llmprune.kernels import sweep
from llmprune.methods.base import Method, Pruned, Share, register
from llmprune.methods.grid import Grid, nearest
from llmprune.methods.wanda import Wanda
from llmprune.pattern import NM, Pattern, Unstructured, Within, keep_highest, kth_lowest
from llmprune.stats import Gram, Stats

TOKENS_PER_FEATURE = 1.5
"""Tokens that an expert must have seen, a share of its inputs' number. With fewer the Gram matrix has
directions that no token showed, and compensation along them harms. Measured on wikillama-5m at 50%
against Wanda on the same tokens: output error on other tokens 0.053 to 0.026 at 1/4 per input, 0.024 to
0.025 at 1, 0.019 to 0.025 at 1.5; perplexity 32.27 to 32.05 at 1, 31.80 to 32.02 at 1.5. At 2:4 the order
turns at the same places (benchmarks/results/expert-floor.json)."""

LEAF = 32  # columns swept one by one; of 16 to 128 the fastest for 768 rows, and no worse for 4096
STACK = {"cpu": 2**23, "cuda": 2**27}
"""Weights that are stacked at most. On one CPU core q, k, v of width 768 took half to two thirds of the time,
of width 2048 as long or three quarters, gate and up of 8192 x 2048 a third longer: the stack must stay in
the cache. On a GPU each step is one launch whatever the height; that number is not measured."""


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

    def needs_tokens(self, features: int) -> int:
        """A share of the inputs' number."""
        return math.ceil(TOKENS_PER_FEATURE * features)

    def fallback(self, stats: Gram) -> tuple[Method[Any], Stats]:
        """Wanda, whose norms are the diagonal of the Gram matrix."""
        return Wanda(), stats.norms()

    def prune(self, weight: Tensor, stats: Gram, pattern: Pattern) -> Pruned:
        """Sweep the columns of `weight` [out, in] from left to right."""
        return next(self.prune_together([weight], stats, pattern))

    def prune_together(
        self, weights: Sequence[Tensor], stats: Gram, pattern: Pattern
    ) -> Iterator[Pruned]:
        """Sweep several matrices [out, in] that read one input as one tall matrix.

        Their rows meet only in comparison groups, and those stay each matrix's own.
        """
        return self.prune_rows(weights, stats, pattern, [Share(len(w)) for w in weights])

    def by_rows(self, pattern: Pattern) -> bool:
        """Always: rows meet only in comparison groups."""
        return True

    def prune_rows(
        self, weights: Sequence[Tensor], stats: Gram, pattern: Pattern, shares: Sequence[Share]
    ) -> Iterator[Pruned]:
        """Sweep some rows of several matrices; the scores of a comparison group come from all rows."""
        factor = stats.inverse_factor(self.damping)
        notes = {"damping": factor.damping} if factor.raised else {}
        for taken in _stacks(weights, shares):
            some, parts = weights[taken], shares[taken]
            own = [slice(*pair) for pair in pairwise(accumulate(map(len, some), initial=0))]
            # columns lie in rows of `wt`, so that every step reads and writes memory in order
            wt = factor.upper.new_empty(len(factor.upper), own[-1].stop)
            for weight, rows in zip(some, own, strict=True):
                wt[:, rows] = weight.T
            wt[factor.dead] = 0
            kt = torch.ones_like(wt, dtype=torch.bool)
            spares = self._sweep(wt, kt, own, parts, factor.upper, pattern)
            # a product would leave -0.0, which no packer drops
            wt.masked_fill_(kt.logical_not(), 0)
            for weight, rows, spare in zip(some, own, spares, strict=True):
                w, keep = wt[:, rows].T.contiguous(), kt[:, rows].T.contiguous()
                for row, column in spare.tolist():
                    _bring_back(w[row], weight[row].float(), stats.column(column), column)
                keep[spare[:, 0], spare[:, 1]] = True
                yield Pruned(w.to(weight.dtype), keep, notes, spare if len(spare) else None)

    def _sweep(
        self,
        wt: Tensor,
        kt: Tensor,
        own: Sequence[slice],
        shares: Sequence[Share],
        upper: Tensor,
        pattern: Pattern,
    ) -> list[Tensor]:
        """Prune and update `wt` [in, out] float32 and its keep mask `kt` in place.

        `own` says which columns of them are each matrix's.

        Returns:
            For each matrix the weights that were removed beyond the count, [n, 2] int64 rows and columns.
        """
        spares = [[torch.empty(0, 2, dtype=torch.int64, device=wt.device)] for _ in own]
        diagonal = upper.diagonal()[:, None]
        chosen = isinstance(pattern, Unstructured) and pattern.within == "matrix"
        if chosen:
            for rows, share in zip(own, shares, strict=True):
                score = share.whole((wt[:, rows] / diagonal).square_())
                kt[:, rows] = pattern.keep(score.T.contiguous()).T[:, share.own]
        width = self.block
        if isinstance(pattern, NM):  # groups must not straddle two blocks
            width = max(pattern.m, width - width % pattern.m)
        for start in range(0, len(wt), width):
            block = slice(start, min(start + width, len(wt)))
            if isinstance(pattern, Unstructured) and not chosen:
                score = (wt[block] / diagonal[block]).square_()
                for rows, share, spare in zip(own, shares, spares, strict=True):
                    kt[block, rows], more = _keep_own(score[:, rows], start, pattern, share)
                    spare.append(more)
            errors = torch.empty_like(wt[block])
            _solve(wt[block], kt[block], errors, upper[block, block], pattern)
            wt[block.stop :].addmm_(upper[block, block.stop :].T, errors, alpha=-1)
        return [torch.cat(spare) for spare in spares]


def onto_grid(weight: Tensor, keep: Tensor, upper: Tensor, grid: Grid, block: int) -> Tensor:
    """Sweep the columns of `weight` [out, in] so that what is kept comes to lie on `grid`.

    The joint sweep of pruning and quantisation (arXiv 2301.00774, sec. 3.5): with the mask given, the error
    of a removed weight and that of a kept one that is rounded both go to the columns on the right. Where
    all is kept it is GPTQ (Frantar et al. 2022, arXiv 2210.17323), its columns in their own order.

    Args:
        weight: [out, in], what is to be approximated.
        keep: [out, in] bool.
        upper: `InverseFactor.upper` of the inputs.
        grid: for all columns.
        block: columns that are solved together; only a matter of speed.

    Returns:
        [out, in] float32, zero where `keep` is False.
    """
    wt = weight.T.to(torch.float32, copy=True).contiguous()
    kt = keep.T.contiguous()
    scales = grid.columns(len(wt))
    for start in range(0, len(wt), block):
        some = slice(start, min(start + block, len(wt)))
        errors = torch.empty_like(wt[some])
        _round(wt[some], kt[some], errors, upper[some, some], scales[some], grid.top)
        wt[some.stop :].addmm_(upper[some, some.stop :].T, errors, alpha=-1)
    return wt.T.contiguous()


def _round(
    wt: Tensor, kt: Tensor, errors: Tensor, u: Tensor, scales: Sequence[Tensor], top: int
) -> None:
    """`_solve` where the mask stands and kept weights are rounded: `wt` [width, out] ends on the grid."""
    width = len(wt)
    by_kernel = sweep.SWEEP.used(wt.device)
    if width > (sweep.WIDTH if by_kernel else LEAF):
        half = width // 2
        _round(wt[:half], kt[:half], errors[:half], u[:half, :half], scales[:half], top)
        wt[half:].addmm_(u[:half, half:].T, errors[:half], alpha=-1)
        _round(wt[half:], kt[half:], errors[half:], u[half:, half:], scales[half:], top)
        return
    if by_kernel:
        return sweep.round_columns(wt, kt, errors, u, torch.stack(list(scales)), top)
    for j in range(width):
        point = nearest(wt[j], scales[j], top).masked_fill_(~kt[j], 0)
        torch.sub(wt[j], point, out=errors[j]).div_(u[j, j])
        wt[j] = point
        wt[j + 1 :].addr_(u[j, j + 1 :], errors[j], alpha=-1)


def _stacks(weights: Sequence[Tensor], shares: Sequence[Share]) -> Iterator[slice]:
    """`weights` in order, as many at a time as STACK allows for all their rows: the same in every process."""
    limit = STACK.get(weights[0].device.type, STACK["cpu"])
    sizes = [share.count * w.shape[1] for share, w in zip(shares, weights, strict=True)]
    begin = 0
    for end, size in enumerate(sizes):
        if end > begin and sum(sizes[begin:end]) + size > limit:
            yield slice(begin, end)
            begin = end
    yield slice(begin, len(sizes))


def _solve(wt: Tensor, kt: Tensor, errors: Tensor, u: Tensor, pattern: Pattern) -> None:
    """Sweep some columns, transposed: `wt` and its mask `kt` [width, out] change in place.

    `errors` [width, out] float32 is filled with the error of each removed weight over U_jj. For n:m the
    mask is chosen here, group by group, from the weights as they then are.
    """
    width, step = len(wt), pattern.m if isinstance(pattern, NM) else 1
    half = width // 2 // step * step
    by_kernel = step in sweep.GROUPS and sweep.SWEEP.used(wt.device)
    if width > (sweep.WIDTH if by_kernel else LEAF) and half:
        _solve(wt[:half], kt[:half], errors[:half], u[:half, :half], pattern)
        wt[half:].addmm_(u[:half, half:].T, errors[:half], alpha=-1)
        _solve(wt[half:], kt[half:], errors[half:], u[half:, half:], pattern)
        return
    if by_kernel:
        nm = (pattern.n, pattern.m) if isinstance(pattern, NM) else None
        return sweep.prune_columns(wt, kt, errors, u, nm)
    diagonal = u.diagonal()[:, None]
    step = step if isinstance(pattern, NM) else width
    for start in range(0, width, step):
        group = slice(start, start + step)
        if isinstance(pattern, NM):
            kt[group] = pattern.keep_down((wt[group] / diagonal[group]).square_())
        errors[group] = kt[group].logical_not().float().div_(diagonal[group])
        for j in range(start, start + step):
            errors[j].mul_(wt[j])
            wt[j + 1 :].addr_(u[j, j + 1 :], errors[j], alpha=-1)


def _keep_own(
    score: Tensor, start: int, pattern: Unstructured, share: Share
) -> tuple[Tensor, Tensor]:
    """`_keep_block` for the own rows of a matrix, of which `score` [width, own] is."""
    if pattern.within == "row":
        return _keep_block(score, start, pattern)
    keep, spare = _keep_block(share.whole(score), start, pattern)
    return keep[:, share.own], share.mine(spare)


def _keep_block(score: Tensor, start: int, pattern: Unstructured) -> tuple[Tensor, Tensor]:
    """What one column block keeps, by its `score` [width, out]; it begins at column `start`.

    Returns:
        The mask that the sweep works with, bool [width, out]; and what that mask removes beyond the
        count, [n, 2] int64 rows and columns of the matrix.
    """
    width, rows = score.shape
    none = torch.empty(0, 2, dtype=torch.int64, device=score.device)
    if pattern.within == "row":  # what the row has lost by the end of the block, less before it
        quota = pattern.removed(start + width) - pattern.removed(start)
        return keep_highest(score.T.contiguous(), quota).T, none
    # The paper's `<=` the next score takes that one too: one too many, and more on ties.
    removed = pattern.removed(rows * width)
    next_one = kth_lowest(score.reshape(1, -1), removed + 1)
    paper = score > next_one
    spare = (score == next_one).nonzero()
    if len(spare) > 1:  # ties, which count from the left of each row
        exact = keep_highest(score.T.reshape(1, -1), removed).reshape(rows, width).T
        spare = (exact & ~paper).nonzero()
        if len(spare) > 1:  # such as weights that were zero before: nothing is owed to them
            return exact, none
    return paper, spare.flip(1) + spare.new_tensor([0, start])


def _bring_back(w: Tensor, dense: Tensor, gram: Tensor, column: int) -> None:
    """Give the pruned weight w[column] of a row [in] the value that minimises the finished row's error.

    With E = dense - w, the error E G E^T has its minimum along this one weight at a step of
    (E G)_column / G_column,column. `gram` [in] is that column of G.
    """
    if (scale := float(gram[column])) > 0:
        w[column] += (dense - w) @ gram / scale
