"""Which kernels the solvers take, and that whole runs keep the same weights by them as by plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import INTERPRETED
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import llmprune
from llmprune import methods
from llmprune.cli import main
from llmprune.kernels import gpu, gram, nm_mask, solver, sweep
from llmprune.pattern import NM, kth_lowest
from llmprune.stats import Gram

pytest.importorskip("triton", reason="triton is not installed on this platform")

CPU = torch.device("cpu")


def right(device: torch.device) -> str | None:
    return None


def race(device: torch.device) -> solver.Race:
    return list, tuple


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Set LLMPRUNE_SOLVER; it is not set before."""
    monkeypatch.delenv(solver.SETTING, raising=False)
    return lambda value: monkeypatch.setenv(solver.SETTING, value)


def test_without_a_gpu_it_is_torch_unless_the_interpreter_is_asked_for(
    asked: Callable[[str], None],
) -> None:
    assert solver.Solver("gram", right, race).refusal(CPU) == "needs an NVIDIA GPU"
    asked("torch")
    assert solver.Solver("gram", right, race).refusal(CPU) == "LLMPRUNE_SOLVER=torch"
    assert set(solver.state(CPU)) == {"gram", "sweep", "nm_mask"}
    asked("triton")
    expected = None if INTERPRETED else "needs an NVIDIA GPU"
    assert solver.Solver("gram", right, race).refusal(CPU) == expected
    asked("triron")
    with pytest.raises(ValueError, match="'triron'; known: torch, triton"):
        solver.Solver("gram", right, race).used(CPU)


@pytest.mark.skipif(not INTERPRETED, reason="on a CPU kernels need the interpreter")
def test_every_kernel_passes_its_own_trial(asked: Callable[[str], None]) -> None:
    asked("triton")
    assert solver.state(CPU) == dict.fromkeys(("gram", "sweep", "nm_mask"), "triton")


@pytest.mark.skipif(not INTERPRETED, reason="on a CPU kernels need the interpreter")
def test_a_kernel_that_is_wrong_is_tried_once_and_told(
    asked: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    tries = []

    def wrong(device: torch.device) -> str | None:
        tries.append(device)
        return "3 tokens"

    asked("triton")
    broken = solver.Solver("gram", wrong, race)
    for _ in range(2):
        assert broken.refusal(CPU) == "gives wrong results on this GPU: 3 tokens"
    assert tries == [CPU]
    assert capsys.readouterr().err.count("gram by plain torch on cpu: gives wrong") == 1


@pytest.mark.parametrize(
    ("where", "launch"),
    [
        (gram, "add_kernel"),
        (sweep, "prune_columns"),
        (sweep, "round_columns"),
        (nm_mask, "nm_keep"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_trials_notice_a_kernel_that_does_nothing(
    where: Any, launch: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    def nothing(score: Tensor, *rest: Any) -> Tensor:
        return torch.zeros_like(score, dtype=torch.bool)

    assert where._wrong(device) is None
    monkeypatch.setattr(where, launch, nothing)
    assert where._wrong(device) is not None


@pytest.mark.parametrize(("theirs", "why"), [(0.9, "slower than torch here (0.45x)"), (2.1, None)])
def test_one_that_is_slower_is_not_used(
    theirs: float, why: str | None, monkeypatch: pytest.MonkeyPatch, asked: Callable[[str], None]
) -> None:
    """With times that are made up, on a CPU that says it is a GPU."""
    monkeypatch.setenv("LLMPRUNE_MEASURE", "1")
    monkeypatch.setattr(gpu, "missing", lambda device: None)
    times = iter([2.0, theirs])
    monkeypatch.setattr(solver, "_seconds", lambda work: next(times))
    kernel = solver.Solver(f"gram {theirs}", right, race)
    for _ in range(2):  # the second time without measuring
        assert kernel.refusal(CPU) == why
    monkeypatch.setenv("LLMPRUNE_MEASURE", "0")
    assert kernel.refusal(CPU) is None
    asked("triton")
    if INTERPRETED:
        assert kernel.refusal(CPU) is None


def model(dtype: torch.dtype) -> Any:
    """One block, of which the last matrix has more columns than a launch takes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=136,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU benchmarks/gpu.py compares whole runs")
@pytest.mark.parametrize(
    ("method", "pattern", "dtype", "more"),
    [
        ("sparsegpt", "0.5", torch.bfloat16, {}),
        ("sparsegpt", "2:4", torch.bfloat16, {}),
        ("sparsegpt", "4:8", torch.float32, {"quantize": "int4"}),
        ("wanda", "2:4", torch.bfloat16, {}),
    ],
    ids=str,
)
def test_whole_runs_keep_what_they_keep_by_torch(
    method: str,
    pattern: str,
    dtype: torch.dtype,
    more: dict[str, Any],
    asked: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sweep, "ROWS", 256)  # fewer programs: one interpreted step takes as long
    ids = torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(1))
    launched = set[str]()
    for where, name in ((sweep, "prune_columns"), (sweep, "round_columns"), (nm_mask, "nm_keep")):
        monkeypatch.setattr(where, name, _noting(launched, name, getattr(where, name)))
    found = []
    for how in ("torch", "triton"):
        asked(how)
        solver.state(CPU)  # trials launch, too
        launched.clear()
        pruned = model(dtype)
        llmprune.prune(
            pruned, calibration=ids, method=method, sparsity=pattern, progress=False, **more
        )
        weights = {k: v.detach().float() for k, v in pruned.named_parameters()}
        found.append((llmprune.masks(pruned), weights, set(launched)))
    (masks, weights, by_torch), (ours, values, by_triton) = found
    assert masks.keys() == ours.keys()
    assert all(torch.equal(masks[name], ours[name]) for name in masks)
    assert by_torch == set()
    expected = {"nm_keep"} if method == "wanda" else {"prune_columns"}
    assert by_triton == expected | ({"round_columns"} if more else set())
    if not more:  # on a grid the least difference may move a weight by a step
        for name, value in weights.items():
            torch.testing.assert_close(values[name], value, rtol=2e-2, atol=2e-3)


def _noting(launched: set[str], name: str, launch: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*given: Any, **named: Any) -> Any:
        launched.add(name)
        return launch(*given, **named)

    return noted


@pytest.mark.parametrize(("block", "m"), [(160, 4), (100, 8), (1, 16), (256, 256), (40, 10)])
def test_a_block_that_a_launch_does_not_take_is_parted_or_left_to_torch(
    block: int, m: int, device: torch.device, asked: Callable[[str], None]
) -> None:
    random = torch.Generator().manual_seed(2)
    stats = Gram.empty(256 if m == 256 else 160, device)
    stats.add(torch.randn(300, len(stats.sums), generator=random).to(device))
    weight = torch.randn(5, len(stats.sums), generator=random).to(device)
    method = methods.build("sparsegpt", {"block": block})
    asked("torch")
    theirs = method.prune(weight, stats, NM(m // 2, m))
    asked("triton")
    ours = method.prune(weight, stats, NM(m // 2, m))
    assert torch.equal(ours.keep, theirs.keep)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_one_long_group_is_sorted_on_a_gpu() -> None:
    score = torch.randn(1, 100_001, generator=torch.Generator().manual_seed(0))
    for k in (1, 50_000, 100_001):
        assert kth_lowest(score.cuda(), k).item() == kth_lowest(score, k).item()


def test_a_setting_that_there_is_not_is_said_before_anything_is_read(
    asked: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    asked("fast")
    assert main(["--model", "nowhere", "--sparsity", "0.5"]) == 2
    assert capsys.readouterr().err == (
        "llmprune: error: LLMPRUNE_SOLVER is 'fast'; known: torch, triton\n"
    )
