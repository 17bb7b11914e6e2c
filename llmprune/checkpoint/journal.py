"""What a run has done so far, line by line, each on the disk before the next step begins.

The first line says what is run: recipe, model, data, versions. Every further line is one finished step
with checksums of what it left in the files. A line that was cut off by a crash is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
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
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], restart: bool) -> None:
        """Open or begin the journal in `folder` for a run that is `header`.

        Raises:
            ConfigError: when the folder holds another run, with the first difference.
            CheckpointError: when another process is at work there.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(folder)
        path = folder / _NAME
        lines = _lines(path)
        self.resumed = bool(lines) and not restart
        if self.resumed and (found := _difference(lines[0], header)):
            self._lock.close()
            raise ConfigError(
                f"{folder} holds an unfinished run with another {found}; give the same again to go on, "
                "or --restart to discard it"
            )
        if not lines or restart:
            _clear(folder)
            lines = [dict(header)]
            self._begin(path, lines[0])
        else:  # drop what a crash cut off, so that the next line begins a line
            _replace(path, lines)
        self.steps: dict[str, dict[str, Any]] = {str(s["step"]): s for s in lines[1:]}

    @staticmethod
    def header(folder: Path) -> dict[str, Any]:
        """The first line of the journal in `folder`, empty where there is none."""
        lines = _lines(folder / _NAME)
        return lines[0] if lines else {}

    def _begin(self, path: Path, header: dict[str, Any]) -> None:
        _replace(path, [header])

    def add(self, step: str, content: Mapping[str, Any]) -> None:
        """Note a finished step, durably."""
        entry = {"step": step, **content}
        with (self.folder / _NAME).open("ab") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())
        self.steps[step] = entry

    def discard(self) -> None:
        """Remove the run's folder: its result is elsewhere."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let another process have the folder."""
        self._lock.close()


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
    text = json.dumps(entry, sort_keys=True, allow_nan=False)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:16]} {text}\n".encode()


def _lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line, up to the first that is not."""
    found: list[dict[str, Any]] = []
    if not path.is_file():
        return found
    for raw in path.read_bytes().split(b"\n"):
        checksum, _, text = raw.partition(b" ")
        if not text or hashlib.sha256(text).hexdigest()[:16].encode() != checksum:
            break
        found.append(json.loads(text))
    return found


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


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first entry that differs, as `sparsity: 0.5 then, 0.6 now`, or None.

    What stands under `aside` is not compared.
    """
    old, new = (_flat({k: v for k, v in e.items() if k != "aside"}) for e in (before, now))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            name = re.sub(r"^(recipe|settings)\.", "", key)
            return f"{name}: {old.get(key, 'nothing')} then, {new.get(key, 'nothing')} now"
    return None


def _flat(entry: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(entry, Mapping) and entry:
        return {
            k: v
            for key, value in entry.items()
            for k, v in _flat(value, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    plain: dict[str, Any] = {prefix: json.loads(json.dumps(entry))}
    return plain
