"""The walk's self-check for a model whose blocks are in memory one at a time.

A plain forward of the whole model is held against its blocks run alone, as in `Walker.self_check`, but in
step: each block is read once, runs in the plain forward, runs alone, and is released. The plain forward
runs in a twin, so that state which a block run alone leaves behind cannot reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.checkpoint.shelf import Shelf
from llmprune.errors import NotByBlock, WalkError
from llmprune.model import blocks
from llmprune.walk import (
    Walker,
    axis_of_windows,
    hidden_state,
    restore_forward,
    template,
    without_tensors,
)


def check_walk(
    shelf: Shelf,
    walker: Walker,
    progress: Callable[[int, int, str], None],
    look: Callable[[int], None] = lambda block: None,
) -> None:
    """Load what is outside the blocks, and hold the walk against the model's plain forward.

    Every block is read once for it. What is outside stays loaded. `walker` learns what its blocks return.

    Args:
        shelf: the model.
        walker: over that model.
        progress: told of each block.
        look: called with each block once it is loaded; may raise.

    Raises:
        NotByBlock: when a block run alone does not give exactly what it gives in the plain forward.
    """
    try:
        shelf.load_rest(torch.cat([b.flatten() for b in walker.batches]), head=False)
        check = _Check(shelf, walker, progress, look)
        with check.in_place():
            check.twin(input_ids=check.single.batches[0].to(walker.device), use_cache=False)
    except WalkError as error:
        raise NotByBlock(str(error)) from error
    for i in range(len(walker.layers)):
        if i not in check.reached:
            name = type(walker.model).__name__
            raise NotByBlock(f"block {i} of {name} takes no part in its forward")


class _Check:
    """The plain forward in a twin, and the same blocks run alone on two windows in turn."""

    def __init__(
        self,
        shelf: Shelf,
        walker: Walker,
        progress: Callable[[int, int, str], None],
        look: Callable[[int], None],
    ) -> None:
        self.shelf = shelf
        self.walker = walker
        self.progress = progress
        self.look = look
        self.reached: list[int] = []
        self.single = Walker(walker.model, walker.layers, walker.two_windows(), walker.device)
        self.single.extras = walker.extras
        self._hidden: list[Tensor | None] = [None, None]
        shared = (*shelf.model.parameters(), *shelf.model.buffers())
        self.twin: nn.Module = deepcopy(shelf.model, {id(t): t for t in shared})
        self.twins = blocks(self.twin)[1]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While open, the twin's forward loads, checks and releases each block that it reaches."""
        with ExitStack() as restore:
            for i, block in enumerate(self.twins):
                own = block.__dict__.get("forward")
                block.forward = self._at(i, block.forward)
                restore.callback(restore_forward, block, own)
            get_head: Any = getattr(self.twin, "get_output_embeddings", lambda: None)
            if isinstance(head := get_head(), nn.Module):  # not loaded, or a few rows of it
                restore.callback(restore_forward, head, head.__dict__.get("forward"))
                head.forward = lambda hidden, *args, **kwargs: hidden
            yield

    def _at(self, index: int, inner: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if index in self.reached:
                name = type(self.walker.model).__name__
                raise WalkError(f"block {index} of {name} runs twice in a forward")
            self.reached.append(index)
            self.progress(index, len(self.twins), "checking the walk")
            self.shelf.load(index)
            self.look(index)
            self._share(index)
            out = inner(*args, **kwargs)
            self._compare(index, out)
            self.shelf.release(index)
            self._share(index)
            return out

        return run

    def _compare(self, index: int, out: Any) -> None:
        """Run the block alone on both windows; `out` is what it returned in the plain forward."""
        if not isinstance(out, Tensor):
            self.walker.extras[index] = without_tensors(template(out))
        first = self._hidden[0]
        self._hidden[0] = self.walker.checked(self.single, index, 0, first, hidden_state(out))
        self._hidden[1] = self.single.run(index, 1, self._hidden[1])
        self.walker.axis = axis_of_windows(self._hidden[0])

    def _share(self, index: int) -> None:
        """Let the twin's block hold the parameters that the model's own now holds."""
        mine_all = list(self.shelf.layers[index].modules())
        theirs_all = list(self.twins[index].modules())
        if len(mine_all) != len(theirs_all):
            name = type(self.walker.model).__name__
            raise WalkError(
                f"block {index} of {name} has other modules after a forward than before"
            )
        for mine, theirs in zip(mine_all, theirs_all, strict=True):
            theirs._parameters = dict(mine._parameters)
            theirs._buffers = dict(mine._buffers)
