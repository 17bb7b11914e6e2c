"""The n:m mask kernel against its reference and against the pattern that the methods use."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmprune.kernels.nm_mask import nm_keep, nm_keep_reference
from llmprune.pattern import NM

pytest.importorskip("triton", reason="triton is not installed on this platform")

Unwritten = Callable[[torch.Tensor], int]
PATTERNS = [(1, 2), (2, 4), (1, 4), (4, 8), (3, 8), (2, 8), (8, 16), (5, 16), (16, 32), (31, 32)]


def _random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _few_values(rows: int, columns: int) -> torch.Tensor:
    """Scores from {0, 1, 2}: every group of four and more has ties."""
    return torch.randint(0, 3, (rows, columns), generator=torch.Generator().manual_seed(1)).float()


def _signed_zeros(rows: int, columns: int) -> torch.Tensor:
    """0.0 and -0.0 in turn: equal, so the index decides."""
    return torch.zeros(rows, columns).index_fill_(1, torch.arange(0, columns, 2), -0.0)


CASES = {
    "random": _random(8, 128),
    "one row": _random(1, 32),
    "one column of groups": _random(33, 32),
    "ragged last program": _random(37, 96),
    "ties": _few_values(16, 96),
    "all equal": torch.full((5, 64), 0.25),
    "all zero": torch.zeros(5, 64),
    "signed zeros": _signed_zeros(5, 64),
    "descending": torch.arange(320, 0, -1).float().reshape(5, 64),
    "infinite": _random(4, 64).masked_fill_(_random(4, 64, seed=2) > 1, float("inf")),
    "subnormal": _random(4, 64) * 1e-40,
    "nothing": torch.empty(0, 32),
}


@pytest.mark.parametrize(("n", "m"), PATTERNS, ids=lambda value: str(value))
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference_and_the_pattern(
    case: str, n: int, m: int, device: torch.device, poisoned: Unwritten
) -> None:
    score = CASES[case].to(device)
    keep = nm_keep(score, n, m)
    assert poisoned(keep) == 0
    torch.testing.assert_close(keep, nm_keep_reference(score, n, m), rtol=0, atol=0)
    if score.numel():
        torch.testing.assert_close(keep, NM(n, m).keep(score), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_compare_by_value(
    dtype: torch.dtype, device: torch.device, poisoned: Unwritten
) -> None:
    score = _random(16, 64).to(device, dtype)
    keep = nm_keep(score, 2, 4)
    assert poisoned(keep) == 0
    torch.testing.assert_close(keep, nm_keep_reference(score, 2, 4), rtol=0, atol=0)


def test_a_transposed_score_is_read_row_by_row(device: torch.device) -> None:
    score = _random(64, 32).to(device).T
    torch.testing.assert_close(nm_keep(score, 2, 4), nm_keep_reference(score, 2, 4), rtol=0, atol=0)


def test_on_a_tie_the_lower_index_goes_first() -> None:
    keep = nm_keep_reference(torch.tensor([[1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 2.0, 1.0]]), 2, 4)
    assert keep.tolist() == [[False, False, True, True, True, False, True, False]]


@pytest.mark.parametrize(
    ("shape", "n", "m", "dtype", "message"),
    [
        ((4, 24), 2, 6, torch.float32, "2:6"),
        ((4, 24), 4, 4, torch.float32, "0 < n < m"),
        ((4, 64), 32, 64, torch.float32, "32:64"),
        ((4, 6), 2, 4, torch.float32, "divisible by 4"),
        ((8,), 2, 4, torch.float32, r"\[out, in\]"),
        ((4, 8), 2, 4, torch.float64, "float64"),
    ],
)
def test_what_it_does_not_take_is_refused(
    shape: tuple[int, ...], n: int, m: int, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        nm_keep(torch.zeros(shape, dtype=dtype), n, m)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "m"), PATTERNS, ids=lambda value: str(value))
def test_on_a_gpu_at_the_size_of_a_layer(n: int, m: int, poisoned: Unwritten) -> None:
    """The twin of the interpreted test: Llama-3-8B's down projection, a hundred times the same."""
    score = torch.randn(4096, 14336, generator=torch.Generator().manual_seed(0)).cuda().abs()
    expected = nm_keep_reference(score, n, m)
    for _ in range(100):
        keep = nm_keep(score, n, m)
        assert poisoned(keep) == 0
        assert torch.equal(keep, expected)


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from llmprune.kernels.nm_mask_triton import keep_kernel

arch, n, m = map(int, sys.argv[1:4])
constants = {"N": n, "M": m, "GROUPS": 1024 // m}
types = {"score": "*fp32", "keep": "*i1", "groups": "i32"} | dict.fromkeys(constants, "constexpr")
aligned = [["tt.divisibility", 16]]  # what a launch with torch's own memory specialises on
kernel = triton.compile(
    ASTSource(keep_kernel, types, constexprs=constants, attrs={(0,): aligned, (1,): aligned}),
    target=GPUTarget("cuda", arch, 32),
)
with open(sys.argv[4], "wb") as cubin:
    cubin.write(kernel.asm["cubin"])
print(kernel.metadata.shared)
"""


def _nvidia(tool: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool


def _runs(tool: str) -> bool:
    try:
        return subprocess.run([_nvidia(tool), "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (16, 32)], ids=["2:4", "16:32"])
def test_compiles_offline_without_shared_memory_or_spills(
    arch: int, n: int, m: int, tmp_path: Path, root: Path
) -> None:
    """In a process of its own, for here `triton.jit` interprets."""
    if not (_runs("ptxas") and _runs("cuobjdump")):
        pytest.skip("the ptxas and cuobjdump that triton ships do not run here")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    cubin = tmp_path / "kernel.cubin"
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(arch), str(n), str(m), str(cubin)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0", "values change lanes through shared memory"
    usage = subprocess.run(
        [_nvidia("cuobjdump"), "-res-usage", cubin], capture_output=True, text=True, check=True
    )
    assert re.findall(r"STACK:(\d+)", usage.stdout) == ["0"], usage.stdout
