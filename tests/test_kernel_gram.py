"""The Gram kernel against its twin and float64, on and above the diagonal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from codegen import Job, can_compile, found
from kernel_harness import amid_poison
from torch import Tensor

from llmprune.kernels import gram
from llmprune.stats import Gram

pytest.importorskip("triton", reason="triton is not installed on this platform")

Unwritten = Callable[[Tensor], int]
# tokens, features: one token, one feature, one tile and a bit of both, three bands of tiles
SHAPES = [(1, 5), (70, 1), (65, 130), (64, 128), (3, 300)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def inputs(tokens: int, features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    random = torch.Generator().manual_seed(tokens + features)
    x = torch.randn(tokens, features, generator=random) * torch.logspace(-1, 1, features)
    return amid_poison(x.to(device, dtype))


def assert_right(found: Tensor, before: Tensor, x: Tensor) -> None:
    """`before` plus x^T x to the rounding of a float32 sum in any order; `before` below the diagonal."""
    wide = x.double()
    exact = before.double() + wide.T @ wide
    lost = (wide.abs().T @ wide.abs() + before.abs()) * ((len(x) + 4) * 2.0**-24)
    assert bool(
        ((found.double() - exact).abs() <= lost).triu().eq(torch.ones_like(lost).triu()).all()
    )
    assert torch.equal(found.tril(-1), before.tril(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "features"), SHAPES, ids=str)
def test_it_adds_the_upper_half_and_leaves_the_lower(
    tokens: int, features: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = inputs(tokens, features, dtype, device)
    before = torch.randn(features, features, generator=torch.Generator().manual_seed(1)).to(device)
    ours, theirs = amid_poison(before), before.clone()
    gram.add_kernel(ours, x)
    assert_right(ours, before, x)
    gram.add_reference(theirs, x)
    torch.testing.assert_close(ours.triu(), theirs.triu(), rtol=2e-5, atol=2e-4)


def test_rows_may_lie_apart_and_columns_too(device: torch.device) -> None:
    x = inputs(40, 48, torch.bfloat16, device)
    expected = torch.zeros(20, 20, device=device)
    gram.add_kernel(expected, x[:, 8:28].contiguous())
    for view in (x[:, 8:28], x.T.contiguous().T[:, 8:28]):
        sums = torch.zeros(20, 20, device=device)
        gram.add_kernel(sums, view)
        assert torch.equal(sums, expected)


def test_infinity_and_nan_reach_the_diagonal_and_no_other_feature(device: torch.device) -> None:
    """The walk looks for them there."""
    x = inputs(20, 40, torch.bfloat16, device)
    x[3, 7], x[4, 9] = float("inf"), float("nan")
    sums = torch.zeros(40, 40, device=device)
    with np.errstate(invalid="ignore"):  # what the interpreter would warn of
        gram.add_kernel(sums, x)
    wrong = ~sums.diagonal().isfinite()
    assert wrong.nonzero().flatten().tolist() == [7, 9]


def test_nothing_is_added_for_no_tokens(device: torch.device) -> None:
    sums = torch.ones(6, 6, device=device)
    gram.add_kernel(sums, torch.empty(0, 6, dtype=torch.bfloat16, device=device))
    assert torch.equal(sums, torch.ones(6, 6, device=device))


@pytest.mark.parametrize(
    ("sums", "x", "message"),
    [
        (torch.zeros(6, 6), torch.zeros(3, 6).double(), "float64"),
        (torch.zeros(5, 5), torch.zeros(3, 6), "features"),
        (torch.zeros(6, 6).double(), torch.zeros(3, 6), "float32"),
        (torch.zeros(6, 7)[:, :6], torch.zeros(3, 6), "contiguous"),
    ],
)
def test_what_it_does_not_take_is_refused(sums: Tensor, x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gram.add_kernel(sums, x)


@pytest.mark.parametrize(("dtype", "by_kernel"), [(torch.bfloat16, 1), (torch.float32, 0)])
def test_statistics_take_it_for_half_precision(
    dtype: torch.dtype, by_kernel: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMPRUNE_SOLVER", "triton")
    calls = []
    add = gram.add_kernel

    def counted(sums: Tensor, x: Tensor) -> None:
        calls.append(x)
        add(sums, x)

    assert gram.GRAM.used(device)  # tried before calls count
    monkeypatch.setattr(gram, "add_kernel", counted)
    x = inputs(33, 70, dtype, device)
    stats = Gram.empty(70, device)
    stats.add(x[:20].view(2, 10, 70))
    stats.add(x[20:].view(1, 13, 70))
    assert len(calls) == 2 * by_kernel
    exact = (x.double().T @ x.double()).float()
    torch.testing.assert_close(stats.gram, exact, rtol=1e-5, atol=1e-3)
    assert torch.equal(stats.gram, stats.gram.T)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "features"), [(8192, 4096), (2049, 14336), (513, 1000)], ids=str
)
def test_on_a_gpu_at_the_size_of_a_layer(tokens: int, features: int, dtype: torch.dtype) -> None:
    """The twin of the interpreted test; twenty times the same, and no worse than torch's own product."""
    x = inputs(tokens, features, dtype, torch.device("cuda"))
    expected = torch.zeros(features, features, device="cuda")
    gram.add_kernel(expected, x)
    assert_right(expected, torch.zeros_like(expected), x)
    for _ in range(20):
        sums = torch.zeros_like(expected)
        gram.add_kernel(sums, x)
        assert torch.equal(sums, expected)
    theirs = torch.zeros_like(expected)
    gram.add_reference(theirs, x)
    exact = (x.double().T @ x.double()).triu()
    mine, other = (float((t.triu() - exact).abs().mean()) for t in (expected, theirs))
    assert mine <= 4 * other


def job(arch: int, kind: str, tiles: dict[str, int]) -> Job:
    types = {"x": f"*{kind}", "sums": "*fp32", "tokens": "i32", "features": "i32", "step": "i32"}
    constants: dict[str, int | bool | str] = {k: v for k, v in tiles.items() if k.isupper()}
    constants["WIDEN"] = False
    return Job(
        "gram_triton", "gram_kernel", types, constants, tiles["warps"], arch, False, ["tokens"]
    )


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_compiles_offline_for_tensor_cores_without_spills(arch: int, root: Path) -> None:
    if not can_compile():
        pytest.skip("the ptxas and cuobjdump that triton ships do not run here")
    jobs = [job(arch, "bf16", gram.TILES), job(arch, "fp32", gram.WIDE_TILES)]
    half, wide = found(jobs, root)
    assert half.stack == wide.stack == 0
    # on sm_100 a loop waits for them and then reads the memory that they alone write
    assert half.names or (arch == 100 and "LDTM" in half.loop), f"no tensor cores: {half.loop}"
    # Triton may leave the rows of a tile as they are in registers and turn them there, which is no detour.
    assert not {"SHFL", "LDL", "STL"} & half.loop.keys(), half.loop
    assert half.shared <= 99 * 1024, "a GPU of sm_89 has 99 KiB for a program"
    assert not wide.names, f"float32 must not become TF32: {wide.names}"
    # FFMA2, of sm_100, is two of them
    one, two = (wide.loop.get(name, 0) for name in ("FFMA", "FFMA2"))
    assert one + 2 * two == 64 * 64 * 32 / 128
