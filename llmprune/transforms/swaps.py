"""Which columns share a group of n:m: a search by swaps for the order that keeps most of the scores.

The idea is that of Pool and Yu 2021 (NeurIPS, channel permutations for N:M sparsity). Columns are first dealt
out by their total; then pairs of groups, drawn anew in each sweep, make the swap of two columns that gains
most, all pairs at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PAIRS_AT_ONCE = 2**24  # scores in hand at a time


def kept(score: Tensor, order: Tensor, n: int, m: int) -> float:
    """Sum of the scores [rows, columns] that n:m keeps when the columns come in `order`."""
    groups = score[:, order].reshape(len(score), -1, m)
    return float(groups.topk(n, dim=-1).values.double().sum())


def best_order(score: Tensor, n: int, m: int, sweeps: int, random: torch.Generator) -> Tensor:
    """An order [columns] int64 of the columns of `score` [rows, columns] for groups of m of which n stay.

    It never keeps less than the order that is there. `score` is not negative; columns are a multiple of m.
    """
    count = score.shape[1]
    as_is = torch.arange(count, device=score.device)
    dealt = score.sum(0).argsort(descending=True, stable=True).reshape(m, -1).T.reshape(-1)
    order = max((as_is, dealt), key=lambda o: kept(score, o, n, m))
    groups = order.reshape(-1, m)
    for _ in range(sweeps if len(groups) > 1 and n < m else 0):
        shuffled = torch.randperm(len(groups), generator=random).to(score.device)
        half = len(groups) // 2
        left, right = shuffled[:half], shuffled[half : 2 * half]
        step = max(1, _PAIRS_AT_ONCE // (len(score) * m))
        for start in range(0, half, step):
            some = slice(start, start + step)
            _swap(score, groups, left[some], right[some], n)
    return groups.reshape(-1)


def _swap(score: Tensor, groups: Tensor, left: Tensor, right: Tensor, n: int) -> None:
    """Make the best swap of one column between each pair of groups, where it gains."""
    rows, m = len(score), groups.shape[1]
    a = score[:, groups[left].reshape(-1)].reshape(rows, -1, m)
    b = score[:, groups[right].reshape(-1)].reshape(rows, -1, m)
    into_a, into_b = _replaced(a, b, n), _replaced(b, a, n).transpose(1, 2)
    now = a.topk(n, dim=-1).values.sum((0, 2)) + b.topk(n, dim=-1).values.sum((0, 2))
    gain = into_a + into_b - now[:, None, None]
    best, place = gain.flatten(1).max(1)
    good = best > 1e-6 * now
    i, j = place // m, place % m
    pairs = torch.arange(len(left), device=score.device)[good]
    of_a, of_b = groups[left[good], i[good]], groups[right[good], j[good]]
    groups[left[pairs], i[good]], groups[right[pairs], j[good]] = of_b, of_a


def _replaced(a: Tensor, b: Tensor, n: int) -> Tensor:
    """What group `a` keeps when its column i is replaced by column j of `b`: [pairs, i, j].

    Of the columns that stay, the n - 1 largest stay in, and the next one competes with the newcomer.
    """
    m = a.shape[-1]
    found = a.new_empty(a.shape[1], m, m)
    for i in range(m):
        rest = torch.cat([a[..., :i], a[..., i + 1 :]], -1).topk(n, dim=-1).values
        sure, next_one = rest[..., :-1].sum((0, 2)), rest[..., -1]
        for j in range(m):
            found[:, i, j] = sure + torch.maximum(next_one, b[..., j]).sum(0)
    return found
