"""Measuring experts' kernels: with made-up times, by the kernel's own source in an emulator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from gluon_on_cpu import on_cpu
from torch import Tensor

from llmprune.kernels import experts, experts_measure, measure, table, tuning
from llmprune.kernels.experts import S24Experts
from llmprune.kernels.experts_table import matrix_of
from llmprune.kernels.held import S24_MMA
from llmprune.kernels.interface import Mixture
from llmprune.kernels.measure import Way
from llmprune.kernels.table import Timing

CPU = torch.device("cpu")
CASE = Mixture(
    (16, 32),
    1024,
    torch.bfloat16,
    CPU,
    "2:4",
    "rows",
    False,
    tokens=1,
    trains=False,
    experts=4,
    each=2,
)


@pytest.fixture
def emulated(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The kernel runs on a CPU, and the table is empty and nobody's."""
    known = table.Table()
    monkeypatch.setattr(experts_measure, "current", lambda: known)
    monkeypatch.setattr(experts_measure, "keep", known.add)
    monkeypatch.setattr(table, "current", lambda: known)
    monkeypatch.setattr(tuning, "current", lambda: known)
    monkeypatch.setattr(tuning, "keep", known.add)
    monkeypatch.setattr(S24Experts, "static", lambda self, case: S24_MMA._misfit(case))
    monkeypatch.setattr(S24Experts, "unavailable", lambda self, device: None)
    monkeypatch.setenv(measure.SETTING, "1")
    kernels = root / "kernels"
    with on_cpu(kernels / "s24_gluon.py", kernels / "experts_gluon.py") as module:
        yield module
    measure.FAILED.clear()


class MadeUp:
    """A timer for which dense takes 10 us, expanding 30, and the kernel what `kernel` says of its warps."""

    def __init__(self, kernel: dict[int | None, float]) -> None:
        self.kernel, self.asked = kernel, list[Way]()

    def __call__(self, device: torch.device, ways: Sequence[Way]) -> list[float]:
        self.asked += ways
        for way in ways:
            assert all(isinstance(run(), Tensor) for run in way.runs)
        usual = {"dense": 10.0, "expand": 30.0}
        return [usual.get(way.name) or self.kernel[way.warps] for way in ways]


@pytest.mark.usefixtures("emulated")
def test_what_was_not_measured_is_and_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    timer = MadeUp({None: 11.0, 8: 12.0, 4: 9.0})
    monkeypatch.setattr(measure, "quick_timer", timer)
    monkeypatch.setattr(experts_measure, "QUICK", (1, 65))
    for _ in range(2):
        assert experts.choose(CASE) is experts.S24_EXPERTS
    known = table.current().timings[matrix_of(CASE)]
    # with one token other warps make up for it, with 65 nobody asks
    assert known == {
        1: Timing(1, 9.0, 4, None, 30.0, 10.0),
        65: Timing(65, 11.0, None, None, 30.0, 10.0),
    }
    (line,) = capfd.readouterr().err.splitlines()
    assert "measured s24_experts 4 x 2 16 x 32 bfloat16 in" in line
    assert "1.11x at 1, 0.91x at 65 tokens" in line
    several = [len(way.runs) for way in timer.asked]
    assert set(several) == {2}  # each expert is read before one is read again


@pytest.mark.usefixtures("emulated")
def test_slower_than_dense_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "quick_timer", MadeUp({None: 11.0, 8: 12.0, 4: 12.0}))
    monkeypatch.setattr(experts_measure, "QUICK", (1,))
    assert experts.choose(CASE) is experts.DENSE_EXPERTS
    assert "slower than dense at 1 token (0.91x)" in str(experts.explain(CASE, "dense_experts"))


def test_a_kernel_that_gives_something_else_is_not_used(
    emulated: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    right = emulated._mma
    monkeypatch.setattr(emulated, "_mma", lambda step, half: right(step ^ 1, half))
    monkeypatch.setattr(measure, "quick_timer", MadeUp({None: 1.0}))
    assert experts.choose(CASE) is experts.DENSE_EXPERTS
    assert "is not used: gives wrong results for 1 token (kernel)" in capfd.readouterr().err


@pytest.mark.usefixtures("emulated")
def test_tune_measures_experts_too() -> None:
    timer = MadeUp({None: 5.0, 8: 4.0, 4: 6.0})
    odd = replace(CASE, pattern="4:8")
    found = tuning.measured([CASE, CASE, odd], [1, 3], 60, timer, lambda: 0.0)
    (timings,) = found.timings.values()
    assert timings[3] == Timing(3, 4.0, 8, None, 30.0, 10.0)
    assert "s24_experts 4 x 2 16 x 32 bfloat16: used" in str(found)
    assert "not measured: 4 x 16 x 32 4:8: s24_experts needs 2:4, not 4:8" in str(found)

    class Module(torch.nn.Module):
        def cases(self, tokens: int) -> list[Mixture]:
            return [replace(CASE, tokens=tokens)]

    assert list(tuning._cases(torch.nn.Sequential(Module()))) == [CASE]
