"""Prune the matrices of one input: method and pattern applied, invariants held, and reports of it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llmprune.errors import ConfigError, ModelError, NumericalError
from llmprune.fisher.known import Known
from llmprune.fisher.weigh import Solve, weighed
from llmprune.methods.base import Method, Pruned
from llmprune.methods.quantized import Quantized
from llmprune.model import Matrix
from llmprune.pattern import NM, Pattern, as_text, true_in
from llmprune.refine.settings import Repair
from llmprune.report import LayerReport
from llmprune.stats import InputSample, Stats

CHUNK = 2**20  # weights that are measured at a time; of 64 and 256 thousand and this the fastest


@dataclass(frozen=True)
class Task:
    """What to do to every matrix.

    Attributes:
        method: how.
        pattern: what may go, its comparison group decided; on average, where there are `levels`.
        ragged: leave a matrix dense whose rows the pattern does not divide, instead of refusing.
        all_experts: let every expert learn from all tokens, not from those that are routed to it.
        wide: sum statistics in float64.
        room: bytes that the statistics of a block may take at once; None is any number.
        repair: how each block is repaired once it is pruned; None is not at all.
        levels: by name, what an allocation gives a matrix instead of `pattern`; None leaves it dense.
        fisher: what errors weigh; None where all weigh the same.
        rounding: rounds what a repair leaves of a matrix; None where nothing is rounded after one.
    """

    method: Method[Any]
    pattern: Pattern
    ragged: bool = False
    all_experts: bool = False
    wide: bool = False
    room: int | None = None
    repair: Repair | None = None
    levels: Mapping[str, Pattern | None] = field(default_factory=dict)
    fisher: Known | None = None
    rounding: Quantized | None = None

    @property
    def needs_data(self) -> bool:
        """Whether calibration data has to pass through the model while it is pruned."""
        return self.method.stats.needs_data or self.repair is not None

    def level(self, matrix: Matrix) -> Pattern | None:
        """What may go of a matrix; None for one that an allocation leaves dense."""
        return self.levels.get(matrix.name, self.pattern)

    def metric(self, block: int) -> Tensor | None:
        """`Known.metric` of a block; None where nothing is known."""
        return self.fisher.metric(block) if self.fisher else None


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


def prune_matrices(
    matrices: Sequence[Matrix],
    stats: Stats,
    sample: InputSample | None,
    task: Task,
    solve: Solve | None = None,
) -> Iterator[Done]:
    """Prune matrices that read one input, in place, and check what came out; `Done.settle` completes it.

    Those of one pattern follow each other, in the order of each pattern's first. The method may solve them
    as one; the seconds are then in the report of the first. `solve` takes the place of the method where
    several processes share its work.

    Raises:
        ModelError: rows that the pattern does not divide, unless they are left dense.
        NumericalError: naming the matrix, when the method fails or breaks its own promise.
    """
    sample = sample if sample and sample.tokens else None
    for level, some in alike(matrices, task).items():
        if level is None:
            why = "the level that its allocation gives it"
            yield from (_left_dense(m, stats, sample, why) for m in some)
            continue
        yield from _prune_alike(some, stats, sample, replace(task, pattern=level), solve)


def alike(matrices: Sequence[Matrix], task: Task) -> dict[Pattern | None, list[Matrix]]:
    """Matrices by what may go of them."""
    found: dict[Pattern | None, list[Matrix]] = {}
    for matrix in matrices:
        found.setdefault(task.level(matrix), []).append(matrix)
    return found


def _prune_alike(
    matrices: Sequence[Matrix],
    stats: Stats,
    sample: InputSample | None,
    task: Task,
    solve: Solve | None,
) -> Iterator[Done]:
    """Prune matrices that read one input to one pattern, that of `task`."""
    features = matrices[0].shape[1]
    if not task.pattern.fits(features):
        if not task.ragged:
            raise ragged_error(matrices[0], task.pattern)
        why = f"rows of {features} under {task.pattern}"
        yield from (_left_dense(matrix, stats, sample, why) for matrix in matrices)
        return
    task, known = _able(matrices, stats, task)
    solve = solve or task.method.prune_together
    results = weighed(solve, matrices, known, task.pattern, task.fisher)
    for matrix in matrices:
        begun = time.perf_counter()
        try:
            pruned = next(results)
        except NumericalError as error:
            raise NumericalError(f"{matrix.name}: {error}") from error
        if known is not stats:
            pruned = replace(pruned, notes={**pruned.notes, "fallback": task.method.called})
        yield _put(matrix, pruned, stats, sample, task, begun)
        del pruned  # its memory is for the next one


def prune_matrix(matrix: Matrix, stats: Stats, sample: InputSample | None, task: Task) -> Done:
    """`prune_matrices` of one."""
    return next(prune_matrices([matrix], stats, sample, task))


def _left_dense(matrix: Matrix, stats: Stats, sample: InputSample | None, why: str) -> Done:
    """A matrix as it is."""
    begun = time.perf_counter()
    keep = torch.ones(matrix.shape, dtype=torch.bool, device=matrix.weight.device)
    measured = _measure(matrix.weight, Pruned(matrix.weight, keep), sample)
    return Done(matrix, replace(_report(matrix, measured, stats, {}, begun), skipped=why), keep)


def _put(
    matrix: Matrix,
    pruned: Pruned,
    stats: Stats,
    sample: InputSample | None,
    task: Task,
    begun: float,
) -> Done:
    """Check what a method gave for one matrix, report it and write it into the model."""
    if pruned.weight.shape != pruned.keep.shape or tuple(pruned.weight.shape) != matrix.shape:
        wrong: str | None = f"shape {tuple(pruned.weight.shape)} for {matrix.shape}"
    else:
        measured = _measure(matrix.weight, pruned, sample)
        wrong = _broken(pruned, measured, task)
    if wrong:
        raise NumericalError(f"{task.method.called} gave {wrong} at {matrix.name}")
    report = _report(matrix, measured, stats, dict(pruned.notes), begun, as_text(task.pattern))
    matrix.write(pruned.weight)
    if pruned.late is None:
        return Done(matrix, report, pruned.keep)
    at = tuple(pruned.late.T)
    matrix.weight[at] = 0  # shares memory with the model
    return Done(matrix, report, pruned.keep, pruned.late, pruned.weight[at])


def _able(matrices: Sequence[Matrix], stats: Stats, task: Task) -> tuple[Task, Stats]:
    """`task` with a method that `stats` suffice for, and what that method is to know: experts fall back."""
    # the user chose how many tokens there are, the router how few reach an expert
    method = task.method
    if all(matrix.number is not None for matrix in matrices):
        while stats.tokens < method.needs_tokens(matrices[0].shape[1]):
            method, stats = method.fallback(stats)
    return replace(task, method=method), stats


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


@dataclass(frozen=True)
class _Measured:
    """What one pass over a matrix finds; see `LayerReport`. `outside`: weights where the mask has none."""

    kept: int
    outside: bool
    weight_error: float
    output_error: float | None


def _measure(dense: Tensor, pruned: Pruned, sample: InputSample | None) -> _Measured:
    """Read a matrix [out, in] once, before and after, a few rows at a time: they stay in the cache."""
    at = dense.device
    lost, size = torch.zeros(2, device=at), torch.zeros(2, device=at)  # of weights, of outputs
    outside = torch.zeros((), dtype=torch.bool, device=at)
    step = max(1, CHUNK // dense.shape[1])
    for start in range(0, len(dense), step):
        rows = slice(start, start + step)
        w, b = dense[rows].float(), pruned.weight[rows].float()
        outside |= torch.gt(b != 0, pruned.keep[rows]).any()
        for part, total in ((w - b, lost), (w, size)):
            total[0] += torch.linalg.vector_norm(part).square()
            if sample is not None:
                total[1] += sample.energy(part)
    share = (lost / size.clamp_min(1e-30)).tolist()
    return _Measured(true_in(pruned.keep), bool(outside), share[0], share[1] if sample else None)


def _broken(pruned: Pruned, measured: _Measured, task: Task) -> str | None:
    """Which invariant a result breaks: finite, zero outside the mask, exact counts; or None."""
    # an error is a number only where every weight is; the exact test only on suspicion
    if not math.isfinite(measured.weight_error) and not bool(pruned.weight.isfinite().all()):
        return "NaN or Inf weights"
    if measured.outside:
        return "weights outside its own mask"
    if pruned.grid is not None and not pruned.grid.holds(pruned.weight):
        return "weights off their grid"
    return _miscounted(pruned.keep, task.pattern) if task.method.exact else None


def _miscounted(keep: Tensor, pattern: Pattern) -> str | None:
    """What is wrong with the counts of `keep` [out, in], or None."""
    if isinstance(pattern, NM):
        narrow = torch.int8 if pattern.m < 128 else torch.int32  # summed six times as fast as int64
        groups = keep.reshape(-1, pattern.m).sum(1, dtype=narrow)
        return None if bool((groups == pattern.n).all()) else f"groups that are not {pattern}"
    for group in pattern.groups(keep):
        size, kept = group.shape[1], group.sum(1, dtype=torch.int32)
        if not bool((kept == size - pattern.removed(size)).all()):
            return f"a count that is not {size - pattern.removed(size)} kept of {size}"
    return None


def _report(
    matrix: Matrix,
    measured: _Measured,
    stats: Stats,
    notes: dict[str, float | int | str],
    begun: float,
    pattern: str | None = None,
) -> LayerReport:
    return LayerReport(
        name=matrix.name,
        shape=matrix.shape,
        expert=matrix.number,
        kept=measured.kept,
        sparsity=1 - measured.kept / math.prod(matrix.shape),
        weight_error=measured.weight_error,
        output_error=measured.output_error,
        tokens=stats.tokens,
        seconds=time.perf_counter() - begun,
        notes=notes,
        pattern=pattern,
    )
