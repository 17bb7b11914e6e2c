"""The product with an expanded matrix, for as long as it takes, or with those of many experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def times(
    x: Tensor,  # [tokens, in]
    expand: Callable[[], Tensor],
    bias: Tensor | None,  # [out]
    shape: Sequence[int],
    transposed: bool,
) -> Tensor:
    """Give x @ S.T + bias, or with `transposed` x @ S + bias, where `expand` gives S [rows, columns].

    S lies in memory of torch's own cache: it is handed from layer to layer on a stream, never between streams
    that run at once, and a CUDA graph that records the product keeps it for itself.
    """
    if not len(x):
        return x.new_empty((0, shape[1] if transposed else shape[0]))
    dense = expand()
    return torch.nn.functional.linear(x, dense.T if transposed else dense, bias)


def grouped(x: Tensor, weight: Tensor, order: Tensor, ends: Tensor, each: int) -> Tensor:
    """`s24_experts.s24_experts` by dense matrices [experts, out, in], through torch's grouped_mm.

    That runs bfloat16 on compute capability 9.0 and newer as one kernel; elsewhere torch goes through the
    experts one by one, and waits for `ends` before.
    """
    y = x.new_empty((len(order), weight.shape[1]))
    if not len(order):
        return y
    place = order.long()
    taken = x.contiguous()[place // each]
    found = torch.nn.functional.grouped_mm(taken, weight.transpose(1, 2), offs=ends)
    return y.index_copy_(0, place, found)
