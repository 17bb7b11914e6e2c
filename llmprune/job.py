"""A run from the command line: open, measure, prune, measure again, save, push; in that order.

Whatever can be refused is refused before weights load: the settings, the target folder, the rights on the
Hub, the calibration text and the evaluation text.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmprune import hub, loading, plot
from llmprune.calibrate import calibrate
from llmprune.calibration import Calibration, window
from llmprune.checkpoint.save import check_target
from llmprune.errors import ConfigError, DataError, NotByBlock
from llmprune.eval import perplexity as measure
from llmprune.in_memory import run_in_memory
from llmprune.loading import Source
from llmprune.model import max_seqlen
from llmprune.order import Job, Text
from llmprune.report import Report
from llmprune.to_disk import run_to_disk
from llmprune.workplace import settle

LEAST_SPARSITY = 1 / 16  # one bit of 16


def run(job: Job) -> Report:
    """Do `job`, printing as it asks for.

    Raises:
        LLMPruneError: one of its kinds, with a message that says what would work.
    """
    job = _with_own_device(_with_target(job))
    say = job.voice.say
    source, target = _check(job), job.save
    tokenizer = loading.tokenizer(source)
    job = _with_calibration(job, source, tokenizer)
    text = job.ranks.tell(_eval_text(job, source, tokenizer) if job.ranks.leads else None)

    report = _pruned(job, source, tokenizer, text)
    if not job.ranks.leads:
        return report
    if job.plot is not None:
        plot.plot(report, job.plot)
    job.voice.result(report.table(), report.as_dict())
    if job.push_to_hub is not None and target is not None:
        say(f"pushed to {hub.push(target, job.push_to_hub, private=job.private)}")
    return report


def _with_target(job: Job) -> Job:
    """A push needs a local copy that stays: the folder is named after the repository."""
    if job.push_to_hub is not None and job.save is None:
        return replace(job, save=Path(job.push_to_hub.split("/")[-1]))
    return job


def _with_own_device(job: Job) -> Job:
    """Of several processes on a machine, each computes on the GPU of its own number, where there are some."""
    ranks, device = job.ranks, job.choice.device
    if ranks.world == 1:
        return job
    where = loading.check_choice(job.choice.dtype, device)
    if where.type != "cuda":
        return job
    if where.index is not None:
        raise ConfigError(
            f"--device {device} would put {ranks.world} processes on one GPU; leave it out, and each "
            "takes its own"
        )
    count = torch.cuda.device_count()
    if ranks.local >= count:
        raise ConfigError(
            f"process {ranks.local} of this machine has no GPU: there are {count}; start as many "
            "processes, or use --device cpu"
        )
    torch.cuda.set_device(ranks.local)
    return replace(job, choice=replace(job.choice, device=f"cuda:{ranks.local}"))


def _check(job: Job) -> Source:
    """Everything that can be refused before data or weights are read."""
    job.voice.check()
    if job.plot is not None:
        plot.check(job.plot)
    if job.format == "sparse":
        _check_sparse(job)
    if job.save is not None:
        settle(job.save)
        check_target(job.save, job.overwrite, 0)
    if job.push_to_hub is not None and job.ranks.leads:
        hub.check_push(job.push_to_hub)
    source = job.choice.check()
    if job.save is not None:
        check_target(job.save, job.overwrite, 0, source.path)
    return source


def _check_sparse(job: Job) -> None:
    """Whether a sparse checkpoint is to be written, and can be smaller than a dense one."""
    if job.save is None:
        raise ConfigError("--format sparse is about what --save or --push-to-hub write; name one")
    _, pattern = job.prune.built()
    if pattern.sparsity <= LEAST_SPARSITY:
        raise ConfigError(
            f"--format sparse takes one bit for each weight, so {pattern} makes nothing smaller; raise the "
            f"sparsity above {LEAST_SPARSITY:g}, or leave the format dense"
        )


def _with_calibration(job: Job, source: Source, tokenizer: Any) -> Job:
    """`job` with its calibration windows read, so that bad data stops the run before weights load."""
    if not job.prune.needs_data:
        return job
    data = job.ranks.tell(
        calibrate(job.prune, max_seqlen(source.config), tokenizer, progress=not job.voice.quiet)
        if job.ranks.leads
        else None
    )
    config = replace(job.prune, calibration=data, samples=None, seqlen=None)
    return replace(job, prune=config)


def _eval_text(job: Job, source: Source, tokenizer: Any) -> Text | None:
    """The text to measure on; a default that cannot be had is said, one that was asked for is an error."""
    if not job.evaluate:
        return None
    data = job.prune.calibration
    width = data.ids.shape[1] if isinstance(data, Calibration) else job.prune.seqlen
    seqlen = window(width, max_seqlen(source.config))
    name = job.eval_dataset or ("demo" if job.choice.model == "demo" else "wikitext2")
    try:
        ids, read = measure.token_ids(name, tokenizer)
    except DataError as error:
        if job.eval_dataset is not None:
            raise
        job.voice.say(
            f"perplexity is not measured: {error} (for perplexity: --eval-dataset test.txt; "
            "to silence this: --no-eval)"
        )
        return None
    return Text(ids, read, seqlen)


def _pruned(job: Job, source: Source, tokenizer: Any, text: Text | None) -> Report:
    """Block by block from disk where that is possible and of use, else in memory."""
    try:
        report = run_to_disk(job, source, tokenizer, text)
    except NotByBlock as error:
        if job.ranks.world > 1:
            raise NotByBlock(f"{error}; one process, without torchrun, may do it") from error
        if job.max_memory is not None:
            raise
        job.voice.say(f"the whole model is loaded, and the run cannot be taken up again: {error}")
        report = None
    return report or run_in_memory(job, source, tokenizer, text)
