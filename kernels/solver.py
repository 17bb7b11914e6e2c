"""Which kernels the solvers use on a device: those that are right there and not slower than plain torch.

Each is tried once on each GPU of a process, when it is first needed: compared with its twin in plain torch on
small inputs, then timed beside it on inputs of a usual size. One that fails, or is slower, is not used there,
and a line on stderr says so. docs/solvers.md is the page for users.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import gpu
from .measure import SETTING as MEASURE
from .table import FAIR, tell

SETTING = "LLMPRUNE_SOLVER"  # environment variable: one of NAMES, or nothing, the choice told above
NAMES = ("torch", "triton")
_ROUNDS = 5


def asked() -> str | None:
    """What LLMPRUNE_SOLVER says, or None.

    Raises:
        ValueError: when that is neither `torch` nor `triton`.
    """
    found = os.environ.get(SETTING) or None
    if found is not None and found not in NAMES:
        raise ValueError(f"{SETTING} is {found!r}; known: {', '.join(NAMES)}")
    return found


Race = tuple[Callable[[], object], Callable[[], object]]
"""What the kernel does and what plain torch does, on inputs of a usual size."""


@dataclass(frozen=True)
class Solver:
    """One kernel of the solvers.

    Attributes:
        name: what it is called.
        wrong: runs it on small inputs of a device; what differs from plain torch, in a few words, or None.
        race: inputs of a usual size on a device, and what kernel and torch do with them.
    """

    name: str
    wrong: Callable[[torch.device], str | None]
    race: Callable[[torch.device], Race]

    def used(self, device: torch.device) -> bool:
        """Whether the kernel, and not plain torch, is to be used on tensors of `device`.

        Raises:
            ValueError: when LLMPRUNE_SOLVER is set to something else than `torch` or `triton`.
        """
        return self.refusal(device) is None

    def refusal(self, device: torch.device) -> str | None:
        """Why plain torch is used on `device`, in a few words, or None.

        With LLMPRUNE_SOLVER=triton a kernel is used wherever it runs and is right, also where it is slower,
        and by Triton's interpreter on a CPU.

        Raises:
            ValueError: as `used`.
        """
        wanted = asked()
        if wanted == "torch":
            return f"{SETTING}=torch"
        device = gpu.whole(device)
        if wanted == "triton" and gpu.launches(device):
            return _fails(device, self)
        if (why := gpu.missing(device)) is not None:
            return why
        if (why := _fails(device, self)) is not None or os.environ.get(MEASURE) == "0":
            return why
        return _slower(device, self)


@gpu.once
def _fails(device: torch.device, solver: Solver) -> str | None:
    return _told(device, solver, gpu.trial(device, solver.wrong))


@gpu.once
def _slower(device: torch.device, solver: Solver) -> str | None:
    """Whether torch is quicker, by the least of a few times; what then is kept for this process."""
    with gpu.plainly(device):
        try:
            ours, theirs = (_seconds(work) for work in solver.race(device))
        except torch.OutOfMemoryError:
            return None  # it is right, and needs no more memory than torch
    gain = theirs / ours
    return _told(device, solver, None if gain >= FAIR else f"slower than torch here ({gain:.2f}x)")


def _told(device: torch.device, solver: Solver, why: str | None) -> str | None:
    if why is not None:
        tell(f"{solver.name} by plain torch on {gpu.identity(device)[0]}: {why}")
    return why


def _seconds(work: Callable[[], object]) -> float:
    """The least of a few runs on the current GPU, in seconds."""
    times = []
    work()
    for _ in range(_ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1e3)
    return min(times)


def state(device: torch.device) -> dict[str, str]:
    """For each kernel of the solvers "triton", or why plain torch is used on `device`; tries what was not."""
    from .gram import GRAM
    from .nm_mask import NM_MASK
    from .sweep import SWEEP

    return {
        solver.name: why or "triton"
        for solver in (GRAM, SWEEP, NM_MASK)
        for why in [solver.refusal(device)]
    }
