"""Patterns: counts and ties against a reference that sorts Python lists, and what may be typed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llmprune.errors import ConfigError
from llmprune.pattern import COLUMN_BLOCK, NM, Pattern, Unstructured, Within, keep_highest, parse

WITHIN: tuple[Within, ...] = ("row", "matrix", "columns")
PAIRS = (
    (1, 2),
    (1, 4),
    (2, 4),
    (3, 4),
    (4, 8),
    (7, 8),
    (8, 16),
    (16, 32),
    (3, 7),
    (4, 9),
    (1, 128),
)


pytestmark = pytest.mark.usefixtures("one_thread")


def groups_of(pattern: Pattern, rows: int, columns: int) -> list[list[tuple[int, int]]]:
    """Positions that compete, each group row-major."""
    everything = [(i, j) for i in range(rows) for j in range(columns)]
    if isinstance(pattern, NM):
        size = pattern.m
        return [everything[k : k + size] for k in range(0, rows * columns, size)]
    match pattern.within:
        case "matrix":
            return [everything]
        case "columns":
            starts = range(0, columns, pattern.width)
            return [[p for p in everything if s <= p[1] < s + pattern.width] for s in starts]
        case _:
            return [everything[k : k + columns] for k in range(0, rows * columns, columns)]


def naive(pattern: Pattern, score: Tensor) -> Tensor:
    """The lowest of each group go, and of equals the one that comes first."""
    values = score.tolist()
    keep = torch.ones(score.shape, dtype=torch.bool)
    for group in groups_of(pattern, *score.shape):
        if isinstance(pattern, NM):
            removed = pattern.m - pattern.n
        else:
            removed = math.floor(len(group) * pattern.sparsity)
        order = sorted(range(len(group)), key=lambda k: (values[group[k][0]][group[k][1]], k))
        for k in order[:removed]:
            keep[group[k]] = False
    return keep


def scores(rows: int, columns: int, seed: int) -> dict[str, Tensor]:
    """Random scores, and several kinds of ties."""
    random = torch.Generator().manual_seed(seed)
    plain = torch.randn(rows, columns, generator=random).abs()
    signs = torch.randint(0, 2, (rows, columns), generator=random)
    return {
        "random": plain,
        "all equal": torch.full((rows, columns), 0.25),
        "few values": (plain * 2).round(),
        "blocks of equals": (torch.arange(rows * columns) // 5 % 3).reshape(rows, columns).float(),
        "zeros of both signs": torch.where(signs == 1, 0.0, -0.0),
        "mostly zero": plain * (torch.rand(rows, columns, generator=random) < 0.2),
        "falling": torch.arange(rows * columns, 0, -1).reshape(rows, columns).float(),
        "huge": plain * 1e38,
        "infinite": plain.where(signs == 1, float("inf")),
        "tiny": plain * 1e-42,
    }


SHAPES = [(5, 40), (1, 150), (40, 1), (1, 1), (3, 128), (2, 129), (4, 7), (3, 8), (3, 9), (2, 300)]


@pytest.mark.parametrize("within", [None, *WITHIN])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shares_equal_the_reference(shape: tuple[int, int], within: Within | None) -> None:
    for seed, sparsity in enumerate((0.01, 0.3, 0.5, 0.7, 0.99)):
        pattern = Unstructured(sparsity, within)
        for kind, score in scores(*shape, seed).items():
            assert torch.equal(pattern.keep(score), naive(pattern, score)), (sparsity, kind)


@pytest.mark.parametrize("width", [1, 3, 16, 64, 1000])
def test_column_blocks_of_any_width(width: int) -> None:
    pattern = Unstructured(0.5, "columns", width)
    for kind, score in scores(6, 70, width).items():
        assert torch.equal(pattern.keep(score), naive(pattern, score)), kind


@pytest.mark.parametrize(("n", "m"), PAIRS)
def test_n_of_m_equals_the_reference(n: int, m: int) -> None:
    pattern = NM(n, m)
    for seed, (rows, groups) in enumerate(((1, 1), (7, 3), (3, 16), (20, 1))):
        for kind, score in scores(rows, groups * m, seed).items():
            keep = pattern.keep(score)
            assert torch.equal(keep, naive(pattern, score)), kind
            assert (keep.reshape(-1, m).sum(1) == n).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_scores_of_any_floating_dtype(dtype: torch.dtype) -> None:
    score = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)).abs().to(dtype)
    for pattern in (NM(2, 4), NM(8, 16), Unstructured(0.4, "row"), Unstructured(0.4, "matrix")):
        assert torch.equal(pattern.keep(score), naive(pattern, score)), pattern


def test_a_score_need_not_be_contiguous_and_is_not_changed() -> None:
    score = torch.randn(48, 32, generator=torch.Generator().manual_seed(0)).T
    before = score.clone()
    for pattern in (NM(2, 4), NM(8, 16), *(Unstructured(0.4, w, 20) for w in WITHIN)):
        keep = pattern.keep(score)
        assert torch.equal(keep, pattern.keep(score.contiguous()))
        assert torch.equal(score, before)
        assert keep.shape == score.shape
        assert keep.dtype == torch.bool


def test_the_count_is_the_floor_in_double_precision() -> None:
    for size in (1, 2, 3, 7, 10, 100, 127, 128, 4096, 11008, 4096 * 11008):
        for sparsity in (
            1e-9,
            0.1,
            0.29,
            1 / 3,
            0.5,
            0.57,
            0.58,
            0.7,
            0.9999,
            math.nextafter(1, 0),
        ):
            removed = Unstructured(sparsity).removed(size)
            assert removed == int(size * sparsity)
            assert 0 <= removed < size
    assert Unstructured(0.29).removed(100) == 28  # 0.29 * 100 is 28.999999999999996
    assert Unstructured(0.57).removed(100) == 56
    assert Unstructured(0.58).removed(50) == 28


def test_keep_highest_removes_what_it_is_told() -> None:
    for size in (1, 2, 8, 9, 33):  # up to 8 weights are ranked by comparison, more are selected
        for kind, score in scores(6, size, size).items():
            order = score.sort(dim=1, stable=True).indices
            for removed in range(size):
                expected = torch.ones(6, size, dtype=torch.bool)
                expected.scatter_(1, order[:, :removed], False)
                assert torch.equal(keep_highest(score, removed), expected), (kind, size, removed)


def test_rows_that_n_of_m_does_not_divide() -> None:
    assert NM(2, 4).fits(12)
    assert not NM(2, 4).fits(10)
    assert Unstructured(0.5).fits(1)
    with pytest.raises(ConfigError, match="2:4 needs rows divisible by 4, got rows of 10"):
        NM(2, 4).keep(torch.rand(4, 10))  # 40 weights, but groups would straddle rows


def test_values() -> None:
    assert NM(1, 4).sparsity == 0.75
    assert str(NM(2, 4)) == "2:4"
    assert str(Unstructured(0.5)) == "0.5"
    assert COLUMN_BLOCK == 128
    assert Unstructured(0.5).resolved("matrix") == Unstructured(0.5, "matrix", 128)
    assert Unstructured(0.5, "row").resolved("columns", 32) == Unstructured(0.5, "row", 32)
    assert NM(2, 4).resolved("columns", 32) == NM(2, 4)
    for sparsity in (0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="strictly between 0 and 1"):
            Unstructured(sparsity)
    with pytest.raises(ConfigError, match="within must be one of row, matrix, columns, got 'rows'"):
        Unstructured(0.5, "rows")  # type: ignore[arg-type]
    for n, m in ((0, 4), (4, 4), (5, 4), (-1, 4), (0, 0)):
        with pytest.raises(ConfigError, match="0 < n < m"):
            NM(n, m)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("0.5", Unstructured(0.5)),
        (0.5, Unstructured(0.5)),
        (" .25 ", Unstructured(0.25)),
        ("5e-1", Unstructured(0.5)),
        ("0.999", Unstructured(0.999)),
        ("2:4", NM(2, 4)),
        (" 4:8\n", NM(4, 8)),
        ("1:2", NM(1, 2)),
        ("16:32", NM(16, 32)),
        ("3:7", NM(3, 7)),
        (NM(2, 4), NM(2, 4)),
        (Unstructured(0.5, "matrix", 32), Unstructured(0.5, "matrix", 32)),
    ],
)
def test_what_may_be_typed(text: str | float | Pattern, pattern: Pattern) -> None:
    assert parse(text) == pattern


@pytest.mark.parametrize("within", WITHIN)
def test_a_share_takes_a_comparison_group(within: Within) -> None:
    assert parse("0.5", within) == Unstructured(0.5, within)
    assert parse(Unstructured(0.5), within) == Unstructured(0.5, within)
    with pytest.raises(
        ConfigError, match=f"within={within} needs a share such as 0.5; 2:4 compares"
    ):
        parse("2:4", within)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", r"strictly between 0 and 1, got 0; use e\.g\. 0\.5"),
        ("1", r"strictly between 0 and 1, got 1; use e\.g\. 0\.5"),
        (0, "strictly between 0 and 1, got 0"),
        (1.0, r"strictly between 0 and 1, got 1\.0"),
        ("50", r"sparsity 50 is no share; for 50 percent use 0\.5$"),
        (50, r"for 50 percent use 0\.5$"),
        ("62.5", r"for 62\.5 percent use 0\.625$"),
        ("100", "strictly between 0 and 1, got 100"),
        ("-0.5", r"strictly between 0 and 1, got -0\.5"),
        ("nan", "strictly between 0 and 1, got nan"),
        ("inf", "strictly between 0 and 1, got inf"),
        ("abc", r"'abc' is no sparsity; use the share removed \(0\.5\) or kept:group \(2:4\)"),
        ("", "'' is no sparsity"),
        ("50%", "'50%' is no sparsity"),
        ("2:5:4", "'2:5:4' is no sparsity"),
        ("2/4", "'2/4' is no sparsity"),
        ("-2:4", "'-2:4' is no sparsity"),
        ("4:2", r"4:2 keeps more than there are; n:m keeps n of m: 2:4\?$"),
        ("0:4", "0:4 removes nothing or everything"),
        ("4:4", "4:4 removes nothing or everything"),
        ("0:0", "0:0 removes nothing or everything"),
        ("4:0", "4:0 removes nothing or everything"),
    ],
)
def test_what_is_typed_wrong_is_told_what_would_work(text: str | float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text)
