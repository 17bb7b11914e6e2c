"""A run that reads, prunes and writes one block at a time, and that can be taken up again.

Taken by every run that saves, and by those whose model does not fit into memory. Perplexity is measured
on the files that were written; in memory where the model fits, else block by block.
"""

from __future__ import annotations

import errno
import hashlib
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmprune import hub, loading
from llmprune.allocate import allocated, decided
from llmprune.by_block import losses_by_block, share_windows
from llmprune.calibrate import told
from llmprune.calibration import Calibration
from llmprune.checkpoint.save import check_target, write_side_files
from llmprune.checkpoint.shelf import Shelf
from llmprune.checkpoint.skeleton import open_shelf
from llmprune.checkpoint.tensors import raw
from llmprune.chosen import able, choose
from llmprune.errors import CheckpointError, ConfigError, NotByBlock
from llmprune.eval.perplexity import Losses, model_losses
from llmprune.generated import with_own_text
from llmprune.informed import informed, room_to_measure
from llmprune.loading import Source
from llmprune.memory import budget, fits, parse_size
from llmprune.model import Matrix, check_vocabulary
from llmprune.order import Job, Text
from llmprune.packed_result import pack, room_to_pack, tell_fewer_bits
from llmprune.preserve import evaluating, random_state
from llmprune.progress import Bar, timed
from llmprune.provenance import describe, versions
from llmprune.prune_matrix import Task
from llmprune.report import LayerReport, PerplexityReport, RepairReport, Report
from llmprune.stopping import Stopping, on_sigterm
from llmprune.stream import Streaming
from llmprune.transformed import Dense, transformed
from llmprune.workplace import Settings, Workplace, batch_size, open_workplace


def run_to_disk(job: Job, source: Source, tokenizer: Any, text: Text | None) -> Report | None:
    """Do `job`, whose data has been read, block by block; None where memory is better, for one process.

    Raises:
        NotByBlock: before a block is written, when the blocks of this family cannot be run alone.
        LLMPruneError: one of its kinds.
        Stopped: after SIGTERM, behind a finished block.
    """
    where = loading.check_choice(job.choice.dtype, job.choice.device)
    settings = Settings(
        job.choice.dtype,
        where,
        job.choice.attention,
        parse_size(job.max_shard_size, "--max-shard-size"),
        budget(job.max_memory, where, job.ranks.beside),
        job.ranks,
    )
    dtype = loading.compute_dtype(job.choice.dtype, where)
    shelf = open_shelf(source, dtype=dtype, device=where, attention=job.choice.attention)
    if job.save is None and job.ranks.world == 1 and fits(shelf.model, settings.budget):
        return None
    if job.save is not None:
        return _to_target(job, source, tokenizer, text, shelf, settings, job.save)
    with tempfile.TemporaryDirectory(prefix="llmprune-") as own:
        to = Path(job.ranks.tell(own)) / "pruned"
        job.voice.say(f"pruned blocks go to {to.parent}, and are gone when the run ends")
        return _to_target(job, source, tokenizer, text, shelf, settings, to)


def _to_target(
    job: Job,
    source: Source,
    tokenizer: Any,
    text: Text | None,
    shelf: Shelf,
    settings: Settings,
    target: Path,
) -> Report:
    """Prune into the folder of unfinished work beside `target`, and put it in place at the end."""
    job, left_out = able(job, shelf, settings)
    choose(job, shelf, settings)  # refused now, or not at all
    dense = transformed(job, source, shelf, settings, target)
    shelf = dense.shelf
    chosen, task = choose(job, shelf, settings)
    given = job.prune.calibration
    data = given if isinstance(given, Calibration) and job.prune.needs_data else None
    if data is not None:
        check_vocabulary(data.ids, data.source, shelf.model)
    _say_what(job, shelf, chosen, data)
    work = open_workplace(
        target,
        shelf,
        job.prune,
        data,
        settings,
        packed=room_to_pack(job, shelf, chosen),
        measured=room_to_measure(job, shelf, chosen, data),
        restart=job.restart,
        say=job.voice.say,
        progress=not job.voice.quiet,
    )
    try:
        with on_sigterm(job.ranks) as stopping:
            if job.prune.allocation == "search":
                stopping.left = "the same command goes on with its search"
            run = _Run(job, source, tokenizer, text, dense, settings, work, stopping, left_out)
            report = run.done(chosen, task, data)
            if job.ranks.leads:
                run.finish(target, report)
    except NotByBlock:
        if not work.blocks:
            work.journal.discard()  # the run goes on in memory, or not at all
        raise
    except OSError as error:
        raise _unwritten(error, work) from error
    finally:
        work.close()
        dense.clear(unless=work.folder)
    return report


def _unwritten(error: OSError, work: Workplace) -> CheckpointError:
    """What to do where something could not be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return CheckpointError(
        f"{error.filename or work.folder} could not be written: {error.strerror or error}; "
        f"{'make room and ' if full else ''}give the same command again: it goes on behind the last "
        "finished block"
    )


def _say_what(job: Job, shelf: Shelf, chosen: list[Matrix], data: Calibration | None) -> None:
    name, pattern = type(shelf.model).__name__, job.prune.built()[1]
    job.voice.say(f"{name}: {len(chosen)} matrices to prune with {job.prune.method}, {pattern}")
    job.voice.say(told(job.prune, data))


@dataclass
class _Run:
    """One run to disk, its workplace open."""

    job: Job
    source: Source
    tokenizer: Any
    text: Text | None
    dense: Dense
    settings: Settings
    work: Workplace
    stopping: Stopping
    left_out: dict[str, str]
    measured: dict[str, PerplexityReport] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def done(self, chosen: Sequence[Matrix], task: Task, data: Calibration | None) -> Report:
        """Write what is missing of `data`, prune and report."""
        if data is not None:
            data, unwritten = with_own_text(self.job, self.source, self.work, data, self.seconds)
            self.left_out |= unwritten
        return self.report(*self.prune(chosen, task, data), data)

    def prune(
        self, chosen: Sequence[Matrix], task: Task, data: Calibration | None
    ) -> tuple[list[LayerReport], list[RepairReport]]:
        """Measure the dense model, then prune everything chosen into the output files."""
        job, say = self.job, self.job.voice.say
        if self.text is not None:
            self._measure("dense", self.source, self.dense.original)
            say(f"perplexity before: {self.measured['dense'].perplexity:.3f}")
        size = batch_size(job.prune, data, self.settings.device)
        given = list(data.batches(size)) if data is not None else []
        batches, shelf = self._own(given) if given else [], self.dense.shelf
        at = self.dense.source, shelf, self.settings, self.work
        task = informed(job, shelf, self.work, chosen, task, given, self.seconds)
        task = allocated(job, *at, chosen, task, given, batches, self.seconds)
        with (
            timed(self.seconds, "prune"),
            evaluating(shelf.model),
            random_state(shelf.model),
            Bar(0, "pruning", enabled=not job.voice.quiet) as bar,
        ):
            run = Streaming(
                shelf,
                chosen,
                task,
                self.work,
                batches if task.needs_data else [],
                self.settings.budget,
                say,
                bar.step,
                bar.expect,
                job.ranks,
            )
            return run.run(self.stopping), run.repaired()

    def _own(self, batches: list[Tensor]) -> list[Tensor]:
        """The batches of this process."""
        ranks = self.job.ranks
        if len(batches) < ranks.world:
            raise ConfigError(
                f"{ranks.world} processes need as many batches, and the calibration windows make "
                f"{len(batches)}; use a smaller --batch-size, more --samples or fewer processes"
            )
        return batches[ranks.span(len(batches))]

    def _measure(self, name: str, source: Source, shelf: Shelf) -> None:
        """Perplexity of a checkpoint, or what an earlier run noted of it."""
        text = self.text
        assert text is not None
        digest = hashlib.sha256(raw(text.ids)).hexdigest()
        step = f"perplexity {name} {digest[:16]} {text.seqlen}"
        if step not in self.work.journal.steps:
            shown = not self.job.voice.quiet
            size = self.job.prune.batch_size
            if fits(shelf.model, self.settings.budget):
                model = self.job.choice.open(source, None).model
                losses: Losses = model_losses
            else:
                model = shelf.model
                losses = losses_by_block(shelf, self.settings.budget, self.work.folder)
            found = text.measure(model, size, shown, share_windows(losses, self.job.ranks))
            self.work.journal.add(step, {"report": asdict(found)})
        self.measured[name] = PerplexityReport(**self.work.journal.steps[step]["report"])

    def report(
        self, layers: list[LayerReport], repaired: list[RepairReport], data: Calibration | None
    ) -> Report:
        """What was done, with the perplexity of the files that were written."""
        job, shelf = self.job, self.dense.shelf
        folder = self.work.checkpoint
        dtypes: Counter[torch.dtype] = Counter()
        for place in self.work.shards.places.values():
            if place.dtype.is_floating_point:
                dtypes[place.dtype] += place.bytes
        if job.ranks.leads:
            write_side_files(shelf.model, self.tokenizer, folder, dtypes.most_common(1)[0][0])
        job.ranks.any(False)  # the others read what has been written
        if self.text is not None:
            written = replace(self.source, path=str(folder), revision=None)
            where, dtype = self.settings.device, job.choice.dtype
            pruned = open_shelf(
                written,
                dtype=loading.compute_dtype(dtype, where),
                device=where,
                attention=job.choice.attention,
            )
            self._measure("pruned", written, pruned)
        decision = decided(self.work, job.prune.built()[1])
        left_out = {**self.left_out, **decision.left_out}
        found = Report(
            recipe=job.prune.without(*left_out).recipe(),
            model={
                **describe(shelf.model),
                "name": job.choice.model,
                "revision": job.choice.revision,
            },
            layers=layers,
            walk="blocks" if data is not None else None,
            repair=repaired,
            allocation=decision.found,
            left_out=left_out,
            calibration=data.report() if data is not None else None,
            perplexity=self.measured,
            seconds={
                **self.seconds,
                **{f"eval {name}": m.seconds for name, m in self.measured.items()},
            },
            versions=versions(self.settings.device),
        )
        if found.sparsity == 0:
            _, pattern = job.prune.built()
            self.work.journal.discard()
            raise ConfigError(f"{pattern} removes no weight of any matrix; raise the sparsity")
        return self.dense.told(found)

    def finish(self, target: Path, report: Report) -> None:
        """Add report and card, and put the checkpoint in place."""
        job, folder = self.job, self.work.checkpoint
        card = hub.card(report, repo_id=job.push_to_hub, command=job.command())
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / "llmprune.json").write_text(report.to_json() + "\n", encoding="utf-8")
        if job.format == "sparse":
            pack(job, self.work, self.settings.max_shard_size)
        check_target(target, job.overwrite, 0, self.source.path)
        self.work.put_in_place(target, job.overwrite, packed=job.format == "sparse")
        if job.save is not None:
            job.voice.say(f"saved to {target}, counts and pattern verified from the files")
            tell_fewer_bits(job, target)
