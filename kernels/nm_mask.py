"""Which n of every m neighbouring weights stay: the keep mask of semi-structured pruning.

A weight's rank is the number of weights in its group that go before it: those with a lower score,
and on a tie those with a lower index. The m - n weights of lowest rank are removed. Ranks are
counted by comparison, m reads per weight, because m is small: nothing is sorted.

State: equal to the reference in Triton's interpreter; compiles offline for sm_80, 89, 90 and 100
with neither shared memory nor spills (tests/test_kernel_nm_mask.py). **It has not run on a GPU**,
its speed is unknown, and so nothing in llmprune dispatches to it yet: `NM.keep` in
llmprune/pattern.py is what runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

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


def _check(score: Tensor, n: int, m: int) -> None:
    if m not in (2, 4, 8, 16, 32) or not 0 < n < m:
        raise ValueError(f"n:m needs m of 2, 4, 8, 16 or 32 and 0 < n < m, got {n}:{m}")
    if score.ndim != 2 or score.shape[1] % m:
        raise ValueError(
            f"{n}:{m} needs [out, in] with in divisible by {m}, got {list(score.shape)}"
        )
    if score.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"scores are float32, bfloat16 or float16, got {score.dtype}")
