"""What was measured: microseconds of a kernel, of expanding and of the dense product, by GPU and matrix.

A file holds rows, one for each number of tokens of a matrix; what a row holds, `Matrix` and `Timing` say.
Files lie in the folder `measured` beside this one, and in the user's cache, a file for each matrix, so that
processes that write at once do not meet. What the cache says goes before what is shipped.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

FORMAT = 1
FAIR = 0.98  # of the dense product's speed: below is slower than dense, above is what a measurement is off by
MOST = 64  # tokens up to which a layer may not be slower than dense, unless the user says otherwise
SETTING = "LLMPRUNE_TOKENS"  # environment variable: how many instead
SHIPPED = Path(__file__).with_name("measured")


@dataclass(frozen=True)
class Matrix:
    """A matrix that a kernel multiplies by, on a GPU."""

    gpu: str  # as the driver calls it
    capability: str  # "9.0"
    kernel: str  # "nm_gemv 4:8"
    revision: int  # of that kernel's code
    pattern: str  # "4:8"
    rows: int  # outputs
    columns: int  # inputs
    dtype: str  # "bfloat16"

    def __str__(self) -> str:
        """Without the GPU."""
        return f"{self.kernel} {self.rows} x {self.columns} {self.dtype}"


@dataclass(frozen=True)
class Timing:
    """Microseconds of a product with so many tokens."""

    tokens: int
    kernel_us: float | None  # at best, a piece at a time; None where there are too many
    warps: int | None  # what was best for it; None is its default
    split: int | None
    expand_us: float
    dense_us: float

    @property
    def best(self) -> float:
        """By the kernel or by expanding, whichever is quicker."""
        return self.expand_us if self.kernel_us is None else min(self.kernel_us, self.expand_us)

    @property
    def by_kernel(self) -> bool:
        """Whether the kernel is no slower than expanding."""
        return self.kernel_us is not None and self.kernel_us <= self.expand_us

    @property
    def gain(self) -> float:
        """How many times as fast as the dense product."""
        return self.dense_us / self.best


@dataclass
class Table:
    """All that was measured; `str` of it is for people."""

    timings: dict[Matrix, dict[int, Timing]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, matrix: Matrix, timings: Iterable[Timing]) -> None:
        """Take measurements in, in place of earlier ones of the matrix."""
        self.timings[matrix] = {t.tokens: t for t in sorted(timings, key=lambda t: t.tokens)}

    def at(self, matrix: Matrix, tokens: int) -> Timing | None:
        """What was measured for so many tokens, or else for the next more."""
        known = self.timings.get(matrix)
        if not known:
            return None
        counts = list(known)
        i = bisect_left(counts, tokens)
        return known[counts[i]] if i < len(counts) else None

    def slow(self, matrix: Matrix) -> Timing | None:
        """The worst of what is slower than dense, of up to `most` tokens; None if nothing is."""
        few = [t for t in self.timings.get(matrix, {}).values() if t.tokens <= most()]
        worst = min(few, key=lambda t: t.gain, default=None)
        return worst if worst is not None and worst.gain < FAIR else None

    def __str__(self) -> str:
        """A line for each number of tokens, losses among them, and what a layer is then held in."""
        lines = list[str]()
        for gpu in dict.fromkeys(matrix.gpu for matrix in self.timings):
            lines.append(
                f"{gpu}: microseconds, cold L2; gain is dense / the better of kernel and expand"
            )
            for matrix, timings in self.timings.items():
                if matrix.gpu == gpu:
                    lines += ["", *_lines(matrix, timings.values(), self.slow(matrix))]
        return "\n".join([*lines, *self.notes])


def _lines(matrix: Matrix, timings: Iterable[Timing], slow: Timing | None) -> Iterable[str]:
    verdict = "used" if slow is None else f"dense instead: slower at {counted(slow.tokens)}"
    yield f"{matrix}: {verdict}"
    yield f"{'tokens':>8} {'kernel':>9} {'expand':>9} {'dense':>9} {'gain':>6}  warps, split"
    for t in timings:
        kernel = "-" if t.kernel_us is None else f"{t.kernel_us:.1f}"
        launch = "" if t.kernel_us is None else f"  {t.warps or 'default'}, {t.split or 'default'}"
        yield f"{t.tokens:>8} {kernel:>9} {t.expand_us:>9.1f} {t.dense_us:>9.1f} {t.gain:>6.2f}{launch}"


def most() -> int:
    """Tokens up to which a layer may not be slower than dense: `MOST`, or what LLMPRUNE_TOKENS says.

    Raises:
        ValueError: when that says no number from 1 on.
    """
    said = os.environ.get(SETTING) or str(MOST)
    if not re.fullmatch("[1-9][0-9]{0,8}", said):
        raise ValueError(f"{SETTING} is {said!r}; give a number of tokens, such as {MOST}")
    return int(said)


def cache_folder() -> Path:
    """$LLMPRUNE_CACHE, $XDG_CACHE_HOME/llmprune or ~/.cache/llmprune, and there `kernels`."""
    if own := os.environ.get("LLMPRUNE_CACHE"):
        return Path(own) / "kernels"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "llmprune" / "kernels"


@cache
def current() -> Table:
    """The table of this process, read when it is first asked for."""
    table = Table()
    for folder in (SHIPPED, cache_folder()):
        for path in sorted(folder.glob("*.json")):
            try:
                found = read(path)
            except (OSError, ValueError, RecursionError) as error:
                tell(f"{path} is left out: {error}")
                continue
            for matrix, timings in found.timings.items():
                table.add(matrix, timings.values())
    return table


def keep(matrix: Matrix, timings: Iterable[Timing]) -> None:
    """Take measurements into the table of this process and the user's cache, if that can be written."""
    current().add(matrix, timings)
    own = Table({matrix: current().timings[matrix]})
    named = re.sub(r"[^\w.]+", "-", f"{matrix.gpu} {matrix} r{matrix.revision}")
    told_apart = sha256(repr(matrix).encode()).hexdigest()[:8]
    try:
        write(own, cache_folder() / f"{named}-{told_apart}.json")
    except OSError as error:
        tell(f"measurements are not kept: {error}")


def write(table: Table, path: Path) -> None:
    """As a file that is there whole or not at all, whoever reads or writes meanwhile."""
    rows = [asdict(matrix) | asdict(t) for matrix, ts in table.timings.items() for t in ts.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"format": FORMAT, "rows": rows}, file, indent=1)
            file.write("\n")
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read(path: Path) -> Table:
    """The table of a file.

    Raises:
        OSError: when it cannot be read.
        ValueError: when it is not such a file, in one line.
    """
    found = json.loads(path.read_text(encoding="utf-8"))  # what is no JSON is a ValueError
    if not isinstance(found, dict) or not isinstance(found.get("rows"), list):
        raise ValueError("no table of measurements")
    if found.get("format") != FORMAT:
        raise ValueError(f"format {found.get('format')!r}, this version reads {FORMAT}")
    timings: dict[Matrix, list[Timing]] = {}
    for row in found["rows"]:
        matrix, timing = _row(row)
        timings.setdefault(matrix, []).append(timing)
    table = Table()
    for matrix, of_it in timings.items():
        table.add(matrix, of_it)
    return table


_FIELDS = {f.name: f.type for of in (Matrix, Timing) for f in fields(of)}
_OF_MATRIX = {f.name for f in fields(Matrix)}


def _row(row: Any) -> tuple[Matrix, Timing]:
    """A row of a file, once each field is what it has to be."""
    if not isinstance(row, dict) or row.keys() != _FIELDS.keys():
        raise ValueError(f"a row has not the fields {', '.join(_FIELDS)}")
    for name, kind in _FIELDS.items():
        value = row[name]
        if not _is(value, str(kind)):
            raise ValueError(f"{name} is {str(value)[:40]!r}, which is no {kind}")
    if row["warps"] not in (None, 1, 2, 4, 8, 16, 32):
        raise ValueError(f"warps is {row['warps']}, which is no power of two up to 32")
    own = {name: row[name] for name in _OF_MATRIX}
    return Matrix(**own), Timing(**{k: v for k, v in row.items() if k not in own})


def _is(value: Any, kind: str) -> bool:
    """Whether a value of a file is a text, a count from 1 on, or microseconds above 0."""
    if value is None:
        return kind.endswith("| None")
    if kind == "str":
        return isinstance(value, str) and value.isprintable() and len(value) <= 200
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    whole = kind.startswith("int")
    return 0 < value < math.inf and (isinstance(value, int) if whole else True)


def counted(tokens: int) -> str:
    """So many tokens, in words."""
    return "1 token" if tokens == 1 else f"{tokens} tokens"


def tell(line: str) -> None:
    """One line for the user, on stderr."""
    print(f"llmprune: {line}", file=sys.stderr, flush=True)
