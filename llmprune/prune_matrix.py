"""Prune one matrix: method and pattern applied, invariants held, and a report of what it did."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmprune.errors import ConfigError, ModelError, NumericalError
from llmprune.methods.base import Method, Pruned
from llmprune.model import Matrix
from llmprune.pattern import NM, Pattern
from llmprune.report import LayerReport
from llmprune.stats import InputSample, Stats


@dataclass(frozen=True)
class Task:
    """What to do to every matrix: the same for the whole model.

    Attributes:
        method: how.
        pattern: what may go, its comparison group decided.
        ragged: leave a matrix dense whose rows the pattern does not divide, instead of refusing.
    """

    method: Method[Any]
    pattern: Pattern
    ragged: bool = False


@dataclass(frozen=True)
class Done:
    """One matrix after it was pruned.

    Attributes:
        matrix: which one.
        report: what was done to it.
        keep: bool [out, in], True for the weights that stay.
        where: [n, 2] int64, weights that get their final value once the block has been passed on.
        final: [n] those values.
    """

    matrix: Matrix
    report: LayerReport
    keep: Tensor
    where: Tensor | None = None
    final: Tensor | None = None

    def settle(self) -> None:
        """Give the weights that were held back their final value."""
        if self.where is not None and self.final is not None:
            weight = self.matrix.weight  # shares memory with the model
            weight[self.where[:, 0], self.where[:, 1]] = self.final


def prune_matrix(matrix: Matrix, stats: Stats, sample: InputSample | None, task: Task) -> Done:
    """Prune one matrix in place and check what came out; `Done.settle` completes it.

    Raises:
        ModelError: rows that the pattern does not divide, unless they are left dense.
        NumericalError: naming the matrix, when the method fails or breaks its own promise.
    """
    begun = time.perf_counter()
    dense = matrix.weight
    if not task.pattern.fits(dense.shape[1]):
        if not task.ragged:
            raise ragged_error(matrix, task.pattern)
        keep = torch.ones_like(dense, dtype=torch.bool)
        report = _report(matrix, dense, Pruned(dense, keep), stats, sample, begun)
        why = f"rows of {dense.shape[1]} under {task.pattern}"
        return Done(matrix, replace(report, skipped=why), keep)
    try:
        pruned = task.method.prune(dense, stats, task.pattern)
    except NumericalError as error:
        raise NumericalError(f"{matrix.name}: {error}") from error
    _hold(matrix, pruned, task)
    report = _report(matrix, dense, pruned, stats, sample, begun)
    matrix.write(pruned.weight)
    if pruned.late is None:
        return Done(matrix, report, pruned.keep)
    at = tuple(pruned.late.T)
    matrix.weight[at] = 0  # shares memory with the model
    return Done(matrix, report, pruned.keep, pruned.late, pruned.weight[at])


def check_fit(chosen: Sequence[Matrix], pattern: Pattern, ragged: str) -> None:
    """Refuse a pattern that some matrix, or under `ragged` dense every matrix, cannot take."""
    unfit = [m for m in chosen if not pattern.fits(m.shape[1])]
    if unfit and ragged == "error":
        raise ragged_error(unfit[0], pattern)
    if len(unfit) == len(chosen):
        widths = sorted({m.shape[1] for m in chosen})
        raise ConfigError(
            f"no matrix can take {pattern}: rows are {', '.join(map(str, widths))} wide"
        )


def ragged_error(matrix: Matrix, pattern: Pattern) -> ModelError:
    """The error for rows that n:m does not divide."""
    return ModelError(
        f"{matrix.name} has rows of {matrix.shape[1]} weights, which {pattern} does not divide; "
        "choose another pattern, --ignore it, or leave such matrices alone with --ragged dense"
    )


def _hold(matrix: Matrix, pruned: Pruned, task: Task) -> None:
    """Invariants of every result: shape, finite, zero outside the mask, exact counts."""
    weight, keep = pruned.weight, pruned.keep
    wrong = None
    if weight.shape != keep.shape or tuple(weight.shape) != matrix.shape:
        wrong = f"shape {tuple(weight.shape)} for {matrix.shape}"
    elif not bool(weight.isfinite().all()):
        wrong = "NaN or Inf weights"
    elif bool((weight.ne(0) & ~keep).any()):
        wrong = "weights outside its own mask"
    elif task.method.exact and (bad := _miscounted(keep, task.pattern)):
        wrong = bad
    if wrong:
        raise NumericalError(f"{task.method.name} gave {wrong} at {matrix.name}")


def _miscounted(keep: Tensor, pattern: Pattern) -> str | None:
    """What is wrong with the counts of `keep` [out, in], or None."""
    if isinstance(pattern, NM):
        groups = keep.reshape(-1, pattern.m).sum(1)
        return None if bool((groups == pattern.n).all()) else f"groups that are not {pattern}"
    for group in pattern.groups(keep):
        size = group.shape[1]
        kept = group.sum(1)
        if not bool((kept == size - pattern.removed(size)).all()):
            return f"a count that is not {size - pattern.removed(size)} kept of {size}"
    return None


def _report(
    matrix: Matrix,
    dense: Tensor,
    pruned: Pruned,
    stats: Stats,
    sample: InputSample | None,
    begun: float,
) -> LayerReport:
    kept = int(pruned.keep.sum())
    change = (dense.float() - pruned.weight.float()).square().sum()
    size = dense.float().square().sum().clamp_min(1e-30)
    return LayerReport(
        name=matrix.name,
        shape=matrix.shape,
        kept=kept,
        sparsity=1 - kept / dense.numel(),
        weight_error=float(change / size),
        output_error=sample.error(dense, pruned.weight) if sample is not None else None,
        tokens=stats.tokens,
        seconds=time.perf_counter() - begun,
        notes=dict(pruned.notes),
    )
