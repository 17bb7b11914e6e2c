"""What a run to disk prunes, and how, once it is known that it can be."""

from __future__ import annotations

import math
from dataclasses import replace

from llmprune.checkpoint.shelf import Shelf
from llmprune.deliver import check_layout
from llmprune.errors import ConfigError, LLMPruneError, NotByBlock
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
    """`job` without a repair that its quality brings, where the model can be pruned without alone; and why.

    Raises:
        LLMPruneError: what `choose` raises without a repair too.
    """
    if not job.prune.optional("repair"):
        return job, {}
    try:
        choose(job, shelf, settings)
    except LLMPruneError as error:
        less = replace(job, prune=job.prune.without("repair"))
        choose(less, shelf, settings)
        job.voice.say(going_on(job.prune.quality, "repair", str(error)))
        return less, {"repair": str(error)}
    return job, {}
