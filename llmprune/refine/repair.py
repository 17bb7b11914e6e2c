"""Tune what is left of a pruned block until it gives what the dense block gave.

The pruned block reads what the pruned blocks before it pass on; its goal is the output of the dense block on
what the dense blocks before it pass on, so that it also mends what they have spoilt. The error is the mean
square over tokens and features; with a metric, features weigh as that says (`Known.metric`). One block is in
memory, with its optimizer and a few windows; of the hidden states there are two streams, the pruned and the
dense one. Nothing else of the model is touched.

Tuning blocks against their dense outputs is in many papers on quantisation and pruning (of pruning, for
example, Guo et al. 2024, arXiv 2402.12419). Windows that are held out decide when it ends, and where it
has made them worse the block stays as the pruning left it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmprune.errors import ConfigError, ModelError, NumericalError
from llmprune.parallel import ALONE, Ranks
from llmprune.prune_matrix import Done
from llmprune.refine.settings import Repair
from llmprune.refine.tuned import Tuned, check_learnable, learning, repeatable, tuned
from llmprune.refine.windows import Windows
from llmprune.report import RepairReport
from llmprune.walk import HiddenStates, Walker


def check_repairable(walker: Walker) -> None:
    """Refuse a model whose blocks cannot be repaired by themselves.

    Raises:
        ConfigError: naming its class.
    """
    name = type(walker.model).__name__
    if not walker.passes_on:
        raise ConfigError(
            f"{name} keeps state outside its blocks, so none can be repaired by itself; leave --repair out"
        )
    if walker.axis is None:
        raise ConfigError(
            f"the blocks of {name} do not keep windows apart, so they cannot be learnt from one by one; "
            "leave --repair out"
        )
    check_learnable(walker.model, "leave --repair out")


MOST = 1 / 3  # of the damage that steps are measured by: a choice, for pruning that leaves little
RISE = 20  # steps over which the rate rises, at most a tenth of all: Adam knows no scale before; a choice


def repair_block(
    walker: Walker,
    index: int,
    done: Sequence[Done],
    hidden: HiddenStates,
    dense: HiddenStates,
    settings: Repair,
    tell: Callable[[str], None],
    ranks: Ranks = ALONE,
    metric: Tensor | None = None,
) -> tuple[list[Done], RepairReport]:
    """Repair block `index` in place, whose matrices `done` have just been pruned.

    Args:
        walker: has the windows of this process.
        index: of the block.
        done: its pruned matrices. Weights that were held back get their value before, not after.
        hidden: what enters the pruned block.
        dense: what left the dense block.
        settings: how.
        tell: told of every step.
        ranks: the processes that have the other windows.
        metric: [width, width] float32, what errors in two features weigh together; None weighs all alike.

    Raises:
        ConfigError: for blocks that do not keep windows apart.
        ModelError: when the block gives no gradient.
    """
    check_repairable(walker)
    for each in done:
        each.settle()
    done = [replace(each, where=None, final=None) for each in done]
    begun = time.monotonic()
    parts = tuned(walker.model, index, done, settings.tune, ranks)
    pace = settings.rate * ranks.tell(_damage(done))
    if metric is not None:
        metric = metric.to(walker.device)
    run = _Repairing(walker, index, parts, hidden, dense, settings, pace, ranks, begun, metric)
    with repeatable(walker.device):
        report = run.tune(tell)
    for part in parts:
        part.back()
        ranks.hand_out(part.parameter.data, 0)
    return list(done), report


def _damage(done: Sequence[Done]) -> float:
    """How far pruning has moved the outputs of matrices, in their own size: a root mean square."""
    found = [each.report.output_error for each in done if each.report.skipped is None]
    known = [error for error in found if error is not None]
    return min(MOST, math.sqrt(sum(known) / max(1, len(known))))


@dataclass(frozen=True)
class _Error:
    """||given - wanted||^2 and ||wanted||^2 over some windows, in the metric, and how many values."""

    lost: float
    size: float
    values: float

    @property
    def share(self) -> float:
        """Of what is wanted."""
        return self.lost / self.size if self.size else 0.0


@dataclass
class _Repairing:
    """One block under repair."""

    walker: Walker
    index: int
    parts: Sequence[Tuned]
    hidden: HiddenStates
    dense: HiddenStates
    settings: Repair
    rate: float
    ranks: Ranks
    begun: float
    metric: Tensor | None

    def __post_init__(self) -> None:
        self.windows = Windows(self.walker.batches, self.ranks, self.walker.axis or 0)
        self.learnt, self.held = self.settings.parted(self.windows.count)
        self.seqlen = self.walker.batches[0].shape[1]
        self.whole = self.settings.steps(self.windows.count, self.seqlen)
        self.some = self.learnt[:: math.ceil(len(self.learnt) / len(self.held))]
        sizes = sorted(part.size for part in self.parts if part.size > 0)
        self.usual = sizes[len(sizes) // 2] if sizes else 0.0

    def tune(self, tell: Callable[[str], None]) -> RepairReport:
        """Go through the windows until there is no gain, the time is up, or all epochs are done."""
        before, held = self._error(self.some), self._error(self.held)
        if not math.isfinite(held.share):
            name = type(self.walker.model).__name__
            raise NumericalError(f"block {self.index} of {name} gives NaN or Inf once it is pruned")
        best, best_epoch, epoch, number, gone = held, 0, 0, 0, 0.0
        order = torch.Generator().manual_seed(self.settings.seed + self.index)
        patience = self.settings.patience or math.inf
        while self.parts and held.share > 0 and gone < 1 and epoch - best_epoch < patience:
            epoch += 1
            for step in self._steps(order):
                tell(f"repairing, epoch {epoch}/{math.ceil(self.settings.epochs)}")
                number += 1
                self._step(step, number, gone, held)
                gone = self._gone(number)
                if gone >= 1:
                    break
            now = self._error(self.held)
            if now.share < best.share:
                best, best_epoch = now, epoch
                for part in self.parts:
                    part.remember()
            elif not math.isfinite(now.share):
                break
        for part in self.parts:
            part.back()
        return RepairReport(
            block=self.index,
            before=before.share,
            after=self._error(self.some).share,
            held_out_before=held.share,
            held_out_after=best.share,
            epochs=epoch,
            best_epoch=best_epoch,
            windows=len(self.learnt),
            held_out_windows=len(self.held),
            seconds=time.monotonic() - self.begun,
        )

    def _gone(self, number: int) -> float:
        """How much of the repair is over after `number` steps, 1 where all: by steps or by time."""
        gone = number / self.whole
        if self.settings.seconds:
            used = self.ranks.tell(time.monotonic() - self.begun)
            gone = max(gone, used / self.settings.seconds)
        return float(gone)

    def _steps(self, order: torch.Generator) -> list[list[int]]:
        """The windows of each step of an epoch."""
        size = self.settings.windows(self.seqlen)
        mixed = [self.learnt[i] for i in torch.randperm(len(self.learnt), generator=order).tolist()]
        return [mixed[i : i + size] for i in range(0, len(mixed), size)]

    def _step(self, chosen: Sequence[int], number: int, gone: float, first: _Error) -> None:
        """Step `number` of Adam, on the windows `chosen`, when `gone` of the repair is over."""
        tokens = len(chosen) * self.seqlen
        # gradients of about one, whatever the dtype: half precision does not hold very small ones
        self._add_gradients(chosen, 1 / math.sqrt(tokens * first.lost / first.values))
        self.ranks.add_up([part.gradient for part in self.parts])
        rise = min(1.0, number / max(1, min(RISE, self.whole // 10)))
        fall = (1 + math.cos(math.pi * gone)) / 2
        for part in self.parts:
            part.step(self.rate * rise * fall * (part.size or self.usual), number)

    def _add_gradients(self, chosen: Sequence[int], scale: float) -> None:
        """Add `scale` times the gradient of half the squared error on the own ones of these windows."""
        parameters = [part.parameter for part in self.parts]
        for places in self.windows.own(chosen):
            with learning(parameters):
                out, goal = self._outputs(places)
                loss = self._energy(out.float() - goal.float()) * (scale / 2)
                try:
                    found = torch.autograd.grad(loss, parameters, allow_unused=True)
                except RuntimeError as error:
                    if isinstance(error, torch.OutOfMemoryError):
                        raise
                    raise ModelError(
                        f"block {self.index} of {type(self.walker.model).__name__} gives no gradient, so it "
                        f"cannot be repaired ({error}); leave --repair out"
                    ) from error
            for part, gradient in zip(self.parts, found, strict=True):
                if gradient is not None:  # None where no token reaches
                    part.gradient.add_(gradient)

    def _energy(self, values: Tensor) -> Tensor:
        """The sum of squares of `values` [windows, seqlen, width] as the metric has it."""
        other = values if self.metric is None else values @ self.metric
        return (values * other).sum()

    def _outputs(self, places: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """What the block gives on some windows, and what it should give: [windows, seqlen, width]."""
        ids = self.windows.ids(places)
        out = self.walker.run_on(self.index, ids, self.windows.states(self.hidden, places))
        goal = self.windows.states(self.dense, places)
        assert goal is not None
        return out, goal

    def _error(self, chosen: Sequence[int]) -> _Error:
        """The error on these windows of all processes."""
        sums = torch.zeros(3, dtype=torch.float64)
        with torch.no_grad():
            for places in self.windows.own(chosen):
                out, goal = (t.float() for t in self._outputs(places))
                lost, size = self._energy(out - goal), self._energy(goal)
                sums += torch.tensor([float(lost), float(size), goal.numel()], dtype=torch.float64)
        self.ranks.add_up([sums])
        return _Error(*sums.tolist())
