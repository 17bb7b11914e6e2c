"""Do transforms to a dense model, in memory or on a shelf: see every block, try, decide, change.

Each transform goes through the blocks once, on the model as the one before it has left it. In memory it then
changes the parameters in place; on a shelf it changes what is read from the files from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.errors import NumericalError
from llmprune.matrix import Matrix
from llmprune.model import blocks, every_matrix
from llmprune.pattern import Pattern
from llmprune.progress import Bar
from llmprune.prune_matrix import Task
from llmprune.transforms.base import Change, Setting, Transform, Watch, steps
from llmprune.transforms.sites import Block, Outside, look, look_outside
from llmprune.transforms.trial import try_block, try_outside
from llmprune.walk import HiddenStates, Walker, hidden_state

SHORT = 64  # tokens of the window that changes are tried on


class Place:
    """A whole model in memory; see `llmprune.transforms.files.OnShelf` for one that is not.

    Attributes:
        model: the model.
        dtypes: that parameters are saved in, by name; those not named keep the one they have.
    """

    def __init__(self, model: Any, dtypes: Mapping[str, torch.dtype]) -> None:
        self.model = model
        self.dtypes = dtypes
        self.prefix, self.layers = blocks(model)

    def begin(self, walker: Walker) -> None:
        """Bring in what runs before the blocks."""

    def loaded(self, index: int) -> AbstractContextManager[None]:
        """While open, block `index` has its weights."""
        return nullcontext()

    def end(self, walker: Walker) -> None:
        """Bring in what runs after the blocks."""

    def hidden(self, walker: Walker) -> HiddenStates:
        """Where hidden states are kept."""
        return [None] * len(walker.batches)

    def advance(self, hidden: HiddenStates, index: int, outputs: Iterable[Tensor]) -> None:
        """Replace the inputs of block `index` by its outputs."""
        for b, output in enumerate(outputs):
            hidden[b] = output

    def make(self, change: Change, looks: Looks) -> None:
        """Do a change that has been decided."""
        for block in looks.blocks:
            change.block(block)
        change.outside(looks.outside)
        settle_tie(self.model, looks.outside)


@dataclass
class Looks:
    """What was seen of a model."""

    blocks: list[Block] = field(default_factory=list)
    outside: Any = None


def separate(outside: Outside) -> bool:
    """Whether the output head now has weights that are no embedding's."""
    head = outside.model.get_output_embeddings()
    return not any(cell.module.weight is head.weight for cell in outside.embeddings)


def settle_tie(model: Any, outside: Outside) -> None:
    """Let the config say so when the output head has become a matrix of its own."""
    if outside.head is None or not (outside.tied and separate(outside)):
        return
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.tie_word_embeddings = False
    gone = outside.head.weight.name
    ties = getattr(model, "all_tied_weights_keys", {})
    model.all_tied_weights_keys = {k: v for k, v in ties.items() if gone not in (k, v)}


def refused(transforms: Sequence[Transform], why: str) -> dict[str, Any]:
    """The report where nothing can be done."""
    return {t.name: {"done": [], "refused": {"all": why}, "notes": {}} for t in transforms}


def in_memory(
    walker: Walker,
    transforms: Sequence[Transform],
    task: Task,
    stored: Mapping[str, torch.dtype],
    say: Callable[[str], None],
    progress: bool,
) -> dict[str, Any]:
    """`apply` to the model of `walker`, in memory and in place.

    `stored` is the dtype that each parameter is saved in, by name; those not named keep the one they have.
    """
    model = walker.model
    if walker.kind != "blocks":
        why = f"{type(model).__name__} keeps state outside its blocks, so they cannot be tried one by one"
        say(f"transforms: nothing done; {why}")
        return refused(transforms, why)
    place = Place(model, stored)
    total = len(list(steps(transforms))) * len(place.layers) * len(walker.batches)
    with Bar(total, "transforming", enabled=progress) as bar:
        return apply(place, walker, transforms, task.pattern, say, bar.step)


def with_untied(model: Any, stored: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """`stored` with what transforms have untied: it is saved as what it was tied to."""
    found = dict(stored)
    table = model.get_input_embeddings().weight
    source = next(n for n, p in model.named_parameters(remove_duplicate=False) if p is table)
    for name, _ in model.named_parameters():
        found.setdefault(name, found.get(source, table.dtype))
    return found


@torch.no_grad()
def apply(
    place: Place,
    walker: Walker,
    transforms: Sequence[Transform],
    pattern: Pattern,
    say: Callable[[str], None],
    progress: Callable[[int, int, str], None],
) -> dict[str, Any]:
    """Do `transforms` to the model of `place`, in their order.

    Args:
        place: the model.
        walker: runs its blocks on the calibration windows; its self-check is done.
        transforms: to do.
        pattern: that the model will be pruned to.
        say: told what is done and what is left out.
        progress: told of each block.

    Returns:
        For each transform the parts that were done, those refused and why, and its notes.

    Raises:
        LLMPruneError: a weight that does not fit its dtype.
    """
    found: dict[str, Any] = {}
    todo = list(steps(transforms))
    for one in transforms:
        if one not in todo:
            over = next(t.name for t in todo if one.name in t.over)
            found[one.name] = {"done": [], "refused": {}, "notes": {"done_by": over}}
    for one in todo:
        tokens = sum(ids.numel() for ids in walker.batches)
        change = one.begin(Setting(pattern, len(place.layers), tokens, walker.device))
        if change.active:
            looks = _see(place, walker, change, partial(_told, progress, one.name))
            change.decide()
            if change.active:
                place.make(change, looks)
        found[one.name] = {
            "done": change.active, "refused": change.refused, "notes": change.notes(),
        }  # fmt: skip
        say(_line(one.name, change))
    return found


def _told(
    progress: Callable[[int, int, str], None], name: str, block: int, blocks: int, doing: str
) -> None:
    progress(block, blocks, f"{name}: {doing}")


def _line(name: str, change: Change) -> str:
    done = f"{name}: {', '.join(change.active) or 'nothing'} done"
    left = "; ".join(f"{part} left out: {why}" for part, why in change.refused.items())
    return f"{done}; {left}" if left else done


def _see(
    place: Place, walker: Walker, change: Change, progress: Callable[[int, int, str], None]
) -> Looks:
    """Show the dense model to a change, and try each of its parts."""
    looks, depth = Looks(), len(place.layers)
    place.begin(walker)
    hidden = place.hidden(walker)
    short = Walker(walker.model, walker.layers, [walker.batches[0][:1, :SHORT]], walker.device)
    short.extras = walker.extras
    state: Tensor | None = None
    by_block: dict[int | None, list[Matrix]] = {}
    for matrix in every_matrix(place.model):
        by_block.setdefault(matrix.block, []).append(matrix)
    for index in range(depth):
        with place.loaded(index):
            name = f"{place.prefix}.{index}"

            def run(index: int = index, state: Tensor | None = state) -> Tensor:
                return short.run(index, 0, state)

            here = (index, place.layers[index], name, by_block.get(index, []), run)
            block, unrounded = look(*here, place.dtypes), look(*here, {})
            looks.blocks.append(block)
            watches = change.watch(block)
            place.advance(hidden, index, _outputs(walker, index, hidden, watches, depth, progress))
            change.learn(block, watches)
            random = torch.Generator().manual_seed(index)
            try_block(change, unrounded, f"block {index}", run, random)
            state = run()
    place.end(walker)
    width = looks.blocks[0].width
    first, last = _edges(short, state)
    there = (place.model, place.prefix, width, lambda: last(None))
    looks.outside, unrounded_outside = look_outside(*there, place.dtypes), look_outside(*there, {})
    inside = frozenset(m for layer in place.layers for m in layer.modules())
    random = torch.Generator().manual_seed(depth)
    try_outside(change, unrounded_outside, first, last, random, inside)
    return looks


def _outputs(
    walker: Walker,
    index: int,
    hidden: HiddenStates,
    watches: Mapping[str, Watch],
    depth: int,
    progress: Callable[[int, int, str], None],
) -> Iterable[Tensor]:
    """What block `index` gives for each batch, while `watches` learn."""
    with ExitStack() as handles:
        for watch in watches.values():
            handles.callback(_hooked(watch).remove)
        for b in range(len(walker.batches)):
            progress(index, depth, f"seeing {b + 1}/{len(walker.batches)}")
            out = walker.run(index, b, hidden[b])
            if not bool(out.isfinite().all()):
                raise NumericalError(f"block {index} gives NaN or Inf on the calibration windows")
            yield out


def _hooked(watch: Watch) -> Any:
    if watch.side == "in":

        def see(module: nn.Module, args: Any, kwargs: Any) -> None:
            watch.sums.add(args[0] if args else next(iter(kwargs.values())))

        return watch.module.register_forward_pre_hook(see, with_kwargs=True)
    return watch.module.register_forward_hook(lambda m, a, out: watch.sums.add(hidden_state(out)))


def _edges(
    short: Walker, state: Tensor | None
) -> tuple[Callable[[], Tensor], Callable[[Tensor | None], Tensor]]:
    """What enters the first block; and the logits, what leaves the last one turned by a matrix."""

    def first() -> Tensor:
        taken: list[Tensor] = []

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            taken.append(args[0] if args else kwargs["hidden_states"])

        handle = short.layers[0].register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with short.only(len(short.layers), state, None):
                short.forward(short.batches[0])
        finally:
            handle.remove()
        return taken[0]

    def last(turn: Tensor | None) -> Tensor:
        assert state is not None
        given = state if turn is None else (state.double() @ turn).to(state.dtype)
        return short.logits(0, given)

    return first, last
