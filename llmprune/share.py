"""Several processes solve one block: rows of each matrix where the method can, whole matrices elsewhere.

The statistics of an input are summed up where they are needed. Rows are independent given those, but for
comparison groups that span rows, whose scores are brought together (`methods.base.Share`). Experts are
many and small, and each has statistics of its own: they are pruned whole, each by one process, as is
every matrix of a method that knows nothing of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmprune.fisher.weigh import Solve
from llmprune.methods.base import Method, Pruned, Share
from llmprune.methods.grid import Grid
from llmprune.observe import Observed
from llmprune.parallel import Ranks
from llmprune.pattern import Pattern
from llmprune.prune_matrix import Done, Task, prune_matrices

UNIT = 16
"""Rows are shared out in units of so many. MKL takes another way through products of less than 16 rows,
which rounds otherwise; with 16 or more every product was the same, bit for bit, as that of all rows (256
features, 32 to 2048 rows, 2 to 8 processes, one thread of an AMD EPYC)."""


def prune_shared(inputs: Sequence[Observed], task: Task, ranks: Ranks) -> Iterator[Done]:
    """Prune all matrices that read `inputs`; every rank ends with all of the weights.

    A matrix that another rank pruned whole has an empty mask.
    """
    owners = _owners(inputs, task, ranks)
    for seen, owner in zip(inputs, owners, strict=True):
        ranks.add_up(seen.sums(), owner)
        if owner is not None and owner != ranks.rank:
            _release(seen, task)
    solve = _by_rows(ranks, task.method)
    for seen, owner in zip(inputs, owners, strict=True):
        if owner is None:
            seen.ready()
            yield from prune_matrices(seen.readers, seen.stats, seen.sample, task, solve)
            _release(seen, task)
    mine: dict[int, dict[str, Done]] = {}
    for i, (seen, owner) in enumerate(zip(inputs, owners, strict=True)):
        if owner == ranks.rank:
            seen.ready()
            done = prune_matrices(seen.readers, seen.stats, seen.sample, task)
            mine[i] = {each.matrix.name: each for each in done}
            _release(seen, task)
    yield from _exchanged(inputs, owners, mine, ranks)


def _owners(inputs: Sequence[Observed], task: Task, ranks: Ranks) -> list[int | None]:
    """The rank that prunes the readers of each input, None for all ranks, each some rows.

    The heaviest goes to the rank with the least to do; what weighs is the solver, and the factor of its
    input, of a method that looks at all pairs of features.
    """
    owners: list[int | None] = [None] * len(inputs)
    load = [0] * ranks.world
    for i in sorted(range(len(inputs)), key=lambda i: -_cost(inputs[i])):
        readers = inputs[i].readers
        expert = any(m.number is not None for m in readers)
        rows = min(m.shape[0] for m in readers)
        if expert or rows < UNIT * ranks.world or not task.method.by_rows(task.pattern):
            owner = load.index(min(load))
            owners[i] = owner
            load[owner] += _cost(inputs[i])
    return owners


def _cost(seen: Observed) -> int:
    features = seen.readers[0].shape[1]
    return features**2 * (features + sum(m.shape[0] for m in seen.readers))


def _release(seen: Observed, task: Task) -> None:
    """Give the memory of an input's sums back; how many tokens it had stays known."""
    tokens = seen.stats.tokens
    seen.stats, seen.wide = task.method.stats.empty(0, torch.device("cpu")), []
    seen.stats.tokens = tokens


class _Rows(Share):
    """The own rows of a matrix among those of all ranks."""

    def __init__(self, ranks: Ranks, count: int) -> None:
        self.spans = _spans(count, ranks)
        self.ranks = ranks
        super().__init__(count, self.spans[ranks.rank])

    def whole(self, score: Tensor) -> Tensor:
        parts = []
        for rank, rows in enumerate(self.spans):
            own = rank == self.ranks.rank
            shape = len(score), rows.stop - rows.start
            parts.append(score.contiguous() if own else score.new_empty(shape))
            self.ranks.hand_out(parts[-1], rank)
        return torch.cat(parts, dim=1)


def _spans(count: int, ranks: Ranks) -> list[slice]:
    """The rows of each rank among `count`."""
    units = ranks.spans(-(-count // UNIT))
    return [slice(unit.start * UNIT, min(unit.stop * UNIT, count)) for unit in units]


def _by_rows(ranks: Ranks, method: Method[Any]) -> Solve:
    """Prune the own rows, and have those of the other ranks from them."""

    def solve(weights: Sequence[Tensor], stats: Any, pattern: Pattern) -> Iterator[Pruned]:
        shares = [_Rows(ranks, len(weight)) for weight in weights]
        own = [weight[share.own] for weight, share in zip(weights, shares, strict=True)]
        parts = method.prune_rows(own, stats, pattern, shares)
        for weight, part in zip(weights, parts, strict=True):
            yield _whole(weight, part, ranks)

    return solve


def _whole(weight: Tensor, part: Pruned, ranks: Ranks) -> Pruned:
    """A matrix like `weight` [out, in], of which each rank has pruned its rows."""
    spans = _spans(len(weight), ranks)
    own = spans[ranks.rank]
    late = [] if part.late is None else (part.late + part.late.new_tensor([own.start, 0])).tolist()
    places = [place for some in ranks.gather(late) for place in some]
    pruned = torch.empty_like(weight, memory_format=torch.contiguous_format)
    keep = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    pruned[own], keep[own] = part.weight, part.keep
    for rank, rows in enumerate(spans):
        ranks.hand_out(pruned[rows], rank)
        ranks.hand_out(keep[rows], rank)
    found = torch.tensor(places, dtype=torch.int64, device=weight.device) if places else None
    return Pruned(pruned, keep, part.notes, found, _whole_grid(part.grid, spans, ranks))


def _whole_grid(part: Grid | None, spans: Sequence[slice], ranks: Ranks) -> Grid | None:
    """The grid of a matrix, of which each rank has that of its rows."""
    if part is None:
        return None
    scale = part.scale.new_empty(spans[-1].stop, part.scale.shape[1])
    scale[spans[ranks.rank]] = part.scale
    for rank, rows in enumerate(spans):
        ranks.hand_out(scale[rows], rank)
    return replace(part, scale=scale)


def _exchanged(
    inputs: Sequence[Observed],
    owners: Sequence[int | None],
    mine: dict[int, dict[str, Done]],
    ranks: Ranks,
) -> Iterator[Done]:
    """What each rank made of its own matrices, on every rank."""
    told = ranks.gather({i: {n: _told(d) for n, d in some.items()} for i, some in mine.items()})
    known = {i: some for each in told for i, some in each.items()}
    for i, (seen, owner) in enumerate(zip(inputs, owners, strict=True)):
        for matrix in seen.readers if owner is not None else []:
            assert owner is not None
            weight = matrix.weight.contiguous()
            ranks.hand_out(weight, owner)
            if owner == ranks.rank:
                yield mine[i][matrix.name]
                continue
            matrix.write(weight)
            report, where, final = known[i][matrix.name]
            where, final = (None if t is None else t.to(weight.device) for t in (where, final))
            yield Done(matrix, report, torch.empty(0, dtype=torch.bool), where, final)


def _told(done: Done) -> tuple[Any, Tensor | None, Tensor | None]:
    where, final = (None if t is None else t.cpu() for t in (done.where, done.final))
    return done.report, where, final
