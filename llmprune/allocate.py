"""How much of each matrix goes in a run to disk: decided once, noted in the journal, told to all."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune.activations import Activations
from llmprune.allocation.base import Measured
from llmprune.allocation.decide import (
    Decision,
    by_fisher,
    by_measure,
    by_search,
    steps,
    where_possible,
)
from llmprune.allocation.fisher import ByFisher
from llmprune.allocation.measuring import Blocks
from llmprune.allocation.search import Search
from llmprune.by_block import rooms
from llmprune.checkpoint.shelf import Shelf
from llmprune.errors import ConfigError
from llmprune.loading import Source
from llmprune.lockstep import check_walk
from llmprune.memory import fits, of_model, trim
from llmprune.model import Matrix, blocks, matrices
from llmprune.order import Job
from llmprune.pattern import Pattern
from llmprune.preserve import evaluating, random_state
from llmprune.progress import Bar, timed
from llmprune.prune_matrix import Task
from llmprune.quality import going_on
from llmprune.walk import Walker
from llmprune.whole import checked_walker
from llmprune.workplace import SEARCH, Settings, Workplace

STEP = "allocation"
"""Its name in the journal."""


def allocated(
    job: Job,
    source: Source,
    shelf: Shelf,
    settings: Settings,
    work: Workplace,
    chosen: Sequence[Matrix],
    task: Task,
    batches: Sequence[Tensor],
    own: Sequence[Tensor],
    seconds: dict[str, float],
) -> Task:
    """`task` with the levels that an earlier run has decided, or that are decided now.

    `own` are those of all calibration `batches` that are this process's.

    Raises:
        NotByBlock: when blocks of this family cannot be run alone.
        ConfigError: where no levels are found, unless the run goes on without the allocation then.
    """
    allocation, journal = job.prune.allocated(), work.journal
    optional = job.prune.optional("allocation")
    if not isinstance(allocation, Measured | Search | ByFisher):
        return task
    if STEP in journal.steps and not decided(work, task.pattern).left_out:
        job.voice.say(f"levels are those that {allocation.name} has found earlier")
    elif STEP not in journal.steps:
        job.voice.say(f"{allocation.name} decides how much of each matrix goes")
        with timed(seconds, STEP):
            if isinstance(allocation, Search):
                made = partial(
                    _searched, job, allocation, source, shelf, settings, work, task, batches
                )
                found = where_possible(optional, made).plain() if job.ranks.leads else None
                decision = Decision.of(job.ranks.tell(found), task.pattern)
            elif isinstance(allocation, ByFisher):
                decision = where_possible(optional, partial(by_fisher, allocation, chosen, task))
            else:
                decision = _from_files(allocation, chosen, shelf, own, task, job, settings, work)
        journal.add(STEP, decision.plain())
        shutil.rmtree(work.folder / SEARCH, ignore_errors=True)
    decision = decided(work, task.pattern)
    for why in decision.left_out.values():
        job.voice.say(going_on(job.prune.quality, STEP, why))
    return replace(task, levels=decision.levels)


def decided(work: Workplace, base: Pattern) -> Decision:
    """What the allocation has decided, for a run of the pattern `base`."""
    step = work.journal.steps.get(STEP)
    return Decision.of(step, base) if step else Decision()


def _check_room(shelf: Shelf, settings: Settings) -> None:
    """Refuse to search where the whole model, whose logits judge, may not be in memory."""
    if not fits(shelf.model, settings.budget):
        need, have = (
            math.ceil(x / 1e8) / 10 for x in (of_model(shelf.model), settings.budget.device)
        )
        raise ConfigError(
            f"--allocation search runs the whole model, {need}GB of weights, and {have}GB may be used; "
            "owl and alphapruning need one block at a time, or give more with --max-memory"
        )


def _searched(
    job: Job,
    search: Search,
    source: Source,
    shelf: Shelf,
    settings: Settings,
    work: Workplace,
    task: Task,
    batches: Sequence[Tensor],
) -> Decision:
    """What a search finds on the model in memory; it goes on where one was ended."""
    _check_room(shelf, settings)
    model = job.choice.open(source, None).model
    chosen = matrices(model, job.prune.targets, job.prune.ignore)
    with evaluating(model), random_state(model):
        walker = checked_walker(model, blocks(model)[1], list(batches), job.voice.say)
        folder = work.folder / SEARCH
        found = by_search(search, chosen, walker, task, folder, not job.voice.quiet)
    del model, chosen, walker
    trim()
    return found


def _from_files(
    allocation: Measured,
    chosen: Sequence[Matrix],
    shelf: Shelf,
    batches: Sequence[Tensor],
    task: Task,
    job: Job,
    settings: Settings,
    work: Workplace,
) -> Decision:
    """Decide for a model on the shelf, one block in memory at a time.

    `batches` are the calibration windows of this process; what the first process finds counts.

    Raises:
        NotByBlock: when blocks of this family cannot be run alone.
    """
    ranks = job.ranks
    walker = None
    if allocation.learns is not None:
        walker = Walker(shelf.model, shelf.layers, batches, shelf.device)
    count = steps(allocation, chosen, walker) + (len(shelf.layers) if walker else 0)
    name = f"process-{ranks.rank}-measured"
    with (
        tempfile.TemporaryDirectory(dir=work.folder, prefix="allocation-") as place,
        Bar(count, "allocating", enabled=not job.voice.quiet) as bar,
        evaluating(shelf.model),
        random_state(shelf.model),
    ):
        room = rooms(shelf, settings.budget)
        hidden = Activations(Path(place), len(batches), room, shelf.device, name)
        if walker is not None:
            check_walk(shelf, walker, bar.step)
        blocks = Blocks(walker, hidden, _from_shelf(shelf, hidden if walker else None), task, ranks)
        try:
            made = partial(by_measure, allocation, chosen, blocks, bar.step)
            found = where_possible(job.prune.optional("allocation"), made)
        finally:
            shelf.release_rest()
    return Decision.of(ranks.tell(found.plain()), task.pattern)


def _from_shelf(shelf: Shelf, hidden: Activations | None) -> Callable[[int], Any]:
    """Opens one block after the other; `hidden` is where each finds its inputs and leaves its outputs."""

    @contextmanager
    def at(index: int) -> Iterator[None]:
        shelf.load(index)
        if hidden is not None:
            hidden.begin(index)
        yield
        if hidden is not None:
            hidden.commit()
            hidden.forget_old()
        shelf.release(index)

    return at
