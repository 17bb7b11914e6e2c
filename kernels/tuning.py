"""Measuring all matrices of a model on the user's own GPU: `llmprune.kernels.tune(model)`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from llmprune.kernels import experts, experts_measure, gpu, measure
from llmprune.kernels.choice import offered
from llmprune.kernels.experts_table import matrix_of
from llmprune.kernels.interface import Case, Mixture
from llmprune.kernels.measure import Bench, Timer
from llmprune.kernels.table import Matrix, Table, Timing, counted, current, keep
from llmprune.kernels.words import Measured

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_Job = Callable[[], Bench | experts_measure.Bench]


def tune(model: torch.nn.Module, tokens: Iterable[int] = TOKENS, seconds: float = 300) -> Table:
    """Measure the kernels on each shape, pattern and dtype of the packed layers, where the layers are.

    Prints the table, losses among it, and keeps it for this and later processes (docs/kernels.md). Layers
    that are laid out already stay as they are until they are laid out anew.

    A layer is held dense where its kernel is slower than that at any of `tokens` up to 64. So a model that is
    used for few tokens only should be measured for these only.

    Args:
        model: with packed layers on an NVIDIA GPU.
        tokens: rows of the inputs to measure, 1 and more.
        seconds: when to begin no further measurement.

    Returns:
        What was measured; its `str` is what was printed.

    Raises:
        ValueError: without packed layers on an NVIDIA GPU, or for tokens that are none.
    """
    counts = sorted(set(tokens))
    if not counts or counts[0] < 1 or not all(isinstance(t, int) for t in counts):
        raise ValueError(f"tokens are {counts}; give whole numbers from 1 on")
    cases = [case for case in _cases(model) if case.device.type == "cuda"]
    if not cases or torch.version.hip:
        raise ValueError(
            "tune needs packed layers on an NVIDIA GPU, and found none; move the model there: "
            'model.to("cuda")'
        )
    table = measured(cases, counts, seconds, measure.slow_timer, time.monotonic)
    print(table)
    return table


def measured(
    cases: Iterable[Case],
    tokens: Iterable[int],
    seconds: float,
    timer: Timer,
    clock: Callable[[], float],
) -> Table:
    """What `tune` does, with any timer and clock."""
    tokens, begun, table = list(tokens), clock(), Table()
    jobs, table.notes = _jobs(cases)
    bar = _Bar(len(jobs) * len(tokens))
    for i, (matrix, job) in enumerate(jobs.items()):
        if clock() - begun >= seconds:
            table.notes.append(f"left out after {seconds:g} s: {matrix}")
            continue
        measure.FAILED.pop(matrix, None)
        measure.LEFT_OUT.pop(matrix, None)
        steps = (i * len(tokens) + k for k in range(len(tokens)))

        def run(
            job: _Job = job, matrix: Matrix = matrix, steps: Iterator[int] = steps
        ) -> list[Timing]:
            bench, found = job(), list[Timing]()
            for step, count in zip(steps, tokens, strict=True):
                if found and clock() - begun >= seconds:
                    table.notes.append(
                        f"left out after {seconds:g} s: {matrix} from {count} tokens on"
                    )
                    break
                bar.show(step, f"{matrix}, {counted(count)}")
                found.append(bench.time(count, bench.launches(), timer))
            return found

        found = measure.attempt(matrix, run)
        if found is None:
            table.notes.append(
                f"{matrix}: {measure.FAILED.get(matrix) or measure.LEFT_OUT[matrix]}"
            )
            continue
        keep(matrix, found)
        table.add(matrix, current().timings[matrix].values())
    bar.done()
    return table


def _cases(model: torch.nn.Module) -> Iterator[Case]:
    """Of all packed layers and experts."""
    for module in model.modules():
        stacked: Any = getattr(module, "cases", None)
        if callable(stacked):
            yield from (found for found in stacked(1) if isinstance(found, Mixture))
        case: Any = getattr(module, "case", None)
        if callable(case) and hasattr(module, "kernel"):
            found = case(1)
            if isinstance(found, Case):
                yield found


def _jobs(cases: Iterable[Case]) -> tuple[dict[Matrix, _Job], list[str]]:
    """What is to be measured, each once, and a note on each case for which there is nothing."""
    jobs, notes = dict[Matrix, _Job](), dict[str, None]()
    for case in cases:
        if isinstance(case, Mixture):
            if (why := experts.S24_EXPERTS.unfit(case)) is None:
                jobs.setdefault(matrix_of(case), partial(experts_measure.Bench, case))
            else:
                shape = " x ".join(map(str, (case.experts, *case.sides)))
                notes[f"not measured: {shape} {case.pattern}: {experts.S24_EXPERTS.name} {why}"] = (
                    None
                )
            continue
        reasons = []
        for kernel in offered(case):
            if not isinstance(kernel, Measured):
                continue
            why = kernel.unfit(case)
            if why is None:
                where = gpu.whole(case.device)  # of two GPUs of a name, one is measured
                matrix = kernel.matrix(where, case.sides, case.dtype)
                jobs.setdefault(matrix, partial(Bench, kernel, where, case.sides, case.dtype))
            else:
                reasons.append(f"{kernel.name} {why}")
        if len(reasons) == sum(isinstance(k, Measured) for k in offered(case)):
            shape = " x ".join(map(str, case.sides))
            notes[f"not measured: {shape} {case.pattern}: {'; '.join(reasons)}"] = None
    return jobs, list(notes)


class _Bar:
    """A progress bar on stderr, where that is a terminal."""

    def __init__(self, total: int) -> None:
        self._total, self._shown = max(1, total), sys.stderr.isatty()

    def show(self, done: int, doing: str) -> None:
        """So many steps are done."""
        if self._shown:
            full = 20 * done // self._total
            line = f"measuring [{'#' * full}{'.' * (20 - full)}] {done}/{self._total} {doing}"
            print(f"\r\x1b[K{line[:110]}", end="", file=sys.stderr, flush=True)

    def done(self) -> None:
        """Take it away."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
