"""Measure Fisher information block by block: once forward, once back.

At each token a next one is drawn from what the model itself predicts, at `Fisher.temperature`, and the
gradient of its log probability is taken: outer products of it, averaged, are the Fisher information, by
which the KL divergence of a changed model from this one begins (Martens 2020, arXiv 1412.1193, sec. 5). Of
that the diagonal by two factors is kept for each matrix, rows and columns of squared gradients. Of each block
it is the Gram matrix of gradients by the hidden state that it passes on, each brought to length one: else the
few tokens that the model is least sure of would decide alone which directions count.

Gradients of several tokens are summed before they are squared. As next tokens are drawn each by itself, what
two of them have in common is zero on average, so that the sum of squares stays what it should be.

One block is in memory with its gradient; hidden states between all blocks are kept, of as many tokens as
`Fisher.tokens` says. Nothing of the model changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llmprune.errors import ConfigError, ModelError, NumericalError
from llmprune.fisher.known import Known, Part, histogram
from llmprune.fisher.settings import Fisher
from llmprune.model import Matrix
from llmprune.parallel import ALONE, Ranks
from llmprune.progress import Bar
from llmprune.refine.tuned import learning
from llmprune.refine.windows import Windows
from llmprune.walk import Walker

Progress = Callable[[int, int, str], None]
Open = Callable[[int | None], AbstractContextManager[None]]
"""While open, a block is in memory, or for None the head of the model."""


def check_measurable(walker: Walker) -> None:
    """Refuse a family whose blocks cannot be run alone.

    Raises:
        ConfigError: naming its class.
    """
    if not walker.passes_on:
        raise ConfigError(
            f"{type(walker.model).__name__} keeps state outside its blocks, so gradients cannot go back "
            "block by block; leave --fisher out"
        )


class Kept:
    """Hidden states between blocks, of one group of windows after the other, in main memory."""

    def __init__(self) -> None:
        self._states: dict[tuple[int, int], Tensor] = {}

    def put(self, block: int, group: int, hidden: Tensor) -> None:
        """Keep what `block` passes on, [windows, seqlen, width]."""
        self._states[block, group] = hidden.cpu()

    def take(self, block: int, group: int) -> Tensor | None:
        """What was kept of it; None before the first block."""
        return self._states.get((block, group))

    def forget(self, block: int) -> None:
        """Give the memory of what `block` passes on back."""
        for key in [key for key in self._states if key[0] == block]:
            del self._states[key]


@dataclass
class Measuring:
    """One measurement.

    Attributes:
        walker: over the dense model, with the windows of this process.
        chosen: the matrices to be pruned.
        settings: how.
        opened: brings what is needed into memory.
        done: told of each block, the last one first.
        progress: told of every step.
        kept: where hidden states stay.
        ranks: the processes that have the other windows.
    """

    walker: Walker
    chosen: Sequence[Matrix]
    settings: Fisher
    opened: Open
    done: Callable[[int, Part], None]
    progress: Progress
    kept: Kept
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        windows = Windows(self.walker.batches, self.ranks)
        seqlen = self.walker.batches[0].shape[1]
        chosen = self.settings.windows(windows.count, seqlen)
        step = self.settings.together(seqlen)
        self._groups: list[tuple[list[int], Tensor]] = []  # numbers of windows, and their ids
        for at in range(0, len(chosen), step):
            own = {n: p for n in chosen[at : at + step] for p in windows.own([n])}
            if own:
                ids = torch.cat([windows.ids(places) for places in own.values()])
                self._groups.append((list(own), ids))
        self._last = max((m.block for m in self.chosen if m.block is not None), default=-1)
        self._first = min((m.block for m in self.chosen if m.block is not None), default=0)

    @property
    def steps(self) -> int:
        """How often `progress` is told something."""
        depth = len(self.walker.layers)
        return len(self._groups) * (2 * depth + 1 - self._first)

    @torch.no_grad()
    def run(self) -> None:
        """Measure.

        Raises:
            ModelError: when the model gives no gradient.
            NumericalError: when it gives NaN or Inf.
        """
        depth = len(self.walker.layers)
        for index in range(depth):
            with self.opened(index):
                for group, (_, ids) in enumerate(self._groups):
                    self.progress(index, depth, f"forward {group + 1}/{len(self._groups)}")
                    before = self._state(index - 1, group)
                    self.kept.put(index, group, self.walker.run_on(index, ids, before))
        with self.opened(None):
            gradients = self._from_head(depth)
        for index in range(depth - 1, self._first - 1, -1):
            self.kept.forget(index)
            with self.opened(index):
                self._back(index, gradients)

    def _state(self, block: int, group: int) -> Tensor | None:
        """What `block` passes on, where it is computed with; None before the first."""
        found = self.kept.take(block, group)
        return None if found is None else found.to(self.walker.device)

    def _from_head(self, depth: int) -> list[Tensor]:
        """The gradient of the sum of log p by what the last block passes on, for each group of windows.

        All of them are by one factor of such a size that half precision holds them.
        """
        found: list[Tensor] = []
        scale = 0.0
        for group, (numbers, ids) in enumerate(self._groups):
            self.progress(depth, depth, f"drawing tokens {group + 1}/{len(self._groups)}")
            hidden = self._state(depth - 1, group)
            assert hidden is not None
            hidden = hidden.detach().requires_grad_(True)
            with torch.enable_grad():
                logits = self.walker.logits_on(ids, hidden)
                seeds = [self.settings.seed + n for n in numbers]
                wanted = _of_drawn(logits.detach() / self.settings.temperature, seeds)
                if group == 0:
                    size = float(wanted.square().mean().sqrt())
                    scale = self.ranks.tell(1 / size if size > 0 else 1.0)
                (gradient,) = _gradients(self.walker, logits, [hidden], (wanted * scale))
            assert gradient is not None
            found.append(gradient.cpu())
        return found

    def _back(self, index: int, gradients: list[Tensor]) -> None:
        """Measure block `index`, and turn the gradients by its output into those by its input."""
        here = [m for m in self.chosen if m.block == index]
        parameters = list({id(m.parameter): m.parameter for m in here}.values())
        sums = {
            m.name: tuple(torch.zeros(n, device=self.walker.device) for n in m.shape) for m in here
        }
        width = gradients[0].shape[-1] if gradients else 0
        metric = torch.zeros(width, width, device=self.walker.device)
        for group, (_, ids) in enumerate(self._groups):
            self.progress(
                index, len(self.walker.layers), f"backward {group + 1}/{len(self._groups)}"
            )
            outer = gradients[group].to(self.walker.device)
            flat = normalize(outer.reshape(-1, width).float(), dim=1)
            metric.addmm_(flat.T, flat)
            before = self.kept.take(index - 1, group)
            inner = [] if before is None else [before.to(self.walker.device).requires_grad_(True)]
            if not parameters and not inner:
                continue
            with learning(parameters):
                out = self.walker.run_on(index, ids, inner[0] if inner else None)
                found = _gradients(self.walker, out, [*parameters, *inner], outer)
            if inner and found[-1] is not None:
                gradients[group] = found[-1].cpu()
            by_id = {id(p): g for p, g in zip(parameters, found, strict=False)}
            for m in here:
                if (whole := by_id[id(m.parameter)]) is not None:
                    squares = _of(m, whole).float().square()
                    for total, dim in zip(sums[m.name], (1, 0), strict=True):
                        total += squares.sum(dim)
        self._finish(index, here, sums, metric)

    def _finish(
        self,
        index: int,
        here: Sequence[Matrix],
        sums: dict[str, tuple[Tensor, ...]],
        metric: Tensor,
    ) -> None:
        if not here:
            return
        self.ranks.add_up([metric, *(t for pair in sums.values() for t in pair)])
        if not all(bool(t.isfinite().all()) for t in (metric, *(p[0] for p in sums.values()))):
            raise NumericalError(
                f"the gradient at block {index} of {type(self.walker.model).__name__} is NaN or Inf; leave "
                "--fisher out, or compute in another --dtype"
            )
        counts = {m.name: histogram(m.weight, *sums[m.name]) for m in here}
        rows = {name: pair[0].cpu() for name, pair in sums.items()}
        self.done(index, Part(rows, counts, metric.cpu()))


def known_in_memory(
    walker: Walker, chosen: Sequence[Matrix], settings: Fisher, progress: bool
) -> Known:
    """Measure a dense model that is in memory."""
    parts: dict[int, Part] = {}
    kept = Kept()

    def here(index: int | None) -> AbstractContextManager[None]:
        return nullcontext()

    with Bar(0, "measuring Fisher information", enabled=progress) as bar:
        run = Measuring(walker, chosen, settings, here, parts.__setitem__, bar.step, kept)
        bar.expect(run.steps)
        run.run()
    return Known(settings, parts.get)


def _of_drawn(logits: Tensor, seeds: Sequence[int]) -> Tensor:
    """By logits [windows, seqlen, vocabulary], the gradient of -log p of tokens drawn from them: float32.

    Each window has a seed, so that what is drawn depends on no other.
    """
    p = logits.float().softmax(-1)
    for window, seed in zip(p, seeds, strict=True):
        draw = torch.Generator(p.device).manual_seed(seed)
        tokens = torch.multinomial(window, 1, generator=draw)
        window.scatter_add_(-1, tokens, torch.full_like(window[:, :1], -1.0))
    return p


def _gradients(
    walker: Walker, out: Tensor, by: Sequence[Tensor], outer: Tensor
) -> Sequence[Tensor | None]:
    """The gradients of `out` by each of `by`, on which `outer` comes in; None where nothing reaches."""
    try:
        return torch.autograd.grad(out, by, outer.to(out.dtype), allow_unused=True)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(
            f"{type(walker.model).__name__} gives no gradient ({error}); leave --fisher out"
        ) from error


def _of(matrix: Matrix, whole: Tensor) -> Tensor:
    """The part of a tensor like the parameter of `matrix` that belongs to it: [out, in]."""
    part = whole if matrix.expert is None else whole[matrix.expert]
    return part.T if matrix.transposed else part
