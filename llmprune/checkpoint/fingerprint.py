"""What the files of a model are, so that a run is not taken up again with another one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llmprune.progress import Bar

_BLOB = re.compile(r"[0-9a-f]{64}")  # the Hub's cache names a large file by its sha256


def fingerprint(
    paths: Sequence[Path], known: Mapping[str, Any] | None = None, *, progress: bool = False
) -> dict[str, Any]:
    """sha256 of every file by name, with what tells that it has not been touched since.

    Args:
        paths: the files.
        known: what this function gave earlier; a file with the same size and time is not read again.
        progress: show a bar after two seconds.
    """
    found: dict[str, Any] = {}
    with (
        ThreadPoolExecutor(4) as pool,
        Bar(len(paths), "reading the model", unit="file", enabled=progress) as bar,
    ):
        entries = pool.map(lambda path: _entry(path, (known or {}).get(path.name)), paths)
        for i, (path, entry) in enumerate(zip(paths, entries, strict=True)):
            bar.step(i, len(paths), path.name)
            found[path.name] = entry
    return found


def content(found: Mapping[str, Any]) -> dict[str, str]:
    """Only what the files hold, of what `fingerprint` gave."""
    return {name: str(entry["sha256"]) for name, entry in found.items()}


def _entry(path: Path, known: Mapping[str, Any] | None) -> dict[str, Any]:
    real = path.resolve()
    stat = real.stat()
    seen = {"size": stat.st_size, "time": stat.st_mtime_ns, "change": stat.st_ctime_ns}
    if known is not None and {k: known.get(k) for k in seen} == seen:
        return {**seen, "sha256": known["sha256"]}
    if _BLOB.fullmatch(real.name):
        return {**seen, "sha256": real.name}
    return {**seen, "sha256": digest(real)}


def digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
