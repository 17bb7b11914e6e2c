"""What was measured, of each block by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.fisher.settings import Fisher
from llmprune.model import Matrix

LEAST = 1e-3  # of the mean row: what no sampled token depends on may yet matter to another one
BINS, PER_OCTAVE = 2048, 8
"""Bins of a histogram of saliencies, and how many of them a factor of two takes: 2^-128 to 2^128."""


@dataclass(frozen=True)
class Part:
    """Of one block. Sums over tokens, all by one unknown factor, the same for all blocks.

    Attributes:
        rows: of each matrix by its name: squares of the gradient of log p(token), summed over the inputs
            of each output. [out] float32.
        counts: how many of its weights have a saliency in each bin: [BINS] int64; none in any where no
            gradient reaches it, such as an expert that no token was sent to.
        metric: sums of g g^T / |g|^2, where g is the gradient by the hidden state that the block passes on:
            [width, width] float32.
    """

    rows: Mapping[str, Tensor]
    counts: Mapping[str, Tensor]
    metric: Tensor


@dataclass(frozen=True)
class Known:
    """All of it.

    Attributes:
        settings: what it is to weigh.
        part: gives that of a block; None where nothing of the block is pruned.
    """

    settings: Fisher
    part: Callable[[int], Part | None]

    def scale(self, matrix: Matrix) -> Tensor | None:
        """What an error in each output weighs, as a factor of its row: [out, 1] float32, of any size.

        None where that is not known.
        """
        part = self.part(matrix.block) if matrix.block is not None else None
        if not self.settings.rows or part is None or matrix.name not in part.rows:
            return None
        rows = part.rows[matrix.name].to(matrix.weight.device)
        mean = float(rows.mean())
        if not mean > 0:
            return None
        return (rows / mean).clamp_min_(LEAST).sqrt_().unsqueeze(1)

    def metric(self, block: int) -> Tensor | None:
        """What errors in the output of a block weigh: [width, width] float32, the mean of its diagonal is 1.

        None for all alike.
        """
        part = self.part(block) if self.settings.mix else None
        if part is None:
            return None
        mean = float(part.metric.diagonal().mean())
        if not mean > 0:
            return None
        mixed = part.metric * (self.settings.mix / mean)
        mixed.diagonal().add_(1 - self.settings.mix)
        return mixed


def histogram(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """How many weights have which saliency w_ij^2 rows_i columns_j / sum(rows), on a scale of octaves.

    Args:
        weight: [out, in].
        rows: [out] float32, squared gradients summed over inputs.
        columns: [in] float32, the same summed over outputs.

    Returns:
        [BINS] int64; what is zero is in the first. No weight is counted where all of `rows` are zero.
    """
    total = float(rows.sum(dtype=torch.float64))
    if total == 0:
        return torch.zeros(BINS, dtype=torch.int64)
    scale = columns.double() / total
    found = torch.zeros(BINS, dtype=torch.int64, device=weight.device)
    step = max(1, 2**20 // weight.shape[1])
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        value = weight[part].double().square() * rows[part].double().unsqueeze(1) * scale
        bins = (value.log2() * PER_OCTAVE + BINS // 2).clamp_(0, BINS - 1)  # the log of 0 is -inf
        found += torch.bincount(bins.long().flatten(), minlength=BINS)
    return found.cpu()
