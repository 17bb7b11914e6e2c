"""A progress bar with block, layer and time left, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from tqdm import tqdm


def interval() -> float:
    """Seconds between two drawings of a bar: few where stderr is a log and every one stays."""
    return 0.2 if sys.stderr.isatty() else 30.0


class Bar:
    """Counts steps; shown only after two seconds, so that short runs stay quiet.

    Where stderr is no terminal but a log, it writes a line's worth every half minute.
    """

    def __init__(
        self, total: int, title: str, *, unit: str = "block", enabled: bool = True
    ) -> None:
        self._unit = unit
        self._bar = tqdm(
            total=total,
            desc=title,
            disable=not enabled,
            delay=2,
            dynamic_ncols=True,
            mininterval=interval(),
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def expect(self, more: int) -> None:
        """There will be `more` steps from here on."""
        self._bar.total = self._bar.n + more

    def step(self, block: int, blocks: int, doing: str) -> None:
        """One step further: `doing` in `block` of `blocks`, counted from 0."""
        self._bar.set_postfix_str(
            f"{self._unit} {min(block + 1, blocks)}/{blocks} {doing}", refresh=False
        )
        self._bar.update()


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Note how long the body took, in wall-clock seconds."""
    begun = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - begun
