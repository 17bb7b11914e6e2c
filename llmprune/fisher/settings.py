"""What can be set about the Fisher information of a run (`--fisher-set KEY=VALUE`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from llmprune.errors import ConfigError
from llmprune.methods.registry import settled


@dataclass(frozen=True)
class Fisher:
    """How it is measured, and what it weighs.

    Attributes:
        tokens: that it is measured on: as many whole windows as they make, spread over all, at least one.
        share: of all windows, the most that it is measured on.
        mix: share of it in the error that a repair lowers; the rest weighs all features alike, for what
            few tokens show of each direction is noise. 0 leaves the repair as it is.
        rows: whether rows of a matrix are weighed against each other, where weights of several compete.
        temperature: of the predictions that next tokens are drawn from. At 1 a token that the model is sure
            of has no gradient, though pruning may make it unsure; above 1 it has.
        seed: of the next tokens that are drawn.
    """

    tokens: int = 16384
    share: float = 1.0
    mix: float = 0.5
    rows: bool = True
    temperature: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"setting tokens of fisher is a number from 1 on, got {self.tokens}")
        if not 0 < self.share <= 1:
            raise ConfigError(
                f"setting share of fisher is a share of the windows up to 1, got {self.share:g}"
            )
        if not 0 <= self.mix <= 1:
            raise ConfigError(f"setting mix of fisher is a share from 0 to 1, got {self.mix:g}")
        if not 0.1 <= self.temperature <= 100:
            raise ConfigError(
                f"setting temperature of fisher is a number from 0.1 to 100, got {self.temperature:g}"
            )
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"setting seed of fisher is a number from 0 on, got {self.seed}")

    def windows(self, count: int, seqlen: int) -> list[int]:
        """Which of `count` windows of `seqlen` tokens it is measured on."""
        some = max(1, min(int(count * self.share), self.tokens // seqlen))
        return [i * count // some for i in range(some)]

    def together(self, seqlen: int) -> int:
        """Windows whose gradients are summed before they are squared: few, or little is averaged."""
        return math.ceil(TOGETHER / seqlen)

    def as_dict(self) -> dict[str, Any]:
        """Every setting with its value, defaults too."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


TOGETHER = 256  # tokens; fewer would leave small batches to the processor


def build(settings: Mapping[str, Any]) -> Fisher:
    """Fisher information with `settings`: values, or text as typed after `--fisher-set`.

    Raises:
        ConfigError: for a setting that there is not, or a value that makes no sense.
    """
    return Fisher(**settled("fisher", Fisher().as_dict(), settings))
