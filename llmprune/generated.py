"""Text that the model writes in a run to disk: written once by the whole dense model in memory, then kept.

It is written before anything else is measured, from the model as it was given, transformed or not.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from llmprune.calibration import Calibration
from llmprune.checkpoint.fingerprint import digest
from llmprune.checkpoint.shelf import Shelf
from llmprune.errors import ConfigError, ModelError
from llmprune.generate import WITHOUT
from llmprune.loading import Source
from llmprune.memory import fits, of_model, trim
from llmprune.order import Job
from llmprune.preserve import evaluating, random_state
from llmprune.progress import timed
from llmprune.ready import with_written
from llmprune.workplace import Settings, Workplace

STEP = "generate"
"""Its name in the journal."""
_FILE = "written.safetensors"


def check_writable(job: Job, shelf: Shelf, settings: Settings) -> None:
    """Refuse where the whole model may not be in memory, as text is written token by token.

    Raises:
        ConfigError: on all processes, though the first one writes.
    """
    if not job.prune.generate or not job.prune.needs_data:
        return
    if job.ranks.tell(fits(shelf.model, settings.budget)):
        return
    need, have = (math.ceil(x / 1e8) / 10 for x in (of_model(shelf.model), settings.budget.device))
    raise ConfigError(
        f"to write text the whole model has to be in memory, {need}GB of weights, and {have}GB may be used; "
        f"give more with --max-memory, or {WITHOUT}"
    )


def with_own_text(
    job: Job, source: Source, work: Workplace, data: Calibration, seconds: dict[str, float]
) -> tuple[Calibration, dict[str, str]]:
    """`data` with what the model of `source` writes beside it, now or in an earlier run; or why it does not.

    Raises:
        ModelError: when it writes nothing, and the user has asked for it.
    """
    if not job.prune.generate:
        return data, {}
    with timed(seconds, STEP):
        found = _led(job, source, work, data) if job.ranks.leads else None
        ids, left_out = job.ranks.tell(found)
    if left_out is None:
        raise ModelError(str(ids))
    if left_out:
        return data, left_out
    written = len(ids) - len(data.ids)
    return replace(data, ids=ids, written=written), {}


def _led(
    job: Job, source: Source, work: Workplace, data: Calibration
) -> tuple[torch.Tensor | str | None, dict[str, str] | None]:
    """All ids; or none, and why; or what is wrong, and None."""
    from safetensors.torch import load_file, save_file

    file, known = work.folder / _FILE, work.journal.steps.get(STEP, {})
    if known and _whole(file, known["file"]):
        job.voice.say("the text that the model wrote earlier is used again")
        return load_file(file)["ids"], {}
    model = job.choice.open(source, None).model
    try:
        with evaluating(model), random_state(model):
            more, left_out = with_written(
                job.prune, model, data, job.voice.say, not job.voice.quiet
            )
    except ModelError as error:
        return str(error), None
    finally:
        del model
        trim()
    if left_out:
        return None, left_out
    beside = file.with_suffix(".new")
    save_file({"ids": more.ids}, beside)
    beside.replace(file)
    work.journal.add(STEP, {"file": digest(file)})
    return more.ids, {}


def _whole(file: Path, known: str) -> bool:
    """Whether the file is as it was written."""
    return file.is_file() and digest(file) == known
