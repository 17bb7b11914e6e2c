"""The search on a model in memory: prune every unit to every level, then let candidates compete.

The model is pruned uniformly on the way, block by block, as any run does it, and each block to all its
levels on what the blocks before give then. All of that lies on disk, with a journal: a search that was
ended, however hard, goes on behind its last block or generation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from llmprune import methods
from llmprune.allocation.database import Database
from llmprune.allocation.evolution import Genes, State, evolved
from llmprune.allocation.ladder import Unit, units
from llmprune.allocation.search import Search
from llmprune.checkpoint.journal import Journal
from llmprune.errors import ConfigError
from llmprune.model import Matrix
from llmprune.observe import Observer
from llmprune.pattern import Level
from llmprune.prune_matrix import Task, alike, prune_matrices
from llmprune.walk import Walker

Progress = Callable[[int, int, str], None]
CHUNK_VALUES = 2**24  # logits compared at a time: 64 MiB in float32


@dataclass
class Searching:
    """One search.

    Attributes:
        search: its settings.
        chosen: the matrices to be pruned.
        walker: over the model, which is dense, in memory and in eval mode.
        task: of the run.
        folder: for what it keeps; its journal says what is there.
        progress: told of every step.
    """

    search: Search
    chosen: Sequence[Matrix]
    walker: Walker
    task: Task
    folder: Path
    progress: Progress

    def __post_init__(self) -> None:
        if not self.walker.passes_on:
            raise ConfigError(
                f"{type(self.walker.model).__name__} keeps state outside its blocks, and search has to run "
                "them one by one; use --allocation owl or alphapruning"
            )
        by = self.search.by
        method = methods.build(by) if by else self.task.method
        pattern = self.task.pattern
        self._task = replace(self.task, method=method, repair=None)
        self.units = units(self.search, self.chosen, pattern)
        self._number = {m.name: i for i, m in enumerate(self.chosen)}
        self.database = Database(self.folder)

    @cached_property
    def _places(self) -> dict[str, tuple[int, Unit]]:
        return {m.name: (i, unit) for i, unit in enumerate(self.units) for m in unit.matrices}

    @property
    def steps(self) -> int:
        """How often `progress` is told something, where nothing is known yet."""
        batches, (_, pool) = len(self.walker.batches), self._selections()
        last = max(m.block for m in self.chosen if m.block is not None)
        rungs = sum(len(unit.rungs) * len(unit.matrices) for unit in self.units)
        return len(pool) + (2 * last + 1) * batches + rungs + self.search.generations

    @torch.no_grad()
    def run(self) -> tuple[dict[str, Level], dict[str, Any]]:
        """The levels of all units, and what was found; the model is dense again afterwards.

        Raises:
            ConfigError: for windows that are too few.
        """
        begun = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        journal = Journal(self.folder, {"recipe": self.search.settings()}, restart=False)
        mine = [m for unit in self.units for m in unit.matrices]
        try:
            stages, pool = self._selections()
            dense = self._through(pool)
            self._prune_all(journal)
            judge = self._judge(pool, dense)
            state = self._evolve(journal, judge, stages, len(pool), begun)
        finally:
            for m in mine:
                if (self.folder / f"{self._number[m.name]:06d}.dense").exists():
                    m.write(self.database.dense(self._number[m.name], m.weight))
            journal.close()
        levels = {
            n: v
            for u, g in zip(self.units, state.genes, strict=True)
            for n, v in u.rungs[g].items()
        }
        return levels, self._found(journal, state)

    def _found(self, journal: Journal, state: State) -> dict[str, Any]:
        return {
            "name": self.search.name,
            "paper": self.search.paper,
            "kl_uniform": journal.steps["generation 0"]["score"],
            "kl_found": state.score,
            "generations": state.generation,
            "judged": state.judged,
            "units": {
                unit.name: g - unit.base for unit, g in zip(self.units, state.genes, strict=True)
            },
        }

    def _selections(self) -> tuple[list[int], list[int]]:
        """How many batches each selection takes, and which there are: those of the last come first."""
        batches = self.walker.batches
        tokens = [ids.numel() for ids in batches]
        each = max(tokens)
        sizes = [min(len(batches), max(1, round(t / each))) for t in self.search.stages()]
        draw = Random(self.search.seed)
        pool = draw.sample(range(len(batches)), min(len(batches), 4 * sizes[-1]))
        return sizes, pool

    def _through(self, pool: Sequence[int]) -> list[Tensor]:
        """What the last block of the dense model gives for each batch of the pool."""
        found = []
        for b in pool:
            self.progress(0, 1, "running the dense model")
            hidden: Tensor | None = None
            for index in range(len(self.walker.layers)):
                hidden = self.walker.run(index, b, hidden)
            found.append(cast(Tensor, hidden))
        return found

    def _prune_all(self, journal: Journal) -> None:
        """Prune every unit to every level, on inputs that the uniformly pruned model gives."""
        hidden: list[Tensor | None] = [None] * len(self.walker.batches)
        last = max(m.block for m in self.chosen if m.block is not None)
        for index in range(last + 1):
            here = [m for m in self.chosen if m.name in self._places and m.block == index]
            if f"block {index}" not in journal.steps:
                self._prune_block(index, here, hidden)
                journal.add(f"block {index}", {})
            for m in here:
                number, (_, unit) = self._number[m.name], self._places[m.name]
                m.write(self.database.get(number, unit.base, m.weight))
            if index < last:
                for b in range(len(hidden)):
                    self.progress(index, last + 1, f"passing on {b + 1}/{len(hidden)}")
                    hidden[b] = self.walker.run(index, b, hidden[b])

    def _prune_block(
        self, index: int, here: Sequence[Matrix], hidden: Sequence[Tensor | None]
    ) -> None:
        task, walker = self._task, self.walker
        tokens = sum(ids.numel() for ids in walker.batches)
        observer = Observer(task.method, tokens, walker.device, task.all_experts, wide=task.wide)
        with observer.watching(here):
            for b in range(len(walker.batches)):
                self.progress(index, len(walker.layers), f"observing {b + 1}/{len(walker.batches)}")
                observer.next_batch()
                walker.run(index, b, hidden[b])
        unreached = observer.unreached(here)
        for seen in observer.handed_out():
            seen.ready()
            self._prune(seen.readers, seen.stats, index)
        for m in unreached:
            self._prune([m], task.method.stats.empty(0, walker.device), index)

    def _prune(self, readers: Sequence[Matrix], stats: Any, index: int) -> None:
        """Prune matrices that read one input to each of their levels; they are dense afterwards."""
        dense = {m.name: m.weight.clone() for m in readers}
        for m in readers:
            self.database.put_dense(self._number[m.name], dense[m.name])
        for rung in range(max(len(self._places[m.name][1].rungs) for m in readers)):
            some = [m for m in readers if rung < len(self._places[m.name][1].rungs)]
            levels = {m.name: self._places[m.name][1].rungs[rung][m.name] for m in some}
            self.progress(index, len(self.walker.layers), f"level {rung + 1} of {some[0].name}")
            task = replace(self._task, levels=levels)
            for group in alike(some, task).values():
                for done in prune_matrices(group, stats, None, task):
                    done.settle()
                    m = done.matrix
                    self.database.put(
                        self._number[m.name], rung, done.keep, m.weight, dense[m.name]
                    )
                    m.write(dense[m.name])

    def _judge(
        self, pool: Sequence[int], dense: Sequence[Tensor]
    ) -> Callable[[Genes, Sequence[int]], float]:
        """KL divergence of a candidate from the dense model, mean over tokens, in nats."""
        now: dict[int, int] = {i: unit.base for i, unit in enumerate(self.units)}

        def judge(genes: Genes, on: Sequence[int]) -> float:
            for i, gene in enumerate(genes):
                if now[i] != gene:
                    for m in self.units[i].matrices:
                        m.write(self.database.get(self._number[m.name], gene, m.weight))
                    now[i] = gene
            total, tokens = 0.0, 0
            for n in on:
                ids = self.walker.batches[pool[n]].to(self.walker.device)
                found = self.walker.model(input_ids=ids, use_cache=False).logits
                total += divergence(self.walker.logits(pool[n], dense[n]), found)
                tokens += ids.numel()
            return total / tokens

        return judge

    def _evolve(
        self,
        journal: Journal,
        judge: Callable[[Genes, Sequence[int]], float],
        stages: Sequence[int],
        batches: int,
        begun: float,
    ) -> State:
        """Generation by generation, each noted, until there have been enough or time is up."""
        counts = [unit.counts for unit in self.units]
        states = [s for name, s in journal.steps.items() if name.startswith("generation")]
        if states:
            state = _state(max(states, key=lambda s: int(s["generation"])))
        else:
            genes = tuple(unit.base for unit in self.units)
            state = State(0, genes, judge(genes, range(stages[-1])), 0.0, 1)
            state = replace(state, seconds=time.monotonic() - begun)
            journal.add("generation 0", asdict(state))
            begun = time.monotonic()
        limit = self.search.minutes * 60 or float("inf")
        while state.generation < self.search.generations and state.seconds < limit:
            draw = Random(f"{self.search.seed} {state.generation}")
            self.progress(0, 1, f"generation {state.generation + 1}, KL {state.score:.4f}")
            spent = state.seconds
            state = evolved(state, counts, judge, stages, batches, self.search.offspring, draw)
            state = replace(state, seconds=spent + time.monotonic() - begun)
            begun = time.monotonic()
            journal.add(f"generation {state.generation}", asdict(state))
        return state


def _state(entry: Mapping[str, Any]) -> State:
    return State(
        int(entry["generation"]), tuple(entry["genes"]), float(entry["score"]), float(entry["seconds"]),
        int(entry["judged"]),
    )  # fmt: skip


def divergence(dense: Tensor, found: Tensor) -> float:
    """Sum over tokens of KL(p_dense || p_found), for logits [batch, seqlen, vocabulary], in float32."""
    rows, vocabulary = dense.shape[0] * dense.shape[1], dense.shape[-1]
    step = max(1, CHUNK_VALUES // vocabulary)
    p, q = dense.reshape(rows, vocabulary), found.reshape(rows, vocabulary)
    total = 0.0
    for start in range(0, rows, step):
        part = slice(start, start + step)
        wanted, given = (F.log_softmax(x[part].float(), -1) for x in (p, q))
        total += float((wanted.exp() * (wanted - given)).sum(dtype=torch.float64))
    return total
