"""Measuring the product over packed experts against grouped_mm, as `measure` does for one matrix.

Each call is routed otherwise, evenly and at random, so that what was read before is not what is read next.

State: the logic is tested on a CPU with made-up times. **What takes the time has not run on a GPU.**
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from llmprune.kernels import experts, gpu, measure
from llmprune.kernels.experts_table import matrix_of
from llmprune.kernels.held import S24_MMA
from llmprune.kernels.interface import Mixture
from llmprune.kernels.measure import Launch, Refused, Timer, Unusable, Way
from llmprune.kernels.product import grouped
from llmprune.kernels.routing import route
from llmprune.kernels.s24_experts import ExpertsLayout, s24_experts
from llmprune.kernels.table import FAIR, Timing, current, keep, most, tell

QUICK = (1, 8, 64, 512, 2048)  # tokens that are measured of a parameter when it is first laid out
WARPS = (8, 4)
_TURNS = 16  # calls that are routed otherwise, at most


def first(case: Mixture) -> None:
    """Measure a parameter quickly if that has not been done, and may be now; keep it, and say so."""
    matrix = matrix_of(case)
    if matrix in current().timings or matrix in measure.FAILED or matrix in measure.LEFT_OUT:
        return
    if os.environ.get(measure.SETTING) == "0" or gpu.occupied(case.device):
        return
    begun = time.perf_counter()
    found = measure.attempt(matrix, lambda: _first(case))
    if found is None:
        return
    keep(matrix, found)
    gains = ", ".join(f"{t.gain:.2f}x at {t.tokens}" for t in found)
    tell(
        f"measured {matrix} in {time.perf_counter() - begun:.1f} s: {gains} tokens, of dense "
        f"({measure.SETTING}=0 forbids this)"
    )


def _first(case: Mixture) -> list[Timing]:
    """By the kernel's own choice of warps; only what would be held dense is given the others."""
    bench, found = Bench(case), list[Timing]()
    for tokens in QUICK:
        timing = bench.time(tokens, [(None, None)], measure.quick_timer)
        if tokens <= most() and timing.gain < FAIR and timing.kernel_us is not None:
            timing = bench.time(tokens, bench.launches(), measure.quick_timer)
        found.append(timing)
    return found


class Bench:
    """Random matrices of the size of a parameter, dense and laid out: one expert, over and over."""

    def __init__(self, case: Mixture) -> None:
        """On the device of the case.

        Raises:
            Unusable: when the layout does not expand to the matrices.
        """
        self.device, self.dtype, self.chosen = gpu.whole(case.device), case.dtype, case.each
        self.shape = (case.experts, *case.sides)
        with gpu.plainly(self.device):
            dense, words = measure._random(S24_MMA, self.device, case.sides, case.dtype)
            self.dense = dense.expand(self.shape).contiguous()
            self.words = words.expand(case.experts, *words.shape).contiguous()
            given = measure._tried(self._expand)
            if not torch.equal(given, self.dense):
                raise Unusable("its layout does not expand to what was laid out")

    def launches(self) -> list[Launch]:
        """All that may be worth trying, the kernel's own choice first."""
        return [(None, None), *((warps, None) for warps in WARPS)]

    def time(self, tokens: int, launches: Sequence[Launch], timer: Timer) -> Timing:
        """Measure so many tokens, the kernel by the best of `launches`.

        Raises:
            Unusable: when a result is not that of the dense product, or the first of `launches` fails.
        """
        with gpu.plainly(self.device):
            ways = list(self._ways(tokens, launches))
            micros = timer(self.device, ways)
        found = dict(zip(ways, micros, strict=True))
        best = min((way for way in ways if way.name == "kernel"), key=found.__getitem__)
        (expand,), (dense,) = (
            [us for way, us in found.items() if way.name == name] for name in ("expand", "dense")
        )
        return Timing(tokens, found[best], best.warps, None, expand, dense)

    def _ways(self, tokens: int, launches: Sequence[Launch]) -> Iterator[Way]:
        """All ways to multiply by inputs that give what the dense product gives."""
        random = torch.Generator(self.device).manual_seed(tokens)
        x = torch.randn(tokens, self.shape[2], generator=random, device=self.device).to(self.dtype)
        routed = list(self._routed(tokens, random))
        call = partial(grouped, x, self.dense)
        dense = Way("dense", tokens, [partial(call, *how, self.chosen) for how in routed])
        expected = dense.runs[0]()
        yield dense
        yield measure._checked(
            Way("expand", tokens, [partial(self._whole, x, *how) for how in routed]), expected
        )
        layout = ExpertsLayout(self.words, self.shape, self.dtype)
        for i, (warps, _) in enumerate(launches):
            runs = [partial(s24_experts, x, layout, *h, self.chosen, warps=warps) for h in routed]
            try:
                way = measure._checked(Way("kernel", tokens, runs, warps), expected)
            except Refused:
                if i == 0:
                    raise
                continue
            yield way

    def _routed(self, tokens: int, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Routings at random, each to the experts behind those of the one before."""
        number = self.shape[0]
        chance = torch.rand(tokens, number, generator=random, device=self.device)
        chosen = chance.argsort(1)[:, : self.chosen]
        for turn in range(max(1, min(_TURNS, number // self.chosen))):
            yield route((chosen + turn * self.chosen) % number, number)

    def _expand(self) -> Tensor:
        layout = [self.dense.new_empty(0), self.words]
        return experts.S24_EXPERTS.expanded(layout, self.shape)

    def _whole(self, x: Tensor, order: Tensor, ends: Tensor) -> Tensor:
        """Expanded, then as dense."""
        return grouped(x, self._expand(), order, ends, self.chosen)
