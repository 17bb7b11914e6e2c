"""SIGTERM: finish the block in hand, then stop; with none, stop at once. And output that nobody reads."""

from __future__ import annotations

import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llmprune.errors import Stopped
from llmprune.parallel import ALONE, Ranks


class Stopping:
    """Whether the process was asked to stop, and how far it is.

    Several processes stop behind the same block: they ask each other at its end, and from the first block
    on the signal waits for that.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.asked = False
        self.finished = 0
        self.left = "nothing is left"  # of a run that has not finished a block
        self._holding = False

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        """Around the work on one block: SIGTERM waits for its end.

        Raises:
            Stopped: behind it, when that was asked for.
        """
        self._holding = True
        try:
            yield
        finally:
            self._holding = self.ranks.world > 1
        self.asked = self.ranks.any(self.asked)
        self.finished = index + 1
        self._check()

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self.asked = True
        if not self._holding:
            self._check()

    def _check(self) -> None:
        if self.asked:
            raise Stopped(
                f"stopped behind block {self.finished}, as asked; the same command goes on from there"
                if self.finished
                else f"stopped before the first block was finished, as asked; {self.left}"
            )


@contextmanager
def on_sigterm(ranks: Ranks = ALONE) -> Iterator[Stopping]:
    """While open, SIGTERM does not end the process but raises `Stopped`, behind the block in hand."""
    stopping = Stopping(ranks)
    if threading.current_thread() is not threading.main_thread():
        yield stopping  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, stopping.note)
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGTERM, before)


def unread() -> bool:
    """Whether nobody reads standard output any more, as of `llmprune methods | true`."""
    asked = select.poll()
    asked.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in asked.poll(0))
