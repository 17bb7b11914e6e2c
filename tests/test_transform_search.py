"""The searches behind transforms: orders against brute force, rotations against known answers."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from llmprune.transforms.concentrate import concentrate, entropy
from llmprune.transforms.rotate import hadamard
from llmprune.transforms.stream import made_up, settled
from llmprune.transforms.swaps import best_order, kept


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def brute(score: Tensor, n: int, m: int) -> float:
    """The most that any split into two groups keeps."""
    columns = range(2 * m)
    halves = [(0, *rest) for rest in combinations(columns[1:], m - 1)]
    return max(
        sum(float(score[:, list(g)].sort(1).values[:, -n:].sum())
            for g in (half, [c for c in columns if c not in half]))
        for half in halves
    )  # fmt: skip


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2)])
def test_orders_against_brute_force(n: int, m: int) -> None:
    close = []
    for seed in range(5):
        score = torch.rand(5, 2 * m, generator=random(seed)) ** 3
        order = best_order(score, n, m, 10, random(seed))
        assert sorted(order.tolist()) == list(range(2 * m))
        plain = sum(float(g.sort(1).values[:, -n:].sum()) for g in score[:, order].split(m, 1))
        assert kept(score, order, n, m) == pytest.approx(plain)
        assert plain >= kept(score, torch.arange(2 * m), n, m) - 1e-6
        close.append(plain / brute(score, n, m))
    assert min(close) > 0.97
    assert sum(close) / len(close) > 0.99


def test_a_search_finds_what_is_hidden() -> None:
    """Two columns of every four matter, and they lie together: 2:4 can keep all of it."""
    score = torch.full((3, 64), 0.01)
    score[:, :32] = 1.0
    assert kept(score, torch.arange(64), 2, 4) < 60
    assert kept(score, best_order(score, 2, 4, 0, random()), 2, 4) == pytest.approx(96)


def test_an_odd_number_of_groups_and_one_group() -> None:
    for columns in (4, 12):
        score = torch.rand(3, columns, generator=random())
        order = best_order(score, 2, 4, 5, random())
        assert sorted(order.tolist()) == list(range(columns))


def test_a_hidden_rotation_is_found() -> None:
    """Rows that are sparse in turned axes: the least entropy is that of the sparse rows."""
    sparse = torch.zeros(200, 8)
    sparse.scatter_(1, torch.randint(0, 8, (200, 1), generator=random()), 1.0)
    turn = made_up(8, random(1), fixed=False).float()
    rows = sparse @ turn.T
    start = torch.eye(8)
    found = concentrate(start, lambda t: entropy((rows @ t).square()) / 200, 300, 0.1, fixed=False)
    assert found.before > 1
    assert found.after < 0.05
    assert torch.allclose(found.turn @ found.turn.T, torch.eye(8), atol=1e-4)


def test_the_direction_of_ones_stays() -> None:
    rows = torch.randn(50, 6, generator=random())
    start = torch.eye(6)
    found = concentrate(start, lambda t: entropy((rows @ t).square()), 20, 0.1, fixed=True)
    exact = settled(found.turn, fixed=True)
    assert torch.allclose(exact.sum(0), torch.ones(6, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(exact.T @ exact, torch.eye(6, dtype=torch.float64), atol=1e-12)
    assert found.after < found.before


def test_entropy_against_the_formula() -> None:
    shares = torch.tensor([[0.25, 0.25, 0.5], [1.0, 0.0, 0.0]])
    assert float(entropy(shares * 7)) == pytest.approx(
        -(0.5 * torch.tensor(0.25).log() + 0.5 * torch.tensor(0.5).log())
    )


@pytest.mark.parametrize("width", [1, 8, 12, 7])
def test_hadamard_matrices_are_orthogonal(width: int) -> None:
    found = hadamard(width)
    assert torch.allclose(found @ found.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    assert found[found != 0].abs().unique().numel() == 1
