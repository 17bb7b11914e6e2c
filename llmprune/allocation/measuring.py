"""Measure the blocks of a dense model, one at a time, and give every matrix its level.

The blocks may be in memory or on the shelf. Each runs once on all windows: what it gives is what the next
block is measured on, and while it runs its inputs are summed up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmprune import methods
from llmprune.allocation.base import Measured
from llmprune.allocation.exact import exact
from llmprune.allocation.levels import offered
from llmprune.errors import ConfigError
from llmprune.model import Matrix
from llmprune.observe import Observer
from llmprune.parallel import ALONE, Ranks
from llmprune.pattern import NM, Level, Pattern
from llmprune.prune_matrix import Task
from llmprune.stats import Stats
from llmprune.walk import HiddenStates, Walker

Progress = Callable[[int, int, str], None]


class NoLevels(ConfigError):
    """Shares lead to no level but the one asked for."""


class Shared(Protocol):
    """An allocation that gives blocks or matrices shares."""

    @property
    def name(self) -> str: ...

    @property
    def grain(self) -> str: ...

    @property
    def levels(self) -> str: ...

    def settings(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Blocks:
    """Where the blocks of a dense model are.

    Attributes:
        walker: runs them on the calibration windows of this process; None where weights are all that counts.
        hidden: the input of the current block for every batch.
        at: while open, a block is in memory; between two blocks its outputs are the inputs of the next.
        task: whether experts see all tokens, and whether sums are float64.
        ranks: the processes that share the windows.
    """

    walker: Walker | None
    hidden: HiddenStates
    at: Callable[[int], AbstractContextManager[None]]
    task: Task
    ranks: Ranks = ALONE


def in_memory(walker: Walker | None, task: Task) -> Blocks:
    """The blocks of a model that is in memory as a whole."""
    hidden: list[Tensor | None] = [None] * (len(walker.batches) if walker else 0)
    return Blocks(walker, hidden, lambda index: nullcontext(), task)


def decided(
    allocation: Measured, chosen: Sequence[Matrix], blocks: Blocks, progress: Progress
) -> tuple[dict[str, Level], dict[str, float]]:
    """The level of every chosen matrix that lies in a block and fits the pattern, and what was measured.

    Raises:
        ConfigError: where no level but the one asked for results.
    """
    base = blocks.task.pattern
    parts = units(allocation, chosen, blocks.task)
    measured = _measured(allocation, parts, blocks, progress)
    sizes = [sum(m.shape[0] * m.shape[1] for m in some) for some in parts.values()]
    shares = allocation.shares([measured[n] for n in parts], sizes, base)
    levels = leveled(allocation, parts, dict(zip(parts, shares, strict=True)), base)
    return levels, measured


def leveled(
    allocation: Shared,
    parts: Mapping[str, list[Matrix]],
    share_of: Mapping[str, float],
    base: Pattern,
) -> dict[str, Level]:
    """The level of every matrix of `parts`, each of which has a share.

    Raises:
        NoLevels: where no level but the one asked for results.
    """
    own = {m.name: share_of[n] for n, some in parts.items() for m in some}
    shapes = {m.name: m.shape for some in parts.values() for m in some}
    levels = exact(base, shapes, own, offered(allocation.levels, base))
    if levels is None:
        raise NoLevels(f"{allocation.name} gives every matrix {base}: {_hint(allocation, base)}")
    return levels


def _hint(allocation: Shared, base: Pattern) -> str:
    """What may give matrices levels of their own."""
    more = ", --within matrix"
    if isinstance(base, NM):
        n, m = 2 * base.n, 2 * base.m
        more = f", name nearer levels (levels={n - 1}:{m},{base},{n + 1}:{m})"
    return (
        "the shares that it measures lie too near to each other, or the sizes of the matrices have too "
        f"little in common; widen its band (--allocation-set {_band(allocation)}){more}, or use "
        "--allocation uniform"
    )


def _band(allocation: Shared) -> str:
    """A setting that would spread levels further."""
    settings = allocation.settings()
    name = next((n for n in ("bound", "tau") if n in settings), "levels")
    return f"{name}=0.5"


def units(allocation: Shared, chosen: Sequence[Matrix], task: Task) -> dict[str, list[Matrix]]:
    """What gets one share: blocks, or matrices; those that the pattern does not divide are left out."""
    found: dict[str, list[Matrix]] = {}
    for m in chosen:
        if m.block is not None and task.pattern.fits(m.shape[1]):
            found.setdefault(
                m.name if allocation.grain == "matrix" else f"block {m.block}", []
            ).append(m)
    if len(found) < 2:
        raise ConfigError(
            f"--allocation {allocation.name} shares out over blocks, and what is to be pruned lies in "
            f"{len(found)}; use --allocation-set grain=matrix or --allocation uniform"
        )
    return found


@torch.no_grad()
def _measured(
    allocation: Measured, parts: Mapping[str, list[Matrix]], blocks: Blocks, progress: Progress
) -> dict[str, float]:
    last = max(m.block for some in parts.values() for m in some if m.block is not None)
    found: dict[str, float] = {}
    for index in range(last + 1):
        here = {n: some for n, some in parts.items() if some[0].block == index}
        with blocks.at(index):
            known = _learnt(
                allocation, [m for some in here.values() for m in some], blocks, index, progress
            )
            for name, some in here.items():
                progress(index, last + 1, f"measuring {name}")
                stats = [known.get(m.name) for m in some]
                found[name] = allocation.measure([m.weight for m in some], stats)
    return found


def _learnt(
    allocation: Measured, here: Sequence[Matrix], blocks: Blocks, index: int, progress: Progress
) -> dict[str, Stats]:
    """What `allocation` learns of the inputs of the matrices of a block, by name; the block is passed on."""
    walker = blocks.walker
    if walker is None or allocation.learns is None:
        return {}
    method, tokens = methods.build(allocation.learns), sum(ids.numel() for ids in walker.batches)
    task, ranks = blocks.task, blocks.ranks
    observer = Observer(
        method, tokens, walker.device, task.all_experts, wide=task.wide, ranks=ranks
    )
    with observer.watching(here):
        for b in range(len(walker.batches)):
            progress(index, len(walker.layers), f"looking at {b + 1}/{len(walker.batches)}")
            observer.next_batch()
            out = walker.run(index, b, blocks.hidden[b])
            if walker.passes_on:
                blocks.hidden[b] = out
    observer.merge(here)
    missed = observer.unreached(here)
    known: dict[str, Stats] = {
        m.name: method.stats.empty(m.shape[1], walker.device) for m in missed
    }
    for seen in observer.handed_out():
        ranks.add_up(seen.sums())
        seen.ready()
        known.update({m.name: seen.stats for m in seen.readers})
    return known
