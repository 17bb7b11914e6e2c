"""Wanda: a weight matters as much as its magnitude times the norm of its input.

Sun et al. 2023, arXiv 2306.11695, eq. 1: score = |W_ij| * ||X_j||_2, compared within each row.

Deliberate differences from the paper's code (locuslab/wanda, commit 8e8fc87): the norm is taken from the
plain sum of squares over all tokens, not from a running mean over sequences (the same ranking); counts
per group are exact under every comparison group. `variant` follows the paper's appendix: one
share alpha per matrix, found by bisection, so that each row loses the weights that make up alpha of its
score; rows then differ in count and the matrix is near the sparsity asked for, not exactly at it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.errors import ConfigError
from llmprune.methods.base import Pruned, Scored, register
from llmprune.pattern import Pattern, Unstructured, Within
from llmprune.stats import InputNorms

MIN_TOKENS = 128
"""Tokens that an expert must have seen; with fewer the norms are too rough. Of 4 to 256 tokens measured on
wikillama-5m it is the fewest with an output error on other tokens below magnitude's for inputs of both
widths (256: 0.025 to 0.028, 704: 0.035 to 0.036 at 50%; 0.056 to 0.061 and 0.068 to 0.071 at 2:4);
perplexity is then within 0.25 of magnitude's (benchmarks/results/expert-floor.json)."""

CHUNK = (
    2**22
)  # weights that are scored at a time: 16 MiB, small beside any matrix whose memory matters


@register("wanda")
@dataclass(frozen=True)
class Wanda(Scored[InputNorms]):
    """Rank by |weight| times input norm."""

    variant: bool = False

    stats: ClassVar[type[InputNorms]] = InputNorms
    within: ClassVar[Within] = "row"
    paper: ClassVar[str] = "Sun et al. 2023, arXiv 2306.11695"

    @property
    def exact(self) -> bool:
        """The variant trades exact row counts for a common share of the score."""
        return not self.variant

    def needs_tokens(self, features: int) -> int:
        """A number that does not depend on the inputs: each norm is learned by itself."""
        return MIN_TOKENS

    def by_rows(self, pattern: Pattern) -> bool:
        """Where no row is compared with another."""
        return not self.variant and getattr(pattern, "within", "row") == "row"

    def score(self, weight: Tensor, stats: InputNorms) -> Tensor:
        """|W| * ||X||."""
        return weight.abs().float() * stats.norm

    def prune(self, weight: Tensor, stats: InputNorms, pattern: Pattern) -> Pruned:
        """Keep the highest scores, or with `variant` all but a common share of each row's score."""
        if self.by_rows(pattern):
            return self._some_rows_at_a_time(weight, stats, pattern)
        if not self.variant:
            return super().prune(weight, stats, pattern)
        if not isinstance(pattern, Unstructured) or pattern.within not in (None, "row"):
            raise ConfigError(
                f"variant=true compares cumulative scores within rows; it takes a share such as 0.5 "
                f"within rows, got {pattern}"
            )
        keep, alpha = keep_by_share(self.score(weight, stats), pattern.sparsity)
        return Pruned(weight.where(keep, 0), keep, {"alpha": round(alpha, 4)})

    def _some_rows_at_a_time(self, weight: Tensor, stats: InputNorms, pattern: Pattern) -> Pruned:
        """The same as all at once, without a score as large as the matrix."""
        pruned = torch.empty_like(weight, memory_format=torch.contiguous_format)
        keep = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        step = max(1, CHUNK // weight.shape[1])
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            part = super().prune(weight[rows], stats, pattern)
            pruned[rows], keep[rows] = part.weight, part.keep
        return Pruned(pruned, keep)


def keep_by_share(score: Tensor, sparsity: float) -> tuple[Tensor, float]:
    """Keep mask of `score` [out, in] whose removed weights make up at most alpha of each row's score.

    Alpha is bisected until the share removed of the matrix is within 0.001 of `sparsity`, the paper's
    tolerance, or the interval is used up.

    Returns:
        The mask, bool [out, in], and alpha.
    """
    ordered, order = score.sort(dim=1, stable=True)
    cumulative = ordered.cumsum(1)
    total = cumulative[:, -1:]
    low, high = 0.0, 1.0
    for _ in range(50):
        alpha = (low + high) / 2
        removed = cumulative <= alpha * total
        share = float(removed.float().mean())
        if abs(share - sparsity) < 1e-3:
            break
        low, high = (alpha, high) if share < sparsity else (low, alpha)
    keep = torch.empty_like(removed).scatter_(1, order, ~removed)
    return keep, alpha
