"""SIGTERM: finish the block in hand, then stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llmprune.errors import Stopped


class Stopping:
    """Whether the process was asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    def check(self, finished: int, depth: int) -> None:
        """End the run when that was asked for.

        Raises:
            Stopped: with what is finished.
        """
        if self.asked and finished < depth:
            raise Stopped(f"stopped behind block {finished} of {depth}, as asked")


@contextmanager
def on_sigterm() -> Iterator[Stopping]:
    """While open, SIGTERM does not end the process but is noted."""
    stopping = Stopping()
    if threading.current_thread() is not threading.main_thread():
        yield stopping  # only the main thread may set handlers
        return

    def note(number: int, frame: FrameType | None) -> None:
        stopping.asked = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGTERM, before)
