"""Evolution over levels whose counts add up to one number: it knows no model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

Genes = tuple[int, ...]
"""The level of each unit, an index into its counts."""
Judge = Callable[[Genes, Sequence[int]], float]
"""(levels, numbers of the batches to judge on) -> how far from the best; lower is better."""

TRIES = 200  # to balance one switch
PARTNERS = 8  # units that may balance one switch
SWITCHES = 3  # of a child at most; fewer are likelier, as in the paper
SURVIVORS = 4  # of so many, one goes on to the next selection


@dataclass(frozen=True)
class State:
    """Where a search is.

    Attributes:
        generation: how many are done.
        genes: the best levels so far.
        score: of those, on the batches of the last selection.
        seconds: spent so far.
        judged: how many candidates were judged, one on several selections counted for each.
    """

    generation: int
    genes: Genes
    score: float
    seconds: float
    judged: int


def switched(genes: Genes, counts: Sequence[Sequence[int]], draw: Random) -> Genes | None:
    """`genes` with one unit a level up or down, and others the other way until counts add up as before.

    None where no such switch is found.
    """
    for _ in range(TRIES):
        new = list(genes)
        free = list(range(len(genes)))
        draw.shuffle(free)
        first = free.pop()
        way = draw.choice((-1, 1))
        if not 0 <= new[first] + way < len(counts[first]):
            continue
        new[first] += way
        left = counts[first][new[first]] - counts[first][genes[first]]
        for unit in free:
            to = new[unit] - (way if left * way > 0 else -way)
            if left == 0 or sum(a != b for a, b in zip(new, genes, strict=True)) > PARTNERS:
                break
            if not 0 <= to < len(counts[unit]):
                continue
            change = counts[unit][to] - counts[unit][new[unit]]
            if abs(change) <= abs(left) and change * left < 0:
                new[unit], left = to, left + change
        if left == 0:
            return tuple(new)
    return None


def children(
    parent: Genes, counts: Sequence[Sequence[int]], number: int, draw: Random
) -> list[Genes]:
    """Up to `number` different candidates near `parent`."""
    found: dict[Genes, None] = {}
    for _ in range(4 * number):
        child: Genes | None = parent
        for _ in range(min(draw.randint(1, SWITCHES), draw.randint(1, SWITCHES))):
            child = switched(child, counts, draw) if child is not None else None
        if child is not None and child != parent:
            found[child] = None
        if len(found) == number:
            break
    return list(found)


def evolved(
    state: State,
    counts: Sequence[Sequence[int]],
    judge: Judge,
    stages: Sequence[int],
    batches: int,
    number: int,
    draw: Random,
) -> State:
    """One generation: children, selections on growing numbers of `batches`; a better parent stays."""
    some = children(state.genes, counts, number, draw)
    judged = 0
    for stage in stages[:-1]:
        on = draw.sample(range(batches), stage)
        scores = {child: judge(child, on) for child in some}
        judged += len(some)
        some = sorted(some, key=scores.__getitem__)[: math.ceil(len(some) / SURVIVORS)]
    finals = [(judge(child, range(stages[-1])), child) for child in some]
    score, genes = min([(state.score, state.genes), *finals])
    return State(
        state.generation + 1, genes, score, state.seconds, state.judged + judged + len(finals)
    )
