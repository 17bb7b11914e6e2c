"""Permute: an order of features in which groups of n:m keep more; exact, and free at run time.

Intermediate features (rows of gate and up, columns of down), the values of each key-value head (rows of v,
columns of o), and the features of the residual stream, in one order for all that read it. The scores are
Wanda's, |W_ij| ||X_j||, of the matrix whose columns are grouped; see `llmprune.transforms.swaps`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmprune.errors import ConfigError
from llmprune.pattern import NM
from llmprune.stats import InputNorms
from llmprune.transforms.base import Change, Setting, Transform, Watch, register
from llmprune.transforms.cells import Cell, Site
from llmprune.transforms.inner import Features, Values
from llmprune.transforms.sites import Block, Outside
from llmprune.transforms.stream import turn_block, turn_outside, why_not, why_not_outside
from llmprune.transforms.swaps import best_order, kept


class Permutation(Change):
    """Permute of one model."""

    parts: ClassVar[tuple[str, ...]] = ("features", "values", "stream")

    def __init__(self, transform: Permute, setting: Setting) -> None:
        super().__init__()
        self.how, self.setting = transform, setting
        self._random = torch.Generator().manual_seed(transform.seed)
        self._orders: dict[str, list[Tensor]] = {}  # of features one, of values one a head
        self._stream: Tensor | None = None
        self._scores: list[Tensor] = []
        self._before: dict[str, float] = {}
        self._after: dict[str, float] = {}
        for part in self.parts:
            if part not in transform.chosen:
                self.refuse(part, f"parts={transform.parts}")
        if not isinstance(setting.pattern, NM):
            for part in self.parts:
                self.refuse(part, f"the order of features does not matter to {setting.pattern}")

    @property
    def _pattern(self) -> NM:
        assert isinstance(self.setting.pattern, NM)
        return self.setting.pattern

    def watch(self, block: Block) -> dict[str, Watch]:
        """Norms of what features, values and the stream are read by."""
        if not self.active:
            return {}
        sites = [f.out for f in self._features(block)] + [v.out for v in self._values(block)]
        if "stream" in self.active:
            if why := why_not(block, folded=False):
                self.refuse("stream", why)
            elif block.width % self._pattern.m:
                self.refuse(
                    "stream", f"{block.width} features are no multiple of {self._pattern.m}"
                )
            else:
                sites += [norm.readers[0] for norm in block.norms]
        return {s.name: self._norms(s) for s in sites}

    def _norms(self, site: Site) -> Watch:
        features = site.shape[1]
        return Watch(site.weight.module, "in", InputNorms.empty(features, self.setting.device))

    def _features(self, block: Block) -> list[Features]:
        m = self._pattern.m
        return [f for f in block.features if "features" in self.active and f.out.shape[1] % m == 0]

    def _values(self, block: Block) -> list[Values]:
        m = self._pattern.m
        return [v for v in block.values if "values" in self.active and v.width % m == 0]

    def learn(self, block: Block, seen: Mapping[str, Watch]) -> None:
        """Find the orders of this block's features and values; keep scores for the stream."""
        if not self.active:
            return
        for f in self._features(block):
            self._orders[f.name] = [self._order("features", self._score(f.out, seen[f.out.name]))]
        for v in self._values(block):
            score = self._score(v.out, seen[v.out.name])
            heads = score.reshape(len(score), v.heads, v.group, v.width)
            by_head = heads.permute(1, 0, 2, 3).flatten(1, 2)
            self._orders[v.name] = [self._order("values", head) for head in by_head]
        if "stream" in self.active:
            for norm in block.norms:
                few = max(1, self.how.rows // 4 // len(norm.readers))
                watch = seen[norm.readers[0].name]
                self._scores += [self._score(r, watch, few) for r in norm.readers]

    def _score(self, site: Site, watch: Watch, rows: int | None = None) -> Tensor:
        """Scores [rows, in] of a few rows of a matrix."""
        assert isinstance(watch.sums, InputNorms)
        count = site.shape[0]
        few = min(count, rows or self.how.rows)
        weight = site.weight.view[torch.arange(few) * count // few].float()
        score = (weight.abs() * watch.sums.norm) ** self.how.power
        return score / score.sum().clamp_min(1e-30)

    def _order(self, part: str, score: Tensor) -> Tensor:
        n, m = self._pattern.n, self._pattern.m
        order = best_order(score, n, m, self.how.sweeps, self._random)
        as_is = torch.arange(len(order), device=order.device)
        for sums, found in ((self._before, as_is), (self._after, order)):
            sums[part] = sums.get(part, 0.0) + kept(score, found, n, m)
        return order

    def rehearse(self, part: str, block: Block, random: torch.Generator) -> Tensor | None:
        """A random order."""
        if part == "features":
            for f in self._features(block):
                permute_features(f, torch.randperm(f.out.shape[1], generator=random))
        elif part == "values":
            for v in self._values(block):
                permute_values(
                    v, [torch.randperm(v.width, generator=random) for _ in range(v.heads)]
                )
        else:
            turn = _matrix(torch.randperm(block.width, generator=random)).to(self.setting.device)
            turn_block(block, turn, folded=False)
            return turn
        return None

    def rehearse_outside(
        self, part: str, outside: Outside, random: torch.Generator
    ) -> Tensor | None:
        """A random order."""
        if part != "stream":
            return None
        if why := why_not_outside(outside):
            self.refuse(part, why)
            return None
        turn = _matrix(torch.randperm(outside.width, generator=random)).to(self.setting.device)
        turn_outside(outside, turn, folded=False)
        return turn

    def decide(self) -> None:
        """Find the order of the stream."""
        for part in ("features", "values"):
            if part not in self._before:
                self.refuse(part, f"no {part} in groups of {self.setting.pattern} are seen")
        if "stream" in self.active:
            self._stream = _matrix(self._order("stream", torch.cat(self._scores)))
        self._scores = []

    def block(self, block: Block) -> None:
        """Bring everything into its order."""
        if not self.active:
            return
        for f in self._features(block):
            permute_features(f, self._orders[f.name][0])
        for v in self._values(block):
            permute_values(v, self._orders[v.name])
        if self._stream is not None:
            turn_block(block, self._stream, folded=False)

    def outside(self, outside: Outside) -> None:
        """Bring embeddings, last norm and output head into the order of the stream."""
        if self._stream is not None:
            turn_outside(outside, self._stream, folded=False)

    def notes(self) -> dict[str, Any]:
        """By how much more of the scores is kept."""
        return {
            f"{part}_kept_gain": round(self._after[part] / self._before[part] - 1, 4)
            for part in self.active
            if self._before.get(part)
        }


def _matrix(order: Tensor) -> Tensor:
    """The permutation matrix P with (x P)_j = x_order[j]: [n, n] float64."""
    return torch.eye(len(order), dtype=torch.float64, device=order.device)[:, order]


def permute_features(features: Features, order: Tensor) -> None:
    """Bring the features into an order."""
    for source, first in features.sources:
        for cell in source.cells():
            _rows(cell, first, order)
    _columns(features.out.weight, order)


def permute_values(values: Values, orders: list[Tensor]) -> None:
    """Bring the values of each key-value head into its order."""
    rows = torch.cat([order + h * values.width for h, order in enumerate(orders)])
    for cell in values.source.cells():
        _rows(cell, values.first, rows)
    starts = range(0, values.heads * values.group * values.width, values.width)
    columns = [orders[g // values.group] + start for g, start in enumerate(starts)]
    _columns(values.out.weight, torch.cat(columns))


def _rows(cell: Cell, first: int, order: Tensor) -> None:
    part = cell.view[first : first + len(order)]
    part.copy_(part[order.to(part.device)])


def _columns(cell: Cell, order: Tensor) -> None:
    view = cell.view
    view.copy_(view[:, order.to(view.device)])


@register("permute")
@dataclass(frozen=True)
class Permute(Transform):
    """Orders of features, values and the residual stream in which n:m keeps more."""

    parts: str = "features,values,stream"
    sweeps: int = 100
    rows: int = 256
    power: float = 1.0
    seed: int = 0

    paper: ClassVar[str] = "NeurIPS 2021, Pool and Yu"

    def __post_init__(self) -> None:
        known = Permutation.parts
        if not self.chosen or not set(self.chosen) <= set(known):
            raise ConfigError(f"permute takes parts={','.join(known)} or some; got {self.parts!r}")
        if self.rows < 1 or self.sweeps < 0 or self.power <= 0:
            raise ConfigError(
                "permute takes rows of 1 or more, sweeps of 0 or more and a power above 0; got "
                f"{self.rows}, {self.sweeps}, {self.power:g}"
            )

    @property
    def chosen(self) -> list[str]:
        """The parts that are wanted."""
        return [part.strip() for part in self.parts.split(",")]

    def begin(self, setting: Setting) -> Change:
        """Orders for one model."""
        return Permutation(self, setting)
