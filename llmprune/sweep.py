"""Through the blocks from the first to the last: observe, prune, pass the pruned outputs on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.model import Matrix
from llmprune.observe import Observer
from llmprune.parallel import ALONE, Ranks
from llmprune.prune_matrix import Done, Task, alike, prune_matrices, prune_matrix
from llmprune.refine.repair import repair_block
from llmprune.report import LayerReport, RepairReport
from llmprune.rounds import of_statistics, rounds
from llmprune.share import prune_shared
from llmprune.walk import HiddenStates, Walker

ROUNDED = ("quantize", "rounding")  # notes of a matrix that are on how it was rounded
Progress = Callable[[int, int, str], None]
"""Called with (block, blocks, what is being done), for a progress bar."""


@torch.no_grad()
def prune_blocks(
    walker: Walker,
    matrices: Sequence[Matrix],
    task: Task,
    progress: Progress,
    repaired: Callable[[RepairReport], None] = lambda report: None,
) -> Iterator[tuple[Matrix, LayerReport, Tensor]]:
    """Prune `matrices` in place, block by block, yielding each with its report and keep mask.

    The outputs of each pruned block are what the next block is calibrated on. `repaired` is told of each
    block that was repaired.
    """
    hidden: list[Tensor | None] = [None] * len(walker.batches)
    dense: list[Tensor | None] = [None] * len(walker.batches)
    last = max((m.block for m in matrices if m.block is not None), default=-1)
    outside = [m for m in matrices if m.block is None]
    depth = len(walker.layers) if outside else last + 1
    for index in range(depth):
        here = [m for m in matrices if m.block == index]
        tell = partial(progress, index, depth)
        if task.repair is not None:
            pass_on(walker, index, dense, tell)
        with ExitStack() as later:  # the last corrections are made also when the caller stops early
            found = prune_block(walker, index, here, hidden, task, tell)
            if task.repair is not None and here:
                own, metric = list(found), task.metric(index)
                parts, report = repair_block(
                    walker, index, own, hidden, dense, task.repair, tell, metric=metric
                )
                repaired(report)
                found = iter(round_block(walker, index, parts, hidden, task, tell))
            for done in found:
                later.callback(done.settle)
                yield done.matrix, done.report, done.keep
            if walker.passes_on and (index + 1 < depth or outside):
                pass_on(walker, index, hidden, tell)
    for done in prune_outside(walker, outside, hidden, task, partial(progress, depth, depth)):
        done.settle()
        yield done.matrix, done.report, done.keep


Tell = Callable[[str], None]
"""Called with what is being done in the current block."""


def prune_block(
    walker: Walker,
    index: int,
    here: Sequence[Matrix],
    hidden: HiddenStates,
    task: Task,
    tell: Tell,
    ranks: Ranks = ALONE,
) -> Iterator[Done]:
    """Observe block `index` on all batches, then prune the matrices `here` of it.

    In several rounds where the statistics do not fit into `task.room`. With several
    `ranks`, `walker` has the batches of this one.
    """
    if not here:
        return
    parted = task.room is not None and of_statistics(here, task.method) > task.room
    order = _order(walker, index, here, hidden, ranks) if parted else here
    for some in rounds(order, task.method, task.room if parted else None):
        observer = _observer(walker, task, ranks)
        with observer.watching(some):
            for b in range(len(walker.batches)):
                tell(f"observing {b + 1}/{len(walker.batches)}")
                observer.next_batch()
                walker.run(index, b, hidden[b])
        yield from _prune_observed(observer, some, task, tell)


def round_block(
    walker: Walker,
    index: int,
    done: Sequence[Done],
    hidden: HiddenStates,
    task: Task,
    tell: Tell,
    ranks: Ranks = ALONE,
) -> list[Done]:
    """Round what a repair has left of the matrices of block `index`, in place, if `task.rounding` says so.

    Statistics are those of the repaired block. Masks stay as decided, also where a weight is now zero.
    """
    if task.rounding is None:
        return list(done)
    here = [each.matrix for each in done if each.report.skipped is None]
    again = replace(task, method=task.rounding, repair=None, fisher=None)
    notes = {
        each.matrix.name: {k: v for k, v in each.report.notes.items() if k in ROUNDED}
        for each in prune_block(walker, index, here, hidden, again, tell, ranks)
    }
    return [
        replace(
            d, report=replace(d.report, notes={**d.report.notes, **notes.get(d.matrix.name, {})})
        )
        for d in done
    ]


def _order(
    walker: Walker, index: int, here: Sequence[Matrix], hidden: HiddenStates, ranks: Ranks
) -> list[Matrix]:
    """`here` in the order in which block `index` uses them; what it does not use comes first.

    For all `ranks` it is that of the first, whose windows may reach other experts than theirs.
    """
    used: dict[int, int] = {}

    def note(module: nn.Module, args: Any) -> None:
        used.setdefault(id(module), len(used))

    with ExitStack() as handles:
        for module in {id(m.module): m.module for m in here}.values():
            handles.callback(module.register_forward_pre_hook(note).remove)
        for b in range(len(walker.batches)):
            walker.run(index, b, hidden[b])
            if len(used) == len({id(m.module) for m in here}):
                break
    order: list[int] = ranks.tell([used.get(id(m.module), -1) for m in here])
    return [here[i] for i in sorted(range(len(here)), key=order.__getitem__)]


def pass_on(walker: Walker, index: int, hidden: HiddenStates, tell: Tell) -> None:
    """Replace the inputs of block `index` by its outputs."""
    for b in range(len(walker.batches)):
        tell(f"passing on {b + 1}/{len(walker.batches)}")
        hidden[b] = walker.run(index, b, hidden[b])


def prune_outside(
    walker: Walker,
    outside: Sequence[Matrix],
    hidden: HiddenStates,
    task: Task,
    tell: Tell,
    ranks: Ranks = ALONE,
) -> Iterator[Done]:
    """Prune the matrices `outside` of the blocks, on what the last block gives."""
    if not outside:
        return
    if task.rounding is not None:  # nothing repairs these, so they are rounded as they are pruned
        task = replace(task, method=replace(task.rounding, inner=task.method))
    observer = _observer(walker, task, ranks)
    with observer.watching(outside):
        for b in range(len(walker.batches)):
            observer.next_batch()
            walker.rest(b, hidden[b])
    yield from _prune_observed(observer, outside, task, tell)


def _observer(walker: Walker, task: Task, ranks: Ranks) -> Observer:
    """What collects the statistics that `task` needs."""
    tokens = sum(ids.numel() for ids in walker.batches)
    device, flood = walker.device, task.all_experts
    return Observer(task.method, tokens, device, flood, wide=task.wide, ranks=ranks)


def _prune_observed(
    observer: Observer, here: Sequence[Matrix], task: Task, tell: Tell
) -> Iterator[Done]:
    """Prune the matrices of one block once their inputs are known."""
    observer.merge(here)
    unreached = observer.unreached(here)
    if observer.ranks.world > 1:
        for done in prune_shared(list(observer.handed_out()), task, observer.ranks):
            tell(done.matrix.name)
            yield done
    for seen in observer.handed_out():
        seen.ready()
        results = prune_matrices(seen.readers, seen.stats, seen.sample, task)
        for some in alike(seen.readers, task).values():
            for matrix in some:
                tell(matrix.name)
                yield next(results)
    for matrix in unreached:
        tell(matrix.name)
        yield prune_matrix(matrix, task.method.stats.empty(0, observer.device), None, task)
