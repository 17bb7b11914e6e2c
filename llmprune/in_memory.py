"""A run whose model is in memory as a whole: load, measure, prune, measure again, save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmprune import hub
from llmprune.checkpoint.save import check_saveable, check_target, expectations, save
from llmprune.errors import NumericalError
from llmprune.loading import Opened, Source
from llmprune.model import Matrix, check_weights, matrices
from llmprune.notice import ANYWHERE
from llmprune.observe import check_floodable
from llmprune.order import Job, Text
from llmprune.packed_result import packed_bytes, tell_fewer_bits
from llmprune.progress import timed
from llmprune.prune_matrix import check_fit
from llmprune.report import PerplexityReport, Report
from llmprune.run import prune_with
from llmprune.transforms.apply import with_untied


def run_in_memory(job: Job, source: Source, tokenizer: Any, text: Text | None) -> Report:
    """Do `job`, whose data has been read, on the whole model.

    Raises:
        LLMPruneError: one of its kinds, with a message that says what would work.
    """
    say, shown = job.voice.say, not job.voice.quiet
    seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        opened = job.choice.open(source, tokenizer)
    model = opened.model
    chosen = _chosen(job, source, opened)
    measured: dict[str, PerplexityReport] = {}
    if text is not None:
        measured["dense"] = text.measure(model, job.prune.batch_size, shown)
        say(f"perplexity before: {measured['dense'].perplexity:.3f}")
    report = prune_with(job.prune, model, tokenizer, progress=shown, stored=opened.stored, say=say)
    if job.prune.transforms:
        opened = replace(opened, stored=with_untied(model, opened.stored))
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
    if job.save is not None:
        _save(job, job.save, opened, chosen, report)
    return report


def _chosen(job: Job, source: Source, opened: Opened) -> list[Matrix]:
    """The matrices to prune, once it is known that they can be, and that the result can be saved."""
    _, pattern = job.prune.built()
    chosen = matrices(opened.model, job.prune.targets, job.prune.ignore)
    check_fit(chosen, pattern, job.prune.ragged)
    check_weights(chosen)
    if job.prune.calibrate_all_experts:
        check_floodable(chosen)
    if job.save is not None:
        check_saveable(opened.model, [m.name for m in chosen])
        check_target(job.save, job.overwrite, _bytes(job, opened, chosen), source.path)
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
        card=hub.card(report, repo_id=job.push_to_hub, command=job.command()),
        stored=opened.stored,
        expected=expectations(report.layers, pattern, transposed=flipped, exact=method.exact),
        max_shard_size=job.max_shard_size,
        overwrite=job.overwrite,
        sparse=(job.push_to_hub or ANYWHERE) if job.format == "sparse" else None,
    )
    job.voice.say(f"saved to {target}, counts and pattern verified from the files")
    tell_fewer_bits(job, target)


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


def _bytes(job: Job, opened: Opened, chosen: Sequence[Matrix]) -> int:
    """What the checkpoint needs of the disk, and a little for the tokenizer and the rest."""
    unique = {id(p): (name, p) for name, p in opened.model.named_parameters()}
    total = 2**24
    if job.prune.transforms:  # the output head may get weights of its own
        table = opened.model.get_input_embeddings().weight
        total += int(table.numel() * table.element_size())
    for name, parameter in unique.values():
        total += parameter.numel() * opened.stored[name].itemsize
    if job.format == "sparse":  # packed from the dense files, which lie beside it until then
        _, pattern = job.prune.built()
        itemsize = max(dtype.itemsize for dtype in opened.stored.values())
        total += packed_bytes(total, chosen, pattern, itemsize)
    return total
