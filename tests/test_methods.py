"""The methods against brute force, against the papers' formulas in float64, and their promises."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from llmprune import methods
from llmprune.errors import ConfigError, NumericalError
from llmprune.methods import base
from llmprune.methods.dsnot import InputMoments
from llmprune.pattern import NM, Pattern, Unstructured, Within
from llmprune.stats import Gram, InputNorms, NoStats

NAMES = ("magnitude", "wanda", "ria", "dsnot", "sparsegpt", "alps")
WITHIN: tuple[Within, ...] = ("row", "matrix", "columns")


pytestmark = pytest.mark.usefixtures("one_thread")


def problem(
    rows: int, columns: int, seed: int = 0, tokens: int = 200, spread: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Weights [rows, columns] and correlated inputs [tokens, columns], scaled 10 ** -spread to spread."""
    random = torch.Generator().manual_seed(seed)
    mix = 0.35 * torch.randn(columns, columns, generator=random) / columns**0.5 + torch.eye(columns)
    scale = torch.logspace(-spread, spread, columns)[torch.randperm(columns, generator=random)]
    inputs = torch.randn(tokens, columns, generator=random) @ mix * scale
    return torch.randn(rows, columns, generator=random), inputs


def stats_of(name: str, inputs: Tensor) -> Any:
    stats = methods.get(name).stats.empty(inputs.shape[-1], torch.device("cpu"))
    stats.add(inputs)
    return stats


def run(
    name: str, weight: Tensor, inputs: Tensor, pattern: Pattern, **settings: Any
) -> methods.Pruned:
    method = methods.build(name, settings)
    return method.prune(weight, stats_of(name, inputs), method.resolve(pattern))


def errors(weight: Tensor, pruned: Tensor, inputs: Tensor) -> Tensor:
    """||X (w - b)||^2 of each row: [rows] float64."""
    return (inputs.double() @ (weight.double() - pruned.double()).T).square().sum(0)


# Brute force: the best that 7 of 14 weights can do, over all supports

SIZE, KEPT = 14, 7
SUPPORTS = torch.tensor(list(combinations(range(SIZE), KEPT)))  # [3432, 7]
DROPPED = torch.tensor(
    [[j for j in range(SIZE) if j not in support] for support in SUPPORTS.tolist()]
)


def optimum(weight: Tensor, inputs: Tensor, *, refit: bool) -> Tensor:
    """Least error of each row over all supports, with the kept weights refit or as they are: [rows]."""
    x = inputs.double()
    gram = x.T @ x
    kept, dropped = SUPPORTS, DROPPED
    left = gram[dropped[:, :, None], dropped[:, None, :]]
    if refit:  # what the kept columns cannot express of the dropped ones: a Schur complement
        cross = gram[kept[:, :, None], dropped[:, None, :]]
        own = gram[kept[:, :, None], kept[:, None, :]]
        left = left - cross.mT @ torch.linalg.solve(own, cross)
    lost = weight.double()[:, dropped]  # [rows, 3432, 7]
    return torch.einsum("rki,kij,rkj->rk", lost, left, lost).min(1).values


@pytest.fixture(scope="module")
def ratios() -> dict[str, float]:
    """Total error of each method over the optimum with refit: 8 problems of 4 rows."""
    total: dict[str, float] = {}
    for seed in range(8):
        weight, inputs = problem(4, SIZE, seed)
        values = {name: errors(weight, half(name, weight, inputs), inputs) for name in NAMES}
        values["best mask"] = optimum(weight, inputs, refit=False)
        values["best"] = optimum(weight, inputs, refit=True)
        for name, value in values.items():
            total[name] = total.get(name, 0) + float(value.sum())
            assert (value >= values["best"] * (1 - 1e-6)).all(), name
    return {name: value / total["best"] for name, value in total.items()}


def half(name: str, weight: Tensor, inputs: Tensor) -> Tensor:
    return run(name, weight, inputs, Unstructured(0.5, within="row")).weight


def test_wanda_is_near_the_best_support(ratios: dict[str, float]) -> None:
    assert 1.15 < ratios["wanda"] < 1.35  # measured 1.247
    # of masks without a refit, none is better than this one, and Wanda is close to it
    assert ratios["best mask"] <= ratios["wanda"] < 1.15 * ratios["best mask"]  # 1.165


def test_sparsegpt_is_nearer(ratios: dict[str, float]) -> None:
    assert 1.05 < ratios["sparsegpt"] < 1.25  # measured 1.153
    assert ratios["sparsegpt"] < 0.97 * ratios["wanda"]


def test_magnitude_does_not_see_uneven_inputs(ratios: dict[str, float]) -> None:
    assert ratios["magnitude"] > 2 * ratios["wanda"]  # measured 4.451 and 1.247


def test_a_row_that_is_one_group_is_pruned_like_a_row() -> None:
    weight, inputs = problem(4, SIZE)
    for name in NAMES:
        row = run(name, weight, inputs, Unstructured(0.5, within="row"))
        group = run(name, weight, inputs, NM(KEPT, SIZE))
        assert torch.equal(row.keep, group.keep)
        torch.testing.assert_close(row.weight, group.weight)


# SparseGPT against the optimal-brain-surgeon formulas, one column at a time in float64


def eliminate(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Inverse Hessians as columns leave from the left.

    Returns:
        Row j of the inverse over columns j and later, [in, in] with zeros left of the diagonal; and the
        features that were never seen.
    """
    hessian = gram.double().clone()
    dead = hessian.diagonal() == 0
    mean = hessian.diagonal()[~dead].mean()
    hessian.diagonal()[dead] = mean
    hessian.diagonal().add_(damping * mean)
    inverse = torch.linalg.inv(hessian)
    rows = torch.zeros_like(inverse)
    for j in range(len(gram)):
        rows[j, j:] = inverse[j, j:]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return rows, dead


def literal(
    weight: Tensor, gram: Tensor, pattern: Pattern, *, block: int = 128, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """SparseGPT as the paper tells it, with its code's rule for the count of a column block.

    Returns:
        Weights and keep mask; under `columns` one weight too many is gone per block.
    """
    inverse, dead = eliminate(gram, damping)
    w = weight.double().clone()
    w[:, dead] = 0
    keep = torch.ones_like(w, dtype=torch.bool)
    columns = w.shape[1]
    for j in range(columns):
        if isinstance(pattern, NM):
            if j % pattern.m == 0:
                score = w[:, j : j + pattern.m].square() / inverse.diagonal()[j : j + pattern.m]
                lowest = score.sort(dim=1, stable=True).indices[:, : pattern.m - pattern.n]
                keep[:, j : j + pattern.m].scatter_(1, lowest, False)
        elif j % block == 0:
            score = w[:, j : j + block].square() / inverse.diagonal()[j : j + block]
            if pattern.within == "columns":
                ordered = score.flatten().sort().values
                threshold = ordered[int(len(ordered) * pattern.sparsity)]
                keep[:, j : j + block] = score > threshold
            else:  # within rows: what is due by the end of the block less what was due before it
                width = score.shape[1]
                due = int((j + width) * pattern.sparsity) - int(j * pattern.sparsity)
                lowest = score.sort(dim=1, stable=True).indices[:, :due]
                keep[:, j : j + width].scatter_(1, lowest, False)
        error = w[:, j] * ~keep[:, j] / inverse[j, j]
        w[:, j:] -= torch.outer(error, inverse[j, j:])
    return w * keep, keep


def damage(inputs: Tensor, dead: tuple[int, ...]) -> Tensor:
    inputs = inputs.clone()
    inputs[:, list(dead)] = 0
    return inputs


@pytest.mark.parametrize("dead", [(), (0, 5, 31)], ids=["all seen", "some never seen"])
@pytest.mark.parametrize(
    ("pattern", "columns", "block"),
    [
        (NM(2, 4), 64, 128),
        (NM(2, 4), 64, 16),
        (NM(4, 8), 200, 128),
        (NM(3, 7), 140, 128),
        (NM(1, 2), 130, 64),
        (NM(20, 40), 80, 16),
        (Unstructured(0.5, "row"), 100, 32),
        (Unstructured(0.7, "row"), 70, 128),
    ],
)
def test_sparsegpt_equals_the_formulas(
    pattern: Pattern, columns: int, block: int, dead: tuple[int, ...]
) -> None:
    weight, inputs = problem(12, columns, tokens=300)
    inputs = damage(inputs, dead)
    pruned = run("sparsegpt", weight, inputs, pattern, block=block)
    x = inputs.double()
    expected, keep = literal(weight, x.T @ x, pattern, block=block)
    assert torch.equal(pruned.keep, keep)
    torch.testing.assert_close(pruned.weight.double(), expected, rtol=1e-3, atol=1e-4)
    assert pruned.late is None


@pytest.mark.parametrize(("columns", "block"), [(64, 128), (100, 32), (129, 128)])
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_sparsegpt_on_column_blocks_equals_the_formulas(
    columns: int, block: int, sparsity: float
) -> None:
    weight, inputs = problem(12, columns, tokens=300)
    pruned = run("sparsegpt", weight, inputs, Unstructured(sparsity), block=block)
    x = inputs.double()
    gram = x.T @ x
    expected, keep = literal(weight, gram, Unstructured(sparsity, "columns"), block=block)
    assert pruned.late is not None
    torch.testing.assert_close(pruned.passed_on.double(), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(pruned.passed_on != 0, keep)

    back = pruned.keep & ~keep  # the paper's one too many of each block, and nothing else, is back
    assert not (keep & ~pruned.keep).any()
    assert [int(part.sum()) for part in back.split(block, dim=1)] == [1] * len(
        range(0, columns, block)
    )
    assert torch.equal(pruned.weight.where(~back, 0), pruned.passed_on)
    gap = weight.double() - pruned.weight.double()
    for row in back.any(1).nonzero().flatten().tolist():
        column = int(back[row].nonzero().flatten()[-1])  # the last of a row has seen the others
        slope = gap[row] @ gram[:, column]
        assert slope.abs() < 1e-5 * (gap[row].norm() * gram[:, column].norm())


@pytest.mark.parametrize("seed", range(6))
def test_exact_counts_never_cost_layer_error(seed: int) -> None:
    columns = (40, 64, 100, 129, 200, 256)[seed]
    weight, inputs = problem(16, columns, seed, tokens=300, spread=seed / 4)
    x = inputs.double()
    for sparsity in (0.1, 0.5, 0.9):
        pattern = Unstructured(sparsity, "columns")
        theirs, _ = literal(weight, x.T @ x, pattern)
        ours = run("sparsegpt", weight, inputs, pattern).weight
        slack = 1 + 1e-4  # float32 against float64
        assert errors(weight, ours, inputs).sum() <= errors(weight, theirs, inputs).sum() * slack, (
            sparsity
        )


def test_a_mask_over_the_matrix_is_chosen_from_the_weights_as_given() -> None:
    weight, inputs = problem(12, 100)
    pruned = run("sparsegpt", weight, inputs, Unstructured(0.6, "matrix"), block=32)
    x = inputs.double()
    inverse, _ = eliminate(x.T @ x, 0.01)
    score = (weight.double().square() / inverse.diagonal()).flatten()
    keep = torch.ones(1200, dtype=torch.bool)
    keep[score.sort(stable=True).indices[:720]] = False
    assert torch.equal(pruned.keep.flatten(), keep)
    mine = errors(weight, pruned.weight, inputs).sum()
    plain = errors(weight, weight * pruned.keep, inputs).sum()
    assert mine < 0.95 * plain  # the sweep makes up for some of it


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), NM(16, 32), NM(3, 7), NM(1, 5)])
def test_under_nm_the_block_is_only_a_matter_of_speed(pattern: NM) -> None:
    weight, inputs = problem(16, 224 if pattern.m != 5 else 225, tokens=400)
    narrow = run("sparsegpt", weight, inputs, pattern, block=32)
    wide = run("sparsegpt", weight, inputs, pattern, block=128)
    whole = run("sparsegpt", weight, inputs, pattern, block=4096)
    for other in (wide, whole):
        assert torch.equal(narrow.keep, other.keep)
        torch.testing.assert_close(narrow.weight, other.weight, rtol=1e-3, atol=1e-4)


def test_raised_damping_is_in_the_notes() -> None:
    weight, inputs = problem(4, 32, tokens=8)  # fewer tokens than features
    pruned = run("sparsegpt", weight, inputs, NM(2, 4), damping=0.0)
    assert pruned.notes["damping"] > 0
    assert run("sparsegpt", weight, inputs, NM(2, 4)).notes == {}


def test_sparsegpt_refuses_what_is_no_gram_matrix() -> None:
    stats = Gram(1.1 * torch.ones(8, 8) - torch.eye(8))  # eigenvalues of -1, a diagonal of 0.1
    with pytest.raises(NumericalError, match="not positive definite even at damping"):
        methods.build("sparsegpt").prune(torch.randn(4, 8), stats, NM(2, 4))


# Scores


def test_wanda_ranks_by_magnitude_times_norm_within_rows() -> None:
    weight, inputs = problem(9, 50)
    score = weight.double().abs() * inputs.double().square().sum(0).sqrt()
    keep = torch.ones_like(weight, dtype=torch.bool)
    keep.scatter_(1, score.sort(dim=1, stable=True).indices[:, :30], False)
    pruned = run("wanda", weight, inputs, Unstructured(0.6))
    assert torch.equal(pruned.keep, keep)


def test_magnitude_ranks_over_the_matrix() -> None:
    weight, inputs = problem(9, 50)
    keep = torch.ones(450, dtype=torch.bool)
    keep[weight.abs().flatten().sort(stable=True).indices[:270]] = False
    pruned = run("magnitude", weight, inputs, Unstructured(0.6))
    assert torch.equal(pruned.keep.flatten(), keep)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "ria", "dsnot"])
def test_scored_methods_leave_kept_weights_as_they_are(name: str) -> None:
    weight, inputs = problem(9, 48)
    pruned = run(name, weight, inputs, NM(2, 4))
    assert torch.equal(pruned.weight, torch.where(pruned.keep, weight, 0))
    assert pruned.late is None


# Counts


def awkward() -> dict[str, tuple[Tensor, Tensor]]:
    weight, inputs = problem(6, 140)
    one_value = torch.full((6, 140), 0.5)
    few = (weight * 2).round()  # many equal, many zero
    zero_rows = weight.clone()
    zero_rows[[0, 3]] = 0
    sparse = weight * (torch.rand(6, 140, generator=torch.Generator().manual_seed(5)) < 0.3)
    dead = damage(inputs, (0, 1, 2, 3, 77, 139))
    single, single_inputs = problem(1, 140)
    column, column_inputs = problem(9, 1)
    return {
        "random": (weight, inputs),
        "one value": (one_value, inputs),
        "few values": (few, inputs),
        "rows of zeros": (zero_rows, inputs),
        "all zeros": (torch.zeros(6, 140), inputs),
        "pruned already": (sparse, inputs),
        "features never seen": (weight, dead),
        "few values, features never seen": (few, dead),
        "nothing ever seen": (weight, torch.zeros_like(inputs)),
        "one token": (weight, inputs[:1]),
        "one row": (single, single_inputs),
        "one column": (column, column_inputs),
    }


@pytest.mark.parametrize("case", awkward())
@pytest.mark.parametrize("name", NAMES)
def test_counts_are_exact(name: str, case: str) -> None:
    weight, inputs = awkward()[case]
    columns = weight.shape[1]
    patterns: list[Pattern] = [Unstructured(s, w) for s in (0.3, 0.5, 0.77) for w in WITHIN]
    if columns % 140 == 0:
        patterns += [NM(2, 4), NM(1, 5), NM(3, 7), NM(5, 14), NM(9, 140)]
    for pattern in patterns:
        pruned = run(name, weight, inputs, pattern)
        keep = pruned.keep
        if isinstance(pattern, NM):
            assert (keep.reshape(-1, pattern.m).sum(1) == pattern.n).all(), pattern
        elif pattern.within == "row":
            assert (keep.sum(1) == columns - int(columns * pattern.sparsity)).all(), pattern
        else:
            width = columns if pattern.within == "matrix" else 128
            for part in keep.split(width, dim=1):
                size = part.numel()
                assert part.sum() == size - int(size * pattern.sparsity), pattern
        assert not pruned.weight[~keep].any()
        assert pruned.weight.isfinite().all()
        if pruned.passed_on is not None:
            assert not pruned.passed_on[~keep].any()
            assert pruned.passed_on.isfinite().all()


@pytest.mark.parametrize("block", [1, 3, 32, 139, 140, 141])
def test_sparsegpt_counts_in_blocks_of_its_own_width(block: int) -> None:
    weight, inputs = problem(6, 140)
    pruned = run("sparsegpt", weight, inputs, Unstructured(0.4), block=block)
    for part in pruned.keep.split(block, dim=1):
        assert part.sum() == part.numel() - int(part.numel() * 0.4)


# What is left alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [NM(2, 4), *(Unstructured(0.5, w) for w in WITHIN)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_not_changed_and_dtypes_are_kept(
    name: str, pattern: Pattern, dtype: torch.dtype
) -> None:
    weight, inputs = problem(6, 140)
    weight = weight.to(dtype)
    stats = stats_of(name, inputs)
    held = {k: v.clone() for k, v in vars(stats).items() if isinstance(v, Tensor)}
    before = weight.clone()
    pruned = methods.build(name).prune(weight, stats, methods.build(name).resolve(pattern))
    assert torch.equal(weight, before)
    assert all(torch.equal(getattr(stats, key), value) for key, value in held.items())
    assert stats.tokens == 200
    assert pruned.weight.dtype == dtype
    assert pruned.weight.data_ptr() != weight.data_ptr()
    assert pruned.keep.dtype == torch.bool
    assert pruned.passed_on is None or pruned.passed_on.dtype == dtype
    again = methods.build(name).prune(weight, stats, methods.build(name).resolve(pattern))
    assert torch.equal(again.weight, pruned.weight)  # nothing kept in `stats` changes the result


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_float32_rounded(name: str) -> None:
    weight, inputs = problem(6, 140)
    weight = weight.bfloat16()
    for pattern in (NM(2, 4), Unstructured(0.5)):
        low = run(name, weight, inputs, pattern)
        high = run(name, weight.float(), inputs, pattern)
        assert torch.equal(low.keep, high.keep)
        assert torch.equal(low.weight, high.weight.bfloat16())


@pytest.mark.parametrize("name", NAMES)
def test_a_transposed_view_is_as_good_as_its_copy(name: str) -> None:
    weight, inputs = problem(24, 32)
    view = weight.T.contiguous().T
    assert not view.is_contiguous()
    for pattern in (
        NM(2, 4),
        Unstructured(0.5, "row"),
        Unstructured(0.5, "matrix"),
        Unstructured(0.5),
    ):
        a, b = run(name, weight, inputs, pattern), run(name, view, inputs, pattern)
        assert torch.equal(a.keep, b.keep)
        torch.testing.assert_close(a.weight, b.weight)


# Wanda's variant


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7, 0.95])
def test_the_variant_removes_a_common_share_of_each_rows_score(sparsity: float) -> None:
    weight, inputs = problem(64, 140)
    weight[:32] *= torch.rand(32, 140, generator=torch.Generator().manual_seed(1)) ** 3
    pruned = run("wanda", weight, inputs, Unstructured(sparsity), variant=True)
    assert abs(float((~pruned.keep).float().mean()) - sparsity) < 1e-3
    assert len(set(pruned.keep.sum(1).tolist())) > 1
    score = weight.double().abs() * inputs.double().square().sum(0).sqrt()
    alpha = pruned.notes["alpha"]
    ordered = score.sort(dim=1).values.cumsum(1) / score.sum(1, keepdim=True)
    gone = (~pruned.keep).sum(1)
    for row in range(64):
        lowest = score[row].argsort()[: int(gone[row])]
        assert not pruned.keep[row, lowest].any()  # the lowest of the row, and no others
        if gone[row]:
            assert ordered[row, gone[row] - 1] <= alpha + 1e-4
        assert ordered[row, gone[row]] >= alpha - 1e-4


def test_the_variant_ends_where_no_share_fits() -> None:
    weight, inputs = torch.ones(4, 10), torch.ones(5, 10)
    pruned = run("wanda", weight, inputs, Unstructured(0.55), variant=True)
    assert set(pruned.keep.sum(1).tolist()) <= {4, 5}


def test_the_variant_refuses_what_it_cannot_do() -> None:
    method = methods.build("wanda", {"variant": True})
    assert not method.exact
    assert methods.build("wanda").exact
    weight, inputs = problem(4, 8)
    for pattern in (NM(2, 4), Unstructured(0.5, "matrix"), Unstructured(0.5, "columns")):
        with pytest.raises(ConfigError, match="within rows"):
            method.prune(weight, stats_of("wanda", inputs), pattern)


# The registry


def test_every_method_says_what_it_is() -> None:
    assert list(methods.known()) == sorted(methods.known())
    assert set(NAMES) <= set(methods.known())
    for name, method in methods.known().items():
        assert method.name == name
        assert "arXiv" in method.paper
        assert method.within in WITHIN
        assert method().resolve(Unstructured(0.5)).within == method.within
        for within in WITHIN:
            assert method().resolve(Unstructured(0.5, within)).within == within
        assert method().resolve(NM(2, 4)) == NM(2, 4)
    assert methods.build("sparsegpt", {"block": 64}).resolve(Unstructured(0.5)).width == 64


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "wand",
            {},
            "no method 'wand': did you mean 'wanda'.*alps, dsnot, magnitude, ria, sparsegpt, wanda",
        ),
        ("sparse-gpt", {}, "did you mean 'sparsegpt'"),
        ("zzz", {}, "no method 'zzz': known: "),
        ("sparsegpt", {"damp": 0.1}, "no setting 'damp': did you mean 'damping'"),
        ("magnitude", {"x": 1}, "magnitude has no setting 'x': known: refit, refit_damping"),
        ("sparsegpt", {"damping": "much"}, "damping of sparsegpt takes a number, got 'much'"),
        ("sparsegpt", {"block": "1.5"}, "block of sparsegpt takes a whole number, got '1.5'"),
        ("sparsegpt", {"block": True}, "takes a whole number, got True"),
        ("sparsegpt", {"damping": None}, "takes a number, got None"),
        ("wanda", {"variant": "perhaps"}, "variant of wanda takes true or false, got 'perhaps'"),
        ("sparsegpt", {"damping": "2"}, "0 to 1, got 2"),
        ("sparsegpt", {"damping": "nan"}, "0 to 1, got nan"),
        ("sparsegpt", {"block": "0"}, "at least 1, got 0"),
    ],
)
def test_what_cannot_be_built_says_why(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        methods.build(name, settings)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((yes, True) for yes in ("true", "Yes", "1", True, 1)),
        *((no, False) for no in ("false", "NO", " 0 ", False, 0)),
    ],
)
def test_flags_are_read_from_text(text: Any, value: bool) -> None:
    assert methods.build("wanda", {"variant": text}).variant is value


def test_numbers_are_read_from_text() -> None:
    method = methods.build("sparsegpt", {"damping": "1e-3", "block": "64"})
    assert (method.damping, method.block) == (1e-3, 64)
    assert methods.build("sparsegpt", {"damping": 1}).damping == 1.0
    with pytest.raises(AttributeError):
        method.damping = 0.5  # settings are frozen


def test_a_registered_class_is_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base._METHODS, "_classes", base._METHODS.known())

    @methods.register("backwards")
    @dataclass(frozen=True)
    class Backwards(methods.Scored[NoStats]):
        strength: float = 1.0

        stats: ClassVar[type[NoStats]] = NoStats
        within: ClassVar[Within] = "row"
        paper: ClassVar[str] = "none"

        def score(self, weight: Tensor, stats: NoStats) -> Tensor:
            return -self.strength * weight.abs().float()

    assert "backwards" in methods.known()
    weight = torch.tensor([[4.0, -1.0, 3.0, 2.0]])
    method = methods.build("backwards", {"strength": "2"})
    assert method == Backwards(strength=2.0)
    assert method.prune(weight, NoStats(), NM(2, 4)).weight.tolist() == [[0.0, -1.0, 0.0, 2.0]]
    with pytest.raises(ValueError, match="two methods are called 'backwards'"):
        methods.register("backwards")(Backwards)


def test_statistics_are_of_the_type_that_the_method_asks_for() -> None:
    kinds = {name: methods.get(name).stats for name in NAMES}
    assert kinds == {
        "magnitude": NoStats,
        "wanda": InputNorms,
        "ria": InputNorms,
        "dsnot": InputMoments,
        "sparsegpt": Gram,
        "alps": Gram,
    }
