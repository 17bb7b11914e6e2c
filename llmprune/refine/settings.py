"""What can be set about block repair (`--repair-set KEY=VALUE`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from llmprune.errors import ConfigError
from llmprune.methods.registry import settled

TUNES = ("weights", "vectors")


@dataclass(frozen=True)
class Repair:
    """How a block is repaired.

    Attributes:
        epochs: how often all windows are gone through; 0.5 is half of them once.
        rate: length of a step of Adam, in units of the root mean square of what it changes times the
            root of `LayerReport.output_error`, mean over the block: where pruning did little damage,
            long steps would do more. It rises over the first steps and falls to zero along a cosine.
        tokens: for a step: as many whole windows as they make, and at least one.
        seconds: time for one block after which its repair ends; 0 is any. What a limit lets
            through depends on the machine, and so does the result.
        held_out: share of the windows that is not learnt from, and by which the best epoch is chosen.
        patience: epochs without a gain on them after which a block's repair ends; 0 is never, for
            long steps often make a block worse than it was, and the short ones at the end mend that.
        tune: `weights`, those that are left in the pruned matrices; `vectors`, and gains and biases.
        seed: of the order of the windows.
    """

    epochs: float = 4.0
    rate: float = 0.3
    tokens: int = 1024
    seconds: float = 0.0
    held_out: float = 0.0625
    patience: int = 0
    tune: str = "vectors"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"setting tokens of repair is a number from 1 on, got {self.tokens}")
        if not 0 < self.epochs < 2**31:
            raise ConfigError(f"setting epochs of repair is a number above 0, got {self.epochs:g}")
        for name in ("seconds", "patience", "seed"):
            if not 0 <= getattr(self, name) < 2**31:
                raise ConfigError(
                    f"setting {name} of repair is a number from 0 on, got {getattr(self, name):g}"
                )
        if not 0 < self.rate <= 10:
            raise ConfigError(
                f"setting rate of repair is a number above 0 and up to 10, got {self.rate:g}"
            )
        if not 0 < self.held_out < 1:
            raise ConfigError(
                f"setting held_out of repair is a share of the windows between 0 and 1, got "
                f"{self.held_out:g}"
            )
        if self.tune not in TUNES:
            raise ConfigError(f"setting tune of repair is {' or '.join(TUNES)}, got {self.tune!r}")

    def parted(self, windows: int) -> tuple[list[int], list[int]]:
        """Which of `windows` are learnt from, and which are held out, spread evenly: at least one each.

        One window by itself is both.
        """
        if windows == 1:
            return [0], [0]
        held = min(windows - 1, max(1, round(windows * self.held_out)))
        out = {(2 * i + 1) * windows // (2 * held) for i in range(held)}
        return [n for n in range(windows) if n not in out], sorted(out)

    def windows(self, seqlen: int) -> int:
        """Windows of `seqlen` tokens in a step."""
        return max(1, self.tokens // seqlen)

    def steps(self, windows: int, seqlen: int) -> int:
        """Steps of all epochs where there are so many windows of `seqlen` tokens."""
        each = math.ceil(len(self.parted(windows)[0]) / self.windows(seqlen))
        return math.ceil(self.epochs * each)

    def as_dict(self) -> dict[str, Any]:
        """Every setting with its value, defaults too."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def build(settings: Mapping[str, Any]) -> Repair:
    """A repair with `settings`: values, or text as typed after `--repair-set`.

    Raises:
        ConfigError: for a setting that there is not, or a value that makes no sense.
    """
    return Repair(**settled("repair", Repair().as_dict(), settings))
