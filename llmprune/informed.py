"""Fisher information in a run to disk: measured once, one block in memory, a file for each block."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from llmprune.checkpoint.shelf import Shelf
from llmprune.fisher.known import Known, Part
from llmprune.fisher.measure import Kept, Measuring, Open
from llmprune.lockstep import check_walk
from llmprune.model import Matrix
from llmprune.order import Job
from llmprune.preserve import evaluating, random_state
from llmprune.progress import Bar, timed
from llmprune.prune_matrix import Task
from llmprune.walk import Walker
from llmprune.workplace import FISHER, Workplace

STEP = "fisher"
"""Its name in the journal."""


def informed(
    job: Job,
    shelf: Shelf,
    work: Workplace,
    chosen: Sequence[Matrix],
    task: Task,
    own: Sequence[Tensor],
    seconds: dict[str, float],
) -> Task:
    """`task` with what an earlier run has measured of the model on the shelf, or what is measured now.

    `own` are the calibration batches of this process.

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
    if known and job.ranks.tell(_whole(folder, known) if job.ranks.leads else None):
        job.voice.say("Fisher information is what was measured earlier")
    else:
        job.voice.say(
            "measuring how much the output depends on what, one pass back through the blocks"
        )
        with timed(seconds, STEP), evaluating(shelf.model), random_state(shelf.model):
            _measure(job, shelf, work, chosen, own)
        found = _digests(folder) if job.ranks.leads else {}
        journal.add(STEP, {"files": found})
        job.ranks.any(False)  # the others read what rank 0 has written
    return replace(task, fisher=Known(settings, lru_cache(maxsize=1)(_reader(folder, chosen))))


def _measure(
    job: Job, shelf: Shelf, work: Workplace, chosen: Sequence[Matrix], own: Sequence[Tensor]
) -> None:
    """Write a file for each block into the folder for them."""
    settings = job.prune.weighing()
    assert settings is not None
    folder = work.folder / FISHER
    folder.mkdir(exist_ok=True)
    walker = Walker(shelf.model, shelf.layers, own, shelf.device)

    def done(index: int, part: Part) -> None:
        if job.ranks.leads:
            _write(folder / _name(index), part)

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


class OnDisk(Kept):
    """Hidden states in files that go with their folder.

    Attributes:
        folder: for them.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def put(self, block: int, group: int, hidden: Tensor) -> None:
        """Write what `block` passes on."""
        from safetensors.torch import save_file

        save_file({"hidden": hidden.cpu().contiguous()}, self._file(block, group))

    def take(self, block: int, group: int) -> Tensor | None:
        """Read it; None before the first block."""
        from safetensors.torch import load_file

        return None if block < 0 else load_file(self._file(block, group))["hidden"]

    def forget(self, block: int) -> None:
        """Give the room of what `block` passes on back."""
        for file in self.folder.glob(f"{block}-*.safetensors"):
            file.unlink()

    def _file(self, block: int, group: int) -> Path:
        return self.folder / f"{block}-{group}.safetensors"


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
    return {
        file.name: sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.glob("*.safetensors"))
    }


def _whole(folder: Path, known: dict[str, str]) -> bool:
    """Whether the files are as they were written."""
    return _digests(folder) == known
