"""DSnoT, dynamic sparse no training: swap weights of a Wanda mask until the mean output is right.

Zhang et al. 2023, arXiv 2310.08915, sec. 3.2. What a row's pruned weights lose of its mean output is
e = sum over pruned j of W_j E[x_j]. Each cycle grows the pruned weight that takes most from |e|, by
sign(e) W_j E[x_j] / Var[x_j], and prunes the kept one of the least Wanda score among those whose loss takes
from |e| too. No weight changes its value.

Deliberate differences from the paper's code: a row stops when a swap would not lessen |e|, not at an absolute
value of it, which depends on the model's scale; and under n:m and column blocks both weights of a swap are
of one group, so that counts stay exact. It learns means, which a Gram matrix does not hold: no refit follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from llmprune.errors import ConfigError
from llmprune.methods.base import Method, Pruned, register
from llmprune.methods.wanda import CHUNK, MIN_TOKENS
from llmprune.pattern import NM, Pattern, Within
from llmprune.stats import InputNorms

TINY = 1e-30  # instead of a variance of zero


class InputMoments(InputNorms):
    """Sum and sum of squares of each input feature.

    Attributes:
        sum: [features] float32, sum over tokens.
    """

    def __init__(self, sum_sq: Tensor) -> None:
        super().__init__(sum_sq)
        self.sum = torch.zeros_like(sum_sq)

    def add(self, inputs: Tensor) -> None:
        """Add a batch [..., features]."""
        super().add(inputs)
        self.sum += inputs.detach().reshape(-1, inputs.shape[-1]).sum(0, dtype=torch.float32)

    def merge(self, other: Self) -> None:
        """Add the other's sums."""
        super().merge(other)
        self.sum += other.sum.to(self.sum.device)

    def parts(self) -> list[Tensor]:
        """Both sums."""
        return [*super().parts(), self.sum]

    @property
    def mean(self) -> Tensor:
        """[features] float32."""
        return self.sum / max(1, self.tokens)

    @property
    def variance(self) -> Tensor:
        """[features] float32, over tokens."""
        return (self.sum_sq / max(1, self.tokens) - self.mean.square()).clamp_min(0)


@register("dsnot")
@dataclass(frozen=True)
class DSnoT(Method[InputMoments]):
    """A Wanda mask whose weights are swapped until mean outputs are right."""

    cycles: int = 50  # swaps of a row at most: the paper's value

    stats: ClassVar[type[InputMoments]] = InputMoments
    within: ClassVar[Within] = "row"
    paper: ClassVar[str] = "Zhang et al. 2023, arXiv 2310.08915"
    refits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.cycles < 0:
            raise ConfigError(f"cycles is a number of swaps, at least 0, got {self.cycles}")

    def needs_tokens(self, features: int) -> int:
        """As many as Wanda."""
        return MIN_TOKENS

    def by_rows(self, pattern: Pattern) -> bool:
        """Where no row is compared with another."""
        return getattr(pattern, "within", "row") == "row"

    def prune(self, weight: Tensor, stats: InputMoments, pattern: Pattern) -> Pruned:
        """Wanda's mask of `weight` [out, in], then swaps, some rows at a time."""
        keep = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        step = max(1, CHUNK // weight.shape[1])
        starts = range(0, len(weight), step)
        if not self.by_rows(pattern):
            keep = pattern.keep(weight.abs().float() * stats.norm)
        for rows in (slice(start, start + step) for start in starts):
            w = weight[rows].float()
            score = w.abs() * stats.norm
            if self.by_rows(pattern):
                keep[rows] = pattern.keep(score)
            keep[rows] = self._swap(w * stats.mean, score, keep[rows], stats.variance, pattern)
        return Pruned(weight.where(keep, 0), keep)

    def _swap(
        self, part: Tensor, score: Tensor, keep: Tensor, variance: Tensor, pattern: Pattern
    ) -> Tensor:
        """`keep` [rows, features] after the swaps; `part` is what each weight gives to the mean output."""
        keep = keep.clone()
        left = torch.arange(len(part), device=part.device)
        barred = torch.zeros_like(keep)  # grown, pruned, or without a partner
        inverse = 1 / variance.clamp_min(TINY)
        group = torch.arange(part.shape[1], device=part.device) // _width(pattern, part.shape[1])
        lost = (part * ~keep).sum(1)
        for _ in range(self.cycles):
            if not len(left):
                break
            sign = lost[left].sign()[:, None]
            gain = sign * part[left]
            open_ = ~barred[left]
            grow = (gain * inverse).masked_fill(keep[left] | ~open_, -torch.inf).max(1)
            partner = keep[left] & open_ & (gain < 0) & (group == group[grow.indices][:, None])
            prune = score[left].masked_fill(~partner, torch.inf).min(1)
            after = lost[left] - part[left, grow.indices] + part[left, prune.indices]
            able = prune.values.isfinite()
            better = able & (grow.values > 0) & (after.abs() < lost[left].abs())
            barred[left, grow.indices] = True
            rows, grown, pruned = (x[better] for x in (left, grow.indices, prune.indices))
            keep[rows, grown], keep[rows, pruned] = True, False
            barred[rows, pruned] = True
            lost[rows] = after[better]
            left = left[better | (~able & (grow.values > 0))]
        return keep


def _width(pattern: Pattern, features: int) -> int:
    """Columns of one row within which a swap leaves every count as it is."""
    if isinstance(pattern, NM):
        return pattern.m
    return pattern.width if pattern.within == "columns" else features
