"""The dense form of a packed weight, which writes back where it is written to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

_OPERATORS = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__"}


class Holder(Protocol):
    """What holds a packed weight."""

    def write(self, dense: Tensor) -> None:
        """Give kept weights the values of `dense` in their places."""


class Expanded(Tensor):
    """A dense copy of a packed weight.

    Operations on it give plain tensors. An operation in place, and an assignment to its `data`, reach
    the layer: kept weights take the new values, the others stay zero. So PEFT merges its adapters
    (`layer.weight.data += delta`) without losing the mask. What is written to a view of it, such as its
    transpose, does not reach the layer.
    """

    holder: Holder
    _is_hf_initialized = True  # transformers' initialisers leave alone what is marked so

    @staticmethod
    def of(holder: Holder, dense: Tensor) -> Expanded:
        """`dense` as the weight of `holder`."""
        made = dense.as_subclass(Expanded)
        made.holder = holder
        return made

    @property
    def data(self) -> Tensor:
        """The same, outside of autograd."""
        with torch._C.DisableTorchFunctionSubclass():
            return Expanded.of(self.holder, self.detach())

    @data.setter
    def data(self, dense: Tensor) -> None:
        self.holder.write(dense)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func` as on a plain tensor, then write back what it changed."""
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
            changed = args[0] if args and _in_place(func.__name__) else (kwargs or {}).get("out")
            if isinstance(changed, Expanded):
                changed.holder.write(changed)
        return out


def _in_place(name: str) -> bool:
    """Whether a function of this name changes its first argument."""
    return name in _OPERATORS or (name.endswith("_") and not name.endswith("__"))
