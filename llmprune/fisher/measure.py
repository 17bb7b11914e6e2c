"""Measure Fisher information block by block: once forward, once back.

At each token a next one is drawn from what the model itself predicts, at `Fisher.temperature`, and the
gradient of its log probability is taken: outer products of it, averaged, are the Fisher information, by
which the KL divergence of a changed model from this one begins (Martens 2020, arXiv 1412.1193, sec. 5). Of
that the diagonal by two factors is kept for each matrix, rows and columns of squared gradients. Of each block
it is the Gram matrix of gradients by the hidden state that it passes on, each brought to length one: else the
few tokens that the model is least sure of would decide alone which directions count.

Gradients of several tokens are summed before they are squared. As next tokens are drawn each by itself, what
two of them have in common is zero on average, so that the sum of squares stays what it should be.

One block is in memory with the gradient of its matrices, and what autograd keeps of one group of windows, 256
tokens or one window that is longer; at the head there are a few float32 copies of its logits. Hidden states
between all blocks are kept, of as many tokens as `Fisher.tokens` says. Nothing of the model changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llmprune.errors import ConfigError, ModelError, NumericalError
from llmprune.fisher.kept import InMemory, Kept
from llmprune.fisher.known import Known, Part, histogram
from llmprune.fisher.settings import Fisher
from llmprune.model import Matrix
from llmprune.parallel import ALONE, Ranks
from llmprune.progress import Bar
from llmprune.refine.tuned import check_learnable, learning, repeatable
from llmprune.walk import Walker

Progress = Callable[[int, int, str], None]
Open = Callable[[int | None], AbstractContextManager[None]]
"""While open, a block is in memory, or for None the head of the model."""
WITHOUT = "leave --fisher and --allocation fisher out"


def check_measurable(walker: Walker) -> None:
    """Refuse a model whose blocks cannot be run alone, or give no gradient.

    Raises:
        ConfigError: naming its class.
    """
    if not walker.passes_on:
        raise ConfigError(
            f"{type(walker.model).__name__} keeps state outside its blocks, so gradients cannot go back "
            f"block by block; {WITHOUT}"
        )
    check_learnable(walker.model, WITHOUT)


GRADIENT = "gradient"
"""By what the block in hand passes on; the other tensors that are kept are what each block passes on."""


def _of_block(index: int) -> str:
    return f"block {index}"


@dataclass
class Measuring:
    """One measurement.

    Attributes:
        walker: over the dense model, with the windows of all processes.
        chosen: the matrices to be pruned; those in no block are not measured.
        settings: how.
        opened: brings what is needed into memory.
        done: told of each block that has some of them, the last one first.
        progress: told of every step.
        kept: where hidden states and gradients stay.
        ranks: the processes that share the groups of windows; the sums are on all of them.
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
        ids = torch.cat([batch.cpu() for batch in self.walker.batches])
        count, seqlen = ids.shape
        chosen, size = self.settings.windows(count, seqlen), self.settings.together(seqlen)
        parts = [chosen[at : at + size] for at in range(0, len(chosen), size)]
        # whole groups for each process: what is squared are sums over a group
        own = parts[self.ranks.span(len(parts))]
        self._groups = [(numbers, ids[numbers]) for numbers in own]
        self._depth = len(self.walker.layers)
        self._first = min(
            (m.block for m in self.chosen if m.block is not None), default=self._depth
        )

    @property
    def steps(self) -> int:
        """How often `progress` is told something: of each group, block by block there and back."""
        if self._first == self._depth:
            return 0
        return len(self._groups) * (2 * self._depth - self._first + 1)

    @torch.no_grad()
    def run(self) -> None:
        """Measure: from the first block to the head, and back to the first one with a chosen matrix.

        Raises:
            ModelError: when the model gives no gradient.
            NumericalError: when it gives NaN or Inf.
        """
        if self._first == self._depth:
            return
        with repeatable(self.walker.device):
            for index in range(self._depth):
                with self.opened(index):
                    self._forward(index)
                if index < self._first:  # nothing goes back to before the first one
                    self.kept.forget(_of_block(index - 1))
            with self.opened(None):
                self._from_head()
            for index in range(self._depth - 1, self._first - 1, -1):
                self.kept.forget(_of_block(index))
                with self.opened(index):
                    self._back(index)

    def _forward(self, index: int) -> None:
        for group, (_, ids) in enumerate(self._groups):
            self.progress(index, self._depth, f"forward {group + 1}/{len(self._groups)}")
            before = self._taken(_of_block(index - 1), group) if index else None
            self.kept.put(_of_block(index), group, self.walker.run_on(index, ids, before))

    def _taken(self, what: str, group: int) -> Tensor:
        """What was kept, where it is computed with."""
        return self.kept.take(what, group).to(self.walker.device)

    def _from_head(self) -> None:
        """Keep the gradient of the sum of log p by what the last block passes on, for each group.

        All of them are by one factor of such a size that half precision holds them: the sign does not count.
        """
        scale = self._scale()
        for group, (_, ids) in enumerate(self._groups):
            self.progress(
                self._depth, self._depth, f"drawing tokens {group + 1}/{len(self._groups)}"
            )
            hidden = self._taken(_of_block(self._depth - 1), group).requires_grad_(True)
            with torch.enable_grad():
                logits = self.walker.logits_on(ids, hidden)
            wanted = self._wanted(group, logits).mul_(scale)
            (gradient,) = _gradients(self.walker, logits, [hidden], wanted)
            self.kept.put(GRADIENT, group, _needed(self.walker, gradient))

    def _scale(self) -> float:
        """What brings the gradient by the logits of the first group of all to a root mean square of one."""
        size: float | None = None
        if self._groups:
            hidden = self._taken(_of_block(self._depth - 1), 0)
            wanted = self._wanted(0, self.walker.logits_on(self._groups[0][1], hidden))
            size = float(wanted.square().mean().sqrt())
        first = next(found for found in self.ranks.gather(size) if found is not None)
        return 1 / first if first > 0 else 1.0

    def _wanted(self, group: int, logits: Tensor) -> Tensor:
        """The gradient of -log p of drawn tokens by the `logits` of a group, at the temperature: float32."""
        seeds = [self.settings.seed + number for number in self._groups[group][0]]
        return _of_drawn(logits.detach() / self.settings.temperature, seeds)

    def _back(self, index: int) -> None:
        """Measure block `index`, and turn the gradients by its output into those by its input."""
        here = [m for m in self.chosen if m.block == index]
        parameters = list({id(m.parameter): m.parameter for m in here}.values())
        device, last = self.walker.device, index == self._first
        sums = {m.name: tuple(torch.zeros(n, device=device) for n in m.shape) for m in here}
        width = self.kept.take(GRADIENT, 0).shape[-1] if self._groups else 0
        width = max(self.ranks.gather(width))  # a process may have no group
        metric = torch.zeros(width, width, device=device)
        for group, (_, ids) in enumerate(self._groups):
            self.progress(index, self._depth, f"backward {group + 1}/{len(self._groups)}")
            outer = self._taken(GRADIENT, group)
            if here:
                flat = normalize(outer.reshape(-1, width).float(), dim=1)
                metric.addmm_(flat.T, flat)
            before = self._taken(_of_block(index - 1), group) if index else None
            inner = [] if before is None or last else [before.requires_grad_(True)]
            with learning(parameters):
                out = self.walker.run_on(index, ids, before)
                found = _gradients(self.walker, out, [*parameters, *inner], outer)
            if inner:
                self.kept.put(GRADIENT, group, _needed(self.walker, found[-1]))
            by_id = {id(p): g for p, g in zip(parameters, found, strict=False)}
            for m in here:
                if (whole := by_id[id(m.parameter)]) is not None:  # None: no token reaches it
                    squares = m.part(whole).float().square()
                    for total, dim in zip(sums[m.name], (1, 0), strict=True):
                        total += squares.sum(dim)
        if here:
            self._finish(index, here, sums, metric)

    def _finish(
        self,
        index: int,
        here: Sequence[Matrix],
        sums: dict[str, tuple[Tensor, ...]],
        metric: Tensor,
    ) -> None:
        """Hand over what is known of block `index` once the sums of all processes are together."""
        self.ranks.add_up([metric, *(t for pair in sums.values() for t in pair)])
        total = torch.stack([metric.sum(), *(rows.sum() for rows, _ in sums.values())])
        if not bool(total.isfinite().all()):
            raise NumericalError(
                f"the gradient at block {index} of {type(self.walker.model).__name__} is NaN or Inf; "
                f"{WITHOUT}, or compute in another --dtype"
            )
        counts = {m.name: histogram(m.weight, *sums[m.name]) for m in here}
        rows = {name: pair[0].cpu() for name, pair in sums.items()}
        self.done(index, Part(rows, counts, metric.cpu()))


def known_in_memory(
    walker: Walker, chosen: Sequence[Matrix], settings: Fisher, progress: bool
) -> Known:
    """Measure a dense model that is in memory."""
    parts: dict[int, Part] = {}
    kept = InMemory()

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

    Raises:
        NumericalError: for logits that are NaN or Inf.
    """
    p = logits.float().softmax(-1)
    if not bool(p.isfinite().all()):
        raise NumericalError(
            "the dense model gives NaN or Inf on a calibration window, so no token can be drawn from its "
            f"predictions; compute in another --dtype, or {WITHOUT}"
        )
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
            f"{type(walker.model).__name__} gives no gradient ({error}); {WITHOUT}"
        ) from error


def _needed(walker: Walker, gradient: Tensor | None) -> Tensor:
    """A gradient without which none before it can be had.

    Raises:
        ModelError: where there is none.
    """
    if gradient is None:
        raise ModelError(
            f"{type(walker.model).__name__} does not depend on what a block passes on, so no gradient "
            f"goes back through it; {WITHOUT}"
        )
    return gradient
