"""Single blocks of a model, run through the model's own forward.

To run block i alone, the model's own forward is called with every other block skipped: blocks before it
give their input back untouched, the one just before it gives the stored hidden state, block i runs with
whatever arguments the model itself passes, and then the forward is stopped. Masks, rotary tables and
per-layer arguments are thus always the model's own, for any family. A self-check holds this against one
plain forward before a weight is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Literal, NoReturn, Protocol, cast

import torch
from torch import Tensor, nn

from llmprune.errors import WalkError
from llmprune.model import Matrix


class _Stop(Exception):
    """Ends a forward once the block of interest has run."""


def stopped() -> NoReturn:
    """End the forward that is running; `Walker.forward` returns."""
    raise _Stop


def hidden_state(output: Any) -> Tensor:
    """The hidden state in what a block returns: a tensor, or the first of a tuple or list."""
    return cast(Tensor, output if isinstance(output, Tensor) else output[0])


class HiddenStates(Protocol):
    """The input of the current block for every batch; what is set is the input of the next one."""

    def __getitem__(self, batch: int, /) -> Tensor | None:
        """[batch, seqlen, width], or None before the first block."""

    def __setitem__(self, batch: int, hidden: Tensor, /) -> None:
        """Keep the output of the current block."""


class Walker:
    """Runs single blocks of a model on stored hidden states.

    Attributes:
        model: the whole model; its parameters are never changed here.
        layers: its decoder blocks.
        batches: token ids, each [batch, seqlen] int64, on any device.
        kind: what a block's run starts from, for the report.
        passes_on: whether a block's run needs the stored output of the block before.
        extras: what each block returns beside its hidden state, learnt by the self-check.
        axis: of hidden states, along which windows lie: 1 where positions come first, as in XLNet; None
            where windows do not lie apart. Learnt by the self-check.
    """

    kind: ClassVar[Literal["blocks", "whole model"]] = "blocks"
    passes_on: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        layers: nn.ModuleList,
        batches: Sequence[Tensor],
        device: torch.device | None = None,
    ) -> None:
        """`device` is where the model runs; None reads it off the parameters."""
        self.model = model
        self.layers = layers
        self.batches = batches
        self.device = device or next(model.parameters()).device
        self.extras: list[Any] = [None] * len(layers)
        self.axis: int | None = 0

    def forward(self, ids: Tensor) -> None:
        """The model's own forward on `ids` [batch, seqlen], up to where a block stops it."""
        try:
            self.model(input_ids=ids.to(self.device), use_cache=False)
        except _Stop:
            return

    def _wrap(self, index: int, hidden: Tensor) -> Any:
        """`hidden` in the container that block `index` returns it in."""
        template = self.extras[index]
        return hidden if template is None else type(template)([hidden, *template[1:]])

    @contextmanager
    def only(
        self, index: int, hidden: Tensor | None, then: Callable[[Tensor], None] | None
    ) -> Iterator[None]:
        """While open, a forward runs block `index` alone and hands its hidden state to `then`.

        `hidden` is the output of the block before; None for the first block. `index` may be one past
        the last block: then no block runs and the rest of the model follows on `hidden`.
        """
        with ExitStack() as restore:
            for i, block in enumerate(self.layers):
                own = block.__dict__.get("forward")
                inner = block.forward
                if i == index:
                    block.forward = _running(inner, then)
                elif i == index - 1:
                    block.forward = _giving(self._wrap(i, cast(Tensor, hidden)))
                else:
                    block.forward = self._skipping(i)
                restore.callback(restore_forward, block, own)
            yield

    def _skipping(self, index: int) -> Callable[..., Any]:
        def skip(*args: Any, **kwargs: Any) -> Any:
            return self._wrap(index, args[0] if args else kwargs["hidden_states"])

        return skip

    def run(self, index: int, batch: int, hidden: Tensor | None) -> Tensor:
        """Output [batch, seqlen, width] of block `index` on the stored output of the block before."""
        return self.run_on(index, self.batches[batch], hidden)

    def run_on(self, index: int, ids: Tensor, hidden: Tensor | None) -> Tensor:
        """The same for any windows `ids` [batch, seqlen], whose stored output is `hidden`."""
        out: list[Tensor] = []
        with self.only(index, hidden, out.append):
            self.forward(ids)
        if not out:
            raise WalkError(
                f"block {index} was not reached by the forward of {type(self.model).__name__}"
            )
        return out[0]

    def rest(self, batch: int, hidden: Tensor | None) -> None:
        """Everything but the blocks, on the last block's output."""
        with self.only(len(self.layers), hidden, None):
            self.forward(self.batches[batch])

    def logits(self, batch: int, hidden: Tensor | None) -> Tensor:
        """Logits [batch, seqlen, vocabulary] on the last block's output."""
        return self.logits_on(self.batches[batch], hidden)

    def logits_on(self, ids: Tensor, hidden: Tensor | None) -> Tensor:
        """The same for any windows `ids` [batch, seqlen]."""
        with self.only(len(self.layers), hidden, None):
            output = self.model(input_ids=ids.to(self.device), use_cache=False)
            return cast(Tensor, output.logits)

    def steps(self, matrices: Sequence[Matrix], repair: int | None = None) -> int:
        """How often `prune_blocks` reports progress on `matrices`.

        At most, where each block is repaired, in `repair` steps.
        """
        inside = {m.block for m in matrices if m.block is not None}
        outside = len(inside) == 0 or any(m.block is None for m in matrices)
        depth = len(self.layers) if outside else max(inside) + 1
        passes = (depth if outside else depth - 1) if self.passes_on else 0
        more = 0 if repair is None else depth * len(self.batches) + len(inside) * repair
        return (len(inside) + passes) * len(self.batches) + len(matrices) + more

    def self_check(self) -> None:
        """Compare two windows, block by block, with the model's plain forward; learn the containers.

        Each block runs on one window and then on the other before the next block runs, as in the walk, so
        that state which a block leaves behind for the next one is of the wrong window and shows.

        Raises:
            WalkError: when a block run alone does not give exactly what it gives in the plain forward.
        """
        windows = self.two_windows()
        runs = [self._plain(window) for window in windows]
        for i, calls in enumerate(runs[0]):
            if len(calls) > 1:
                raise WalkError(
                    f"block {i} of {type(self.model).__name__} runs {len(calls)} times in a forward"
                )
        plain = [[calls[-1] for calls in run] for run in runs]
        self.extras = [without_tensors(template(out)) for out in plain[0]]
        hidden: list[Tensor | None] = [None, None]
        single = Walker(self.model, self.layers, windows)
        single.extras = (
            self.extras
        )  # as in the walk: a tensor that the next block needs is missed here
        for i in range(len(self.layers)):
            for w in range(2):
                hidden[w] = self.checked(single, i, w, hidden[w], hidden_state(plain[w][i]))
            self.axis = axis_of_windows(hidden[0])

    def two_windows(self) -> list[Tensor]:
        """Two windows [1, seqlen] that differ, for the self-check."""
        first = self.batches[0][:1]
        last = self.batches[-1][-1:]
        return [first, last if not torch.equal(first, last) else first.flip(1)]

    def _plain(self, window: Tensor) -> list[list[Any]]:
        """What every block returns, call by call, in the model's plain forward on `window` [1, seqlen]."""
        outputs: list[list[Any]] = [[] for _ in self.layers]

        def record(calls: list[Any]) -> Callable[..., None]:
            return lambda module, args, output: calls.append(output)

        with ExitStack() as handles:
            for block, calls in zip(self.layers, outputs, strict=True):
                handles.callback(block.register_forward_hook(record(calls)).remove)
            self.model(input_ids=window.to(self.device), use_cache=False)
        for i, calls in enumerate(outputs):
            if not calls:
                raise WalkError(
                    f"block {i} of {type(self.model).__name__} takes no part in its forward"
                )
        return outputs

    def checked(
        self, single: Walker, index: int, window: int, hidden: Tensor | None, expected: Tensor
    ) -> Tensor:
        """Output of block `index` run alone on a window, once it is known to be the plain forward's."""
        name = f"block {index} of {type(self.model).__name__} run alone"
        try:
            out = single.run(index, window, hidden)
        except torch.OutOfMemoryError:
            raise
        except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, WalkError):
                raise
            raise WalkError(f"{name} fails ({type(error).__name__}: {error})") from error
        if not same(out, expected):
            raise WalkError(f"{name} differs from its plain forward")
        return out


def axis_of_windows(hidden: Tensor | None) -> int | None:
    """The axis of what a block gives for one window along which there is one; None where there is none."""
    shape = () if hidden is None else hidden.shape[:-1]
    return next((axis for axis, size in enumerate(shape) if size == 1), None)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN equal to NaN."""
    return torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num())


def template(output: Any) -> Any:
    """The container that a block returns its hidden state in, without it; None for a bare tensor.

    Raises:
        WalkError: for a container that cannot be made anew around another hidden state.
    """
    if isinstance(output, Tensor):
        return None
    if type(output) not in (tuple, list):
        raise WalkError(f"a block returns a {type(output).__name__}, which cannot be made anew")
    return type(output)([None, *output[1:]])


def without_tensors(template: Any) -> Any:
    """A container as a template for other batches: tensors of the check's window do not belong in it."""
    if template is None:
        return None
    return type(template)([None if isinstance(x, Tensor) else x for x in template])


def _running(
    inner: Callable[..., Any], then: Callable[[Tensor], None] | None
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        if then is not None:
            then(hidden_state(out))
        raise _Stop

    return run


def _giving(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


def restore_forward(block: nn.Module, own: Any) -> None:
    """Put back the instance's own forward (accelerate's hooks set one), or uncover the class's."""
    if own is None:
        del block.forward
    else:
        block.forward = own
