"""Fold: the gain of a norm goes into the matrices that read it, and becomes one.

As in SliceGPT (Ashkboos et al. 2024, arXiv 2401.15024). A bias b of a LayerNorm stays in the norm as
b / gain, so that readers without biases keep their architecture. By itself it changes what a method sees
only where that depends on the scale of inputs: not Wanda, whose score it leaves as it is; SparseGPT by its
damping. It is what a rotation needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmprune.transforms.base import Change, Setting, Transform, Watch, register
from llmprune.transforms.norms import Norm
from llmprune.transforms.sites import Block, Outside


def fold(norm: Norm) -> None:
    """Put the gain of a norm into its readers."""
    gain = norm.gain()
    if gain is None:
        return
    for reader in norm.readers:
        reader.weight.scale(gain)
    if norm.bias is not None:
        norm.bias.put(torch.where(gain == 0, gain, norm.bias.get() / gain))
    norm.set_gain(torch.ones_like(gain))


def cannot_fold(norm: Norm) -> str | None:
    """Why the gain of a norm cannot be folded, or None."""
    gain = norm.gain()
    if gain is None or norm.bias is None or not bool(((gain == 0) & (norm.bias.get() != 0)).any()):
        return None
    return f"{norm.name} has a gain of zero where its bias is not"


def fold_outside(outside: Outside) -> None:
    """Put the gain of the last norm into the output head, which gets weights of its own if it was tied."""
    if outside.norm is None or outside.norm.gain() is None:
        return
    if outside.tied:
        untie(outside)
    fold(outside.norm)


def untie(outside: Outside) -> None:
    """Give the output head weights of its own."""
    assert outside.head is not None
    head: Any = outside.head.weight.module
    if any(cell.module.weight is head.weight for cell in outside.embeddings):
        own = head.weight
        head.weight = nn.Parameter(own.data.clone(), requires_grad=own.requires_grad)


class Folding(Change):
    """Fold of one model."""

    parts: ClassVar[tuple[str, ...]] = ("norms", "final norm")

    def __init__(self) -> None:
        super().__init__()
        self._folded = 0
        self._left: set[str] = set()

    def watch(self, block: Block) -> dict[str, Watch]:
        """Nothing is learnt; refuses what cannot be divided by."""
        for norm in block.norms:
            if why := cannot_fold(norm):
                self.refuse("norms", why)
        self._folded += len(block.norms)
        self._left |= {norm.name.rpartition(".")[2] for norm in block.others}
        return {}

    def decide(self) -> None:
        """Refuse where nothing was found."""
        if not self._folded:
            self.refuse("norms", "no matrix of a block reads a norm" + self._kept())

    def _kept(self) -> str:
        return f" ({', '.join(sorted(self._left))} follow what blocks add)" if self._left else ""

    def rehearse(self, part: str, block: Block, random: torch.Generator) -> None:
        """The real thing."""
        if part == "norms":
            self._fold(block)

    def rehearse_outside(self, part: str, outside: Outside, random: torch.Generator) -> None:
        """The real thing."""
        if part == "final norm":
            if outside.norm is None:
                self.refuse(part, "the output head is not seen to read a norm")
            elif why := cannot_fold(outside.norm):
                self.refuse(part, why)
            else:
                fold_outside(outside)

    def _fold(self, block: Block) -> None:
        for norm in block.norms:
            fold(norm)

    def block(self, block: Block) -> None:
        """Fold its norms."""
        if "norms" in self.active:
            self._fold(block)

    def outside(self, outside: Outside) -> None:
        """Fold the last norm."""
        if "final norm" in self.active:
            fold_outside(outside)

    def notes(self) -> dict[str, Any]:
        """Which norms keep their gain."""
        return {"kept": sorted(self._left)} if self._left else {}


@register("fold")
@dataclass(frozen=True)
class Fold(Transform):
    """Norm gains go into the matrices that read them."""

    paper: ClassVar[str] = "arXiv 2401.15024"

    def begin(self, setting: Setting) -> Change:
        """Nothing has to be known."""
        return Folding()


def turn_norm(norm: Norm, turn: Tensor) -> None:
    """Let a norm work in a residual stream turned by `turn`: a permutation, unless its gain is folded."""
    gain = norm.gain()
    if gain is not None:
        norm.set_gain(gain @ turn)
    if norm.bias is not None:
        norm.bias.put(norm.bias.get() @ turn)
