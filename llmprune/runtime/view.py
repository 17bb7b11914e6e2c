"""What stands where a dense parameter stood: multiplied, it stays packed; used otherwise, it expands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from llmprune.checkpoint.census import Axis
from llmprune.kernels.choice import EXPAND
from llmprune.kernels.interface import Case, Mixture
from llmprune.kernels.packed import Packed
from llmprune.kernels.sparse_linear import expanded, sparse_linear


class View:
    """Looks like a tensor to torch's functions. Those that it does not know get its dense form."""

    def expanded(self) -> Tensor:
        """The dense tensor, in new memory; values that are trained get its gradient."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """A product with a view on its right runs packed."""
        kwargs = kwargs or {}
        if len(args) > 1 and isinstance(args[0], Tensor) and isinstance(args[1], View):
            out = args[1].multiplied(func, args[0], *args[2:], **kwargs)
            if out is not NotImplemented:
                return out
        dense = (a.expanded() if isinstance(a, View) else a for a in args)
        return func(*dense, **{k: _dense(v) for k, v in kwargs.items()})

    def multiplied(self, func: Callable[..., Any], x: Tensor, *more: Any, **named: Any) -> Any:
        """`func(x, self, *more, **named)`, or NotImplemented."""
        return NotImplemented

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.expanded(), name)


def _dense(value: Any) -> Any:
    return value.expanded() if isinstance(value, View) else value


_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)


@dataclass(frozen=True, eq=False)
class PackedMatrix(View):
    """A packed matrix.

    Attributes:
        packed: [rows, columns].
        pattern: `n:m`, which every group holds, or `unstructured`.
        axis: along which its groups lie.
        flipped: whether what is seen is its transpose.
    """

    packed: Packed
    pattern: str
    axis: Axis
    flipped: bool = False

    kernel: ClassVar[str] = EXPAND.name  # the stored form of all experts has no other layout

    @property
    def shape(self) -> torch.Size:
        """As it is seen."""
        shape = self.packed.shape
        return torch.Size(shape[::-1] if self.flipped else shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.packed.values.dtype

    @property
    def device(self) -> torch.device:
        """Of the values."""
        return self.packed.values.device

    @property
    def T(self) -> PackedMatrix:
        """Its transpose, nothing moved."""
        return PackedMatrix(self.packed, self.pattern, self.axis, not self.flipped)

    def t(self) -> PackedMatrix:
        """Its transpose."""
        return self.T

    def expanded(self) -> Tensor:
        """See `View.expanded`."""
        dense = expanded(self.packed.values, self.packed.bitmap, self.packed.shape)
        return dense.T if self.flipped else dense

    def case(self, tokens: int) -> Case:
        """What a kernel is asked to do for inputs of so many tokens."""
        rows, columns = self.packed.shape
        values = self.packed.values
        return Case(
            (rows, columns),
            values.shape[0],
            values.dtype,
            values.device,
            self.pattern,
            self.axis,
            self.flipped,
            tokens,
            values.requires_grad,
        )

    def times(self, x: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        """The product x @ stored + bias where `transposed`, else x @ stored.T + bias."""
        layout = [self.packed.values, self.packed.bitmap]
        return sparse_linear(x, layout, bias, self.kernel, self.packed.shape, transposed)

    def multiplied(self, func: Callable[..., Any], x: Tensor, *more: Any, **named: Any) -> Any:
        """Linear layers and plain products."""
        if func is F.linear and set(named) <= {"bias"}:
            return self.times(x, more[0] if more else named.get("bias"), self.flipped)
        if func in _PRODUCTS and not more and not named:
            return self.times(x, None, not self.flipped)
        return NotImplemented


@dataclass(frozen=True, eq=False)
class PackedStack(View):
    """The packed matrices of all experts.

    Attributes:
        matrices: gives one of them by its number.
        experts: how many there are.
        flipped: whether what is seen of each is its transpose.
        case: what a kernel for all of them is asked to do for inputs of so many tokens.
        kernel: the form that they are held in; None where they are stored as in a file.
    """

    matrices: Callable[[int], PackedMatrix]
    experts: int
    flipped: bool
    case: Callable[[int], Mixture]
    kernel: str | None

    def __len__(self) -> int:
        return self.experts

    def __getitem__(self, which: Any) -> Any:
        """One expert, packed; for anything but one number, what the dense tensor gives."""
        one = isinstance(which, int) or (
            isinstance(which, Tensor) and which.dim() == 0 and which.dtype != torch.bool
        )
        if not one:
            return self.expanded()[which]
        number = int(which)
        if not -self.experts <= number < self.experts:
            raise IndexError(f"expert {number} of {self.experts}")
        matrix = self.matrices(number % self.experts)
        return matrix.T if self.flipped else matrix

    @property
    def shape(self) -> torch.Size:
        """As it is seen."""
        return torch.Size((self.experts, *self[0].shape))

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self[0].dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """Of the values."""
        return self[0].device  # type: ignore[no-any-return]

    def dim(self) -> int:
        """Three."""
        return 3

    def transpose(self, first: int, second: int) -> Any:
        """Each expert turned around, nothing moved; other dimensions as the dense tensor does."""
        if {first % 3, second % 3} == {1, 2}:
            return replace(self, flipped=not self.flipped)
        return self.expanded().transpose(first, second)

    def expanded(self) -> Tensor:
        """See `View.expanded`."""
        return torch.stack([self[expert].expanded() for expert in range(self.experts)])

    def multiplied(self, func: Callable[..., Any], x: Tensor, *more: Any, **named: Any) -> Any:
        """One product per expert."""
        alike = x.dim() == 3 and x.shape[0] == self.experts and not more and not named
        if alike and func in (torch.bmm, Tensor.bmm, *_PRODUCTS):
            return torch.stack([torch.matmul(x[e], self[e]) for e in range(self.experts)])
        return NotImplemented
