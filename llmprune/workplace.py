"""Where a run keeps what it has finished: its journal and its output files, beside the target."""

from __future__ import annotations

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
from llmprune.checkpoint.journal import Followed, Journal, clear_finished
from llmprune.checkpoint.shards import Shards
from llmprune.checkpoint.shelf import Shelf
from llmprune.checkpoint.target import put_in_place, resolve, size, unfinished
from llmprune.checkpoint.target import settle as settle_target
from llmprune.errors import CheckpointError
from llmprune.generate import windows
from llmprune.memory import Budget, default_batch
from llmprune.parallel import ALONE, Ranks
from llmprune.provenance import versions
from llmprune.run import PruneConfig

SEARCH = "search"
"""Folder inside a run's, in which a search keeps what it has found (llmprune/allocation/searching.py)."""
FISHER = "fisher"
"""Folder inside a run's, with what was measured of each block (llmprune/informed.py)."""
PACKED = "packed"
"""Folder inside a run's, in which a result in the sparse format is put together."""
_PACKED_DONE = "packed.done"  # there while that folder is complete, or has become the target


@dataclass(frozen=True)
class Settings:
    """What decides how a run is done, beside the recipe.

    Attributes:
        dtype: to compute in, as typed.
        device: that computes.
        attention: backend of transformers, as typed.
        max_shard_size: bytes of the largest output file.
        budget: memory that may be used.
        ranks: the processes that share the work.
    """

    dtype: str
    device: torch.device
    attention: str | None
    max_shard_size: int
    budget: Budget
    ranks: Ranks = ALONE


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

    def close(self) -> None:
        """End a run: nothing stays of one that has finished nothing, or whose result is in its place."""
        begun = (
            bool({"allocation", "fisher", "generate"} & set(self.journal.steps))
            or (self.folder / SEARCH).is_dir()
        )
        if self.checkpoint.is_dir() and (self.blocks or begun):
            self.journal.close()
        else:
            self.journal.discard()

    def put_in_place(self, target: Path, overwrite: bool, *, packed: bool) -> None:
        """Rename the finished checkpoint to `target`, or the packed one, and then the dense one goes.

        Raises:
            OSError: when that cannot be done.
        """
        if not packed:
            put_in_place(self.checkpoint, target, overwrite)
            return
        (self.folder / _PACKED_DONE).touch()
        put_in_place(self.folder / PACKED, target, overwrite)
        shutil.rmtree(self.checkpoint)

    @property
    def blocks(self) -> int:
        """How many blocks are finished."""
        return sum(name.startswith("block") for name in self.journal.steps)


def open_workplace(
    target: Path,
    shelf: Shelf,
    config: PruneConfig,
    data: Calibration | None,
    settings: Settings,
    *,
    packed: int = 0,
    measured: tuple[int, int] = (0, 0),
    restart: bool,
    say: Callable[[str], None],
    progress: bool,
) -> Workplace:
    """Open the folder in which the run to `target` keeps what it has finished, or begin one.

    `data` is what was read. `packed` is what a result in the sparse format will take of the disk beside the
    dense one, `measured` what Fisher information takes while it is measured, and from then on.

    Raises:
        ConfigError: when there is an unfinished run of something else.
        CheckpointError: when there is no room for the result, or another process is at work.
    """
    folder, ranks = unfinished(target), settings.ranks
    shards = Shards(folder / "checkpoint", layout(shelf, settings.dtype), settings.max_shard_size)
    if not ranks.leads:
        steps = ranks.tell(None)
        folder.mkdir(parents=True, exist_ok=True)  # on a machine of its own it is not there yet
        return Workplace(Followed(folder, steps), shards)
    try:
        header = _header(folder, shelf, config, data, settings, progress)
        journal = Journal(folder, header, restart)
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error.strerror or error}") from error
    work = Workplace(journal, shards)
    try:
        for line in journal.damaged:
            say(
                f"line {line} of {folder / 'journal.jsonl'} is damaged: what it tells of is done again"
            )
        if journal.resumed:
            say(f"taking up the unfinished run in {folder} ({work.blocks} blocks finished)")
        hidden = hidden_bytes(shelf, tokens_of(config, data), 2 if config.repair else 1)
        first, stays = measured
        first = 0 if FISHER in journal.steps else first  # the name of that step too
        _make_room(work, target, max(hidden, first) + stays, packed)
        ranks.tell(journal.steps)
    except BaseException:
        work.close()
        raise
    return work


def settle(target: Path) -> None:
    """Clear what runs to `target` have left that died in their last moments."""
    place = resolve(target)
    settle_target(place)
    folder = unfinished(target)
    in_place = not (folder / "checkpoint").exists() or (
        (folder / _PACKED_DONE).exists() and not (folder / PACKED).exists()
    )
    if place.exists() and in_place:
        clear_finished(folder)


def hidden_bytes(shelf: Shelf, tokens: int, streams: int = 1) -> int:
    """Bytes that hidden states of `tokens` need on the disk: what enters a block, and what leaves it.

    For each of the `streams`; there are two where blocks are repaired.
    """
    width = int(getattr(shelf.model.config.get_text_config(decoder=True), "hidden_size", 0))
    return 2 * streams * tokens * width * next(shelf.layers.parameters()).element_size()


def tokens_of(config: PruneConfig, data: Calibration | None) -> int:
    """Tokens of all windows of a run: those of `data`, and those that are yet to be written beside it."""
    if data is None:
        return 0
    more = 0 if data.written else windows(len(data.ids), config.generate)
    return (len(data.ids) + more) * data.ids.shape[1]


def _make_room(work: Workplace, target: Path, hidden: int, packed: int) -> None:
    """Take the room for the output, once it is known that there is enough for all that lies beside it.

    Raises:
        CheckpointError: with the figures.
    """
    folder, shards = work.folder, work.shards
    (folder / _PACKED_DONE).unlink(missing_ok=True)
    for (
        path
    ) in folder.iterdir():  # of a run that was killed: temporary folders, a half-made generation
        if path.is_dir() and path not in (shards.folder, folder / SEARCH, folder / FISHER):
            shutil.rmtree(path)
    free = shutil.disk_usage(folder).free
    files = (p for p in folder.rglob("*") if p.is_file() and p.parent != folder / SEARCH)
    here = sum(p.stat().st_blocks * 512 for p in files)
    need, error = shards.bytes + hidden + packed, None
    if need <= free + here:
        try:
            shards.create()
            return
        except OSError as failed:
            error = failed
    why = f" ({error.strerror})" if error else ""
    raise CheckpointError(
        f"{target} needs {size(need - here)} ({size(hidden)} for hidden states while it is made"
        f"{f', {size(packed)} to pack it' if packed else ''}), and its "
        f"disk has {size(free)} free{why}; make room or choose another disk"
    ) from error


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
    plain = json.loads(json.dumps(shelf.model.config.to_dict(), default=str))
    return {
        "recipe": config.recipe(),
        "data": asdict(data.report()) if data else None,
        "model": {
            "config": {k: v for k, v in plain.items() if k != "_name_or_path"},
            "files": prints.content(found),
        },
        "settings": {
            "dtype": settings.dtype,
            "device": settings.device.type,
            "attention": settings.attention,
            "max_shard_size": settings.max_shard_size,
            "batch_size": batch_size(config, data, settings.device),
            "processes": settings.ranks.world,
        },
        "versions": {k: v for k, v in versions(settings.device).items() if k != "platform"},
        "aside": {"files": found, "begun": time.time()},
    }


def batch_size(config: PruneConfig, data: Calibration | None, device: torch.device) -> int:
    """Windows at once; 1 where there are none."""
    if data is None:
        return 1
    return config.batch_size or default_batch(device, data.ids.shape[1])


def measured_at_once(config: PruneConfig) -> int | None:
    """Tokens whose gradients are taken at once for Fisher information; None where nothing asks for it."""
    data, settings = config.calibration, config.weighing()
    if settings is None or not isinstance(data, Calibration):
        return None
    seqlen = data.ids.shape[1]
    return settings.together(seqlen) * seqlen


def repaired_at_once(config: PruneConfig, device: torch.device) -> int | None:
    """Tokens that a block under repair sees at once; None where blocks are not repaired."""
    data = config.calibration
    if not config.repair or not isinstance(data, Calibration):
        return None
    return batch_size(config, data, device) * data.ids.shape[1]
