"""RIA, relative importance and activations: a weight matters by its share of its row and of its column.

Zhang et al. 2024, arXiv 2402.12419, eq. 3 and 5: score = (|W_ij| / sum |W_i*| + |W_ij| / sum |W_*j|) *
||X_j||_2^a with a = 0.5, compared within each row. Their channel permutation for n:m is not part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.errors import ConfigError
from llmprune.methods.base import Scored, register
from llmprune.methods.wanda import MIN_TOKENS
from llmprune.pattern import Within
from llmprune.stats import InputNorms

TINY = torch.finfo(torch.float32).tiny  # instead of a sum of zero


@register("ria")
@dataclass(frozen=True)
class RIA(Scored[InputNorms]):
    """Rank by the share of row and column times the root of the input norm."""

    power: float = 0.5  # of the input norm: the paper's value

    stats: ClassVar[type[InputNorms]] = InputNorms
    within: ClassVar[Within] = "row"
    paper: ClassVar[str] = "Zhang et al. 2024, arXiv 2402.12419"

    def __post_init__(self) -> None:
        if not 0 <= self.power <= 10:
            raise ConfigError(f"power of the input norm is 0 to 10, got {self.power:g}")

    def needs_tokens(self, features: int) -> int:
        """As many as Wanda, which learns the same."""
        return MIN_TOKENS

    def score(self, weight: Tensor, stats: InputNorms) -> Tensor:
        """(|W| / its row's sum + |W| / its column's sum) * ||X||^power; zero weights score zero."""
        size = weight.abs().float()
        row, column = size.sum(1, keepdim=True), size.sum(0)
        share = size / row.clamp_min(TINY) + size / column.clamp_min(TINY)
        return share.mul_(stats.norm**self.power)
