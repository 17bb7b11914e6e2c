"""What passes between two blocks of a run to disk: the outputs of the pruned ones, and of the dense ones.

The second stream is there where blocks are repaired towards it. Both are kept, and restored, alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llmprune.activations import Activations
from llmprune.memory import SLACK, Budget
from llmprune.parallel import Ranks
from llmprune.prune_matrix import Done, Task
from llmprune.refine.repair import repair_block
from llmprune.report import RepairReport
from llmprune.sweep import Tell, pass_on
from llmprune.walk import Walker


class Streams:
    """The hidden states that leave a block, for every batch of this process.

    Attributes:
        walker: makes them.
        hidden: those of the pruned blocks.
        dense: those of the dense blocks; None where nobody needs them.
        ranks: the processes that have the other batches.
    """

    def __init__(
        self, folder: Path, walker: Walker, need: int, budget: Budget, ranks: Ranks, *, dense: bool
    ) -> None:
        """In memory as far as `budget` goes, of which a block `need`s some; files are in `folder`."""
        self.walker = walker
        self.ranks = ranks
        count = 2 if dense else 1
        rooms = [(walker.device, (budget.device - need) // count)]
        if walker.device.type != "cpu":
            rooms.append((torch.device("cpu"), (budget.memory - SLACK) // count))
        own = "" if ranks.world == 1 else f"process-{ranks.rank}-"

        def stream(name: str) -> Activations:
            return Activations(folder, len(walker.batches), rooms, walker.device, f"{own}{name}")

        self.hidden = stream("hidden")
        self.dense = stream("dense") if dense else None

    def _named(self) -> dict[str, Activations]:
        both = {"hidden": self.hidden, "dense": self.dense}
        return {name: stream for name, stream in both.items() if stream is not None}

    def pass_on(self, name: str, index: int, tell: Tell) -> dict[str, Any]:
        """Let block `index` as it is replace the stream called `name`; what `restore` needs for it."""
        stream = self._named().get(name)
        if stream is None:
            return {}
        stream.begin(index)
        pass_on(self.walker, index, stream, tell)
        return {name: self.ranks.gather(stream.commit())}

    def repair(
        self, index: int, pruned: Sequence[Done], task: Task, tell: Tell
    ) -> tuple[list[Done], RepairReport]:
        """Repair block `index` towards what the dense one passed on."""
        how, metric = task.repair, task.metric(index)
        assert self.dense is not None
        assert how is not None
        hidden, dense = self.hidden, self.dense
        return repair_block(
            self.walker, index, pruned, hidden, dense, how, tell, self.ranks, metric
        )

    def restore(self, step: Mapping[str, Any]) -> str | None:
        """Take up what a finished block left; the first file that is damaged, or None."""
        for name, stream in self._named().items():
            left = step[name]
            good = self.ranks.gather(stream.restore(left[self.ranks.rank]))
            if not all(good):
                return str(left[good.index(False)]["file"])
        return None

    def forget_old(self) -> None:
        """Remove what led to a block that is finished."""
        for stream in self._named().values():
            stream.forget_old()
