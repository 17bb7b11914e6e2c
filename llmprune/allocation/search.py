"""Search: evolution over levels, judged by how near the model's outputs stay to the dense ones.

Sieberling et al. 2024, arXiv 2410.14649 (EvoPress). Every unit, a block or a matrix, is pruned to each of a
few levels beforehand (llmprune/allocation/database.py). A candidate is a level for each unit; its children
take one level more in some units and one less in others, so that the total stays what it was; and they are
judged by the KL divergence of their next-token distributions from the dense model's, first on few tokens,
the best of them on more, and the last on all, where it has to beat its parent.

Deliberate differences from the paper's code: levels are found on inputs that a uniformly pruned model gives,
as they will nearly be; switches may balance several small units against a large one, by exact counts; and
the model is pruned again at the end, block by block, to the levels that were found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from llmprune import methods
from llmprune.allocation.base import Allocation, register
from llmprune.allocation.levels import offered
from llmprune.errors import ConfigError
from llmprune.methods.base import Method
from llmprune.pattern import Pattern


@register("search")
@dataclass(frozen=True)
class Search(Allocation):
    """By evolution over levels, nearest to the dense model's outputs.

    Attributes:
        grain: what gets one level: `matrix` or `block`.
        step: distance of two levels of a share.
        reach: levels to either side of the share asked for.
        levels: of an n:m run, such as `2:4,3:4,dense`; empty for every n of the same m and dense.
        generations: after which it ends.
        minutes: after which it ends, those of earlier runs that it takes up counted; 0 for no limit.
        offspring: children of a generation.
        tokens: on which children are judged, selection by selection, a quarter of them left by each.
        by: method that prunes the candidates; empty for that of the run.
        seed: of what is switched and which windows judge.
    """

    grain: str = "matrix"
    step: float = 0.05
    reach: int = 3
    levels: str = ""
    generations: int = 50
    minutes: float = 0.0
    offspring: int = 16
    tokens: str = "1024,4096,16384"
    by: str = ""
    seed: int = 0

    paper: ClassVar[str] = "Sieberling et al. 2024, arXiv 2410.14649"

    def __post_init__(self) -> None:
        for name in ("reach", "generations", "offspring"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is a number of at least 1, got {getattr(self, name)}")
        if not 0 < self.step < 1:
            raise ConfigError(f"step is a share between 0 and 1, such as 0.05, got {self.step:g}")
        if not 0 <= self.minutes < float("inf"):
            raise ConfigError(f"minutes is a time, 0 for no limit, got {self.minutes:g}")
        self.stages()

    @property
    def needs_data(self) -> bool:
        """Always: candidates are judged on calibration windows."""
        return True

    def stages(self) -> list[int]:
        """Tokens of each selection.

        Raises:
            ConfigError: for what are no growing numbers.
        """
        try:
            found = [int(part) for part in self.tokens.split(",")]
        except ValueError:
            found = []
        if not found or found[0] < 1 or found != sorted(found):
            raise ConfigError(f"tokens are growing numbers such as 1024,4096, got {self.tokens!r}")
        return found

    def check(self, method: Method[Any], pattern: Pattern) -> None:
        """Refuse a grain that there is not, levels that are none, and methods that keep no exact counts."""
        if self.grain not in ("matrix", "block"):
            raise ConfigError(f"grain of search is matrix or block, got {self.grain!r}")
        offered(self.levels, pattern)
        if self.by:
            methods.get(self.by)
        if not method.exact:
            raise ConfigError(
                "search weighs exact counts against each other, and a variant of this method has none; use "
                "--allocation owl"
            )
