"""OWL, outlier weighed layerwise sparsity: blocks with more outlying scores lose less.

Yin et al. 2023, arXiv 2310.05175, sec. 3.2. With Wanda's scores A_ij = |W_ij| ||X_j||_2 of all matrices of
a block, D is the share of scores above M times their mean; over blocks D is stretched to a band 2 lambda
wide, and a block's density is D less the mean of D plus the density asked for.

Deliberate differences from the paper's code: the mean of shares is weighed by the weights they are shares of,
so that the total is right where blocks differ in size; and counts are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmprune import methods
from llmprune.allocation.base import Measured, register, room
from llmprune.errors import ConfigError
from llmprune.methods.base import Scored
from llmprune.pattern import Pattern

LAMBDA = 0.08  # the paper's choice for LLaMA at 70%


@register("owl")
@dataclass(frozen=True)
class OWL(Measured):
    """By the share of Wanda scores far above their mean.

    Attributes:
        outlier: M, how many times the mean makes an outlier.
        bound: lambda, half the width of the band of shares; 0 is 0.08, for n:m one level (1/m).
    """

    outlier: float = 5.0
    bound: float = 0.0

    paper: ClassVar[str] = "Yin et al. 2023, arXiv 2310.05175"
    learns: ClassVar[str | None] = "wanda"

    def __post_init__(self) -> None:
        if not 0 < self.outlier < math.inf:
            raise ConfigError(f"outlier is a factor above 0, such as 5, got {self.outlier:g}")
        if not 0 <= self.bound < 1:
            raise ConfigError(
                f"bound is a distance of shares from 0 to 1, such as 0.08, got {self.bound:g}"
            )

    def measure(self, weights: Sequence[Tensor], stats: Sequence[Any]) -> float:
        """The share of scores above `outlier` times their mean over all of `weights`."""
        method = methods.build("wanda")
        assert isinstance(method, Scored)
        total, size = 0.0, sum(weight.numel() for weight in weights)
        for weight, known in zip(weights, stats, strict=True):  # one matrix's scores at a time
            total += float(method.score(weight, known).sum(dtype=torch.float64))
        limit, found = self.outlier * total / size, 0
        for weight, known in zip(weights, stats, strict=True):
            found += int((method.score(weight, known) > limit).sum())
        return found / size

    def shares(
        self, measured: Sequence[float], sizes: Sequence[int], pattern: Pattern
    ) -> list[float]:
        """More outliers, less sparsity: the band is 2 lambda wide."""
        low, high = min(measured), max(measured)
        bound = self.bound or room(pattern, LAMBDA)
        spread = (high - low) or 1.0
        return [pattern.sparsity - 2 * bound * (value - low) / spread for value in measured]
