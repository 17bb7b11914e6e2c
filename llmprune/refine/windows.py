"""Single windows of streams that are kept in batches, numbered through all processes of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llmprune.parallel import ALONE, Ranks
from llmprune.walk import HiddenStates


class Windows:
    """The calibration windows of a run, of which this process has some.

    Attributes:
        batches: token ids of this process, each [batch, seqlen] int64.
        axis: of hidden states, along which windows lie.
        count: windows of all processes.
    """

    def __init__(self, batches: Sequence[Tensor], ranks: Ranks = ALONE, axis: int = 0) -> None:
        self.batches = batches
        self.axis = axis
        self._places = [(b, row) for b, ids in enumerate(batches) for row in range(len(ids))]
        counts = ranks.gather(len(self._places))
        self.count = sum(counts)
        self._first = sum(counts[: ranks.rank])

    def own(self, chosen: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """Which of the windows `chosen` this process has, as batch and row, a batch's worth at a time."""
        last = self._first + len(self._places)
        mine = [self._places[n - self._first] for n in chosen if self._first <= n < last]
        step = max(map(len, self.batches))
        yield from (mine[i : i + step] for i in range(0, len(mine), step))

    def ids(self, places: Sequence[tuple[int, int]]) -> Tensor:
        """Token ids [windows, seqlen] int64."""
        return torch.stack([self.batches[b][row] for b, row in places])

    def states(self, stream: HiddenStates, places: Sequence[tuple[int, int]]) -> Tensor | None:
        """What `stream` holds of these windows, [windows, seqlen, width], or with `axis` 1 the first two
        the other way round; None before the first block.
        """
        whole = {b: stream[b] for b in {b for b, _ in places}}
        rows = [
            None if (batch := whole[b]) is None else batch.select(self.axis, row)
            for b, row in places
        ]
        found = [row for row in rows if row is not None]
        return torch.stack(found, self.axis) if found else None
