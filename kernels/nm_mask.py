"""Which n of every m neighbouring weights stay: the keep mask of semi-structured pruning.

A weight's rank is the number of weights in its group that go before it: those with a lower score,
and on a tie those with a lower index. The m - n weights of lowest rank are removed. Ranks are
counted by comparison, m reads per weight, because m is small: nothing is sorted.

State: equal to the reference in Triton's interpreter; compiles offline for sm_80, 89, 90 and 100
with neither shared memory nor spills (tests/test_kernel_nm_mask.py). **It has not run on a GPU**, and its
speed is unknown: `NM.keep` in llmprune/pattern.py takes it where `solver.py` finds it right and not slower.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .nm_gemv import on_device_of
from .solver import Race, Solver

GROUPS = (2, 4, 8, 16, 32)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TILE = 1024  # weights per program: 8 to each lane of four warps; a guess, not measured


def nm_keep(
    score: Tensor,  # [out, in] float32, bfloat16 or float16, finite
    n: int,
    m: int,
) -> Tensor:
    """Keep mask of `score`: bool [out, in], True for the n highest of every m neighbours in a row.

    Needs a CUDA tensor, or Triton's interpreter. `m` is a power of two up to 32 and divides `in`.

    Raises:
        ValueError: for an n:m, a row length or a dtype that the kernel does not take.
    """
    _check(score, n, m)
    from .nm_mask_triton import keep_kernel

    keep = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    groups = score.numel() // m
    if groups:
        tile = _TILE // m
        grid = (-(-groups // tile),)
        with on_device_of(score):
            keep_kernel[grid](score.contiguous(), keep, groups, N=n, M=m, GROUPS=tile)
    return keep


def nm_keep_reference(score: Tensor, n: int, m: int) -> Tensor:
    """What `nm_keep` equals, in plain torch: sort each group stably, remove the first m - n."""
    _check(score, n, m)
    groups = score.reshape(-1, m)
    removed = groups.sort(dim=1, stable=True).indices[:, : m - n]
    return (
        torch.ones_like(groups, dtype=torch.bool).scatter_(1, removed, False).reshape(score.shape)
    )


def takes(score: Tensor, m: int) -> bool:
    """Whether the kernel is to choose among every `m` neighbours of `score`, on the device where it is."""
    return m in GROUPS and score.dtype in DTYPES and NM_MASK.used(score.device)


def _check(score: Tensor, n: int, m: int) -> None:
    if m not in GROUPS or not 0 < n < m:
        raise ValueError(f"n:m needs m of 2, 4, 8, 16 or 32 and 0 < n < m, got {n}:{m}")
    if score.ndim != 2 or score.shape[1] % m:
        raise ValueError(
            f"{n}:{m} needs [out, in] with in divisible by {m}, got {list(score.shape)}"
        )
    if score.dtype not in DTYPES:
        raise ValueError(f"scores are float32, bfloat16 or float16, got {score.dtype}")


def _wrong(device: torch.device) -> str | None:
    """The first of a few small masks that is not that of plain torch; the scores have ties."""
    random = torch.Generator().manual_seed(0)
    for n, m in ((2, 4), (4, 8), (5, 16)):
        score = torch.randint(0, 9, (37, 96), generator=random).float().to(device)
        if not torch.equal(nm_keep(score, n, m), nm_keep_reference(score, n, m)):
            return f"{n}:{m}"
    return None


def _race(device: torch.device) -> Race:
    score = torch.ones(1024, 4096, device=device)
    return lambda: nm_keep(score, 2, 4), lambda: _by_comparison(score, 2, 4)


def _by_comparison(score: Tensor, n: int, m: int) -> Tensor:
    """The same without a sort, which is what plain torch does best for a small m."""
    groups, column = score.view(-1, m), torch.arange(m, device=score.device)
    before = torch.zeros(groups.shape, dtype=torch.int8, device=score.device)
    for other in range(m):
        theirs = groups[:, other : other + 1]
        before += (theirs < groups).logical_or_((theirs == groups).logical_and_(other < column))
    return (before >= m - n).view(score.shape)


NM_MASK = Solver("nm_mask", _wrong, _race)
