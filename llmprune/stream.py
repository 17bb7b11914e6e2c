"""Prune a model that is never in memory as a whole: read a block, prune it, write it, forget it.

Every finished block is durable: its tensors lie in their place in the output files, the hidden states it
passes on lie beside them, both flushed, and the journal has a line with the checksums of all. A run
that is ended, however hard, goes on behind its last finished block, and its result is the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.checkpoint import tensors
from llmprune.checkpoint.shelf import Shelf
from llmprune.deliver import Delivery
from llmprune.lockstep import check_walk
from llmprune.memory import SLACK, Budget, of_model, of_repair, room_for_statistics
from llmprune.model import Matrix, check_weights
from llmprune.parallel import ALONE, Ranks
from llmprune.prune_matrix import Done, Task, prune_matrix
from llmprune.report import LayerReport, RepairReport
from llmprune.rounds import of_statistics
from llmprune.stopping import Stopping
from llmprune.streams import Streams
from llmprune.sweep import Tell, prune_block, prune_outside, round_block
from llmprune.walk import Walker
from llmprune.workplace import Workplace


@dataclass(frozen=True)
class Streaming:
    """One run over the blocks of a model on the shelf.

    Attributes:
        shelf: the model.
        chosen: its matrices that are to be pruned.
        task: how.
        work: where the result goes.
        batches: calibration windows of this process, each [batch, seqlen] int64; none for a method that
            needs no data.
        budget: memory that may be used.
        ranks: the processes that share the work; rank 0 writes.
        say: told what a person should know.
        progress: told of every step; see `llmprune.sweep`.
        expect: told how many more steps there will be.
    """

    shelf: Shelf
    chosen: Sequence[Matrix]
    task: Task
    work: Workplace
    batches: Sequence[Tensor]
    budget: Budget
    say: Callable[[str], None]
    progress: Callable[[int, int, str], None]
    expect: Callable[[int], None] = lambda more: None
    ranks: Ranks = ALONE

    @property
    def depth(self) -> int:
        """How many blocks have to be run."""
        if any(m.block is None for m in self.chosen):
            return len(self.shelf.layers)
        return max(m.block for m in self.chosen if m.block is not None) + 1

    @cached_property
    def _delivery(self) -> Delivery:
        return Delivery(self.shelf, self.work, self.task)

    @cached_property
    def walker(self) -> Walker | None:
        """Runs single blocks; None when there is nothing to run them on."""
        if not self.batches:
            return None
        return Walker(self.shelf.model, self.shelf.layers, self.batches, self.shelf.device)

    @torch.no_grad()
    def run(self, stopping: Stopping) -> list[LayerReport]:
        """Prune and write every chosen matrix; returns what was done, in the order of the blocks.

        Raises:
            NotByBlock: before a block is written, when blocks of this family cannot be run alone.
            LLMPruneError: a matrix that cannot be pruned, or files that do not hold what was decided.
            Stopped: when asked to stop, behind the block in hand.
            OSError: when something cannot be written.
        """
        outside = self._here(None)
        names = [*(f"block {i}" for i in range(self.depth)), *(["outside"] * bool(outside))]
        if self.ranks.leads:
            self._check_finished([*names, "copy"])
        steps = self.work.journal.steps = self.ranks.tell(self.work.journal.steps)
        streams = self._streams()
        todo = self._todo(streams)
        stopping.finished = todo[0] if todo else self.depth
        rest = outside if "outside" not in steps else []
        check = self.walker is not None and bool(todo or rest)
        self.expect(self._steps(todo, check) + len(rest))
        if self.walker is not None and check:
            check_walk(
                self.shelf, self.walker, self.progress, lambda i: check_weights(self._here(i))
            )
        if "copy" not in steps and self.ranks.leads:
            self._copy()
        for index in todo:
            with stopping.block(index):
                self._block(index, streams)
        if rest:
            self._outside(rest, streams)
        self.shelf.release_rest()
        return [LayerReport.read(entry) for name in names for entry in steps[name]["layers"]]

    def repaired(self) -> list[RepairReport]:
        """What the repairs of a finished run did, in the order of the blocks."""
        steps = [self.work.journal.steps[f"block {i}"] for i in range(self.depth)]
        return [RepairReport(**step["repair"]) for step in steps if "repair" in step]

    def _steps(self, todo: Sequence[int], check: bool) -> int:
        """How often `progress` will be told something before the matrices outside of the blocks."""
        batches = len(self.batches)
        count = len(self.shelf.layers) if check else 0
        if "copy" not in self.work.journal.steps and self.ranks.leads:
            count += len(self._copied())
        for index in todo:
            if here := len(self._here(index)):
                count += batches + here + self.ranks.leads
            count += batches * self._passes(index)
            if self.task.repair is not None:
                windows, seqlen = sum(map(len, self.batches)), self.batches[0].shape[1]
                steps = self.task.repair.steps(windows * self.ranks.world, seqlen)
                again = self.task.rounding is not None and here > 0
                count += batches + steps * bool(here) + (batches + here) * again
        return count

    def _here(self, index: int | None) -> list[Matrix]:
        return [m for m in self.chosen if m.block == index]

    def _room(self, block: nn.Module) -> int:
        """Bytes for the statistics of a block: what the process with the least has."""
        room = room_for_statistics(self.budget, block)
        if self.task.wide:  # float64 sums beside those of a batch in float32
            room //= 3
        return int(min(self.ranks.gather(room)))

    def _streams(self) -> Streams | None:
        if self.walker is None:
            return None
        need, folder = SLACK + max(map(self._need, range(self.depth))), self.work.folder
        dense = self.task.repair is not None
        return Streams(folder, self.walker, need, self.budget, self.ranks, dense=dense)

    def _need(self, index: int) -> int:
        """Bytes of a block and of what it takes to prune it."""
        block, here = self.shelf.layers[index], self._here(index)
        methods = [m for m in (self.task.method, self.task.rounding) if m is not None]
        extra = min(max(of_statistics(here, m) for m in methods), self._room(block))
        if self.task.repair is not None and here:
            extra = max(extra, of_repair(block, max(ids.numel() for ids in self.batches)))
        return of_model(block) + extra

    def _check_finished(self, steps: Sequence[str]) -> None:
        """Hold what earlier runs have written against the journal; what is damaged is forgotten."""
        journal, shards = self.work.journal, self.work.shards
        written = {name: journal.steps.get(name, {}).get("tensors", {}) for name in steps}
        self.expect(sum(map(len, written.values())))
        for name, entries in written.items():
            bad: list[str] = []
            for key, digest in entries.items():
                self.progress(0, self.depth, f"looking at finished {name}")
                if shards.digest(key) != digest:
                    bad.append(key)
            if bad:
                more = f" and {len(bad) - 1} more tensors" if bad[1:] else ""
                shard = shards.places[bad[0]].shard
                self.say(f"{shard} is damaged at {bad[0]}{more}: {name} is done again")
                journal.forget([name])

    def _todo(self, streams: Streams | None) -> list[int]:
        """The blocks that are not finished, with those that have to be run again to reach them.

        A block that is run again is written again too, with the same bits.
        """
        steps = self.work.journal.steps
        missing = [i for i in range(self.depth) if f"block {i}" not in steps]
        if streams is None:
            return missing
        if not missing:
            finished = self.depth
            if not self._here(None) or "outside" in steps:
                return []
        else:
            finished = missing[0]
        last = f"block {finished - 1}"
        whole = missing == list(range(finished, self.depth))
        if finished and whole:
            bad = streams.restore(steps[last])
            if bad is None:
                self.say(f"going on behind block {finished} of {self.depth}, finished earlier")
                return missing
            self.say(f"{bad} is damaged: all blocks are done again")
        elif len(missing) < self.depth:
            self.say("all blocks are done again, for what they pass on")
        self.work.journal.forget([f"block {i}" for i in range(self.depth)])
        return list(range(self.depth))

    def _copied(self) -> list[str]:
        """File keys that no step changes."""
        changed = {f for i in range(self.depth) if self._here(i) for f in self.shelf.keys(i)}
        if self._here(None):
            changed |= set(self._delivery.outside(self._here(None)))
        return [key for key in self.work.shards.places if key not in changed]

    def _copy(self) -> None:
        """Bring everything that no step changes into the output as it is."""
        written = {}
        for key in self._copied():
            self.progress(0, self.depth, f"copying {key}")
            stored = self.shelf.stored[key]
            written[key] = self.work.shards.write(key, tensors.pieces(stored))
        self.work.shards.flush()
        self.work.journal.add("copy", {"tensors": written})

    def _block(self, index: int, streams: Streams | None) -> None:
        """Everything that is done to one block."""
        here = self._here(index)
        tell = partial(self.progress, index, self.depth)
        self.shelf.load(index)
        check_weights(here)
        entry: dict[str, Any] = streams.pass_on("dense", index, tell) if streams else {}
        pruned = self._prune(index, here, streams, tell)
        if (
            here
            and self.walker is not None
            and streams is not None
            and self.task.repair is not None
        ):
            pruned, report = streams.repair(index, list(pruned), self.task, tell)
            entry["repair"] = asdict(report)
            task, hidden = self._task(index), streams.hidden
            pruned = round_block(self.walker, index, pruned, hidden, task, tell, self.ranks)
        # without masks, which nobody needs once the counts are known
        found = {d.matrix.name: replace(d, keep=d.keep.new_empty(0)) for d in pruned}
        done = [found[m.name] for m in here]
        entry["layers"] = [asdict(d.report) for d in done]
        if streams is not None and self._passes(index):
            entry |= streams.pass_on("hidden", index, tell)
        for each in done:
            each.settle()
        if here and self.ranks.leads:
            tell("writing")
            entry["tensors"] = self._delivery.block(index, done)
        self.shelf.release(index)
        self.work.journal.add(f"block {index}", entry)
        self.ranks.any(False)  # no process forgets what came before until rank 0 has noted this
        if streams is not None:
            streams.forget_old()

    def _task(self, index: int) -> Task:
        """What is done to a block, in the room that there is."""
        return replace(self.task, room=self._room(self.shelf.layers[index]))

    def _passes(self, index: int) -> bool:
        return index + 1 < self.depth or bool(self._here(None))

    def _prune(
        self, index: int, here: Sequence[Matrix], streams: Streams | None, tell: Tell
    ) -> Iterable[Done]:
        if streams is not None and self.walker is not None:
            task, hidden = self._task(index), streams.hidden
            yield from prune_block(self.walker, index, here, hidden, task, tell, self.ranks)
            return
        for matrix in here:
            tell(matrix.name)
            yield prune_matrix(matrix, self.task.method.stats(), None, self.task)

    def _outside(self, outside: Sequence[Matrix], streams: Streams | None) -> None:
        """Prune what is in no block, such as the output head."""
        tell = partial(self.progress, self.depth, self.depth)
        self.shelf.release_rest()
        ids = torch.cat([b.flatten() for b in self.batches]) if self.batches else None
        self.shelf.load_rest(ids, head=True)
        check_weights(outside)
        done: list[Done] = []
        if streams is not None and self.walker is not None:
            done += prune_outside(self.walker, outside, streams.hidden, self.task, tell, self.ranks)
        else:
            done += self._prune(self.depth, outside, None, tell)
        for each in done:
            each.settle()
        named = {m.parameter_name: m.parameter for m in outside}
        entry: dict[str, Any] = {"layers": [asdict(d.report) for d in done]}
        if self.ranks.leads:
            files = self._delivery.outside(outside)
            entry["tensors"] = self._delivery.write(named, set(named), files)
        self.work.journal.add("outside", entry)
