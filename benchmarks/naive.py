"""SparseGPT on one block as the paper tells it: the truth that benchmarks/speed.py compares with.

Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1 and section 3. One matrix and one window at a time:
each matrix sums a Hessian of its own, also where q, k and v read the same input, as a running mean over
windows; it is factored by Cholesky, inverted, and factored again, in float32; the mask of 128 columns
comes from a full sort; columns are removed one by one. Nothing here is shared, halved or blocked
beyond what the algorithm itself says, and nothing here is used by llmprune.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 128  # the paper's B and B_s
DAMPING = 0.01


class Hessian:
    """Mean over windows of 2 X^T X, for one matrix."""

    def __init__(self, matrix: nn.Linear) -> None:
        n = matrix.in_features
        self.mean = torch.zeros(n, n, device=matrix.weight.device)
        self.windows = 0

    def add(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook."""
        for window in args[0].reshape(-1, args[0].shape[-2], args[0].shape[-1]):
            x = window.float()
            self.mean *= self.windows / (self.windows + 1)
            self.windows += 1
            self.mean += (2 / self.windows) * (x.T @ x)


@torch.no_grad()
def prune_block(
    block: nn.Module,
    windows: Sequence[Tensor],  # each [1, seqlen, width]
    forward: Callable[[Tensor], Tensor],
    pattern: float | tuple[int, int],
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Prune every linear layer of `block` in place to a share removed, or to n kept of m.

    Returns:
        The keep masks by name, bool [out, in]; and the outputs of the pruned block.
    """
    matrices = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    hessians = {name: Hessian(m) for name, m in matrices.items()}
    with ExitStack() as hooks:
        for name, matrix in matrices.items():
            handle = matrix.register_forward_hook(hessians[name].add)
            hooks.callback(handle.remove)
        for window in windows:
            forward(window)
    masks = {}
    for name, matrix in matrices.items():
        weight, masks[name] = prune(matrix.weight.float(), hessians.pop(name).mean, pattern)
        matrix.weight.copy_(weight)
    return masks, [forward(window) for window in windows]


def prune(
    weight: Tensor,  # [out, in] float32
    hessian: Tensor,  # [in, in] float32, overwritten
    pattern: float | tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Algorithm 1: the pruned weight and its keep mask, both [out, in]."""
    w = weight.clone()
    unseen = hessian.diagonal() == 0
    hessian[unseen, unseen] = 1
    w[:, unseen] = 0
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    keep = torch.ones_like(w, dtype=torch.bool)
    for start in range(0, w.shape[1], BLOCK):
        end = min(start + BLOCK, w.shape[1])
        errors = torch.zeros_like(w[:, start:end])
        if isinstance(pattern, float):
            score = (w[:, start:end] / upper.diagonal()[start:end]) ** 2
            ordered = score.flatten().sort().values
            keep[:, start:end] = score > ordered[int(ordered.numel() * pattern)]
        for j in range(start, end):
            if isinstance(pattern, tuple) and j % pattern[1] == 0:
                kept, group = pattern
                score = (w[:, j : j + group] / upper.diagonal()[j : j + group]) ** 2
                lowest = score.topk(group - kept, dim=1, largest=False).indices
                keep[:, j : j + group] = torch.ones_like(score).scatter(1, lowest, 0).bool()
            error = w[:, j] * ~keep[:, j] / upper[j, j]
            w[:, j:end] -= torch.outer(error, upper[j, j:end])
            errors[:, j - start] = error
        w[:, end:] -= errors @ upper[start:end, end:]
    return w * keep, keep
