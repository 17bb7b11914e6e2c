"""The levels that a matrix can hold exactly.

A level is a pattern, or None for a matrix that stays dense. The counts of a pattern are those of its
comparison groups: within rows a matrix of [out, in] loses a multiple of `out`, within the matrix any number,
within columns what a share makes of whole and last column block, under n:m what n leaves. So every group of
a matrix holds its count exactly, and what rounding leaves of the total is spent on single matrices
(llmprune/allocation/exact.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmprune.errors import ConfigError
from llmprune.pattern import DENSE, NM, Level, Pattern, Unstructured, parse

Shape = tuple[int, int]

REACH = 3  # steps to either side of a wanted count that are looked at
FREE = 12  # matrices of each size of step that the last search may move
STATES = (
    2**22
)  # sums that the last search may hold; where sizes have so little in common, it gives up


@dataclass(frozen=True)
class Step:
    """One level of one matrix, and how many of its weights that removes."""

    removed: int
    level: Level


def count(level: Level, shape: Shape) -> int:
    """How many weights of a matrix [out, in] a level removes."""
    out, features = shape
    if level is None:
        return 0
    if isinstance(level, NM):
        return out * (features // level.m) * (level.m - level.n)
    match level.within or "row":
        case "row":
            return out * level.removed(features)
        case "matrix":
            return level.removed(out * features)
        case "columns":
            blocks, last = divmod(features, level.width)
            return blocks * level.removed(out * level.width) + level.removed(out * last)


def offered(text: str, base: Pattern) -> list[Level]:
    """The levels of an n:m run, the densest first: those named in `text`, or all of the same m.

    Args:
        text: `2:4,4:8,dense`; empty for n = 1 to m of the base's m, of 2m where the base is 1:m, which
            nothing of the same m is sparser than. The base is always among them.
        base: the pattern asked for; for a share there is no list, every share is a level.

    Raises:
        ConfigError: for a level that is no n:m, or a list for a share.
    """
    if isinstance(base, Unstructured):
        if text:
            raise ConfigError(
                f"levels={text} are for n:m; a share such as {base} takes every share as a level"
            )
        return []
    named = [part.strip() for part in text.split(",") if part.strip()]
    found: list[Level] = [base]
    if not named:
        m = base.m if base.n > 1 else 2 * base.m
        found += [None, *(NM(n, m) for n in range(1, m))]
    for part in named:
        level = None if part == DENSE else parse(part)
        if isinstance(level, Unstructured):
            raise ConfigError(
                f"levels of {base} are n:m or dense, such as 2:4,4:8,dense; got {part!r}"
            )
        found.append(level)
    return sorted(dict.fromkeys(found), key=_order)


def _order(level: Level) -> tuple[float, int]:
    """Densest first; of equal shares the wider group, which is the less strict one, first."""
    return (0.0, 0) if level is None else (level.sparsity, -getattr(level, "m", 0))


def steps(base: Pattern, shape: Shape, wanted: float, levels: Sequence[Level]) -> list[Step]:
    """What a matrix [out, in] can hold near `wanted` removed weights, in order, the base's count among them.

    Of levels that remove as many, such as 2:4 and 4:8, the base is taken, else the wider group.

    `levels` are those of an n:m run, `offered`.
    """
    if isinstance(base, NM):
        some = [Step(count(v, shape), v) for v in levels if v is None or v.fits(shape[1])]
    else:
        some = _near(base, shape, wanted)
    found = {step.removed: step for step in reversed([Step(count(base, shape), base), *some])}
    return [found[removed] for removed in sorted(found)]


def _near(base: Unstructured, shape: Shape, wanted: float) -> list[Step]:
    """Counts next to `wanted`, each with a share in the middle of those that give it."""
    out, features = shape
    groups, size = _groups(base, shape)
    last = features - groups * size // out if base.within == "columns" else 0
    middle = math.floor(wanted / (groups + out * last / size))
    found = []
    for k in range(max(0, middle - REACH), min(size - 1, middle + REACH) + 1):
        found += _steps_at(base, k, groups, size, out * last)
    return found


def _groups(base: Unstructured, shape: Shape) -> tuple[int, int]:
    """How many whole comparison groups of how many weights; a narrow matrix is one column block."""
    out, features = shape
    if base.within == "matrix":
        return 1, out * features
    if base.within == "columns":
        width = min(base.width, features)
        return features // width, out * width
    return out, features


def _steps_at(base: Unstructured, k: int, groups: int, size: int, last: int) -> list[Step]:
    """Every step that takes `k` of each whole group of `size`; `last` is the size of a narrower one."""
    low, high = k / size, (k + 1) / size
    if not last:
        return [Step(groups * k, replace(base, sparsity=(low + high) / 2))]
    found = []
    for few in range(k * last // size, -(-(k + 1) * last // size)):
        middle = (max(low, few / last) + min(high, (few + 1) / last)) / 2
        step = Step(groups * k + few, replace(base, sparsity=middle))
        found.append(step)
    return found
