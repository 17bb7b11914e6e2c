"""Sees what enters fused experts, whatever the family's forward looks like.

While a module of experts runs, every matrix product that takes (a slice of) its parameter is seen, and
the other operand is what enters that expert.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llmprune.errors import WalkError

See = Callable[[str, int, Tensor], None]
"""Called with the name of a parameter, an expert, and the tokens [n, in] that enter it."""


@contextmanager
def watching(
    module: nn.Module, flipped: Mapping[str, bool], see: See, every: Iterable[int] | None = None
) -> Iterator[None]:
    """While open, every forward of `module` tells `see` the tokens that enter each expert.

    Args:
        module: holds fused experts.
        flipped: for each of its parameters of interest, whether it is stored [experts, in, out].
        see: gets only tokens that were routed to the expert, or with `every` all tokens.
        every: experts that are to see all tokens; the output of `module` is the routed one.

    Raises:
        WalkError: in the forward, when a parameter is used in a way that hides what enters it.
    """
    watch = _Watch(module, flipped, see)
    run = watch.entered if every is None else _flooded(watch, list(every))
    with _around(module, run):
        yield


@contextmanager
def learning(module: nn.Module, attribute: str, flipped: list[bool]) -> Iterator[None]:
    """While open, a forward adds to `flipped` whether a parameter turns out as [experts, in, out]."""

    def note(name: str, expert: int, tokens: Tensor) -> None:
        flipped.append(watch.flipped[name])

    watch = _Watch(module, {attribute: None}, note)
    with _around(module, watch.entered):
        yield


def _flooded(watch: _Watch, every: list[int]) -> Callable[..., Any]:
    """Run the routed forward, then each expert once more on all tokens, watched and forgotten."""

    def run(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        routed = inner(*args, **kwargs)
        given = inspect.signature(inner).bind(*args, **kwargs).arguments
        hidden, index, weights = list(given.values())[:3]
        for expert in every:
            here = index.new_full((*index.shape[:-1], 1), expert)
            watch.entered(inner, hidden, here, weights.new_ones(here.shape))
        return routed

    return run


@contextmanager
def _around(module: nn.Module, run: Callable[..., Any]) -> Iterator[None]:
    """While open, a forward of `module` is `run(its own forward, ...)`."""
    own, inner = module.__dict__.get("forward"), module.forward
    module.forward = lambda *args, **kwargs: run(inner, *args, **kwargs)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def _eager(module: nn.Module) -> Iterator[None]:
    """While open, transformers runs the experts one by one, not all in one grouped product."""
    config = getattr(module, "config", None)
    key = "_experts_implementation_internal"
    if config is None or key not in vars(config):
        yield
        return
    before = vars(config)[key]
    vars(config)[key] = "eager"
    try:
        yield
    finally:
        vars(config)[key] = before


@dataclass(frozen=True)
class _Place:
    """Where a parameter [experts, ., .] lies in memory."""

    name: str
    storage: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> _Place:
        storage = tensor.untyped_storage().data_ptr()
        return cls(
            name, storage, int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride())
        )

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` is a view of the parameter."""
        if tensor.untyped_storage().data_ptr() != self.storage:
            return False
        size = self.shape[0] * self.stride[0]
        return self.offset <= tensor.storage_offset() < self.offset + size


_FACTORS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # which operands: this one and the next


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the matrix products that take a fused parameter, below whatever Python call made them.

    `linear`, `@`, `einsum` and the rest all arrive here as one of four products.
    """

    def __init__(self, module: nn.Module, flipped: Mapping[str, bool | None], see: See) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.module = module
        self.flipped: dict[str, Any] = dict(flipped)
        self.see = see
        self.places: list[_Place] = []

    def entered(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `inner` with every operation under watch."""
        self.places = [_Place.of(n, getattr(self.module, n)) for n in self.flipped]
        with _eager(self.module), self:
            return inner(*args, **kwargs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # called by torch for every operation
        out = func(*args, **(kwargs or {}))
        tensors = [a for a in args if isinstance(a, Tensor)]
        for place in self.places:
            if any(place.holds(t) for t in tensors):
                self._used(place, func, args, out)
        return out

    def _used(self, place: _Place, func: Any, args: Any, out: Any) -> None:
        """A parameter was an operand of `func`: a view of it, a product, or something unknown."""
        first = _FACTORS.get(func.overloadpacket.__name__)
        if first is not None:
            left, right = args[first], args[first + 1]
            if place.holds(right):
                self._product(place, left, right)
            elif place.holds(left):
                self._product(place, right.transpose(-1, -2), left.transpose(-1, -2))
        elif any(isinstance(o, Tensor) and not place.holds(o) for o in _outputs(out)):
            raise self._hidden(place, f"in {func}")

    def _product(self, place: _Place, tokens: Tensor, weight: Tensor) -> None:
        """`tokens` [..., n, in] were multiplied by `weight` [..., in, out], a view of the parameter."""
        strides = weight.stride()[-2:]
        if strides not in (place.stride[1:], place.stride[:0:-1]):
            raise self._hidden(place, f"as a view with strides {weight.stride()}")
        flipped = strides == place.stride[1:]  # the first of the two is summed over
        if self.flipped[place.name] is None:
            self.flipped[place.name] = flipped
        if flipped != self.flipped[place.name]:
            raise WalkError(
                f"{type(self.module).__name__}.{place.name} is stored "
                f"[experts, {'in, out' if flipped else 'out, in'}], against what its shape and class say"
            )
        out, features = place.shape[:0:-1] if flipped else place.shape[1:]
        if weight.shape[-2] != features or weight.shape[-1] > out:
            raise self._hidden(place, f"as a view of shape {tuple(weight.shape)}")
        expert, rest = divmod(int(weight.storage_offset()) - place.offset, place.stride[0])
        if rest:  # more rows of the same expert: what enters them was counted with the first
            return
        if weight.dim() == 2:
            self.see(place.name, expert, tokens)
            return
        if len(weight) > 1 and weight.stride(0) != place.stride[0]:
            raise self._hidden(place, f"as a view with strides {weight.stride()}")
        for i in range(len(weight)):
            routed = tokens[i][tokens[i].any(-1)]  # zeros stand for tokens sent to other experts
            if len(routed):
                self.see(place.name, expert + i, routed)

    def _hidden(self, place: _Place, how: str) -> WalkError:
        kind = type(self.module).__name__
        return WalkError(
            f"{kind} uses {place.name} {how}, which does not show what enters each expert; "
            "leave it out with --ignore"
        )


def _outputs(out: Any) -> list[Any]:
    return list(out) if isinstance(out, tuple | list) else [out]
