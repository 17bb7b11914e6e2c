"""Learn an orthogonal matrix that concentrates importance: the entropy of normalised saliency goes down.

After DenoiseRotator (Gu et al. 2025, arXiv 2505.23049): Adam on the mean entropy of the rows of W R, whose
weights count by (W R)_ij^2 ||X R_j||^2, Wanda's score squared; nothing passes through the model again. Here
one matrix serves all blocks, and it stays orthogonal because each step is a Cayley transform of a skew
matrix, not a QR decomposition of a free one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.errors import NumericalError

BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Learnt:
    """An orthogonal matrix and what it is good for.

    Attributes:
        turn: [..., n, n].
        before: the objective at the start.
        after: and at the end.
    """

    turn: Tensor
    before: float
    after: float


def concentrate(
    start: Tensor, objective: Callable[[Tensor], Tensor], steps: int, rate: float, *, fixed: bool
) -> Learnt:
    """Make `objective` of an orthogonal matrix small.

    Args:
        start: [..., n, n] orthogonal.
        objective: a scalar, of such a tensor.
        steps: of Adam.
        rate: the angle, in radians, by which a step turns a direction about; it goes to 0 as a cosine.
        fixed: whether the direction of ones stays as it is.

    Raises:
        NumericalError: when the objective is no number.
    """
    turn, width = start.clone(), start.shape[-1]
    first, second = torch.zeros_like(turn), torch.zeros_like(turn)
    eye = torch.eye(width, dtype=turn.dtype, device=turn.device)
    values: list[float] = []
    for step in range(steps):
        value, slope = _slope(turn, objective)
        values.append(value)
        skew = turn.mT @ slope
        skew = _level(skew - skew.mT, fixed)
        first = BETAS[0] * first + (1 - BETAS[0]) * skew
        second = BETAS[1] * second + (1 - BETAS[1]) * skew.square()
        scaled = (second / (1 - BETAS[1] ** (step + 1))).sqrt_().add_(1e-12)
        way = _level(first / (1 - BETAS[0] ** (step + 1)) / scaled, fixed)
        angle = rate * 0.5 * (1 + math.cos(math.pi * step / steps)) / math.sqrt(width)
        half = way * (-angle / 2)
        turn = turn @ torch.linalg.solve(eye - half, eye + half)
    values.append(_slope(turn, objective)[0] if steps else float(objective(turn).detach()))
    if not all(map(math.isfinite, values)):
        raise NumericalError("the entropy of the saliency is no number; a statistic is damaged")
    return Learnt(turn, values[0], values[-1])


def _slope(turn: Tensor, objective: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
    """The objective, and its gradient [..., n, n]."""
    with torch.enable_grad():
        free = turn.detach().requires_grad_()
        value = objective(free)
        (slope,) = torch.autograd.grad(value, free)
    return float(value.detach()), slope


def _level(skew: Tensor, fixed: bool) -> Tensor:
    """`skew` without what would move the direction of ones."""
    if not fixed:
        return skew
    skew = skew - skew.mean(-1, keepdim=True)
    return skew - skew.mean(-2, keepdim=True)


def entropy(saliency: Tensor) -> Tensor:
    """Sum over rows of the entropy, in nats, of the shares in each row of `saliency` [..., n]; a scalar."""
    total = saliency.sum(-1).clamp_min(1e-30)
    own = (saliency * saliency.clamp_min(1e-30).log()).sum(-1)
    return (total.log() - own / total).sum()


def readers_entropy(rows: Tensor, tokens: Tensor, turn: Tensor) -> Tensor:
    """Of matrices that read the stream: rows [n, width], tokens [t, width] of their input, both turned."""
    energy = (tokens @ turn).square().sum(0)
    return entropy((rows @ turn).square() * energy)


def writers_entropy(columns: Tensor, turn: Tensor) -> Tensor:
    """Of matrices that write into it: columns [width, n], each times the norm of its input."""
    return entropy((turn.mT @ columns).square())


@dataclass(frozen=True)
class Heads:
    """What the values of one attention tell of rotations of its heads.

    Attributes:
        out: [rows, heads, group, width] of the matrix that reads them.
        gram: [heads, group, width, width] of its inputs.
        source: [heads, width, columns] rows of values, each column times the norm of its input.
    """

    out: Tensor
    gram: Tensor
    source: Tensor

    def entropy(self, turn: Tensor) -> Tensor:
        """Mean entropy of the rows of both, the heads turned by [heads, width, width]."""
        energy = torch.einsum("hgij,hik,hjk->hgk", self.gram, turn, turn)
        out = torch.einsum("rhgi,hik->rhgk", self.out, turn).square() * energy
        source = turn.mT @ self.source
        count = len(self.out) + self.source.shape[0] * self.source.shape[1]
        return (entropy(out.flatten(1)) + entropy(source.square())) / count
