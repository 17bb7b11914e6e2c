"""What a run to disk prunes, and how, once it is known that it can be."""

from __future__ import annotations

import math
from dataclasses import replace

from llmprune.checkpoint.shelf import Shelf
from llmprune.deliver import check_layout
from llmprune.errors import ConfigError, LLMPruneError, NotByBlock
from llmprune.generated import check_writable
from llmprune.memory import least
from llmprune.model import Matrix, matrices
from llmprune.observe import check_floodable
from llmprune.order import Job
from llmprune.prune_matrix import Task, check_fit
from llmprune.quality import going_on
from llmprune.workplace import Settings, measured_at_once, repaired_at_once


def choose(job: Job, shelf: Shelf, settings: Settings) -> tuple[list[Matrix], Task]:
    """The matrices to prune, and what to do to them.

    Raises:
        NotByBlock: when blocks share weights.
        LLMPruneError: naming what cannot be pruned, or cannot be written.
    """
    task = job.prune.task()
    for name, source in shelf.tied.items():
        if name.startswith(f"{shelf.prefix}."):
            raise NotByBlock(f"{name} is {source} too, so blocks cannot be pruned one at a time")
    chosen = matrices(shelf.model, job.prune.targets, job.prune.ignore)
    check_fit(chosen, task.pattern, job.prune.ragged)
    check_layout(shelf, chosen, task.repair)
    if task.all_experts:
        check_floodable(chosen)
    at_once = repaired_at_once(job.prune, settings.device)
    measured = measured_at_once(job.prune)
    need = least(list(shelf.layers), chosen, task.method, at_once, measured)
    if job.max_memory is not None and need > settings.budget.device:
        raise ConfigError(
            f"--max-memory {job.max_memory} is less than one block of this model needs with "
            f"{job.prune.method}{' and a repair' if at_once else ''}"
            f"{' and Fisher information' if measured else ''}: {math.ceil(need / 1e8) / 10}GB"
        )
    return chosen, task


def able(job: Job, shelf: Shelf, settings: Settings) -> tuple[Job, dict[str, str]]:
    """`job` without what its quality brings and cannot be had here, and why: text of its own, or a repair.

    A repair goes only where the model can be pruned without it.

    Raises:
        LLMPruneError: what `choose` raises without a repair too.
        ConfigError: for text that was asked for, and cannot be written.
    """
    left_out: dict[str, str] = {}
    try:
        check_writable(job, shelf, settings)
    except ConfigError as error:
        if not job.prune.optional("generate"):
            raise
        job, left_out["generate"] = _without(job, "generate", str(error).partition(";")[0])
    if not job.prune.optional("repair"):
        return job, left_out
    try:
        choose(job, shelf, settings)
    except LLMPruneError as error:
        choose(replace(job, prune=job.prune.without("repair")), shelf, settings)
        job, left_out["repair"] = _without(job, "repair", str(error))
    return job, left_out


def _without(job: Job, part: str, why: str) -> tuple[Job, str]:
    """`job` without `part`, once it is said, and `why`."""
    job.voice.say(going_on(job.prune.quality, part, why))
    return replace(job, prune=job.prune.without(part)), why
