"""AlphaPruning: blocks whose spectra have light tails, which training has shaped less, lose more.

Lu et al. 2024, arXiv 2410.10912, sec. 3. The eigenvalues l of W^T W, the squared singular values, fall off
as a power law; its exponent is Hill's estimate over the larger half of them,

    alpha = 1 + k / sum_{i=1..k} ln(l_{n-i+1} / l_{n-k}),    k = n / 2

A block's alpha is the mean over its matrices, and its share of sparsity grows with it in a straight line from
1 - tau to 1 + tau times one number, that which makes the total right.

Deliberate differences from the paper's code: counts are exact, and no block loses more than half of what it
would keep of the average, the others making up for it by one number that is added to all. Where one of few
blocks stands apart, as the first of six in wikillama-5m, theirs takes all of its weights at 70%.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmprune.allocation.base import Measured, register
from llmprune.errors import ConfigError
from llmprune.pattern import Pattern

FLAT = 101.0  # of a spectrum without any spread, such as that of one row, or of a matrix of zeros
WIDE = 1024  # features up to which eigenvalues are found in float64, as llmprune/factor.py does


@register("alphapruning")
@dataclass(frozen=True)
class AlphaPruning(Measured):
    """By the power-law exponent of the weights' spectra; looks at no data.

    Attributes:
        tau: half the width of the band of shares, a share of their mean: the paper's value.
    """

    tau: float = 0.3

    paper: ClassVar[str] = "Lu et al. 2024, arXiv 2410.10912"

    def __post_init__(self) -> None:
        if not 0 < self.tau < 1:
            raise ConfigError(f"tau is a share between 0 and 1, such as 0.3, got {self.tau:g}")

    def measure(self, weights: Sequence[Tensor], stats: Sequence[Any]) -> float:
        """The mean alpha of the matrices."""
        return sum(hill(weight) for weight in weights) / len(weights)

    def shares(
        self, measured: Sequence[float], sizes: Sequence[int], pattern: Pattern
    ) -> list[float]:
        """In a straight line with alpha, scaled so that the total is right."""
        low, high = min(measured), max(measured)
        spread = (high - low) or 1.0
        line = [1 - self.tau + 2 * self.tau * (value - low) / spread for value in measured]
        mean = sum(x * size for x, size in zip(line, sizes, strict=True)) / sum(sizes)
        most = (1 + pattern.sparsity) / 2
        return [min(most, pattern.sparsity * x / mean) for x in line]


def hill(weight: Tensor) -> float:
    """Hill's estimate of the exponent of the spectrum of `weight` [out, in], at most `FLAT`."""
    w = weight if weight.shape[0] <= weight.shape[1] else weight.T
    w = w.to(torch.float64 if len(w) <= WIDE else torch.float32)
    values = torch.linalg.eigvalsh(w @ w.T).clamp_min(0).double()  # ascending
    k = max(1, len(values) // 2)
    floor = float(values[len(values) - k - 1]) if k < len(values) else float(values[0])
    tiny = torch.finfo(torch.float32).eps * float(values[-1]) + torch.finfo(torch.float32).tiny
    logs = (values[-k:].clamp_min(tiny) / max(floor, tiny)).log().sum()
    return 1 + k / max(float(logs), k / (FLAT - 1))
