"""A level for each matrix, near the share that was wanted, with a total that is exact to the weight.

Every matrix takes the level nearest to its share. What rounding leaves of the total is spent on single
matrices: first, as by the largest remainder, the cheapest steps that bring the sum nearer, then, by dynamic
programming over a few steps of a few matrices of each size, those that end at it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np

from llmprune.allocation.levels import Shape, Step, count, steps
from llmprune.pattern import Level, Pattern, Unstructured

FREE = 12  # matrices of each size of step that the last search may move
STATES = 2**26  # sums, over all of those, that it may hold; beyond, sizes have too little in common


def exact(
    base: Pattern, shapes: Mapping[str, Shape], shares: Mapping[str, float], levels: Sequence[Level]
) -> dict[str, Level] | None:
    """A level for each matrix, near the wanted share, that together remove what `base` everywhere would.

    Near means: the least sum over weights of the squared distance to the share that was wanted, as far as
    the two searches see. Where sizes have too little in common for that, shares are drawn together.

    Args:
        base: what uniform would give every matrix, its comparison group decided.
        shapes: [out, in] of each matrix, each of which `base` fits.
        shares: how much of each is to go, 0 to 1, of any total: they are moved by one number.
        levels: those of an n:m run.

    Returns:
        The levels; None where nothing but `base` for all is found.
    """
    total = sum(count(base, shape) for shape in shapes.values())
    aimed = centred(shares, shapes, total, _bounds(base, levels))
    for blend in (1.0, 0.75, 0.5, 0.25):
        even = {name: count(base, shape) / (shape[0] * shape[1]) for name, shape in shapes.items()}
        mixed = {n: blend * aimed[n] + (1 - blend) * even[n] for n in shapes}
        found = _rounded(base, shapes, mixed, levels, total)
        if found and any(count(found[n], s) != count(base, s) for n, s in shapes.items()):
            return found
    return None


def _bounds(base: Pattern, levels: Sequence[Level]) -> tuple[float, float]:
    """The least and the greatest share that a level can have."""
    if isinstance(base, Unstructured):
        return 0.0, 1.0
    shares = [0.0 if level is None else level.sparsity for level in levels]
    return min(shares), max(shares)


def centred(
    shares: Mapping[str, float],
    shapes: Mapping[str, Shape],
    total: int,
    bounds: tuple[float, float],
) -> dict[str, float]:
    """`shares` moved by one number, and cut off at `bounds`, so that together they remove `total` weights."""
    sizes = np.array([shapes[name][0] * shapes[name][1] for name in shapes], dtype=np.float64)
    wanted = np.array([shares[name] for name in shapes], dtype=np.float64)
    low, high = -2.0, 2.0
    for _ in range(80):
        middle = (low + high) / 2
        less = float(sizes @ np.clip(wanted + middle, *bounds)) < total
        low, high = (middle, high) if less else (low, middle)
    return dict(zip(shapes, np.clip(wanted + high, *bounds).tolist(), strict=True))


@dataclass
class _Choice:
    """The steps of one matrix and which of them is chosen."""

    steps: list[Step]
    wanted: float
    size: int
    at: int

    @property
    def removed(self) -> int:
        return self.steps[self.at].removed

    def cost(self, at: int) -> float:
        """Weights times the squared distance of shares."""
        return (self.steps[at].removed - self.wanted) ** 2 / self.size


def _rounded(
    base: Pattern,
    shapes: Mapping[str, Shape],
    shares: Mapping[str, float],
    levels: Sequence[Level],
    total: int,
) -> dict[str, Level] | None:
    """The nearest levels whose counts are `total`, or None where none are found."""
    choices = {}
    for name, shape in shapes.items():
        size = shape[0] * shape[1]
        some = steps(base, shape, shares[name] * size, levels)
        choice = _Choice(some, shares[name] * size, size, 0)
        choice.at = min(range(len(some)), key=choice.cost)
        choices[name] = choice
    _move(list(choices.values()), total)
    if not _settle(list(choices.values()), total):
        return None
    return {name: choice.steps[choice.at].level for name, choice in choices.items()}


def _move(choices: Sequence[_Choice], total: int) -> None:
    """Largest remainder: the cheapest single steps, as long as they bring the sum nearer to `total`."""
    left = total - sum(choice.removed for choice in choices)
    way = 1 if left > 0 else -1
    queue = [entry for i, c in enumerate(choices) if (entry := _next(c, i, way))]
    heapify(queue)
    while left and queue:
        _, i = heappop(queue)
        choice = choices[i]
        gain = choice.steps[choice.at + way].removed - choice.removed
        if abs(gain) > abs(left):
            continue  # what is left only shrinks
        choice.at += way
        left -= gain
        if entry := _next(choice, i, way):
            heappush(queue, entry)


def _next(choice: _Choice, index: int, way: int) -> tuple[float, int] | None:
    """What the next step of a matrix costs for each weight, with its index; None at the end."""
    to = choice.at + way
    if not 0 <= to < len(choice.steps):
        return None
    gain = abs(choice.steps[to].removed - choice.removed)
    return (choice.cost(to) - choice.cost(choice.at)) / gain, index


def _settle(choices: Sequence[_Choice], total: int) -> bool:
    """Make the sum `total` by the cheapest steps of a few matrices; False where none do."""
    left = total - sum(choice.removed for choice in choices)
    if left == 0:
        return True
    free = _free(choices)
    moves = [[s.removed - c.removed for s in c.steps] for c in free]
    unit = math.gcd(*(abs(m) for some in moves for m in some))
    if unit == 0 or left % unit:
        return False
    reach = abs(left) + 2 * max(abs(m) for some in moves for m in some)
    width = reach // unit
    if (2 * width + 1) * len(free) > STATES:
        return False
    costs = np.full(2 * width + 1, np.inf)
    costs[width] = 0
    picked = []
    for choice, some in zip(free, moves, strict=True):
        best, at = np.full_like(costs, np.inf), np.zeros(len(costs), dtype=np.int16)
        for i, move in enumerate(some):
            d = move // unit
            if abs(d) > width:
                continue
            there = np.full_like(costs, np.inf)
            there[max(0, d) : len(costs) + min(0, d)] = costs[max(0, -d) : len(costs) - max(0, d)]
            there += choice.cost(i) - choice.cost(choice.at)
            better = there < best
            best[better], at[better] = there[better], i
        costs = best
        picked.append(at)
    state = width + left // unit
    if not np.isfinite(costs[state]):
        return False
    for choice, some, at in zip(free[::-1], moves[::-1], picked[::-1], strict=True):
        choice.at = int(at[state])
        state -= some[choice.at] // unit
    return True


def _free(choices: Sequence[_Choice]) -> list[_Choice]:
    """The matrices that the last search may move: of each kind the few whose next step costs least."""
    kinds: dict[tuple[int, ...], list[_Choice]] = {}
    for choice in choices:
        kind = tuple(s.removed - choice.removed for s in choice.steps)
        kinds.setdefault((choice.size, *sorted({abs(k) for k in kind})), []).append(choice)
    found = []
    for some in kinds.values():
        found += sorted(some, key=lambda c: c.cost(c.at), reverse=True)[:FREE]
    return found
