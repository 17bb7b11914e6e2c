"""From an allocation to a level for each matrix, for a model in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune.allocation.base import Allocation, Measured
from llmprune.allocation.fisher import ByFisher
from llmprune.allocation.measuring import Blocks, NoLevels, decided, in_memory, leveled, units
from llmprune.allocation.search import Search
from llmprune.allocation.searching import Searching
from llmprune.errors import ConfigError
from llmprune.model import Matrix
from llmprune.pattern import Level, Pattern, as_text, from_text
from llmprune.progress import Bar
from llmprune.prune_matrix import Task
from llmprune.walk import Walker


@dataclass(frozen=True)
class Decision:
    """What an allocation has decided.

    Attributes:
        levels: of every matrix that gets one of its own, by name.
        found: what it was decided by, for the report: plain JSON types.
        left_out: why an allocation that may be left out was, and nothing decided; else empty.
    """

    levels: Mapping[str, Level] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As plain JSON types."""
        levels = {n: as_text(v) for n, v in self.levels.items()}
        return {"levels": levels, "found": self.found, "left_out": self.left_out}

    @classmethod
    def of(cls, plain: Mapping[str, Any], base: Pattern) -> Decision:
        """What `plain` gave, for a run of the pattern `base`."""
        levels = {name: from_text(text, base) for name, text in plain["levels"].items()}
        return cls(levels, plain["found"], plain["left_out"])


def where_possible(optional: bool, made: Callable[[], Decision]) -> Decision:
    """What `made` gives; of an `optional` allocation that it refuses, why.

    Raises:
        ConfigError: of one that is not.
    """
    try:
        return made()
    except ConfigError as error:
        if not optional:
            raise
        return Decision(left_out={"allocation": str(error)})


def decide(
    allocation: Allocation,
    chosen: Sequence[Matrix],
    walker: Walker | None,
    task: Task,
    progress: bool,
    optional: bool,
) -> Decision:
    """Decide for a model in memory, whose weights are as before afterwards.

    Raises:
        ConfigError: where an allocation that is not `optional` finds no levels.
    """
    return where_possible(optional, lambda: _decided(allocation, chosen, walker, task, progress))


def _decided(
    allocation: Allocation,
    chosen: Sequence[Matrix],
    walker: Walker | None,
    task: Task,
    progress: bool,
) -> Decision:
    if isinstance(allocation, Search):
        assert walker is not None  # it needs data
        with tempfile.TemporaryDirectory(prefix="llmprune-search-") as folder:
            return by_search(allocation, chosen, walker, task, Path(folder), progress)
    if isinstance(allocation, ByFisher):
        return by_fisher(allocation, chosen, task)
    if not isinstance(allocation, Measured):
        return Decision()
    with Bar(steps(allocation, chosen, walker), "allocating", enabled=progress) as bar:
        return by_measure(allocation, chosen, in_memory(walker, task), bar.step)


def by_search(
    search: Search,
    chosen: Sequence[Matrix],
    walker: Walker,
    task: Task,
    folder: Path,
    progress: bool,
) -> Decision:
    """Search on a model in memory, which is dense again afterwards; `folder` holds what is known so far."""
    with Bar(0, "searching", enabled=progress) as bar:
        searching = Searching(search, chosen, walker, task, folder, bar.step)
        bar.expect(searching.steps)
        return Decision(*searching.run())


def by_fisher(allocation: ByFisher, chosen: Sequence[Matrix], task: Task) -> Decision:
    """Decide by what is known of the dense model."""
    assert task.fisher is not None  # the run measures it for this allocation
    parts = units(allocation, chosen, task)
    counts: dict[str, Tensor] = {}
    for name, some in parts.items():
        for m in some:
            part = task.fisher.part(m.block) if m.block is not None else None
            assert part is not None
            counts[name] = counts.get(name, 0) + part.counts[m.name]
    shares = allocation.shares(counts, task.pattern)
    try:
        levels = leveled(allocation, parts, shares, task.pattern)
    except NoLevels:
        levels = {}  # all depend on all alike: uniform is what it finds, and the report has the shares
    return Decision(
        levels, {"name": allocation.name, "paper": allocation.paper, "measured": shares}
    )


def by_measure(
    allocation: Measured,
    chosen: Sequence[Matrix],
    blocks: Blocks,
    progress: Callable[[int, int, str], None],
) -> Decision:
    levels, measured = decided(allocation, chosen, blocks, progress)
    about = {"name": allocation.name, "paper": allocation.paper, "measured": measured}
    return Decision(levels, about)


def steps(allocation: Measured, chosen: Sequence[Matrix], walker: Walker | None) -> int:
    """How often `progress` is told something."""
    inside = {m.block for m in chosen if m.block is not None}
    forwards = len(walker.batches) if walker is not None and allocation.learns else 0
    parts = len(chosen) if allocation.grain == "matrix" else len(inside)
    return parts + (max(inside, default=-1) + 1) * forwards
