"""Windows of text that the dense model writes itself, to be calibrated on beside those that are given.

A block that is tuned for long on few windows learns them by heart: its error on those is below that on others
(`learnt` and `held_out` of the cells in benchmarks/results/frontier.json). More text mends that, and a model
can write it: what it is likely to write is where its outputs have to stay as they were. Text of the model's
own to calibrate on is in Williams & Aletras 2024, arXiv 2410.17170; there it takes the place of real
text.

Each window goes on from a few tokens of a given one, so that it is about as diverse as those are, and every
token is drawn from the model's own predictions at temperature 1. What a checkpoint asks for when it is talked
to (its `generation_config`: temperature, end tokens, penalties) plays no part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.calibration import Calibration
from llmprune.errors import DataError, ModelError
from llmprune.model import check_vocabulary
from llmprune.progress import Bar

PROMPT = 8  # tokens of a given window that one begins with, at most half of it: a choice
TOGETHER = 16384
"""Tokens written at once, in whole windows. What is drawn depends on it, so no option changes it."""
WITHOUT = "leave --generate out"


def windows(given: int, share: float) -> int:
    """How many are written for so many `given` ones: at least one, but for a share of 0."""
    return math.ceil(given * share)


def generated(
    model: nn.Module, given: Calibration, share: float, seed: int, *, progress: bool
) -> Calibration:
    """`given` and, behind it, windows that `model` writes; the same ones for the same seed and device.

    The global random state is used: callers keep theirs with `llmprune.preserve.random_state`.

    Args:
        model: dense, in eval mode; as it was afterwards.
        given: windows that none is written behind yet.
        share: windows to write for each given one.
        seed: of what is drawn.
        progress: show a bar.

    Raises:
        ModelError: when it cannot write.
    """
    starts = prompts(given.ids, windows(len(given.ids), share))
    length = given.ids.shape[1]
    groups = torch.split(starts, max(1, TOGETHER // length))
    torch.manual_seed(seed)
    with (
        _plain(model, length) as settings,
        Bar(
            len(groups) * (length - starts.shape[1]), "writing text", unit="group", enabled=progress
        ) as bar,
    ):
        written = []
        for index, group in enumerate(groups):
            ticks = _Ticks(bar, index, len(groups), length)
            written.append(_continued(model, group, settings, ticks))
    found = torch.cat(written)
    try:
        check_vocabulary(found, "what the model has written", model)
    except DataError as error:
        raise ModelError(f"{error}; {WITHOUT}") from error
    return replace(given, ids=torch.cat([given.ids, found]), written=len(found))


def prompts(ids: Tensor, count: int) -> Tensor:
    """The beginnings [count, PROMPT or fewer] of windows to write, from those of `ids` [given, seqlen].

    Where fewer are wanted than there are, they are of windows spread over all; where more, from further on
    in the windows too.
    """
    given, length = ids.shape
    size = min(PROMPT, length // 2)
    rounds = max(1, math.ceil(count / given))
    found = []
    for turn in range(rounds):
        some = min(given, count - turn * given)
        rows = torch.arange(some) * given // some
        at = turn * (length - size) // rounds
        found.append(ids[rows, at : at + size])
    return torch.cat(found)


class _Ticks:
    """Steps of a bar, as transformers hands on the tokens it draws."""

    def __init__(self, bar: Bar, group: int, groups: int, length: int) -> None:
        self.bar, self.at, self.length = bar, (group, groups), length
        self.begun = False

    def put(self, tokens: Tensor) -> None:
        """The prompts first, then a token for each window."""
        if self.begun:
            self.bar.step(*self.at, f"of windows of {self.length} tokens")
        self.begun = True

    def end(self) -> None:
        """All is written."""


def _continued(model: Any, group: Tensor, settings: Any, ticks: _Ticks) -> Tensor:
    """Windows [n, seqlen] that go on from `group` [n, tokens]; on the CPU.

    Raises:
        ModelError: when the model writes none.
    """
    name = type(model).__name__
    if not callable(getattr(model, "generate", None)):
        raise ModelError(f"{name} has no generate(), so it writes no text; {WITHOUT}")
    ids = group.to(next(model.parameters()).device)
    try:
        out: Tensor = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=ticks
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # it runs code of the family's own
        why = " ".join(str(error).split())[:160]
        raise ModelError(
            f"{name} writes no text: {type(error).__name__}, {why}; {WITHOUT}"
        ) from error
    wanted = settings.max_length
    if out.shape != (len(group), wanted):
        raise ModelError(f"{name} wrote {list(out.shape)}, not windows of {wanted}; {WITHOUT}")
    return out.cpu()


@contextmanager
def _plain(model: Any, length: int) -> Iterator[Any]:
    """Settings under which text is drawn as the model predicts it; its own do not count while open."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_length=length, pad_token_id=0
    )
    own = getattr(model, "generation_config", None)
    if own is not None:
        model.generation_config = settings
    try:
        yield settings
    finally:
        if own is not None:
            model.generation_config = own
