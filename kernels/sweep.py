"""SparseGPT's sweep over a block of columns as one launch: rows in parallel, the block on chip.

Frantar and Alistarh 2023, arXiv 2301.00774, the inner loop of algorithm 1: from left to right, the
error of each removed weight over U_jj goes to the columns on its right. In plain torch that is two
launches for each column; here a program keeps a few rows of all columns of the block in registers, and
reads U row by row. For n:m the mask is chosen on the way, when a group is reached, from the weights as
they then are. `round_columns` rounds kept weights to a grid on the way (sec. 3.5 there; GPTQ, arXiv
2210.17323). What the block as a whole owes to the columns behind it is one matrix product, and left to
torch.

A score is (w / U_jj)^2 in float32, and equal scores go from the left, as in the twins: where every
value is exact, masks are the same, on ties too. A GPU rounds `w - e u` once where torch may round
twice.

State: equal to its twins in Triton's interpreter; compiles offline for sm_80 to sm_100 without spills
(tests/test_kernel_sweep.py). **It has not run on a GPU**; the number of rows of a program is a guess.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .nm_gemv import on_device_of
from .solver import Race, Solver

WIDTH = (
    128  # columns of a launch, at most: what 255 registers of a thread hold together with the masks
)
GROUPS = (1, 2, 4, 8, 16, 32)  # of neighbours: a tile is folded by them; 1 where the mask stands
ROWS = 8  # of a program, which is one warp: 4096 rows are a warp for each scheduler of an H200; not measured
_MOST = 2**31


def takes(width: int, m: int = 1) -> bool:
    """Whether the kernel sweeps so many columns at once, in groups of `m`."""
    return 0 < width <= WIDTH and m in GROUPS and width % m == 0


def prune_columns(
    wt: Tensor,  # [width, rows] float32, rows of memory are columns of the matrix; changed
    kt: Tensor,  # [width, rows] bool; written for n:m, read otherwise
    errors: Tensor,  # [width, rows] float32; written
    upper: Tensor,  # [width, width] float32, upper triangular
    nm: tuple[int, int] | None = None,
) -> None:
    """Sweep a block of columns; equals `prune_reference`, to rounding.

    Needs CUDA tensors, or Triton's interpreter. Removed weights keep the value that they had when it was
    their turn, and `errors` has that over U_jj; zero for what is kept. Values are finite.

    Args:
        wt: the weights.
        kt: True for what stays.
        errors: contiguous.
        upper: of the inverse of the Gram matrix, for these columns.
        nm: keep n of every m neighbours, chosen here; None where `kt` is given.

    Raises:
        ValueError: for a width or an m that the kernel does not take, or tensors that do not fit together.
    """
    from .sweep_triton import prune_kernel

    n, m = nm or (1, 1)
    _check(wt, kt, errors, upper, m)
    width, rows = wt.shape
    if not wt.numel():
        return
    with on_device_of(wt):
        prune_kernel[(-(-rows // ROWS),)](
            wt,
            kt.view(torch.uint8),
            errors,
            upper.contiguous(),
            width,
            rows,
            wt.stride(0),
            kt.stride(0),
            DROP=m - n,
            M=m,
            BLOCK=_block(width),
            ROWS=ROWS,
            num_warps=1,
        )


def round_columns(
    wt: Tensor,  # [width, rows] float32; changed
    kt: Tensor,  # [width, rows] bool
    errors: Tensor,  # [width, rows] float32; written
    upper: Tensor,  # [width, width] float32, upper triangular
    scales: Tensor,  # [width, rows] float32
    top: int,
) -> None:
    """Sweep a block of columns, rounding what is kept; equals `round_reference`, to rounding.

    Args:
        wt: the weights; each ends as a whole number up to `top` times its scale, or zero where `kt` is False.
        kt: True for what stays.
        errors: contiguous.
        upper: as of `prune_columns`.
        scales: of each weight.
        top: the largest whole number, below 2^22; the smallest is its negative.

    Raises:
        ValueError: as `prune_columns`.
    """
    from .sweep_triton import round_kernel

    _check(wt, kt, errors, upper, 1)
    if scales.shape != wt.shape or not 0 < top < 2**22:
        raise ValueError(f"scales are {list(scales.shape)} for {list(wt.shape)}, top is {top}")
    width, rows = wt.shape
    if not wt.numel():
        return
    with on_device_of(wt):
        round_kernel[(-(-rows // ROWS),)](
            wt,
            kt.view(torch.uint8),
            scales.contiguous(),
            errors,
            upper.contiguous(),
            width,
            rows,
            wt.stride(0),
            kt.stride(0),
            TOP=top,
            BLOCK=_block(width),
            ROWS=ROWS,
            num_warps=1,
        )


def prune_reference(
    wt: Tensor, kt: Tensor, errors: Tensor, upper: Tensor, nm: tuple[int, int] | None = None
) -> None:
    """What `prune_columns` equals, in plain torch: column by column, groups sorted."""
    diagonal = upper.diagonal()[:, None]
    step = len(wt) if nm is None else nm[1]
    for start in range(0, len(wt), step):
        group = slice(start, start + step)
        if nm is not None:
            score = (wt[group] / diagonal[group]).square()
            order = score.sort(dim=0, stable=True).indices.argsort(dim=0)
            kt[group] = order >= nm[1] - nm[0]
        errors[group] = kt[group].logical_not().float().div_(diagonal[group])
        for j in range(start, start + step):
            errors[j].mul_(wt[j])
            wt[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)


def round_reference(
    wt: Tensor, kt: Tensor, errors: Tensor, upper: Tensor, scales: Tensor, top: int
) -> None:
    """What `round_columns` equals, in plain torch."""
    for j in range(len(wt)):
        steps = (wt[j] / scales[j].clamp_min(torch.finfo(torch.float32).tiny)).round()
        point = (steps.clamp(-top, top) * scales[j] + 0.0).masked_fill(~kt[j], 0)
        errors[j] = (wt[j] - point) / upper[j, j]
        wt[j] = point
        wt[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)


def _block(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _check(wt: Tensor, kt: Tensor, errors: Tensor, upper: Tensor, m: int) -> None:
    width, rows = wt.shape
    if width and not takes(width, m):
        raise ValueError(
            f"a launch takes up to {WIDTH} columns in groups of {m}, got {width} columns"
        )
    for name, tensor, shape, dtype in (
        ("weights", wt, (width, rows), torch.float32),
        ("mask", kt, (width, rows), torch.bool),
        ("errors", errors, (width, rows), torch.float32),
        ("factor", upper, (width, width), torch.float32),
    ):
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name}: {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
            )
    if not errors.is_contiguous() or (rows > 1 and (wt.stride(1) != 1 or kt.stride(1) != 1)):
        raise ValueError("columns of the matrix lie in rows of memory, errors contiguous")
    if width * max(wt.stride(0), kt.stride(0)) >= _MOST:
        raise ValueError(f"a block has fewer than {_MOST} places, got {width} x {wt.stride(0)}")


def exact_case(rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights [width, rows] and a factor [width, width] whose sweep is exact in float32, with many ties."""
    random = torch.Generator().manual_seed(rows * width)
    wt = torch.randint(-3, 4, (width, rows), generator=random).float()
    upper = torch.eye(width) * 2.0 ** torch.randint(-1, 2, (width,), generator=random)
    near = torch.ones(width, width).triu(1).tril(3)
    upper += near * torch.randint(-1, 2, (width, width), generator=random)
    return wt.to(device), upper.to(device)


def _wrong(device: torch.device) -> str | None:
    """The first of a few small sweeps that is not that of plain torch."""
    for width, rows, nm in ((16, 21, None), (32, 9, (2, 4)), (24, 17, (4, 8))):
        wt, upper = exact_case(rows, width, device)
        kt = (wt.cumsum(0) % 3 != 0).contiguous()
        ours, theirs = ([wt.clone(), kt.clone(), torch.empty_like(wt)] for _ in range(2))
        prune_columns(ours[0], ours[1], ours[2], upper, nm)
        prune_reference(theirs[0], theirs[1], theirs[2], upper, nm)
        if not all(map(torch.equal, ours, theirs)):
            return f"{width} columns, {'a mask' if nm is None else '{}:{}'.format(*nm)}"
    wt, upper = exact_case(19, 16, device)
    scales = torch.full_like(wt, 0.5)
    ours, theirs = ([wt.clone(), torch.empty_like(wt)] for _ in range(2))
    keep = wt % 2 == 0
    round_columns(ours[0], keep, ours[1], upper, scales, 7)
    round_reference(theirs[0], keep, theirs[1], upper, scales, 7)
    return None if all(map(torch.equal, ours, theirs)) else "rounding"


def _race(device: torch.device) -> Race:
    """A block of 64 columns whose mask stands, on zeros: no time depends on values."""
    wt, kt = torch.zeros(64, 4096, device=device), torch.ones(64, 4096, device=device).bool()
    errors, upper = torch.empty_like(wt), torch.eye(64, device=device)
    return (
        lambda: prune_columns(wt, kt, errors, upper),
        lambda: prune_reference(wt, kt, errors, upper),
    )


SWEEP = Solver("sweep", _wrong, _race)
