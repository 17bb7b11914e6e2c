"""A run from the command line: open, measure, prune, measure again, save, push; in that order.

Whatever can be refused is refused before weights load: the settings, the target folder, the rights on the
Hub, the calibration text and the evaluation text.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmprune import hub, loading, plot
from llmprune.calibration import Calibration, window
from llmprune.checkpoint.save import check_saveable, check_target, expectations, save
from llmprune.choices import ModelChoice, Voice
from llmprune.errors import DataError, NumericalError
from llmprune.eval import perplexity as measure
from llmprune.loading import Opened, Source
from llmprune.model import Matrix, check_weights, matrices, max_seqlen
from llmprune.prune_matrix import check_fit
from llmprune.report import PerplexityReport, Report
from llmprune.run import PruneConfig, calibrate, prune_with


@dataclass(frozen=True)
class Job:
    """One pruning run; the fields are the options of `python -m llmprune`."""

    choice: ModelChoice
    prune: PruneConfig
    voice: Voice
    save: Path | None = None
    overwrite: bool = False
    max_shard_size: str = "5GB"
    push_to_hub: str | None = None
    private: bool = False
    plot: Path | None = None
    eval_dataset: str | None = None
    evaluate: bool = True
    argv: tuple[str, ...] = ()


@dataclass(frozen=True)
class Text:
    """Text to measure perplexity on, as token ids [tokens]."""

    ids: Tensor
    name: str
    seqlen: int

    def measure(self, model: Any, batch_size: int | None, progress: bool) -> PerplexityReport:
        """Perplexity of `model` on it."""
        return measure.perplexity(
            model,
            self.ids,
            seqlen=self.seqlen,
            dataset=self.name,
            batch_size=batch_size,
            progress=progress,
        )


def run(job: Job) -> Report:
    """Do `job`, printing as it asks for.

    Raises:
        LLMPruneError: one of its kinds, with a message that says what would work.
    """
    job = _with_target(job)
    say, shown = job.voice.say, not job.voice.quiet
    source, target = _check(job), job.save
    tokenizer = loading.tokenizer(source)
    job = _with_calibration(job, source, tokenizer)
    text = _eval_text(job, source, tokenizer)

    seconds: dict[str, float] = {}
    with _timed(seconds, "load"):
        opened = job.choice.open(source, tokenizer)
    model = opened.model
    chosen = _chosen(job, source, opened)

    measured: dict[str, PerplexityReport] = {}
    if text is not None:
        measured["dense"] = text.measure(model, job.prune.batch_size, shown)
        say(f"perplexity before: {measured['dense'].perplexity:.3f}")
    report = prune_with(job.prune, model, tokenizer, progress=shown, say=say)
    round_to_stored(opened)
    if text is not None:
        measured["pruned"] = text.measure(model, job.prune.batch_size, shown)
    report = replace(
        report,
        model={**report.model, "name": job.choice.model, "revision": job.choice.revision},
        perplexity=measured,
        seconds={
            **seconds,
            **report.seconds,
            **{f"eval {k}": m.seconds for k, m in measured.items()},
        },
    )
    if target is not None:
        _save(job, target, opened, chosen, report)
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


def _check(job: Job) -> Source:
    """Everything that can be refused before data or weights are read."""
    job.voice.check()
    if job.plot is not None:
        plot.check(job.plot)
    if job.save is not None:
        check_target(job.save, job.overwrite, 0)
    if job.push_to_hub is not None:
        hub.check_push(job.push_to_hub)
    source = job.choice.check()
    if job.save is not None:
        check_target(job.save, job.overwrite, source.bytes, source.path)
    return source


def _with_calibration(job: Job, source: Source, tokenizer: Any) -> Job:
    """`job` with its calibration windows read, so that bad data stops the run before weights load."""
    method, _ = job.prune.built()
    if not method.stats.needs_data:
        return job
    data = calibrate(job.prune, max_seqlen(source.config), tokenizer, progress=not job.voice.quiet)
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


def _chosen(job: Job, source: Source, opened: Opened) -> list[Matrix]:
    """The matrices to prune, once it is known that they can be, and that the result can be saved."""
    _, pattern = job.prune.built()
    chosen = matrices(opened.model, job.prune.targets, job.prune.ignore)
    check_fit(chosen, pattern, job.prune.ragged)
    check_weights(chosen)
    if job.save is not None:
        check_saveable(opened.model, [m.name for m in chosen])
        check_target(job.save, job.overwrite, _bytes(opened), source.path)
    job.voice.say(
        f"{type(opened.model).__name__}: {len(chosen)} matrices to prune with {job.prune.method}, {pattern}"
    )
    return chosen


def _save(job: Job, target: Path, opened: Opened, chosen: Sequence[Matrix], report: Report) -> None:
    """Write the checkpoint in one step, verified from its files."""
    method, pattern = job.prune.built()
    flipped = {m.name for m in chosen if m.transposed}
    save(
        opened.model,
        opened.tokenizer,
        target,
        report,
        card=hub.card(report, repo_id=job.push_to_hub, command=_command(job)),
        stored=opened.stored,
        expected=expectations(report.layers, pattern, transposed=flipped, exact=method.exact),
        max_shard_size=job.max_shard_size,
        overwrite=job.overwrite,
    )
    job.voice.say(f"saved to {target}, counts and pattern verified from the files")


def round_to_stored(opened: Opened) -> None:
    """Round every parameter to the dtype it is saved in, so that what is measured is what is saved.

    Raises:
        NumericalError: when a weight does not fit the stored dtype, such as 70000 in float16.
    """
    for name, parameter in opened.model.named_parameters():
        dtype = opened.stored.get(name, parameter.dtype)
        if dtype == parameter.dtype:
            continue
        with torch.no_grad():
            rounded = parameter.data.to(dtype)
            if not bool(rounded.isfinite().all()):
                raise NumericalError(
                    f"{name} holds weights that {dtype} cannot; try --dtype bfloat16"
                )
            parameter.data.copy_(rounded)


def _bytes(opened: Opened) -> int:
    """Size of the checkpoint on disk, and a little for the tokenizer and the rest."""
    unique = {id(p): (name, p) for name, p in opened.model.named_parameters()}
    total = 2**24
    for name, parameter in unique.values():
        total += parameter.numel() * opened.stored[name].itemsize
    return total


def _command(job: Job) -> str:
    """The command line that does this run again, the way the user typed it."""
    return shlex.join(["python", "-m", "llmprune", *job.argv])


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - begun
