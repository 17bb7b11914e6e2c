"""The levels that a search may give each unit, and how many weights each of them removes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmprune.allocation.levels import Shape, count, offered, steps
from llmprune.allocation.search import Search
from llmprune.errors import ConfigError
from llmprune.model import Matrix
from llmprune.pattern import Level, Pattern, Unstructured


@dataclass(frozen=True)
class Unit:
    """A block or a matrix.

    Attributes:
        name: for people.
        matrices: that get one level.
        rungs: by number, the level of each matrix; the sparsest last.
        base: number of the one that was asked for.
    """

    name: str
    matrices: list[Matrix]
    rungs: list[dict[str, Level]]
    base: int

    @property
    def counts(self) -> list[int]:
        """How many weights each rung removes."""
        return [sum(count(rung[m.name], m.shape) for m in self.matrices) for rung in self.rungs]


def units(search: Search, chosen: Sequence[Matrix], base: Pattern) -> list[Unit]:
    """What a search shares out over: the matrices of blocks that `base` fits.

    Raises:
        ConfigError: where there are no two levels, or no two units.
    """
    groups: dict[str, list[Matrix]] = {}
    for m in chosen:
        if m.block is not None and base.fits(m.shape[1]):
            key = m.name if search.grain == "matrix" else f"block {m.block}"
            groups.setdefault(key, []).append(m)
    steps_of = _steps(search, {m.name: m.shape for some in groups.values() for m in some}, base)
    found = []
    for name, some in groups.items():
        rungs = _rungs(search, some, base, steps_of)
        own: dict[str, Level] = {m.name: base for m in some}
        found.append(Unit(name, some, rungs, rungs.index(own)))
    if len(found) < 2 or all(len(unit.rungs) == 1 for unit in found):
        raise ConfigError(
            f"search has nothing to exchange: {len(found)} of grain {search.grain} under {base}; use "
            "--allocation-set grain=matrix, another step or levels, or --allocation uniform"
        )
    return found


def _rungs(
    search: Search, some: Sequence[Matrix], base: Pattern, steps_of: Mapping[str, int]
) -> list[dict[str, Level]]:
    """Levels that every matrix of a unit can hold, the densest first."""
    if not isinstance(base, Unstructured):
        levels = offered(search.levels, base)
        fit = [v for v in levels if v is None or all(v.fits(m.shape[1]) for m in some)]
        return [{m.name: level for m in some} for level in fit]
    found: list[dict[str, Level]] = []
    for rung in range(-search.reach, search.reach + 1):
        own = {m.name: _at(base, m.shape, rung * steps_of[m.name]) if rung else base for m in some}
        if all(level is not None for level in own.values()):
            found.append(own)
    return found


def _at(base: Unstructured, shape: Shape, more: int) -> Level:
    """The level that removes `more` weights of a matrix than `base`; None where no share does."""
    wanted = count(base, shape) + more
    return next((s.level for s in steps(base, shape, wanted, []) if s.removed == wanted), None)


def _steps(search: Search, shapes: Mapping[str, Shape], base: Pattern) -> dict[str, int]:
    """Weights between two levels of each matrix: the same share of all where rows allow that."""
    side = 1 if isinstance(base, Unstructured) and base.within == "row" else 0
    lengths = {name: shape[side] for name, shape in shapes.items()}
    common = math.gcd(*lengths.values())
    taken = round(search.step * common)
    even = taken > 0 and abs(taken / common - search.step) <= search.step / 2
    found = {}
    for name, shape in shapes.items():
        length = lengths[name]
        own = taken * (length // common) if even else max(1, round(search.step * length))
        found[name] = own * (shape[1 - side])
    return found
