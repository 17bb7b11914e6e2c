"""The kernels of SparseGPT's sweep against their twins: masks exactly, values to the rounding of float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from codegen import Job, can_compile, found
from kernel_harness import amid_poison
from torch import Tensor

from llmprune.factor import InverseFactor
from llmprune.kernels import sweep
from llmprune.methods import sparsegpt
from llmprune.methods.grid import fitted, nearest
from llmprune.pattern import NM

pytest.importorskip("triton", reason="triton is not installed on this platform")

Unwritten = Callable[[Tensor], int]
PATTERNS = [None, (2, 4), (1, 2), (4, 8), (5, 16), (31, 32)]
# width, rows: a whole block, one row, one group, one program and a bit, a width that is no power of two
SHAPES = [(128, 8), (96, 1), (32, 9), (24, 17)]


def random_case(width: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights [width, rows], and the factor of inputs that are far from independent of each other."""
    random = torch.Generator().manual_seed(width + rows)
    x = torch.randn(3 * width, width, generator=random)
    x = x @ (torch.eye(width) + 0.3 * torch.randn(width, width, generator=random))
    upper = InverseFactor.of(x.T @ x, 0.01).upper
    return torch.randn(width, rows, generator=random).to(device), upper.to(device)


def some(wt: Tensor) -> Tensor:
    """A mask that keeps two of three weights, somehow."""
    return ((wt * 7).floor() % 3 != 0).contiguous()


@pytest.mark.parametrize("nm", PATTERNS, ids=str)
@pytest.mark.parametrize(("width", "rows"), SHAPES, ids=str)
def test_where_values_are_exact_nothing_differs(
    width: int, rows: int, nm: tuple[int, int] | None, device: torch.device, poisoned: Unwritten
) -> None:
    if width % (nm or (1, 1))[1]:
        width = 2 * nm[1]  # type: ignore[index]
    wt, upper = sweep.exact_case(rows, width, device)
    kt = some(wt) if nm is None else torch.empty_like(wt, dtype=torch.bool)
    errors = torch.empty_like(wt)
    ours, theirs = (
        [amid_poison(t) if t.dtype.is_floating_point else t.clone() for t in (wt, kt, errors)]
        for _ in range(2)
    )
    sweep.prune_columns(ours[0], ours[1], ours[2], amid_poison(upper), nm)
    sweep.prune_reference(theirs[0], theirs[1], theirs[2], upper, nm)
    assert sum(poisoned(tensor) for tensor in ours) == 0
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
    exact = wt.double(), theirs[1].clone(), torch.zeros_like(wt).double()
    sweep.prune_reference(*exact, upper.double(), nm)
    assert torch.equal(exact[0], theirs[0].double()), "the case is not exact"
    assert torch.equal(exact[1], ours[1])


@pytest.mark.parametrize("nm", [None, (2, 4), (4, 8)], ids=str)
def test_random_values_are_right_to_rounding(
    nm: tuple[int, int] | None, device: torch.device, poisoned: Unwritten
) -> None:
    """Against float64 with the mask that was found; and that mask is what the methods' own sweep finds."""
    wt, upper = random_case(48, 19, device)
    ours = wt.clone(), some(wt) if nm is None else torch.empty(48, 19, device=device).bool()
    theirs = wt.clone(), ours[1].clone()
    pattern = NM(*nm) if nm else NM(1, 2)
    errors = torch.empty_like(wt)
    sweep.prune_columns(*ours, errors, upper, nm)
    if nm is not None:
        sparsegpt._solve(*theirs, torch.empty_like(wt), upper, pattern)
        assert torch.equal(ours[1], theirs[1])
    truth = wt.double(), ours[1].clone(), torch.zeros_like(wt).double()
    sweep.prune_reference(*truth, upper.double())
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(errors.double(), truth[2], rtol=1e-4, atol=1e-4)
    assert poisoned(errors) == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_ends_on_the_grid_and_where_the_twin_does(
    bits: int, device: torch.device, poisoned: Unwritten
) -> None:
    wt, upper = random_case(48, 19, device)
    keep = some(wt)
    grid = fitted((wt * keep).T.contiguous(), None, bits, 32)
    scales = torch.stack(grid.columns(48))
    ours, theirs = (wt.clone(), torch.empty_like(wt)), (wt.clone(), torch.empty_like(wt))
    sweep.round_columns(ours[0], keep, ours[1], upper, scales, grid.top)
    sweep.round_reference(theirs[0], keep, theirs[1], upper, scales, grid.top)
    assert poisoned(ours[0]) + poisoned(ours[1]) == 0
    assert torch.equal(nearest(ours[0], scales, grid.top), ours[0])
    assert not (ours[0] * ~keep).any()
    # a value half-way between two points may go to either; the columns to its right follow
    same = (ours[0] == theirs[0]).all(0)
    assert same.float().mean() > 0.8
    torch.testing.assert_close(ours[1][:, same], theirs[1][:, same], rtol=1e-4, atol=1e-4)


def test_half_way_rounds_to_the_even_number(device: torch.device) -> None:
    wt = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 7.5, 900.0, -900.0]], device=device)
    keep, errors = torch.ones_like(wt).bool(), torch.empty_like(wt)
    one = torch.ones(1, 1, device=device)
    sweep.round_columns(wt, keep, errors, one, torch.ones_like(wt), 7)
    assert wt.tolist() == [[0.0, 2.0, 2.0, 0.0, -2.0, 7.0, 7.0, -7.0]]


def test_it_sweeps_a_part_of_a_larger_matrix_in_place(device: torch.device) -> None:
    wt, upper = sweep.exact_case(20, 64, device)
    kt = some(wt)
    whole, mask = wt.clone(), kt.clone()
    part = slice(16, 48)
    errors = torch.empty_like(wt[part])
    sweep.prune_columns(whole[part], mask[part], errors, upper[part, part], (2, 4))
    alone, its = wt[part].clone(), kt[part].clone()
    sweep.prune_reference(alone, its, torch.empty_like(alone), upper[part, part], (2, 4))
    assert torch.equal(whole, torch.cat([wt[:16], alone, wt[48:]]))
    assert torch.equal(mask, torch.cat([kt[:16], its, kt[48:]]))


def test_no_columns_or_no_rows_are_nothing_to_do(device: torch.device) -> None:
    for width, rows in ((0, 3), (4, 0)):
        wt = torch.zeros(width, rows, device=device)
        kt, upper = wt.bool(), torch.eye(width, device=device)
        sweep.prune_columns(wt, kt, wt.clone(), upper)
        sweep.round_columns(wt, kt, wt.clone(), upper, wt.clone(), 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wt": torch.zeros(256, 3)}, "up to 128 columns"),
        ({"wt": torch.zeros(6, 3)}, "groups of 4"),
        ({"nm": (3, 6), "wt": torch.zeros(12, 3)}, "groups of 6"),
        ({"kt": torch.zeros(8, 3)}, "mask"),
        ({"errors": torch.zeros(8, 4)}, "errors"),
        ({"upper": torch.eye(9)}, "factor"),
        ({"wt": torch.zeros(3, 8).T}, "rows of memory"),
    ],
)
def test_what_it_does_not_take_is_refused(change: dict[str, Any], message: str) -> None:
    given = {
        "wt": torch.zeros(8, 3),
        "kt": torch.zeros(8, 3).bool(),
        "errors": torch.zeros(8, 3),
        "upper": torch.eye(8),
        "nm": (2, 4),
    }
    with pytest.raises(ValueError, match=message):
        sweep.prune_columns(**{**given, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("nm", [None, (2, 4), (4, 8), (16, 32)], ids=str)
def test_on_a_gpu_at_the_size_of_a_layer(nm: tuple[int, int] | None, poisoned: Unwritten) -> None:
    """The twin of the interpreted test: gate and up of Llama-3-8B, twenty times the same."""
    wt, upper = sweep.exact_case(28672, 128, torch.device("cuda"))
    kt = some(wt)
    expected = wt.clone(), kt.clone(), torch.empty_like(wt)
    sweep.prune_reference(*expected, upper, nm)
    for _ in range(20):
        ours = wt.clone(), kt.clone(), torch.empty_like(wt)
        sweep.prune_columns(*ours, upper, nm)
        assert sum(map(poisoned, ours)) == 0
        assert all(map(torch.equal, ours, expected))


@pytest.mark.gpu
def test_random_values_on_a_gpu_are_right_to_rounding() -> None:
    wt, upper = random_case(128, 4096, torch.device("cuda"))
    ours = wt.clone(), wt > 0, torch.empty_like(wt)
    sweep.prune_columns(*ours, upper, (2, 4))
    truth = wt.double(), ours[1].clone(), torch.zeros_like(wt).double()
    sweep.prune_reference(*truth, upper.double())
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-3, atol=1e-4)


TYPES = {
    "weights": "*fp32", "keep": "*u8", "scales": "*fp32", "errors": "*fp32", "upper": "*fp32",
    "width": "i32", "rows": "i32", "step": "i32", "keep_step": "i32",
}  # fmt: skip


def job(arch: int, drop: int | None, m: int, even: bool = True) -> Job:
    unaligned = [] if even else ["width", "rows", "step", "keep_step"]
    where = {"BLOCK": sweep.WIDTH, "ROWS": sweep.ROWS}
    if drop is None:
        of = {"TOP": 7, **where}
        return Job("sweep_triton", "round_kernel", TYPES, of, 1, arch, False, unaligned)
    of, types = {"DROP": drop, "M": m, **where}, {k: v for k, v in TYPES.items() if k != "scales"}
    return Job("sweep_triton", "prune_kernel", types, of, 1, arch, False, unaligned)


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_compiles_offline_without_spills(arch: int, root: Path) -> None:
    """No weight leaves its registers between two columns."""
    if not can_compile():
        pytest.skip("the ptxas and cuobjdump that triton ships do not run here")
    jobs = [job(arch, 2, 4), job(arch, 16, 32), job(arch, None, 1, even=False)]
    for one, made in zip(jobs, found(jobs, root), strict=True):
        assert made.stack <= 16, one  # a word or two aside, for the division, as sm_90 wants it
        assert made.registers <= 255, one
        assert not {"LDL", "STL"} & made.loop.keys(), (one, made.loop)
        assert sum(made.loop.values()) <= 2100, (one, made.loop)  # 1900 for a group of 2:4
        assert made.shared <= 8192, one  # a row of U, and what lanes tell each other
