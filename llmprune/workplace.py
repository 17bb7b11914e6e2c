"""Where a run keeps what it has finished: its journal and its output files, beside the target."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmprune.calibration import Calibration
from llmprune.checkpoint import fingerprint as prints
from llmprune.checkpoint.journal import Journal
from llmprune.checkpoint.shards import Shards
from llmprune.checkpoint.shelf import Shelf
from llmprune.checkpoint.target import size, unfinished
from llmprune.errors import CheckpointError
from llmprune.memory import Budget
from llmprune.provenance import versions
from llmprune.run import PruneConfig, default_batch


@dataclass(frozen=True)
class Settings:
    """What decides how a run is done, beside the recipe.

    Attributes:
        dtype: to compute in, as typed.
        device: that computes.
        attention: backend of transformers, as typed.
        max_shard_size: bytes of the largest output file.
        budget: memory that may be used.
    """

    dtype: str
    device: torch.device
    attention: str | None
    max_shard_size: int
    budget: Budget


@dataclass(frozen=True)
class Workplace:
    """An unfinished run.

    Attributes:
        journal: what is finished.
        shards: the output files.
    """

    journal: Journal
    shards: Shards

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.journal.folder

    @property
    def checkpoint(self) -> Path:
        """The folder inside it that becomes the target."""
        return self.shards.folder

    def abandon(self) -> None:
        """Leave a run that did not finish: nothing stays of one that has no finished block."""
        if any(name.startswith("block") for name in self.journal.steps):
            self.journal.close()
        else:
            self.journal.discard()


def open_workplace(
    target: Path,
    shelf: Shelf,
    config: PruneConfig,
    data: Calibration | None,
    settings: Settings,
    *,
    restart: bool,
    say: Callable[[str], None],
    progress: bool,
) -> Workplace:
    """Open the folder in which the run to `target` keeps what it has finished, or begin one.

    Raises:
        ConfigError: when there is an unfinished run of something else.
        CheckpointError: when there is no room for the result, or another process is at work.
    """
    folder = unfinished(target)
    try:
        header = _header(folder, shelf, config, data, settings, progress)
        journal = Journal(folder, header, restart)
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error.strerror or error}") from error
    done = sum(name.startswith("block") for name in journal.steps)
    if journal.resumed:
        say(f"taking up the unfinished run in {folder} ({done} blocks finished)")
    shards = Shards(folder / "checkpoint", layout(shelf, settings.dtype), settings.max_shard_size)
    work = Workplace(journal, shards)
    try:
        shards.create()
    except OSError as error:
        work.abandon()
        free = shutil.disk_usage(target.resolve().parent).free
        raise CheckpointError(
            f"{target} needs {size(shards.bytes)} and some more for hidden states, its disk has "
            f"{size(free)} free ({error.strerror}); make room or choose another disk"
        ) from error
    return work


def layout(shelf: Shelf, dtype: str) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Key, dtype and shape of everything the output holds, in the order of the blocks.

    Weights keep the dtype they are stored in, or have `dtype`, that is computed in, where it is narrower.
    """
    asked = getattr(torch, dtype, None)
    order: dict[str, int] = {}
    for index in range(len(shelf.layers)):
        order.update(dict.fromkeys(shelf.keys(index), index))
    found = []
    for key, stored in sorted(shelf.saved().items(), key=lambda entry: order.get(entry[0], -1)):
        keep = stored.dtype
        if isinstance(asked, torch.dtype) and keep.is_floating_point:
            keep = min(keep, asked, key=lambda d: d.itemsize)
        found.append((key, keep, stored.shape))
    return found


def _header(
    folder: Path,
    shelf: Shelf,
    config: PruneConfig,
    data: Calibration | None,
    settings: Settings,
    progress: bool,
) -> dict[str, Any]:
    """What must be the same for a run to be taken up; under `aside` what may differ."""
    paths = sorted({stored.file for stored in shelf.stored.values()})
    known = Journal.header(folder).get("aside", {}).get("files")
    found = prints.fingerprint(paths, known, progress=progress)
    text = json.dumps(shelf.model.config.to_dict(), sort_keys=True, default=str)
    return {
        "recipe": config.recipe(),
        "data": asdict(data.report()) if data else None,
        "model": {
            "config": hashlib.sha256(text.encode()).hexdigest(),
            "files": prints.content(found),
        },
        "settings": {
            "dtype": settings.dtype,
            "device": settings.device.type,
            "attention": settings.attention,
            "max_shard_size": settings.max_shard_size,
            "batch_size": batch_size(config, data, settings.device),
        },
        "versions": {k: v for k, v in versions(settings.device).items() if k != "platform"},
        "aside": {"files": found, "begun": time.time()},
    }


def batch_size(config: PruneConfig, data: Calibration | None, device: torch.device) -> int:
    """Windows at once; 1 where there are none."""
    if data is None:
        return 1
    return config.batch_size or default_batch(device, data.ids.shape[1])
