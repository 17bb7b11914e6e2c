"""Fisher information in a run to disk: measured once, one block in memory, a file for each block."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from llmprune.calibration import Calibration
from llmprune.checkpoint.fingerprint import digest
from llmprune.checkpoint.shelf import Shelf
from llmprune.fisher.kept import OnDisk
from llmprune.fisher.known import BINS, Known, Part
from llmprune.fisher.measure import Measuring, Open
from llmprune.lockstep import check_walk
from llmprune.model import Matrix
from llmprune.order import Job
from llmprune.preserve import evaluating, random_state
from llmprune.progress import Bar, timed
from llmprune.prune_matrix import Task
from llmprune.walk import Walker
from llmprune.workplace import FISHER, Workplace, hidden_bytes, tokens_of

STEP = "fisher"
"""Its name in the journal."""


def informed(
    job: Job,
    shelf: Shelf,
    work: Workplace,
    chosen: Sequence[Matrix],
    task: Task,
    batches: Sequence[Tensor],
    seconds: dict[str, float],
) -> Task:
    """`task` with what an earlier run has measured of the model on the shelf, or what is measured now.

    `batches` are the calibration windows of all processes.

    Raises:
        NotByBlock: when blocks of this family cannot be run alone.
        ModelError: when the model gives no gradient.
        NumericalError: when it gives NaN or Inf.
    """
    settings, journal = job.prune.weighing(), work.journal
    if settings is None:
        return task
    folder = work.folder / FISHER
    known = journal.steps.get(STEP, {}).get("files", {})
    if known and all(job.ranks.gather(not _writes(job) or _whole(folder, known))):
        job.voice.say("Fisher information is what was measured earlier")
    else:
        job.voice.say(
            "measuring how much the output depends on what, one pass back through the blocks"
        )
        with timed(seconds, STEP), evaluating(shelf.model), random_state(shelf.model):
            _measure(job, shelf, work, chosen, batches)
        journal.add(STEP, {"files": _digests(folder) if job.ranks.leads else {}})
        job.ranks.any(False)  # what is read from here on is written on every machine
    return replace(task, fisher=Known(settings, lru_cache(maxsize=1)(_reader(folder, chosen))))


def room_to_measure(
    job: Job, shelf: Shelf, chosen: Sequence[Matrix], data: Calibration | None
) -> tuple[int, int]:
    """Bytes that this takes on the disk while it is measured, and those that stay until the run ends."""
    settings = job.prune.weighing()
    if settings is None or data is None:
        return 0, 0
    tokens, seqlen = tokens_of(job.prune, data), data.ids.shape[1]
    count = tokens // seqlen
    share = len(settings.windows(count, seqlen)) / count
    inside = [m for m in chosen if m.block is not None]
    each = hidden_bytes(shelf, tokens) // 2  # what one block passes on, of all windows
    width = each // tokens // next(shelf.layers.parameters()).element_size()
    metrics = 4 * width**2 * len({m.block for m in inside})
    return (
        int(each * share) * (len(shelf.layers) + 1),  # with the gradient
        metrics + sum(8 * BINS + 4 * m.shape[0] for m in inside),
    )


def _writes(job: Job) -> bool:
    """Whether this process writes for those on its machine; what is measured is the same on all."""
    return job.ranks.local == 0


def _measure(
    job: Job, shelf: Shelf, work: Workplace, chosen: Sequence[Matrix], batches: Sequence[Tensor]
) -> None:
    """Write a file for each block into the folder for them."""
    settings = job.prune.weighing()
    assert settings is not None
    folder = work.folder / FISHER
    folder.mkdir(exist_ok=True)
    walker = Walker(shelf.model, shelf.layers, batches, shelf.device)

    def done(index: int, part: Part) -> None:
        if _writes(job):
            beside = folder / f"process-{job.ranks.rank}"  # machines may share a disk
            _write(beside, part)
            beside.replace(folder / _name(index))

    with (
        tempfile.TemporaryDirectory(dir=work.folder, prefix="fisher-") as place,
        Bar(0, "measuring Fisher information", enabled=not job.voice.quiet) as bar,
    ):
        check_walk(shelf, walker, bar.step)
        opened, kept = _opened(shelf, walker), OnDisk(Path(place))
        run = Measuring(walker, chosen, settings, opened, done, bar.step, kept, job.ranks)
        bar.expect(run.steps)
        try:
            run.run()
        finally:
            shelf.release_rest()


def _opened(shelf: Shelf, walker: Walker) -> Open:
    """Brings a block of the shelf, or its head, into memory while open."""
    ids = torch.cat([b.flatten() for b in walker.batches])

    @contextmanager
    def at(index: int | None) -> Iterator[None]:
        if index is not None:
            shelf.load(index)
            yield
            shelf.release(index)
            return
        shelf.release_rest()
        shelf.load_rest(ids, head=True)
        yield
        shelf.release_rest()
        shelf.load_rest(ids, head=False)

    return at


def _name(index: int) -> str:
    return f"block-{index:05d}.safetensors"


def _write(file: Path, part: Part) -> None:
    from safetensors.torch import save_file

    tensors = {"metric": part.metric}
    tensors |= {f"rows {name}": t for name, t in part.rows.items()}
    tensors |= {f"counts {name}": t for name, t in part.counts.items()}
    save_file(tensors, file)


def _reader(folder: Path, chosen: Sequence[Matrix]) -> Callable[[int], Part | None]:
    """Reads what is known of a block."""
    from safetensors.torch import load_file

    inside = {m.block for m in chosen}

    def read(index: int) -> Part | None:
        if index not in inside:
            return None
        tensors = load_file(folder / _name(index))
        kinds: dict[str, dict[str, Tensor]] = {"rows": {}, "counts": {}}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(" ")
            if name:
                kinds[kind][name] = tensor
        return Part(kinds["rows"], kinds["counts"], tensors["metric"])

    return read


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: digest(file) for file in sorted(folder.glob("*.safetensors"))}


def _whole(folder: Path, known: dict[str, str]) -> bool:
    """Whether the files are as they were written."""
    return _digests(folder) == known
