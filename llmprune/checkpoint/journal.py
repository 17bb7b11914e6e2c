"""What a run has done so far, line by line, each on the disk before the next step begins.

The first line says what is run: recipe, model, data, versions. Every further line is one finished step
with checksums of what it left in the files. A line that was cut off by a crash is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmprune.errors import CheckpointError, ConfigError

_NAME = "journal.jsonl"


class Journal:
    """The lines of one run.

    Attributes:
        folder: where the run keeps its files.
        steps: every finished step by name; a step redone later replaces the earlier one.
        resumed: whether an earlier run began it.
        damaged: numbers of the lines that could not be read, from 1; a last one that was cut off is none.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], restart: bool) -> None:
        """Open or begin the journal in `folder` for a run that is `header`.

        Raises:
            ConfigError: when the folder holds another run, with the first difference.
            CheckpointError: when another process is at work there.
        """
        self.folder = folder
        self._made = [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(folder)
        try:
            self._open(header, restart)
        except BaseException:
            if self._made:  # nothing was here before
                self.discard()
            self.close()
            raise

    def _open(self, header: Mapping[str, Any], restart: bool) -> None:
        lines, self.damaged = _lines(self.folder / _NAME)
        self.resumed = bool(lines) and "step" not in lines[0] and not restart
        if self.resumed and (found := difference(lines[0], header)):
            raise ConfigError(
                f"{self.folder} holds an unfinished run, and {found}; give the same command as then "
                "to go on with it, or --restart to discard it"
            )
        if not self.resumed:
            _clear(self.folder)
            lines = [dict(header)]
        self._header = lines[0]
        self.steps: dict[str, dict[str, Any]] = {str(s["step"]): s for s in lines[1:]}
        self._rewrite()  # without what a crash cut off, so that the next line begins a line

    @staticmethod
    def header(folder: Path) -> dict[str, Any]:
        """The first line of the journal in `folder`, empty where there is none."""
        lines, _ = _lines(folder / _NAME)
        return lines[0] if lines else {}

    def _rewrite(self) -> None:
        _replace(self.folder / _NAME, [self._header, *self.steps.values()])

    def forget(self, steps: Collection[str]) -> None:
        """Take back, durably, that `steps` are finished."""
        if known := [step for step in steps if step in self.steps]:
            for step in known:
                del self.steps[step]
            self._rewrite()

    def add(self, step: str, content: Mapping[str, Any]) -> None:
        """Note a finished step, durably."""
        entry = {"step": step, **content}
        with (self.folder / _NAME).open("ab") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())
        self.steps[step] = entry

    def discard(self) -> None:
        """Remove the run's folder, with the folders made for it that are empty: its result is elsewhere."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            for parent in self._made[1:]:  # nearest first; one that is not empty ends it
                parent.rmdir()

    def close(self) -> None:
        """Let another process have the folder."""
        self._lock.close()


class Followed(Journal):
    """What a process knows of a journal that another process of its run keeps."""

    def __init__(self, folder: Path, steps: Mapping[str, dict[str, Any]]) -> None:
        self.folder = folder
        self.steps = dict(steps)

    def add(self, step: str, content: Mapping[str, Any]) -> None:
        """Note a finished step, here."""
        self.steps[step] = {"step": step, **content}

    def forget(self, steps: Collection[str]) -> None:
        """Take back that `steps` are finished, here."""
        for step in steps:
            self.steps.pop(step, None)

    def discard(self) -> None:
        """Nothing: the other process does it."""

    def close(self) -> None:
        """Nothing: the other process does it."""


def _locked(folder: Path) -> Any:
    """An open file that only one process can hold."""
    file = (folder / "lock").open("a")
    if os.name != "posix":
        return file
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise CheckpointError(
            f"another process is at work in {folder}; wait for it, or save somewhere else"
        ) from None
    return file


def _line(entry: Mapping[str, Any]) -> bytes:
    """One line: a checksum, a space, JSON."""
    text = json.dumps(entry, sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:16]} {text}\n".encode()


def _lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Every whole line, and the numbers of those that are not; one that was cut off at the end is neither."""
    found: list[dict[str, Any]] = []
    damaged: list[int] = []
    whole = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    for number, raw in enumerate(whole, 1):
        checksum, _, text = raw.partition(b" ")
        if text and hashlib.sha256(text).hexdigest()[:16].encode() == checksum:
            found.append(json.loads(text))
        else:
            damaged.append(number)
    return found, damaged


def clear_finished(folder: Path) -> None:
    """Remove what a run has left that died between putting its result in place and removing `folder`."""
    if folder.is_dir():
        with suppress(CheckpointError), _locked(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _replace(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write the journal anew, in one step."""
    beside = path.with_suffix(".new")
    with beside.open("wb") as file:
        file.writelines(_line(entry) for entry in lines)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    handle = os.open(path.parent, os.O_RDONLY) if os.name == "posix" else None
    if handle is not None:
        os.fsync(handle)
        os.close(handle)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name == "lock":
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first entry that differs, in words (`sparsity was 0.5 then and is 0.6 now`), or None.

    What a person has typed comes before what follows from it, and checksums come last. What stands under
    `aside` is not compared.
    """
    old, new = (_flat({k: v for k, v in e.items() if k != "aside"}) for e in (before, now))
    for key in sorted(old.keys() | new.keys(), key=_rank):
        if old.get(key) != new.get(key):
            if key == _TOKENS:
                return "the calibration text is not what it was then"
            if key.startswith(_FILES):
                return f"the weights in {key.removeprefix(_FILES)} are not what they were then"
            name = key.partition(".")[2]
            return f"{name} was {_short(old.get(key))} then and is {_short(new.get(key))} now"
    return None


_ORDER = ("recipe", "data", "settings", "model", "versions")
_TOKENS, _FILES = "data.fingerprint", "model.files."


def _rank(key: str) -> tuple[int, bool, str]:
    section = key.partition(".")[0]
    place = _ORDER.index(section) if section in _ORDER else len(_ORDER)
    return place, key == _TOKENS or key.startswith(_FILES), key


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _flat(entry: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(entry, Mapping) and entry:
        return {
            k: v
            for key, value in entry.items()
            for k, v in _flat(value, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    plain: dict[str, Any] = {prefix: json.loads(json.dumps(entry))}
    return plain
