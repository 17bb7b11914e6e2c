"""ALPS: choose the weights that stay together with their values, by ADMM, then refit them exactly.

Meng et al. 2024, arXiv 2406.07831, algorithm 1. With features at unit size (llmprune/methods/refit.py), v
a row of W D and A = Q L Q^T, it splits min (v - y) A (v - y)^T over sparse y into y = z, z sparse:

    y = (v A + rho z - u) Q (L + rho)^-1 Q^T;    t = y + u / rho;    z = the largest of t;    u += rho (y - z)

while rho grows and ties the two together, until no weight changes sides. What z holds and what u holds of
t do not overlap, so that t and the mask are all that is stored. The values are those of the refit, which
starts from z.

Deliberate differences from the paper:
- rho grows by one factor, `growth`, at every look, whatever has changed. It is then the same for all rows,
  and each may leave when its mask has stood still: the result does not depend on which rows are solved
  together. Slower growth is better and takes longer. A look is after every third step as in the paper, or
  after each (`look`), which for the same growth in three steps is as good and sooner still.
- A mask has to stand still until rho has doubled, which is eight looks, and for four looks at any growth:
  that of a short row may pause for one.
- Damping is a share of each feature's own size and falls with the number of tokens; theirs is 0.01 of the
  mean diagonal.
- All is in float32: rho and damping keep A + rho far from singular.
- A feature that was never seen loses its weights first, the smallest of them before the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.errors import ConfigError, NumericalError
from llmprune.methods.base import Method, Pruned, Share, register
from llmprune.methods.refit import (
    DAMPING,
    FEWEST,
    TOLERANCE,
    UNIT,
    Problem,
    check_damping,
    chunks,
    refit,
    told,
)
from llmprune.pattern import NM, Pattern, Within
from llmprune.stats import Gram

RHO = 0.1  # the first one; A has ones on its diagonal
STILL = 2.0  # what rho has grown by while a mask stood still, before its row is done,
STILL_LOOKS = 4  # and the fewest looks it has to do so for
"""A short row pauses before it is done: on 160 rows of 14 weights the error is 1.017 times that of the best
support after two looks at growth 1.1, 1.003 after eight; at growth 1.5, 1.029 after two and 1.011 after four,
as after eight. Long rows do not: of 128 rows of 1024 weights none moved again after one look at growth 1.5,
and four looks took 30 and 39 steps (70%, 2:4) where eight took 42 and 51."""
MOST = 200  # looks; at growth 1.1 rho is 10^7 by then
UNSEEN = 1e-20  # the rank of a feature that was never seen, to order its weights among themselves
INDEFINITE = -0.01  # an eigenvalue that rounding of float32 sums does not explain


class Basis:
    """A = Q L Q^T, of which rows that read one input need one.

    Attributes:
        vectors: [features, features] float32, Q.
        values: [features] float32, L with damping.
    """

    def __init__(self, problem: Problem) -> None:
        """Decompose in float32.

        Raises:
            NumericalError: for what is not the Gram matrix of any inputs.
        """
        try:
            values, vectors = torch.linalg.eigh(problem.undamped().float())
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise NumericalError(f"the Gram matrix has no eigenvectors: {error}") from error
        if float(values.min()) < INDEFINITE:
            raise NumericalError(
                f"the Gram matrix is not positive definite: eigenvalue {float(values.min()):.2g} with "
                "ones on the diagonal; check the activations"
            )
        self.vectors = vectors
        self.values = values.clamp_min_(0) + problem.damping


@register("alps")
@dataclass(frozen=True)
class ALPS(Method[Gram]):
    """ADMM over masks and values, then the exact refit."""

    damping: float = DAMPING  # on a diagonal of ones, at one token per feature
    growth: float = 1.1  # of rho, per look
    look: int = 3  # steps between two looks at what has changed: the paper's number
    tolerance: float = TOLERANCE  # of the refit: how far from flat the slope of a row may stay

    stats: ClassVar[type[Gram]] = Gram
    within: ClassVar[Within] = "matrix"
    paper: ClassVar[str] = "Meng et al. 2024, arXiv 2406.07831"
    refits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_damping("damping", self.damping)
        if not 1.01 <= self.growth <= 10:
            raise ConfigError(f"growth is a factor from 1.01 to 10, got {self.growth:g}")
        if not 1 <= self.look <= 100:
            raise ConfigError(f"look is a number of steps from 1 to 100, got {self.look}")
        if not TOLERANCE <= self.tolerance <= 1:
            raise ConfigError(
                f"tolerance is a number from {TOLERANCE:g} to 1, got {self.tolerance:g}"
            )

    def needs_tokens(self, features: int) -> int:
        """A number that does not depend on the inputs: damping makes up for those that few tokens show."""
        return FEWEST

    def prune(self, weight: Tensor, stats: Gram, pattern: Pattern) -> Pruned:
        """Choose and refit what stays of `weight` [out, in]."""
        return next(self.prune_together([weight], stats, pattern))

    def prune_together(
        self, weights: Sequence[Tensor], stats: Gram, pattern: Pattern
    ) -> Iterator[Pruned]:
        """The same for matrices that read one input, with one eigendecomposition."""
        return self.prune_rows(weights, stats, pattern, [Share(len(w)) for w in weights])

    def by_rows(self, pattern: Pattern) -> bool:
        """Always: rows meet only in comparison groups."""
        return True

    def prune_rows(
        self, weights: Sequence[Tensor], stats: Gram, pattern: Pattern, shares: Sequence[Share]
    ) -> Iterator[Pruned]:
        """The same for some rows of each; a comparison group of several rows is ranked as a whole."""
        problem = Problem(stats, self.damping)
        basis = stats.remembered(f"basis {self.damping}", lambda: Basis(problem))
        for weight, share in zip(weights, shares, strict=True):
            keep = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
            best, unsolved = torch.empty_like(keep, dtype=weight.dtype), 0
            apart = isinstance(pattern, NM) or pattern.within in (None, "row")
            for rows in chunks(*weight.shape) if apart else [slice(0, len(weight))]:
                v = weight[rows].float() * problem.scale
                one = None if apart else share
                z, keep[rows] = self._choose(v, problem, basis, pattern, one)
                best[rows], failed = refit(weight[rows], keep[rows], problem, z, self.tolerance)
                unsolved += failed
            yield Pruned(best, keep, told(unsolved))

    def _choose(
        self, v: Tensor, problem: Problem, basis: Basis, pattern: Pattern, share: Share | None
    ) -> tuple[Tensor, Tensor]:
        """The z of `v` [rows, features], rows of unit-size features, all that compete; and which of it stays.

        `share` says what `v` is of a matrix whose rows compete; None where each row is by itself.
        """
        still = max(STILL_LOOKS, math.ceil(math.log(STILL) / math.log(self.growth)))
        towards = (v @ basis.vectors).mul_(basis.values)
        keep = _largest(v, problem, pattern, share)
        mine = keep if share is None else keep[share.own]
        t = v * mine
        z, out = torch.empty_like(t), torch.empty_like(mine)
        index = torch.arange(len(t), device=t.device)
        calm = torch.zeros_like(index)  # looks since the mask of a row changed
        for look in range(MOST):
            last, rho = keep, RHO * self.growth**look
            for _ in range(self.look):
                _step(t, mine, towards, basis, rho)
                keep = _largest(t, problem, pattern, share)
                mine = keep if share is None else keep[share.own]
            moved = (keep != last).any(1)
            moved = moved if share is None else moved.any().expand(len(t))
            calm = torch.where((calm < still) & moved, 0, calm + 1)
            done = calm == still if look < MOST - 1 else calm <= still
            if bool(done.any()):
                out[index[done]], z[index[done]] = mine[done], t[done] * mine[done]
            going = calm < still
            left = int(going.sum())
            if left == 0:
                break
            t = t.where(mine, t / self.growth)  # u = rho t there, and stays
            if UNIT <= left <= len(index) // 2:
                t, towards, index, calm = t[going], towards[going], index[going], calm[going]
                mine = keep = keep[going]
        return z, out


def _step(t: Tensor, keep: Tensor, towards: Tensor, basis: Basis, rho: float) -> None:
    """One step of ADMM on t [rows, features], in place, with `keep` of it; `towards` is v A Q."""
    shift = basis.values + rho
    for rows in chunks(*t.shape):
        old, kept = t[rows], keep[rows]
        y = (old.where(kept, -old) @ basis.vectors).mul_(rho).add_(towards[rows]).div_(shift)
        t[rows] = (y @ basis.vectors.T).add_(old.masked_fill_(kept, 0))


def _largest(t: Tensor, problem: Problem, pattern: Pattern, share: Share | None) -> Tensor:
    """Mask of what the pattern keeps of `t` [own rows, features]: of all rows of the matrix."""
    score = t.abs()
    score[:, problem.dead] *= UNSEEN
    return pattern.keep(score if share is None else share.whole(score.T).T.contiguous())
