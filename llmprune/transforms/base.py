"""The contract between a transform and what runs it.

A transform is a frozen dataclass whose fields are its settings (`--transform-set key=value`). For each model
it begins a `Change`, which sees every block once (dense, loaded, running on the calibration windows),
decides, and is then asked to change each block and what is outside of them. A transform may have several
parts; one that a model cannot take is left out, and why is in the report.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from llmprune.errors import ConfigError, nearest
from llmprune.methods.registry import Registry, settled
from llmprune.pattern import Pattern
from llmprune.transforms.sites import Block, Outside


class Sums(Protocol):
    """What is learnt of a tensor while the windows pass."""

    def add(self, inputs: Tensor) -> None:
        """Add a batch [..., features]."""


@dataclass(frozen=True)
class Watch:
    """A tensor to learn from: what `module` takes (`in`) or gives (`out`), and the sums to add it to."""

    module: nn.Module
    side: Literal["in", "out"]
    sums: Sums


@dataclass(frozen=True)
class Setting:
    """What a change may depend on beside the model.

    Attributes:
        pattern: that the model will be pruned to.
        blocks: how many there are.
        tokens: of all calibration windows.
        device: where blocks are computed.
    """

    pattern: Pattern
    blocks: int
    tokens: int
    device: torch.device


class Change(ABC):
    """What one transform does to one model.

    Attributes:
        refused: parts that are left out, and why.
    """

    parts: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        self.refused: dict[str, str] = {}

    @property
    def active(self) -> list[str]:
        """The parts that are not refused."""
        return [part for part in self.parts if part not in self.refused]

    def refuse(self, part: str, why: str) -> None:
        """Leave a part out; the first reason stays."""
        self.refused.setdefault(part, why)

    def watch(self, block: Block) -> Mapping[str, Watch]:
        """What to learn of a block while the windows pass; `refuse` what it cannot take."""
        return {}

    def learn(self, block: Block, seen: Mapping[str, Watch]) -> None:
        """Keep what is needed of a block that is loaded, once all windows have passed."""
        return

    @abstractmethod
    def rehearse(self, part: str, block: Block, random: torch.Generator) -> Tensor | None:
        """Do a part to a block with made-up values, so that its effect can be tried; all is undone after.

        Returns:
            The orthogonal matrix [width, width] float64 that the residual stream is turned by; None where
            it stays.
        """

    def rehearse_outside(
        self, part: str, outside: Outside, random: torch.Generator
    ) -> Tensor | None:
        """The same for what is outside of the blocks; `refuse` what it cannot take."""
        return None

    def decide(self) -> None:
        """Make up what to do, once everything has been seen and tried."""
        return

    @abstractmethod
    def block(self, block: Block) -> None:
        """Change a block that is loaded."""

    def outside(self, outside: Outside) -> None:
        """Change what is outside of the blocks; of an embedding there may be a few rows only."""
        return

    def notes(self) -> dict[str, Any]:
        """What the reader of the report must know, as plain JSON types."""
        return {}


class Transform(ABC):
    """A function-preserving change of a dense model.

    Class attributes:
        name: that it is registered under.
        paper: where it comes from.
        over: names of transforms that it does itself.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    over: ClassVar[tuple[str, ...]] = ()

    def settings(self) -> dict[str, Any]:
        """Every setting with its value, defaults too."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    @abstractmethod
    def begin(self, setting: Setting) -> Change:
        """What it does to one model."""


_TRANSFORMS: Registry[Transform] = Registry("transform")
register, known = _TRANSFORMS.register, _TRANSFORMS.known


def build(names: Sequence[str], settings: Mapping[str, Any] | None = None) -> tuple[Transform, ...]:
    """The transforms `names`, in this order; each of `settings` goes to those that have a field of its name.

    Raises:
        ConfigError: for an unknown or repeated name, a setting that none has, or a value of the wrong type.
    """
    if isinstance(names, str):
        raise ConfigError("transforms is a list of names, not one text")
    for name in names:
        _TRANSFORMS.get(name)
        if list(names).count(name) > 1:
            raise ConfigError(f"transform {name!r} is named twice; once is enough")
    built: list[Transform] = [_TRANSFORMS.get(name)() for name in names]
    for key, value in (settings or {}).items():
        offered = {k for one in built for k in one.settings()}
        if key not in offered:
            have = nearest(key, sorted(offered)) if offered else "they have none"
            raise ConfigError(
                f"{', '.join(names) or 'no transform'} has no setting {key!r}: {have}"
            )
        built = [_with(one, key, value) for one in built]
    return tuple(built)


def _with(one: Transform, key: str, value: Any) -> Transform:
    if key not in one.settings():
        return one
    values = settled(one.name, one.settings(), {key: value})
    changed: Transform = replace(one, **values)  # type: ignore[type-var]
    return changed


def steps(built: Sequence[Transform]) -> Iterator[Transform]:
    """Those that have to run: one that a later one does itself is left to it."""
    for place, one in enumerate(built):
        if not any(one.name in later.over for later in built[place + 1 :]):
            yield one
