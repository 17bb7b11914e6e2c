"""Perplexity of a model on the shelf: one block in memory at a time, all windows through each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmprune.activations import Activations
from llmprune.checkpoint.shelf import Shelf
from llmprune.eval.perplexity import Losses, check_losses, window_losses
from llmprune.lockstep import check_walk
from llmprune.memory import SLACK, Budget, of_model
from llmprune.parallel import Ranks
from llmprune.preserve import evaluating
from llmprune.progress import Bar
from llmprune.sweep import pass_on
from llmprune.walk import Walker


def losses_by_block(shelf: Shelf, budget: Budget, folder: Path | None = None) -> Losses:
    """A way to the losses for `llmprune.eval.perplexity.perplexity` that never holds the model.

    Args:
        shelf: the model.
        budget: memory that may be used; hidden states that do not fit lie in `folder`.
        folder: for temporary files; None is the system's.
    """

    def losses(model: Any, windows: Tensor, batch_size: int, progress: bool) -> Tensor:
        batches = list(torch.split(windows, batch_size))
        walker = Walker(shelf.model, shelf.layers, batches, shelf.device)
        depth = len(shelf.layers)
        steps = depth * (len(batches) + 1) + len(batches)
        with (
            tempfile.TemporaryDirectory(dir=folder, prefix="perplexity-") as place,
            evaluating(shelf.model),
            torch.no_grad(),
            Bar(steps, "perplexity", enabled=progress) as bar,
        ):
            hidden = Activations(Path(place), len(batches), rooms(shelf, budget), shelf.device)
            check_walk(shelf, walker, bar.step)
            _through_blocks(shelf, walker, hidden, bar.step)
            shelf.release_rest()
            shelf.load_rest(None, head=True)
            found: list[Tensor] = []
            for b, ids in enumerate(batches):
                bar.step(depth, depth, f"window {b + 1}/{len(batches)}")
                logits = walker.logits(b, hidden[b])
                found.append(window_losses(logits, ids.to(logits.device)).cpu())
                check_losses(found[-1], b * batch_size)
            shelf.release_rest()
        return torch.cat(found)

    return losses


def _through_blocks(
    shelf: Shelf, walker: Walker, hidden: Activations, step: Callable[[int, int, str], None]
) -> None:
    depth = len(shelf.layers)
    for index in range(depth):
        shelf.load(index)
        hidden.begin(index)
        pass_on(walker, index, hidden, partial(step, index, depth))
        hidden.commit()
        hidden.forget_old()
        shelf.release(index)


def rooms(shelf: Shelf, budget: Budget) -> list[tuple[torch.device, int]]:
    """Where hidden states may stay beside one block or the output head."""
    block = max(of_model(layer) for layer in shelf.layers)
    rooms = [(shelf.device, budget.device - block - SLACK)]
    if shelf.device.type != "cpu":
        rooms.append((torch.device("cpu"), budget.memory - SLACK))
    return rooms


def share_windows(losses: Losses, ranks: Ranks) -> Losses:
    """A way to the losses where each process takes some of the windows."""

    def share(model: Any, windows: Tensor, batch_size: int, progress: bool) -> Tensor:
        batches = torch.split(windows, batch_size)[ranks.span(-(-len(windows) // batch_size))]
        found = [losses(model, torch.cat(batches), batch_size, progress)] if batches else []
        return torch.cat([part for some in ranks.gather(found) for part in some])

    return losses if ranks.world == 1 else share
