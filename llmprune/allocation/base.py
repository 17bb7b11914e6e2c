"""How much of each matrix goes: the contract of an allocation, and where each is known by its name.

An allocation is a frozen dataclass whose fields are its settings on the command line (`--allocation-set
key=value`). One that measures (`Measured`) sees weights and statistics and no model: a number for each
block, and what those numbers mean in shares. The total is made exact behind it, in
`llmprune.allocation.levels`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from llmprune.allocation.levels import offered
from llmprune.errors import ConfigError
from llmprune.methods.base import Method
from llmprune.methods.registry import Registry, settled
from llmprune.pattern import NM, Pattern


@dataclass(frozen=True)
class Allocation(ABC):
    """One way to share out what is removed.

    Class attributes:
        name: the name it is registered under.
        paper: where it comes from.
        learns: the method whose statistics it looks at; None for one that looks at weights alone.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    learns: ClassVar[str | None] = None

    def settings(self) -> dict[str, Any]:
        """Every setting with its value, defaults too."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def needs_data(self) -> bool:
        """Whether calibration windows are needed to decide."""
        return self.learns is not None

    def check(self, method: Method[Any], pattern: Pattern) -> None:
        """Refuse settings that make no sense for a run of `method` and `pattern`.

        Raises:
            ConfigError: saying what would work.
        """
        return


@dataclass(frozen=True)
class Measured(Allocation):
    """An allocation by a number that each block, or each matrix, is measured to have.

    Attributes:
        grain: what gets one level: `block` or `matrix`.
        levels: the levels of an n:m run, such as `2:4,3:4,dense`; empty for every n of the same m and dense.
    """

    grain: str = "block"
    levels: str = ""

    def check(self, method: Method[Any], pattern: Pattern) -> None:
        """Refuse a grain that there is not, and levels that are none."""
        if self.grain not in ("block", "matrix"):
            raise ConfigError(f"grain of {self.name} is block or matrix, got {self.grain!r}")
        offered(self.levels, pattern)

    @abstractmethod
    def measure(self, weights: Sequence[Tensor], stats: Sequence[Any]) -> float:
        """One number for matrices [out, in] that get one level, with what `learns` knows of their inputs."""

    @abstractmethod
    def shares(
        self, measured: Sequence[float], sizes: Sequence[int], pattern: Pattern
    ) -> list[float]:
        """The share of each that is to go, for numbers of `measure` and their weights.

        Their mean need not be that of `pattern`: all are moved by one number until it is.
        """


def room(pattern: Pattern, share: float) -> float:
    """How far shares may lie from the pattern's own: `share`, or one level of n:m."""
    return 1 / pattern.m if isinstance(pattern, NM) else share


_ALLOCATIONS: Registry[Allocation] = Registry("allocation")
register, known = _ALLOCATIONS.register, _ALLOCATIONS.known


def offered_settings(name: str) -> dict[str, Any]:
    """The settings of the allocation called `name`, with their defaults.

    Raises:
        ConfigError: when there is none, with the nearest name.
    """
    return {f.name: f.default for f in fields(_ALLOCATIONS.get(name))}


def build(name: str, settings: Mapping[str, Any] | None = None) -> Allocation:
    """The allocation called `name` with `settings`: values, or text as typed after `--allocation-set`.

    Raises:
        ConfigError: for a setting that it does not have, or a value of the wrong type.
    """
    values = settled(f"allocation {name}", offered_settings(name), settings)
    return _ALLOCATIONS.get(name)(**values)
