"""What a method learns of a layer's inputs while calibration data passes through it.

Statistics belong to an *input*, not to a matrix: q, k and v read the same hidden states and share one
object, and so does everything that is derived from the statistics alone. They are plain float32 sums
over tokens, so that `merge` makes several batches, or several processes, one.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, Protocol, Self, cast, runtime_checkable

import torch
from torch import Tensor

from llmprune.errors import NumericalError


@runtime_checkable
class Stats(Protocol):
    """An accumulator for one input; `add` sees each batch once."""

    needs_data: ClassVar[bool]
    tokens: int

    @classmethod
    def empty(cls, features: int, device: torch.device) -> Self:
        """Sums over no tokens, for inputs of `features` values, kept on `device`."""

    def add(self, inputs: Tensor) -> None:
        """Add a batch of inputs [..., features] of any floating dtype."""

    def merge(self, other: Self) -> None:
        """Add what another accumulator of the same input has seen."""

    def finite(self) -> bool:
        """False when a NaN or Inf has reached the sums."""


class NoStats:
    """For methods that look at the weights alone: no data passes through the model for them."""

    needs_data: ClassVar[bool] = False

    def __init__(self) -> None:
        self.tokens = 0

    @classmethod
    def empty(cls, features: int, device: torch.device) -> Self:
        """Nothing."""
        return cls()

    def add(self, inputs: Tensor) -> None:
        """Count the tokens."""
        self.tokens += inputs.numel() // inputs.shape[-1]

    def merge(self, other: Self) -> None:
        """Count the other's tokens too."""
        self.tokens += other.tokens

    def finite(self) -> bool:
        """Always: nothing was summed."""
        return True


class InputNorms:
    """Sum of squares of each input feature.

    Attributes:
        sum_sq: [features] float32, sum over tokens.
        tokens: how many tokens were added.
    """

    needs_data: ClassVar[bool] = True

    def __init__(self, sum_sq: Tensor) -> None:
        self.sum_sq = sum_sq
        self.tokens = 0

    @classmethod
    def empty(cls, features: int, device: torch.device) -> Self:
        """Zero sums."""
        return cls(torch.zeros(features, device=device))

    def add(self, inputs: Tensor) -> None:
        """Add the squares of a batch [..., features]."""
        x = inputs.detach().reshape(-1, inputs.shape[-1])
        x = (
            x.float() if x.dtype == torch.float64 else x
        )  # torch widens while it sums, never narrows
        self.sum_sq += torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square_()
        self.tokens += x.shape[0]

    def merge(self, other: Self) -> None:
        """Add the other's sums."""
        self.sum_sq += other.sum_sq.to(self.sum_sq.device)
        self.tokens += other.tokens

    def finite(self) -> bool:
        """Whether every sum is finite."""
        return bool(self.sum_sq.isfinite().all())

    @property
    def norm(self) -> Tensor:
        """Euclidean norm of each feature over the tokens: [features] float32."""
        return self.sum_sq.sqrt()


class Gram:
    """X^T X of the inputs X [tokens, features].

    Attributes:
        gram: [features, features] float32, sum over tokens.
        tokens: how many tokens were added.
    """

    needs_data: ClassVar[bool] = True

    def __init__(self, gram: Tensor) -> None:
        self.gram = gram
        self.tokens = 0
        self._derived: dict[Any, Any] = {}

    @classmethod
    def empty(cls, features: int, device: torch.device) -> Self:
        """Zero sums."""
        return cls(torch.zeros(features, features, device=device))

    def add(self, inputs: Tensor) -> None:
        """Add x^T x of a batch [..., features], multiplied in float32."""
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.gram.addmm_(x.T, x)
        self.tokens += x.shape[0]

    def merge(self, other: Self) -> None:
        """Add the other's sums."""
        self.gram += other.gram.to(self.gram.device)
        self.tokens += other.tokens

    def finite(self) -> bool:
        """Whether every sum is finite; a NaN or Inf input always reaches the diagonal."""
        return bool(self.gram.diagonal().isfinite().all())

    def inverse_factor(self, damping: float) -> InverseFactor:
        """The upper Cholesky factor of the inverse of the damped Gram matrix, computed once.

        Raises:
            NumericalError: when the matrix is not positive definite even at the damping limit.
        """
        key = ("inverse_factor", damping)
        if key not in self._derived:
            self._derived[key] = InverseFactor.of(self.gram, damping)
        return cast(InverseFactor, self._derived[key])


class InverseFactor:
    """U with (G + damping * mean(diag G) * I)^-1 = U^T U, U upper triangular.

    Attributes:
        upper: [features, features] float32.
        dead: [features] bool, features that were zero on every token.
        damping: the damping that was needed, a share of the mean of the live diagonal.
        raised: how often it had to be raised tenfold above what was asked.
    """

    LIMIT = 1.0  # a matrix that needs more is not a Gram matrix of usable inputs

    def __init__(self, upper: Tensor, dead: Tensor, damping: float, raised: int) -> None:
        self.upper = upper
        self.dead = dead
        self.damping = damping
        self.raised = raised

    @classmethod
    def of(cls, gram: Tensor, damping: float) -> Self:
        """Factor `gram` [features, features], raising `damping` tenfold until it succeeds.

        One Cholesky of the matrix in reversed order gives G = V V^T with V upper triangular, and
        U = V^-1: half the work of inverting and factoring again, and no explicit inverse to round. In
        float64, because the rounding of a float32 factor alone turns one mask bit in a thousand at 60%
        on a 5M-parameter Llama.
        """
        diagonal = gram.diagonal().double()
        dead = diagonal == 0
        live_mean = diagonal[~dead].mean() if not bool(dead.all()) else diagonal.new_ones(())
        raised = 0
        while True:
            damped = gram.double().flip(0, 1)
            damped.diagonal().copy_(diagonal.where(~dead, live_mean).flip(0))
            damped.diagonal().add_(live_mean, alpha=damping)
            lower, info = torch.linalg.cholesky_ex(damped)
            if int(info) == 0 and bool(lower.diagonal().isfinite().all()):
                break
            if damping * 10 > cls.LIMIT:
                raise NumericalError(
                    f"the Gram matrix is not positive definite even at damping {damping:g} "
                    f"(limit {cls.LIMIT:g}); use more calibration samples or check the activations"
                )
            damping, raised = max(damping, 1e-6) * 10, raised + 1
        eye = torch.eye(gram.shape[0], dtype=lower.dtype, device=gram.device)
        upper = torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1)
        return cls(upper.to(gram.dtype), dead, damping, raised)


class InputSample:
    """A few of the tokens that reach a layer, to measure what pruning did to its output.

    Attributes:
        tokens: how many tokens were seen.
    """

    SIZE = 512  # tokens kept; the error they give is within a few percent of the error over all

    def __init__(self, every: int) -> None:
        self.every = every
        self.tokens = 0
        self._rows: list[Tensor] = []

    @classmethod
    def of(cls, total: int) -> Self:
        """A sample spread evenly over `total` tokens."""
        return cls(max(1, total // cls.SIZE))

    def add(self, inputs: Tensor) -> None:
        """Keep every so-manieth token of a batch [..., features], wherever batches begin."""
        x = inputs.detach().reshape(-1, inputs.shape[-1])
        self._rows.append(x[(-self.tokens) % self.every :: self.every].clone())
        self.tokens += x.shape[0]

    @cached_property
    def inputs(self) -> Tensor:
        """The kept tokens [about SIZE, features]."""
        return torch.cat(self._rows)

    def error(self, dense: Tensor, pruned: Tensor) -> float:
        """||X (W - B)^T||^2 / ||X W^T||^2 for weights W, B [out, features], in float32."""
        x = self.inputs.float()
        change = (x @ (dense.float() - pruned.float()).T).square().sum()
        return float(change / (x @ dense.float().T).square().sum().clamp_min(1e-30))
