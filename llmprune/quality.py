"""`--quality`: what is worth combining, by name: a method and what goes beyond it, in a table.

A name stands for the parts in `QUALITIES`, which may differ for a share and for n:m. What the user sets
himself wins, part by part (`resolve`). A repair, an allocation, Fisher information or text of its own that a
model cannot take or write is left out, and the run says so, where it is the quality's own; what the user has
added is refused (`PruneConfig.optional`). Of transforms each part is tried, and left out, by itself.

Nothing heavy is imported before a name is resolved: `--help` shows this table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmprune.errors import ConfigError, nearest

if TYPE_CHECKING:
    from llmprune.pattern import Pattern


@dataclass(frozen=True)
class Parts:
    """What a run is made of, in fields of `PruneConfig`; the defaults are what runs without a quality."""

    method: str = "wanda"
    settings: Mapping[str, Any] = field(default_factory=dict)
    repair: bool = False
    repair_settings: Mapping[str, Any] = field(default_factory=dict)
    allocation: str = "uniform"
    allocation_settings: Mapping[str, Any] = field(default_factory=dict)
    transforms: Sequence[str] = ()
    transform_settings: Mapping[str, Any] = field(default_factory=dict)
    fisher: bool = False
    fisher_settings: Mapping[str, Any] = field(default_factory=dict)
    generate: float = 0.0

    def options(self) -> str:
        """The same as options of the command line."""
        words = ["--method", self.method, *_typed("--set", self.settings)]
        if self.repair:
            words += ["--repair", *_typed("--repair-set", self.repair_settings)]
        if self.allocation != Parts.allocation:
            words += ["--allocation", self.allocation]
            words += _typed("--allocation-set", self.allocation_settings)
        if self.transforms:
            words += ["--transform", *self.transforms]
            words += _typed("--transform-set", self.transform_settings)
        words += ["--fisher"] if self.fisher else []
        words += _typed("--fisher-set", self.fisher_settings)
        words += [f"--generate {self.generate:g}"] if self.generate else []
        return " ".join(words)


def _typed(option: str, settings: Mapping[str, Any]) -> list[str]:
    return [f"{option} {key}={str(value).lower()}" for key, value in settings.items()]


@dataclass(frozen=True)
class Asked:
    """What the user has set himself of `Parts`; None where he has not said."""

    method: str | None = None
    settings: Mapping[str, Any] | None = None
    repair: bool | None = None
    repair_settings: Mapping[str, Any] | None = None
    allocation: str | None = None
    allocation_settings: Mapping[str, Any] | None = None
    transforms: Sequence[str] | None = None
    transform_settings: Mapping[str, Any] | None = None
    fisher: bool | None = None
    fisher_settings: Mapping[str, Any] | None = None
    generate: float | None = None


@dataclass(frozen=True)
class Quality:
    """One combination.

    Attributes:
        summary: what it does and when to take it, in a sentence.
        share: its parts for a share such as 0.5.
        nm: its parts for n:m.
        cost: what it costs, measured; None where it was not.
    """

    summary: str
    share: Parts
    nm: Parts
    cost: str | None = None

    def parts(self, pattern: Pattern) -> Parts:
        """What it stands for under `pattern`."""
        from llmprune.pattern import NM

        return self.nm if isinstance(pattern, NM) else self.share


_FAST = Parts(method="sparsegpt")
_QUICK = {"growth": 1.2, "look": 1, "tolerance": 0.01}
"""A third of ALPS' own time, for 1.04 times its loss; and values within a hundredth of where the refit would
end, as a repair goes on: wide layers take most steps for the rest, and perplexity hardly differs."""
_WHERE = (
    ", on a processor and models of a few million parameters (benchmarks/results/frontier.json)"
)

QUALITIES: dict[str, Quality] = {
    "fast": Quality(
        "SparseGPT alone, for the largest models and a first look",
        _FAST,
        _FAST,
        "the time of SparseGPT",
    ),
    "balanced": Quality(
        "ALPS in quick steps and a short repair of each block; the share of each matrix by Fisher "
        "information",
        Parts(
            method="alps",
            settings=_QUICK,
            repair=True,
            repair_settings={"epochs": 0.5},
            allocation="fisher",
            fisher=True,
            fisher_settings={"tokens": 8192, "share": 0.25},
        ),
        Parts(method="alps", settings=_QUICK, repair=True, repair_settings={"epochs": 1.0}),
        "2 to 4 times the time of SparseGPT, more with few windows on very wide layers" + _WHERE,
    ),
    "best": Quality(
        "all that pays for the lowest perplexity: the dense model writes more text to calibrate on and has "
        "its values rotated (for n:m it is permuted), then ALPS prunes each block and a repair tunes it, "
        "weighed by Fisher information",
        Parts(
            method="alps",
            repair=True,
            repair_settings={"epochs": 4.0},
            allocation="fisher",
            transforms=("rotate",),
            transform_settings={"stream": "identity"},
            fisher=True,
            generate=1.0,
        ),
        Parts(
            method="alps",
            repair=True,
            repair_settings={"epochs": 3.0},
            transforms=("permute",),
            fisher=True,
            fisher_settings={"temperature": 1.0},
            generate=2.0,
        ),
        "17 to 22 times the time of SparseGPT" + _WHERE,
    ),
}


def get(name: str) -> Quality:
    """The quality called `name`.

    Raises:
        ConfigError: when there is none, with the nearest name.
    """
    if name not in QUALITIES:
        raise ConfigError(f"no quality {name!r}: {nearest(name, list(QUALITIES))}")
    return QUALITIES[name]


def resolve(name: str | None, sparsity: float | str | Pattern, asked: Asked) -> Parts:
    """The parts of a run: those of the quality called `name`, and before them what was `asked` for.

    A method, an allocation or transforms that were asked for take the place of the quality's, whose settings
    go unless the same ones are named; settings that were asked for are laid over those that stay.

    Args:
        name: of the quality; None for what runs without one.
        sparsity: that is wanted, as typed.
        asked: what the user has set himself.

    Raises:
        ConfigError: when there is no such quality, or no such sparsity.
    """
    base = Parts() if name is None else get(name).parts(_parsed(sparsity))
    method = base.method if asked.method is None else asked.method
    repair = base.repair if asked.repair is None else asked.repair
    allocation = base.allocation if asked.allocation is None else asked.allocation
    transforms = base.transforms if asked.transforms is None else asked.transforms
    fisher = base.fisher if asked.fisher is None else asked.fisher
    measured = fisher or allocation == "fisher"
    same, alike = method == base.method, allocation == base.allocation
    return Parts(
        method,
        {**(base.settings if same else {}), **(asked.settings or {})},
        repair,
        {**(base.repair_settings if repair else {}), **(asked.repair_settings or {})},
        allocation,
        {**(base.allocation_settings if alike else {}), **(asked.allocation_settings or {})},
        transforms,
        {**_settings_of(transforms, base), **(asked.transform_settings or {})},
        fisher,
        {**(base.fisher_settings if measured else {}), **(asked.fisher_settings or {})},
        base.generate if asked.generate is None else asked.generate,
    )


def _parsed(sparsity: float | str | Pattern) -> Pattern:
    from llmprune.pattern import parse

    return parse(sparsity)


def _settings_of(transforms: Sequence[str], base: Parts) -> dict[str, Any]:
    """The transform settings of `base` that are of one of its own among `transforms`."""
    from llmprune.transforms import build

    offered = {key for n in base.transforms if n in transforms for key in build([n])[0].settings()}
    return {key: value for key, value in base.transform_settings.items() if key in offered}


def going_on(name: str | None, part: str, why: str) -> str:
    """The line that says that a run does without a part of its quality."""
    return f"quality {name}: going on without {part}: {why}"
