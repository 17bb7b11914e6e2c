"""Fisher: matrices whose weights the model's output depends on lose less.

The saliency of a weight is w^2 times its Fisher information, by which the KL divergence from the dense model
would grow if it alone went: the diagonal of optimal brain damage (LeCun et al. 1989), with the information
from gradients of log p of drawn tokens (Theis et al. 2018, arXiv 1801.05787), kept by rows and columns of
each matrix (llmprune/fisher/measure.py). A threshold over all weights of the model would give each matrix
some share; that is how much would go if no weight could make up for another. As the others do make up
for much of it, the shares are drawn towards the one asked for by `strength`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmprune.allocation.base import Allocation, register
from llmprune.allocation.levels import offered
from llmprune.errors import ConfigError
from llmprune.methods.base import Method
from llmprune.pattern import Pattern


@register("fisher")
@dataclass(frozen=True)
class ByFisher(Allocation):
    """By one threshold over all weights, on how much the output depends on each.

    Attributes:
        strength: how far to go from the share asked for, 0, to that of the threshold, 1.
        grain: what gets one level: `matrix` or `block`.
        levels: of an n:m run, such as `2:4,3:4,dense`; empty for every n of the same m and dense.
    """

    strength: float = 0.5
    grain: str = "matrix"
    levels: str = ""

    paper: ClassVar[str] = "after Theis et al. 2018, arXiv 1801.05787"

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ConfigError(
                f"strength is a number above 0 and up to 1, such as 0.5, got {self.strength:g}"
            )

    @property
    def needs_data(self) -> bool:
        """Always: gradients are those of calibration windows."""
        return True

    def check(self, method: Method[Any], pattern: Pattern) -> None:
        """Refuse a grain that there is not, and levels that are none."""
        if self.grain not in ("block", "matrix"):
            raise ConfigError(f"grain of fisher is matrix or block, got {self.grain!r}")
        offered(self.levels, pattern)

    def shares(self, counts: Mapping[str, Tensor], pattern: Pattern) -> dict[str, float]:
        """The share of each that is to go, for how many of its weights have which saliency.

        One that nothing is known of, whose counts are all zero, gets the share asked for.

        Args:
            counts: int64, the same bins for all, the lowest first.
            pattern: what is asked for on average.
        """
        shares = dict.fromkeys(counts, pattern.sparsity)
        names = [name for name, some in counts.items() if int(some.sum()) > 0]
        if not names:
            return shares
        table = torch.stack([counts[n] for n in names]).double()
        below = table.sum(0).cumsum(0)
        wanted = pattern.sparsity * float(below[-1])
        at = int(torch.searchsorted(below, wanted))
        part = (wanted - (float(below[at - 1]) if at else 0.0)) / float(table[:, at].sum())
        gone = table[:, :at].sum(1) + part * table[:, at]
        found = gone / table.sum(1)
        drawn = pattern.sparsity + self.strength * (found - pattern.sparsity)
        return shares | dict(zip(names, drawn.tolist(), strict=True))
