"""Magnitude pruning: the smallest weights go.

The baseline of every pruning paper (Han et al. 2015, arXiv 1506.02626). Deliberate difference from the
code of the SparseGPT and Wanda papers: they remove every weight at or below the k-th smallest, one too
many and more on ties (50.12% for a bf16 model at 50%); here exactly k go.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llmprune.methods.base import Scored, register
from llmprune.pattern import Within
from llmprune.stats import NoStats


@register("magnitude")
@dataclass(frozen=True)
class Magnitude(Scored[NoStats]):
    """Rank by absolute value over the whole matrix; needs no calibration data."""

    stats: ClassVar[type[NoStats]] = NoStats
    within: ClassVar[Within] = "matrix"
    paper: ClassVar[str] = "Han et al. 2015, arXiv 1506.02626"

    def score(self, weight: Tensor, stats: NoStats) -> Tensor:
        """|W|."""
        return weight.abs().float()
