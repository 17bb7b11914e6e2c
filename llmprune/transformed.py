"""A run to disk with transforms writes the transformed dense model first, in a folder beside the target.

The folder is called `.NAME.transformed`, takes as much of the disk as the dense model, and goes with the run.
A run that is taken up again finds it there; one that was ended while it was made makes it again, with the
same bits.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from llmprune import loading, transforms
from llmprune.calibration import Calibration
from llmprune.checkpoint import fingerprint as prints
from llmprune.checkpoint.save import write_side_files
from llmprune.checkpoint.shards import Planned, Shards
from llmprune.checkpoint.shelf import Shelf
from llmprune.checkpoint.skeleton import open_shelf
from llmprune.checkpoint.target import resolve, size
from llmprune.errors import CheckpointError
from llmprune.loading import Source
from llmprune.lockstep import check_walk
from llmprune.model import check_vocabulary
from llmprune.order import Job
from llmprune.preserve import evaluating, random_state
from llmprune.progress import Bar
from llmprune.provenance import versions
from llmprune.report import Report
from llmprune.transforms.apply import apply
from llmprune.transforms.files import OnShelf, planned
from llmprune.walk import Walker
from llmprune.workplace import Settings, batch_size, hidden_bytes, layout

_DONE = "transforms.json"  # written last: what the folder holds, and what was done


@dataclass(frozen=True)
class Dense:
    """The dense model that is pruned, transformed or as it is.

    Attributes:
        original: the model on the shelf before transforms.
        shelf: and after; the same where there are none.
        source: what `shelf` was opened from.
        data: the windows that transforms have learnt from, or None.
        folder: that holds the transformed model.
        found: what was done, for the report.
        seconds: it took, now or in an earlier run.
        leads: whether this process has made it.
    """

    original: Shelf
    shelf: Shelf
    source: Source
    data: Calibration | None = None
    folder: Path | None = None
    found: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    leads: bool = True

    def told(self, report: Report) -> Report:
        """`report` with what was done, and its time."""
        if self.data is None:
            return report
        seconds = {**report.seconds, "transforms": self.seconds}
        data = report.calibration or self.data.report()
        return replace(report, transforms=dict(self.found), seconds=seconds, calibration=data)

    def clear(self, *, unless: Path) -> None:
        """Remove the transformed model, unless there is a folder `unless` of a run that needs it still."""
        if self.folder is not None and self.leads and not unless.exists():
            shutil.rmtree(self.folder, ignore_errors=True)


def place(target: Path) -> Path:
    """Where the transformed model of a run to `target` lies."""
    own = resolve(target)
    return own.parent / f".{own.name}.transformed"


def transformed(job: Job, source: Source, shelf: Shelf, settings: Settings, target: Path) -> Dense:
    """Transform the model on `shelf`, one block in memory at a time, or take up what an earlier run has.

    Raises:
        NotByBlock: when the blocks of this family cannot be run alone.
        CheckpointError: when there is no room.
        LLMPruneError: a weight that does not fit its dtype.
    """
    data, ranks = job.prune.calibration, settings.ranks
    if not job.prune.transforms or not isinstance(data, Calibration):
        return Dense(shelf, shelf, source)
    folder = place(target)
    done = _transformed(job, shelf, data, settings, folder) if ranks.leads else None
    found, seconds = ranks.tell(done)
    config = loading.check(str(folder), trust_remote_code=source.trust_remote_code).config
    there = Source(str(folder), str(folder), config, source.trust_remote_code)
    opened = open_shelf(
        there,
        dtype=loading.compute_dtype(settings.dtype, settings.device),
        device=settings.device,
        attention=settings.attention,
    )
    return Dense(shelf, opened, there, data, folder, found, seconds, ranks.leads)


def _transformed(
    job: Job, shelf: Shelf, data: Calibration, settings: Settings, folder: Path
) -> tuple[dict[str, Any], float]:
    """What was done, and in how many seconds, once `folder` holds the model."""
    check_vocabulary(data.ids, data.source, shelf.model)
    before = _noted(folder)
    files = prints.fingerprint(
        sorted({s.file for s in shelf.stored.values()}),
        before.get("files"),
        progress=not job.voice.quiet,
    )
    key = _key(job, data, settings, prints.content(files))
    if before.get("key") == key:
        job.voice.say(f"the transformed model of an earlier run is in {folder}")
        return before["found"], before["seconds"]
    shutil.rmtree(folder, ignore_errors=True)
    begun = time.perf_counter()
    try:
        _make_room(shelf, data, settings, folder)
        found = _make(job, shelf, data, settings, folder)
        seconds = round(time.perf_counter() - begun, 3)
        note = {"key": key, "files": files, "found": found, "seconds": seconds}
        (folder / _DONE).write_text(json.dumps(note), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"the transformed model could not be written to {folder}: {error.strerror or error}"
        ) from error
    finally:
        if not (folder / _DONE).is_file():
            shutil.rmtree(folder, ignore_errors=True)
    return found, seconds


def _noted(folder: Path) -> dict[str, Any]:
    """What a finished folder says of itself; nothing where it is not finished."""
    try:
        note: dict[str, Any] = json.loads((folder / _DONE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note


def _key(job: Job, data: Calibration, settings: Settings, files: dict[str, str]) -> dict[str, Any]:
    """What must be the same for a transformed model to be used again."""
    recipe = job.prune.recipe()
    plain = {
        "transforms": recipe["transforms"],
        "transform_settings": recipe["transform_settings"],
        "sparsity": recipe["sparsity"],
        "data": asdict(data.report()),
        "files": files,
        "dtype": settings.dtype,
        "device": settings.device.type,
        "attention": settings.attention,
        "max_shard_size": settings.max_shard_size,
        "batch_size": batch_size(job.prune, data, settings.device),
        "versions": {k: v for k, v in versions(settings.device).items() if k != "platform"},
    }
    found: dict[str, Any] = json.loads(json.dumps(plain))
    return found


def _make_room(shelf: Shelf, data: Calibration, settings: Settings, folder: Path) -> None:
    """Refuse where the disk cannot take the transformed model.

    Raises:
        CheckpointError: with the figures.
    """
    folder.mkdir(parents=True)
    most = Shards(folder, planned(shelf, layout(shelf, settings.dtype), untied=True), 2**62).bytes
    need, free = most + hidden_bytes(shelf, data.ids.numel()), shutil.disk_usage(folder).free
    if need > free:
        raise CheckpointError(
            f"{folder} needs {size(need)} for the transformed model while the run lasts, and its disk has "
            f"{size(free)} free; make room, choose another disk, or do without (--transform none)"
        )


def _make(
    job: Job, shelf: Shelf, data: Calibration, settings: Settings, folder: Path
) -> dict[str, Any]:
    """See, decide and write; returns what was done."""
    _, pattern = job.prune.built()
    layers = layout(shelf, settings.dtype)
    dtypes = _by_name(shelf, layers)
    batches = list(data.batches(batch_size(job.prune, data, settings.device)))
    walker = Walker(shelf.model, shelf.layers, batches, shelf.device)
    with (
        evaluating(shelf.model),
        random_state(shelf.model),
        Bar(0, "transforming", enabled=not job.voice.quiet) as bar,
        torch.no_grad(),
    ):
        chosen = list(transforms.steps(job.prune.transformations()))
        bar.expect(len(shelf.layers) * (1 + len(chosen) * len(batches)))
        check_walk(shelf, walker, bar.step)
        on_shelf = OnShelf(shelf, dtypes, settings.budget, folder)
        done = apply(
            on_shelf, walker, job.prune.transformations(), pattern, job.voice.say, bar.step
        )
        tensors = planned(shelf, layers, untied=on_shelf.untied())
        shards = Shards(folder, tensors, settings.max_shard_size)
        shards.create()
        on_shelf.write(shards)
    for left in folder.glob("hidden*.bin"):
        left.unlink()
    kinds: Counter[torch.dtype] = Counter()
    for entry in shards.places.values():
        if entry.dtype.is_floating_point:
            kinds[entry.dtype] += entry.bytes
    write_side_files(shelf.model, None, folder, kinds.most_common(1)[0][0])
    return done


def _by_name(shelf: Shelf, layers: Sequence[Planned]) -> dict[str, torch.dtype]:
    """The dtype that each parameter is written in, of those that come from several tensors that of one."""
    known = {key for block in (None, *range(len(shelf.layers))) for key in shelf.keys(block)}
    return {shelf.target(key): dtype for key, dtype, _ in layers if key in known}
