"""Rotate: one rotation of the residual stream and one of the values of each key-value head, in the weights.

The rotations are learnt to concentrate importance (`llmprune.transforms.concentrate`), or random, or Hadamard
matrices, for comparison. What differs from DenoiseRotator (arXiv 2505.23049): its rotation of the stream is
another one in every block, which costs a product at run time; here there is one for the whole model, and the
result is a standard architecture. Norm gains are folded on the way, so that each weight is rounded once.

To learn the one rotation, of every block are kept `rows` rows (columns, of what writes) of each matrix and
`tokens` tokens of the input of each norm: at 128 and 256, 23 MB for a block of an 8B Llama, 0.75 GB in all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmprune.errors import ConfigError
from llmprune.stats import InputNorms, InputSample
from llmprune.transforms.base import Change, Setting, Transform, Watch, register
from llmprune.transforms.concentrate import (
    Heads,
    concentrate,
    readers_entropy,
    writers_entropy,
)
from llmprune.transforms.fold import cannot_fold
from llmprune.transforms.heads import HeadGrams, turn_values
from llmprune.transforms.inner import Values
from llmprune.transforms.sites import Block, Outside
from llmprune.transforms.stream import (
    centred,
    made_up,
    settled,
    turn_block,
    turn_outside,
    why_not,
    why_not_outside,
)

KINDS = ("learned", "random", "hadamard", "identity")


class Rotation(Change):
    """Rotate of one model."""

    parts: ClassVar[tuple[str, ...]] = ("stream", "values")

    def __init__(self, transform: Rotate, setting: Setting) -> None:
        super().__init__()
        self.how, self.setting = transform, setting
        self._readers: list[tuple[Tensor, Tensor]] = []
        self._writers: list[Tensor] = []
        self._turns: dict[str, Tensor] = {}
        self._stream: Tensor | None = None
        self._width = 0
        self._fixed = False
        self._values = 0
        self._gains: dict[str, list[float]] = {}
        for part, kind in (("stream", transform.stream), ("values", transform.values)):
            if kind == "identity":
                self.refuse(part, f"{part}=identity")

    def watch(self, block: Block) -> dict[str, Watch]:
        """Tokens of each norm's output, norms of what writers and values read, Gram matrices of heads."""
        found: dict[str, Watch] = {}
        self._width = block.width
        why = why_not(block, folded=True) or next(filter(None, map(cannot_fold, block.norms)), None)
        if why:
            self.refuse("stream", why)
        self._fixed |= centred(block)
        if self._learns("stream"):
            every = max(1, self.setting.tokens // self.how.tokens) | 1
            for norm in block.norms:
                reader = norm.readers[0].weight.module
                found[norm.name] = Watch(reader, "in", InputSample(every))
            for writer in block.writers:
                if writer.weight.expert is None:
                    found[writer.name] = self._norms(writer)
        if any(v.clipped for v in block.values):
            self.refuse("values", "the config cuts values off at clip_qkv")
        if self._learns("values"):
            for v in block.values:
                grams = HeadGrams(v.heads * v.group, v.width, self.setting.device)
                found[f"{v.name} heads"] = Watch(v.out.weight.module, "in", grams)
                found[v.source.name] = self._norms(v.source)
        return found

    def _norms(self, site: Any) -> Watch:
        features = site.shape[1]
        return Watch(site.weight.module, "in", InputNorms.empty(features, self.setting.device))

    def _learns(self, part: str) -> bool:
        return part in self.active and getattr(self.how, part) == "learned"

    def learn(self, block: Block, seen: Mapping[str, Watch]) -> None:
        """Keep rows and tokens for the stream; find the rotations of this block's values."""
        if self._learns("stream"):
            self._keep(block, seen)
        self._values += len(block.values)
        if "values" in self.active:
            for v in block.values:
                self._turns[v.name] = self._of_values(v, seen)

    def _keep(self, block: Block, seen: Mapping[str, Watch]) -> None:
        for norm in block.norms:
            sample = seen[norm.name].sums
            assert isinstance(sample, InputSample)
            gain = norm.gain()
            gain = torch.ones((), dtype=torch.float64) if gain is None else gain
            tokens = sample.inputs.double().reshape(-1, block.width) / gain.where(gain != 0, 1)
            experts = sum(r.weight.expert is not None for r in norm.readers)
            rows = []
            for r in norm.readers:
                few = self.how.rows if r.weight.expert is None else -(-self.how.rows // experts)
                rows.append(r.weight.view[_some(r.shape[0], few)].double() * gain)
            self._readers.append((torch.cat(rows).float(), tokens.float()))
        for writer in block.writers:
            if writer.weight.expert is None:
                norms = seen[writer.name].sums
                assert isinstance(norms, InputNorms)
                chosen = _some(writer.shape[1], self.how.rows)
                columns = writer.weight.view[:, chosen].double() * norms.norm[chosen].double()
                self._writers.append(columns.float())

    def _of_values(self, v: Values, seen: Mapping[str, Watch]) -> Tensor:
        """Rotations [heads, width, width] float64 of one attention's values."""
        random = torch.Generator().manual_seed(self.how.seed)
        if self.how.values != "learned":
            kind = self.how.values
            turn = torch.stack([_start(kind, v.width, random, fixed=False) for _ in range(v.heads)])
            return turn.to(self.setting.device)
        grams, norms = seen[f"{v.name} heads"].sums, seen[v.source.name].sums
        assert isinstance(grams, HeadGrams)
        assert isinstance(norms, InputNorms)
        rows, columns = (
            _some(v.out.shape[0], self.how.rows),
            _some(v.source.shape[1], self.how.rows),
        )
        out = v.out.weight.view[rows].float().reshape(-1, v.heads, v.group, v.width)
        source = v.source.weight.view[v.first :][: v.heads * v.width, columns].float()
        source = (source * norms.norm[columns]).reshape(v.heads, v.width, -1)
        heads = Heads(out, grams.gram.reshape(v.heads, v.group, v.width, v.width), source)
        start = torch.eye(v.width, device=source.device).expand(v.heads, -1, -1)
        found = concentrate(start, heads.entropy, self.how.steps, self.how.rate, fixed=False)
        self._gains.setdefault("values", []).append(found.before - found.after)
        return settled(found.turn, fixed=False)

    def rehearse(self, part: str, block: Block, random: torch.Generator) -> Tensor | None:
        """A random rotation."""
        if part == "values":
            for v in block.values:
                turns = [made_up(v.width, random, fixed=False) for _ in range(v.heads)]
                turn_values(v, torch.stack(turns).to(self.setting.device))
            return None
        turn = made_up(block.width, random, fixed=self._fixed).to(self.setting.device)
        turn_block(block, turn, folded=True)
        return turn

    def rehearse_outside(
        self, part: str, outside: Outside, random: torch.Generator
    ) -> Tensor | None:
        """A random rotation."""
        if part == "values":
            return None
        why = why_not_outside(outside) or (outside.norm and cannot_fold(outside.norm))
        if why:
            self.refuse(part, why)
            return None
        assert outside.norm is not None
        self._fixed |= outside.norm.centred
        turn = made_up(outside.width, random, fixed=self._fixed).to(self.setting.device)
        turn_outside(outside, turn, folded=True)
        return turn

    def decide(self) -> None:
        """Learn the rotation of the stream."""
        if not self._values:
            self.refuse("values", "no attention with values and a matrix that reads them is seen")
        if "stream" in self.active:
            self._stream = self._of_stream()
        self._readers, self._writers = [], []

    def _of_stream(self) -> Tensor:
        random = torch.Generator().manual_seed(self.how.seed)
        kind, fixed = self.how.stream, self._fixed
        begin = _start("identity" if kind == "learned" else kind, self._width, random, fixed=fixed)
        begin = begin.to(self.setting.device)
        if kind != "learned":
            return begin
        count = sum(len(rows) for rows, _ in self._readers) + self._width * len(self._writers)

        def objective(turn: Tensor) -> Tensor:
            parts = [readers_entropy(rows, tokens, turn) for rows, tokens in self._readers]
            parts += [writers_entropy(columns, turn) for columns in self._writers]
            return torch.stack(parts).sum() / count

        found = concentrate(begin.float(), objective, self.how.steps, self.how.rate, fixed=fixed)
        self._gains["stream"] = [found.before, found.after]
        return settled(found.turn, fixed=fixed)

    def block(self, block: Block) -> None:
        """Rotate the values first, which do not see the stream."""
        if "values" in self.active:
            for v in block.values:
                turn_values(v, self._turns[v.name])
        if self._stream is not None:
            turn_block(block, self._stream, folded=True)

    def outside(self, outside: Outside) -> None:
        """Rotate embeddings and output head."""
        if self._stream is not None:
            turn_outside(outside, self._stream, folded=True)

    def notes(self) -> dict[str, Any]:
        """By how much the mean entropy fell, in nats."""
        found: dict[str, Any] = {}
        if "stream" in self._gains:
            found["stream_entropy"] = [round(x, 4) for x in self._gains["stream"]]
        if gains := self._gains.get("values"):
            found["values_entropy_fell"] = round(sum(gains) / len(gains), 4)
        return found


def _some(count: int, most: int) -> Tensor:
    """`most` places spread evenly over `count`, all where there are no more."""
    return torch.arange(min(count, most)) * count // min(count, most)


def _start(kind: str, width: int, random: torch.Generator, *, fixed: bool) -> Tensor:
    """A rotation [width, width] float64 that is not learnt."""
    if kind == "random":
        return made_up(width, random, fixed=fixed)
    if kind == "identity":
        return torch.eye(width, dtype=torch.float64)
    signs = torch.randint(0, 2, (width,), generator=random).double() * 2 - 1
    turn = hadamard(width) * signs[:, None]
    return settled(turn, fixed=True) if fixed else turn


def hadamard(width: int) -> Tensor:
    """A Hadamard matrix [width, width] over its root, of 2^k; of k times that, beside the identity [k, k].

    So every direction is spread over the 2^k of its own.
    """
    power = width & -width
    found = torch.ones(1, 1, dtype=torch.float64)
    while len(found) < power:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return torch.kron(torch.eye(width // power, dtype=torch.float64), found / power**0.5)


@register("rotate")
@dataclass(frozen=True)
class Rotate(Transform):
    """One rotation of the residual stream, and one for the values of each key-value head."""

    stream: str = "learned"
    values: str = "learned"
    steps: int = 100
    rate: float = 0.1
    rows: int = 128
    tokens: int = 256
    seed: int = 0

    paper: ClassVar[str] = "arXiv 2505.23049"
    over: ClassVar[tuple[str, ...]] = ("fold",)

    def __post_init__(self) -> None:
        for part in ("stream", "values"):
            kind = getattr(self, part)
            if kind not in KINDS:
                raise ConfigError(f"rotate takes {part}={', '.join(KINDS)}; got {kind!r}")
        for name in ("steps", "rows", "tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rotate takes a positive {name}, got {getattr(self, name)}")
        if not 0 < self.rate <= 1:
            raise ConfigError(f"rotate takes a rate between 0 and 1 radian, got {self.rate:g}")

    def begin(self, setting: Setting) -> Change:
        """Rotations for one model."""
        return Rotation(self, setting)
