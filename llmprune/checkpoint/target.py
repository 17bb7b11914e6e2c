"""Where a checkpoint goes: looked at before the work starts, then put in place by one rename.

A folder that is being written is called `.NAME.partial-HOST-PID` and stands next to the target, so
that the last step is a rename. `.NAME.old-HOST-PID` is the folder that an overwrite has moved away.
What a process that died has left of either is settled by the next save to the same target.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmprune.errors import CheckpointError, ConfigError


def check_target(
    target: Path, overwrite: bool, bytes_needed: int, source: str | Path | None = None
) -> None:
    """Everything about the target that can be known before a weight is touched.

    Args:
        target: the folder that is to hold the checkpoint.
        overwrite: whether a checkpoint that is there already may be replaced.
        bytes_needed: size of the checkpoint on disk; while it is written the old one stays.
        source: folder or Hub id of the model that is pruned.

    Raises:
        ConfigError: when the target exists, is no checkpoint, or holds the source model.
        CheckpointError: when nothing can be written there, or too little room is left.
    """
    place = resolve(target)
    if source is not None and (origin := Path(source)).exists():
        inside = Path(os.path.realpath(origin))
        if place in (inside, *inside.parents):
            raise ConfigError(f"{target} holds the model that is pruned; choose another folder")
    check_free(target, overwrite)
    parent = _nearest(place)
    if not parent.is_dir():
        raise ConfigError(f"{target} cannot be created: {parent} is a file; choose another folder")
    try:
        with tempfile.NamedTemporaryFile(dir=parent, prefix=_beside(place, "partial").name):
            pass
    except OSError as error:
        raise CheckpointError(
            f"cannot write beside {target}, in {parent}: {error.strerror}; choose another folder"
        ) from error
    free = shutil.disk_usage(parent).free
    if free < bytes_needed:
        raise CheckpointError(
            f"{target} needs {size(bytes_needed)}, {parent} has {size(free)} free; "
            "make room or choose another disk"
        )


def check_free(target: Path, overwrite: bool) -> None:
    """Whether `target` is free, or a checkpoint that may be replaced.

    Raises:
        ConfigError: when it is neither.
    """
    place = resolve(target)
    if not place.exists():
        return
    if not place.is_dir():
        raise ConfigError(f"{target} is a file; name a folder")
    if not overwrite:
        raise ConfigError(f"{target} exists; choose another folder, or --overwrite to replace it")
    if os.path.ismount(place):
        raise ConfigError(
            f"{target} is a mount point and cannot be replaced; name a folder inside it"
        )
    if any(place.iterdir()) and not _is_checkpoint(place):
        raise ConfigError(
            f"{target} is not empty and holds no checkpoint (no config.json of a model, no "
            "llmprune.json), so --overwrite leaves it alone; choose another folder"
        )


@contextmanager
def staged(target: Path, overwrite: bool) -> Iterator[Path]:
    """An empty folder beside `target` that takes its place when the body ends well.

    Whatever ends the body otherwise, KeyboardInterrupt included, removes the folder and leaves
    `target` as it was.

    Raises:
        ConfigError: when `target` is not free.
        OSError: when the folder cannot be made, flushed to disk or renamed.
    """
    place = resolve(target)
    settle(place)
    check_free(target, overwrite)
    missing = [p for p in place.parents if not p.exists()]
    staging = _beside(place, "partial")
    try:
        staging.mkdir(parents=True)
        yield staging
        put_in_place(staging, target, overwrite)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):
            for parent in missing:  # nearest first; one that is not empty ends it
                parent.rmdir()
        raise


def put_in_place(folder: Path, target: Path, overwrite: bool) -> None:
    """Flush a finished `folder` and rename it to `target`; at every moment one of the two is whole.

    Raises:
        OSError: when that cannot be done.
    """
    place = resolve(target)
    _flush(folder)
    _promote(folder, place, overwrite)
    _flush_one(place.parent)


def unfinished(target: Path) -> Path:
    """The folder beside `target` in which a run to it keeps what it has finished."""
    place = resolve(target)
    return place.parent / f".{place.name}.unfinished"


def resolve(target: Path) -> Path:
    """`target` without links, so that what stands beside it is on the same disk."""
    return Path(os.path.realpath(target.expanduser()))


def size(count: float) -> str:
    """A number of bytes as people read it: `15.2 GB`, in powers of ten as disks are sold."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a model's: any program may call its settings config.json."""
    if (folder / "llmprune.json").is_file():
        return True
    try:
        text = (folder / "config.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return '"model_type"' in text or '"architectures"' in text


def _nearest(place: Path) -> Path:
    """The nearest parent of `place` that exists."""
    return next(p for p in place.parents if p.exists())


def _beside(place: Path, kind: str) -> Path:
    return place.parent / f".{place.name}.{kind}-{socket.gethostname()}-{os.getpid()}"


def _promote(staging: Path, place: Path, overwrite: bool) -> None:
    """Put `staging` where `place` is; at every moment one of the two is whole."""
    if not (overwrite and place.exists()):
        staging.rename(place)  # refused by the system if a folder with content has come in between
        return
    old = _beside(place, "old")
    try:
        place.rename(old)
        staging.rename(place)
    except BaseException:
        if old.exists() and not place.exists():
            old.rename(place)
        raise
    finally:
        if place.exists():
            shutil.rmtree(old, ignore_errors=True)


def settle(place: Path) -> None:
    """Clear what dead processes left: half-written folders go, a moved-away original comes back."""
    if not place.parent.is_dir():
        return
    ours = re.compile(rf"\.{re.escape(place.name)}\.(partial|old)-(.+)-(\d+)")
    for folder in sorted(place.parent.iterdir()):
        name = ours.fullmatch(folder.name)
        if not name or name[2] != socket.gethostname() or _alive(int(name[3])):
            continue
        if name[1] == "old" and not place.exists():
            folder.rename(place)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    """Whether another process `pid` runs on this machine; True where that cannot be asked."""
    if pid == os.getpid():
        return False  # one save at a time: what bears our number is from an earlier holder of it
    if os.name != "posix":
        return True  # os.kill would end the process there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flush(folder: Path) -> None:
    """Wait until everything in `folder` is on the disk."""
    for path in sorted(folder.rglob("*")):
        _flush_one(path)
    _flush_one(folder)


def _flush_one(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
