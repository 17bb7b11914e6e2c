"""The n:m that the kept weights of a matrix really hold."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.checkpoint.census import Axis, take
from llmprune.errors import ConfigError
from llmprune.pattern import NM, parse

UNSTRUCTURED = "unstructured"


def tightest(bits: Tensor, axes: tuple[Axis, ...]) -> tuple[str, Axis]:
    """The tightest `n:m` that every group of kept weights holds, and the axis of its groups.

    Args:
        bits: bool [..., rows, columns], True is kept.
        axes: orientations to try, the preferred one first, which `unstructured` gets too.
    """
    # a kept zero counts as kept, so the bits are looked at, and not the weights
    found = take(bits.contiguous().view(torch.float8_e4m3fn), axes)
    if found.pattern is None or found.axis is None:
        return UNSTRUCTURED, "rows"
    n, m = found.pattern
    return f"{n}:{m}", found.axis


def check_pattern(bits: Tensor, pattern: str, axes: tuple[Axis, ...]) -> tuple[str, Axis]:
    """The same for a pattern that the user names.

    Raises:
        ConfigError: for what is neither `unstructured` nor an n:m that holds along one of the axes.
    """
    if pattern == UNSTRUCTURED:
        return pattern, "rows"
    parsed = parse(pattern)
    if not isinstance(parsed, NM):
        raise ConfigError(f"pattern {pattern!r} is none; give n:m, or {UNSTRUCTURED!r}")
    for axis in axes:
        lined = bits if axis == "rows" else bits.transpose(-1, -2)
        if lined.shape[-1] % parsed.m == 0:
            most = int(lined.reshape(-1, parsed.m).sum(1).max())
            if most <= parsed.n:
                return pattern, axis
    raise ConfigError(f"the weights do not hold {pattern}; leave the pattern out to have it found")
