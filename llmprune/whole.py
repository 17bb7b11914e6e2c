"""The walk for families that keep state outside their blocks: every block runs after all before it.

Gemma 3n and 4 hand keys and values of early blocks to late ones past the hidden state; others send the
hidden state through the same blocks twice. There a block cannot be run alone on a stored hidden state.
Instead the model's own forward runs from the tokens up to and including the block of interest, the earlier
blocks pruned already, and is then stopped.

The order is the same as in `llmprune.walk`, and so is what it costs in memory plus nothing stored; time
grows with the square of the depth. One thing differs: an earlier block runs again after it has settled
(`Done.settle`), so that later blocks are calibrated on the weights that are saved, not on what a method
like SparseGPT passes on before it brings weights back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from llmprune.errors import WalkError
from llmprune.walk import Walker, hidden_state, same, stopped


def checked_walker(
    model: nn.Module,
    layers: nn.ModuleList,
    batches: Sequence[Tensor],
    say: Callable[[str], None],
) -> Walker:
    """A walker that is known to be exact on `model`: block by block, or else from the beginning.

    Raises:
        WalkError: when neither gives what the model's plain forward gives.
    """
    walker = Walker(model, layers, batches)
    try:
        walker.self_check()
    except WalkError as alone:
        whole = WholeWalker(model, layers, batches)
        try:
            whole.self_check()
        except WalkError as error:
            raise WalkError(f"{error}; and {alone}") from error
        depth = len(layers)
        runs = depth * (depth + 1) // 2
        say(
            f"{type(model).__name__} keeps state outside its blocks ({alone}): every block is "
            "calibrated by a forward from the beginning, "
            f"{runs} runs of a block per window instead of {2 * depth - 1}"
        )
        return whole
    return walker


class WholeWalker(Walker):
    """Runs a block by running the whole model up to it; stored hidden states are not needed."""

    kind = "whole model"
    passes_on = False

    def __init__(self, model: nn.Module, layers: nn.ModuleList, batches: Sequence[Tensor]) -> None:
        super().__init__(model, layers, batches)
        self._again = False  # whether some block runs more than once in a forward

    def run(self, index: int, batch: int, hidden: Tensor | None) -> Tensor:
        """Output [batch, seqlen, width] of block `index`, all before it run first; `hidden` is not read.

        Where a forward goes through blocks more than once it runs to its end, and what the block gives
        last is returned.
        """
        out: list[Tensor] = []

        def see(module: nn.Module, args: Any, output: Any) -> None:
            out.append(hidden_state(output))
            if not self._again:
                stopped()

        handle = self.layers[index].register_forward_hook(see)
        try:
            self.forward(self.batches[batch])
        finally:
            handle.remove()
        if not out:
            raise WalkError(
                f"block {index} was not reached by the forward of {type(self.model).__name__}"
            )
        return out[-1]

    def rest(self, batch: int, hidden: Tensor | None) -> None:
        """The whole forward; `hidden` is not read."""
        self.forward(self.batches[batch])

    def self_check(self) -> None:
        """Compare each block's output on two windows with the model's plain forward.

        The forwards that are stopped early alternate between the windows, so that what one of them
        leaves behind for the next is of the wrong window and shows.

        Raises:
            WalkError: when the forward up to a block does not give what the plain forward gives there.
        """
        windows = self.two_windows()
        plain = [self._plain(window) for window in windows]
        self._again = any(len(calls) > 1 for calls in plain[0])
        single = WholeWalker(self.model, self.layers, windows)
        single._again = self._again
        for i in range(len(self.layers)):
            for w in range(2):
                out, expected = single.run(i, w, None), hidden_state(plain[w][i][-1])
                if not same(out, expected):
                    raise WalkError(
                        f"{type(self.model).__name__} gives other results for the same tokens in a second "
                        f"forward (at block {i}): it keeps state from one forward to the next, or is random"
                    )
