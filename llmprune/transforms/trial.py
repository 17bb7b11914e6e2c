"""Whether a change leaves a block's function as it was: done with made-up values, held against it, undone.

The transforms guess from names what faces what; this is where a wrong guess shows, on every block and before
anything is changed. What is compared is what the block adds to the residual stream, token by token: the
median over tokens, because rounding alone may send a token to another expert. Nothing is rounded here to the
dtype that it is saved in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.transforms.base import Change
from llmprune.transforms.sites import Block, Outside


def limit(dtype: torch.dtype) -> float:
    """Largest relative difference that rounding explains, in a compute dtype; a wrong guess gives about 1."""
    return 2e-3 if dtype.itemsize >= 4 else 0.1


def try_block(
    change: Change, block: Block, name: str, run: Callable[[], Tensor], random: torch.Generator
) -> None:
    """Refuse the parts of `change` that alter what `block` (called `name`) gives; `run` runs it alone."""
    taken: list[Tensor] = []
    with _input(block.module, taken.append):
        before = run()
    entering = taken[0]
    for part in list(change.active):
        with undone(block.module):
            turn = change.rehearse(part, block, random)
            if part in change.refused:
                continue
            with _input(block.module, partial(_turned, turn=turn)):
                after = run()
        added = _turned(before - entering, turn)
        difference = _median(after - _turned(entering, turn) - added, added)
        if not difference <= limit(before.dtype):
            change.refuse(
                part, f"{name} gives something else after it ({difference:.1g} of what it adds)"
            )


def _turned(x: Tensor, turn: Tensor | None) -> Tensor:
    return x if turn is None else (x.double() @ turn.to(x.device)).to(x.dtype)


def _median(difference: Tensor, whole: Tensor) -> float:
    own, of = (t.double().flatten(0, -2).norm(dim=1) for t in (difference, whole))
    return float((own / of.clamp_min(1e-30)).median())


@contextmanager
def _input(block: nn.Module, function: Callable[[Tensor], Any]) -> Iterator[None]:
    """While open, `function` sees the hidden state that enters `block`, and may give another."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            new = function(args[0])
            return ((args[0] if new is None else new, *args[1:]), kwargs)
        new = function(kwargs["hidden_states"])
        return (args, kwargs if new is None else {**kwargs, "hidden_states": new})

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def undone(root: nn.Module, skip: frozenset[nn.Module] = frozenset()) -> Iterator[None]:
    """While open, parameters of `root` may change; then they are as before, bit for bit, and tied."""
    before = [
        (module, name, parameter, parameter.data.clone())
        for module in root.modules()
        if module not in skip
        for name, parameter in module._parameters.items()
        if parameter is not None and not parameter.is_meta
    ]
    try:
        yield
    finally:
        for module, name, parameter, value in before:
            module._parameters[name] = parameter
            parameter.data.copy_(value)


def try_outside(
    change: Change,
    outside: Outside,
    first: Callable[[], Tensor],
    last: Callable[[Tensor | None], Tensor],
    random: torch.Generator,
    inside: frozenset[nn.Module],
) -> None:
    """Refuse the parts of `change` that alter what is outside of the blocks.

    Args:
        change: that is tried.
        outside: of the model.
        first: gives the hidden state that enters the first block.
        last: gives the logits, what the last block gives turned by a matrix first.
        random: for made-up values.
        inside: modules of the blocks, which are left alone.
    """
    entering, logits = first(), last(None)
    for part in list(change.active):
        with undone(outside.model, inside):
            turn = change.rehearse_outside(part, outside, random)
            if part in change.refused:
                continue
            differences = [
                ("what enters the first block", first() - _turned(entering, turn), entering),
                ("what the output head gives", last(turn) - logits, logits),
            ]
        for what, difference, whole in differences:
            if not (found := _median(difference, whole)) <= limit(whole.dtype):
                change.refuse(part, f"{what} is something else after it ({found:.1g} of it)")
