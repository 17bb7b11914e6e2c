"""Statistics: plain sums over tokens, whatever the batches, and what is derived from them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from llmprune.errors import NumericalError
from llmprune.factor import InverseFactor
from llmprune.stats import Gram, InputNorms, InputSample, NoStats, Stats

CPU = torch.device("cpu")
KINDS = (NoStats, InputNorms, Gram)
SUMS = {InputNorms: "sum_sq", Gram: "gram"}


pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(tokens: int = 300, features: int = 40, seed: int = 0) -> Tensor:
    """Correlated inputs [tokens, features] of uneven scale, with a mean."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.eye(features) + 0.3 * torch.randn(features, features, generator=random)
    x = torch.randn(tokens, features, generator=random) @ mix + 0.5
    return x * torch.logspace(-2, 2, features)


def summed(kind: type[Any], *batches: Tensor) -> Any:
    stats = kind.empty(batches[0].shape[-1], CPU)
    for batch in batches:
        stats.add(batch)
    return stats


def truth(kind: type[Any], x: Tensor) -> Tensor:
    x = x.double().flatten(0, -2)
    return x.square().sum(0) if kind is InputNorms else x.T @ x


def close(kind: type[Any], stats: Any, x: Tensor, tolerance: float = 1e-5) -> None:
    """Sums within rounding of float64 ones: an entry of a Gram is measured by its features' norms."""
    expected = truth(kind, x)
    scale = expected if kind is InputNorms else expected.diagonal().sqrt()
    scale = scale if kind is InputNorms else torch.outer(scale, scale)
    actual = getattr(stats, SUMS[kind])
    assert actual.dtype == torch.float32
    assert ((actual.double() - expected).abs() <= tolerance * scale).all()


@pytest.mark.parametrize("kind", SUMS)
def test_sums_equal_float64(kind: type[Any]) -> None:
    x = inputs()
    stats = summed(kind, x)
    close(kind, stats, x)
    assert stats.tokens == 300
    if kind is InputNorms:
        torch.testing.assert_close(stats.norm.double(), x.double().norm(dim=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", SUMS)
def test_batches_may_have_any_leading_dimensions(kind: type[Any]) -> None:
    x = inputs(240)
    for shape in ((240, 40), (6, 40, 40), (2, 3, 40, 40), (240, 1, 40)):
        stats = summed(kind, x.reshape(shape))
        close(kind, stats, x)
        assert stats.tokens == 240
    turned = x.reshape(6, 40, 40).transpose(0, 1)
    assert not turned.is_contiguous()
    close(kind, summed(kind, turned), x)
    one = summed(kind, x[0])
    assert one.tokens == 1


@pytest.mark.parametrize("kind", SUMS)
def test_half_precision_is_summed_in_float32(kind: type[Any]) -> None:
    x = inputs(2000)
    close(kind, summed(kind, x.bfloat16()), x.bfloat16())
    x = x / 1000
    close(kind, summed(kind, x.half()), x.half())
    # squares that half precision cannot hold: 300 ** 2 overflows, 1e-5 ** 2 vanishes
    for value in (300.0, 1e-5):
        x = torch.full((500, 4), value).half()
        close(kind, summed(kind, x), x)


@pytest.mark.parametrize("kind", SUMS)
def test_the_size_of_batches_matters_only_to_rounding(kind: type[Any]) -> None:
    x = inputs(301)
    for size in (1, 7, 64, 301):
        stats = summed(kind, *x.split(size))
        close(kind, stats, x)
        assert stats.tokens == 301


@pytest.mark.parametrize("kind", KINDS)
def test_two_halves_merged_are_the_whole(kind: type[Any]) -> None:
    x = inputs()
    first, second = summed(kind, x[:100]), summed(kind, x[100:])
    held = {k: v.clone() for k, v in vars(second).items() if isinstance(v, Tensor)}
    first.merge(second)
    assert first.tokens == 300
    assert second.tokens == 200
    assert all(torch.equal(getattr(second, k), v) for k, v in held.items())
    if kind is not NoStats:
        close(kind, first, x)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_stats_and_starts_at_nothing(kind: type[Any]) -> None:
    stats = kind.empty(40, CPU)
    assert isinstance(stats, Stats)
    assert stats.tokens == 0
    assert stats.finite()
    assert kind.needs_data == (kind is not NoStats)
    stats.add(inputs().reshape(3, 100, 40))
    assert stats.tokens == 300


@pytest.mark.parametrize("kind", SUMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_is_no_number_shows(kind: type[Any], bad: float) -> None:
    x = inputs()
    assert summed(kind, x).finite()
    x[123, 7] = bad  # the square of 1e30 is beyond float32
    stats = summed(kind, x)
    assert not stats.finite()
    good = summed(kind, inputs())
    good.merge(stats)
    assert not good.finite()


@pytest.mark.parametrize("kind", SUMS)
def test_inputs_are_not_changed_and_carry_no_gradient(kind: type[Any]) -> None:
    x = inputs().requires_grad_()
    before = x.detach().clone()
    stats = summed(kind, x)
    assert not getattr(stats, SUMS[kind]).requires_grad
    assert torch.equal(x, before)


# The factor of the inverse


def damped(gram: Tensor, damping: float) -> Tensor:
    """Gram with unseen features at the mean of the seen ones, plus a share of that mean: float64."""
    full = gram.double().clone()
    dead = full.diagonal() == 0
    mean = full.diagonal()[~dead].mean() if not dead.all() else torch.ones(()).double()
    full.diagonal()[dead] = mean
    full.diagonal().add_(damping * mean)
    return full


@pytest.mark.parametrize("damping", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("dead", [[], [0], [3, 17, 39]])
def test_the_factor_is_that_of_the_inverse(dead: list[int], damping: float) -> None:
    x = inputs() / torch.logspace(-2, 2, 40)
    x[:, dead] = 0
    gram = summed(Gram, x).gram
    before = gram.clone()
    factor = InverseFactor.of(gram, damping)
    assert torch.equal(gram, before)
    assert factor.upper.dtype == torch.float32
    assert torch.equal(factor.upper, factor.upper.triu())
    assert (factor.upper.diagonal() > 0).all()
    upper = factor.upper.double()
    identity = upper.T @ upper @ damped(gram, damping)
    torch.testing.assert_close(identity, torch.eye(40).double(), rtol=0, atol=1e-4)
    assert factor.dead.nonzero().flatten().tolist() == dead
    assert factor.damping == damping
    assert factor.raised == 0


def test_the_factor_of_ill_conditioned_inputs_is_as_good_as_float32_allows() -> None:
    gram = summed(Gram, inputs()).gram
    upper = InverseFactor.of(gram, 0.01).upper.double()
    inverse = torch.linalg.inv(damped(gram, 0.01))
    expected = torch.linalg.cholesky(inverse, upper=True)
    scale = expected.diagonal()[:, None]
    assert ((upper - expected).abs() / scale).max() < 1e-5


def test_features_never_seen_stand_alone() -> None:
    x = inputs()
    x[:, 5] = 0
    factor = InverseFactor.of(summed(Gram, x).gram, 0.01)
    others = torch.arange(40) != 5
    assert not factor.upper[5, others].any()
    assert not factor.upper[others, 5].any()
    without = InverseFactor.of(summed(Gram, x[:, others]).gram, 0.01)
    seen = factor.upper[others][:, others]  # what was never seen does not count in the damping
    torch.testing.assert_close(seen, without.upper, rtol=1e-5, atol=1e-7)


def test_inputs_that_are_all_zero() -> None:
    factor = InverseFactor.of(torch.zeros(6, 6), 0.01)
    assert factor.dead.all()
    assert factor.upper.isfinite().all()


def test_damping_is_raised_until_the_factor_exists() -> None:
    gram = summed(Gram, inputs(10)).gram  # of rank 10: singular without damping
    factor = InverseFactor.of(gram, 0.0)
    assert factor.raised > 0
    assert factor.damping == pytest.approx(1e-6 * 10**factor.raised)
    upper = factor.upper.double()
    inverse = torch.linalg.inv(damped(gram, factor.damping))
    gap = (upper.T @ upper - inverse).abs().max() / inverse.abs().max()
    assert gap < 1e-4

    indefinite = torch.eye(20)
    indefinite[0, 1] = indefinite[1, 0] = 1.05  # eigenvalues of -0.05 and 2.05
    factor = InverseFactor.of(indefinite, 0.01)
    assert (factor.raised, factor.damping) == (1, pytest.approx(0.1))


def test_damping_has_a_limit() -> None:
    hopeless = torch.eye(20)
    hopeless[0, 1] = hopeless[1, 0] = 3.0
    with pytest.raises(NumericalError, match=r"even at damping 1 \(limit 1\)"):
        InverseFactor.of(hopeless, 0.01)
    with pytest.raises(NumericalError, match="not positive definite"):
        InverseFactor.of(torch.full((4, 4), float("nan")), 0.01)


def test_the_factor_is_computed_once_for_each_damping() -> None:
    stats = summed(Gram, inputs())
    first = stats.inverse_factor(0.01)
    assert stats.inverse_factor(0.01) is first
    assert stats.inverse_factor(0.1) is not first


def hard(features: int, tokens: int = 0) -> Tensor:
    """Inputs [tokens, features] whose spectrum spans three decades and some of which stand out."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(tokens or 2 * features, features, generator=random)
    mix = torch.randn(features, features, generator=random) / features**0.5
    x = (x * torch.logspace(0, -1.5, features)) @ mix
    x[:, :: features // 5] *= 100
    return x


@pytest.mark.parametrize("features", [257, 600, 1024, 1030])
def test_the_factor_of_many_features_is_solved_in_halves(features: int) -> None:
    gram = summed(Gram, hard(features)).gram
    factor = InverseFactor.of(gram, 0.01)
    assert (factor.raised, factor.damping) == (0, 0.01)
    assert torch.equal(factor.upper, factor.upper.triu())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram, 0.01)))
    expected = torch.linalg.cholesky(inverse, upper=True)
    scale = expected.abs().amax(1, keepdim=True)
    error = ((factor.upper - expected).abs() / scale).max()
    # up to 1024 features in float64; beyond, about as good as the paper's three steps in float32
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram, 0.01).float()))
    theirs = torch.linalg.cholesky(inverse, upper=True)
    papers = ((theirs - expected).abs() / scale).max()
    assert error < (1e-7 if features <= 1024 else 4 * papers)


def test_the_factor_reads_half_of_its_matrix_and_leaves_it_alone() -> None:
    gram = summed(Gram, hard(1030)).gram
    half = gram.triu() + torch.full_like(gram, float("nan")).tril(-1)
    before = half.clone()
    assert torch.equal(InverseFactor.of(half, 0.01).upper, InverseFactor.of(gram, 0.01).upper)
    assert torch.equal(half.isnan(), before.isnan())
    assert torch.equal(half.triu(), before.triu())


def test_where_float32_is_not_enough_float64_is_tried_before_damping_is_raised() -> None:
    x = hard(1100, tokens=300).sign()  # of rank 300 at most, and with sums that are exact
    gram = summed(Gram, x).gram
    factor = InverseFactor.of(gram, 1e-7)  # about the rounding of one float32
    assert factor.raised == 0
    matrix = damped(gram, 1e-7)
    _, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1).float())
    assert failed
    _, failed = torch.linalg.cholesky_ex(matrix)
    assert not failed
    assert factor.upper.isfinite().all()
    upper = factor.upper.double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    gap = (upper.T @ upper - inverse).abs().max() / inverse.abs().max()
    assert gap < 1e-5


def test_half_of_the_sums_is_enough() -> None:
    x = hard(600, tokens=700)
    stats = summed(Gram, x[:300], x[300:])
    assert not stats.sums[256:, :256].any()  # not computed, and not mirrored until asked for
    for index in (0, 255, 256, 599):
        assert torch.equal(stats.column(index), stats.gram[:, index])
    assert torch.equal(stats.gram, stats.gram.T)
    close(Gram, stats, x)
    stats.add(x)  # after it was mirrored
    stats.merge(summed(Gram, x[:9]))
    close(Gram, stats, torch.cat([x, x, x[:9]]))
    assert torch.equal(stats.gram, stats.gram.T)


def test_what_was_derived_is_forgotten_when_the_sums_change() -> None:
    stats = summed(Gram, inputs())
    first = stats.inverse_factor(0.01)
    stats.merge(summed(Gram, inputs(seed=1)))
    assert stats.inverse_factor(0.01) is not first


MEASURE = """
import resource, sys, torch
from llmprune.factor import InverseFactor

torch.set_num_threads(1)
n = 3072
InverseFactor.of(torch.eye(300), 0.01)  # LAPACK and its buffers are there
gram = torch.eye(n) + 0.5
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
InverseFactor.of(gram, 0.01)
print((peak() - before) / (8 * n * n))
"""


def test_the_factor_needs_little_more_than_its_own_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 1.0  # float64 matrices of its size; measured 0.6, and 5 by LAPACK


# The sample


@pytest.mark.parametrize("total", [100, 511, 512, 1000, 1024, 5000])
def test_the_sample_is_the_same_whatever_the_batches(total: int) -> None:
    x = inputs(total)
    kept = []
    for size in (1, 3, 100, 257, total):
        sample = InputSample.of(total)
        for batch in x.split(size):
            sample.add(batch)
        assert sample.tokens == total
        kept.append(sample.inputs)
    assert all(torch.equal(kept[0], other) for other in kept)
    assert min(total, InputSample.SIZE // 2) <= len(kept[0]) < 2 * InputSample.SIZE
    assert torch.equal(kept[0], x[:: total // InputSample.SIZE | 1])


def test_the_sample_shows_every_position_of_a_window() -> None:
    positions = torch.arange(64).repeat(512)[:, None].float()
    sample = InputSample.of(len(positions))  # 128 tokens apart
    sample.add(positions)
    assert sample.inputs.unique().tolist() == list(range(64))


def test_the_sample_of_windows_is_that_of_their_tokens() -> None:
    x = inputs(2000)
    flat, windows = InputSample.of(2000), InputSample.of(2000)
    flat.add(x)
    for batch in x.reshape(20, 100, 40).split(3):
        windows.add(batch)
    assert torch.equal(flat.inputs, windows.inputs)


def test_the_sample_does_not_hold_on_to_the_batch() -> None:
    x = inputs(1024)
    sample = InputSample.of(1024)
    sample.add(x)
    before = sample.inputs.clone()
    x.zero_()
    assert torch.equal(sample.inputs, before)
    assert sample.inputs.untyped_storage().nbytes() == -(-1024 // 5) * 40 * 4


def test_the_error_is_that_of_the_layers_output() -> None:
    x = inputs(300)
    weight = torch.randn(16, 40, generator=torch.Generator().manual_seed(1))
    pruned = weight * (weight.abs() > 0.5)
    sample = InputSample.of(300)  # fewer than its size: all of them
    sample.add(x)
    dense = x.double() @ weight.double().T
    change = dense - x.double() @ pruned.double().T
    expected = float(change.square().sum() / dense.square().sum())
    assert sample.error(weight, pruned) == pytest.approx(expected, rel=1e-5)
    assert sample.error(weight, weight) == 0
    assert sample.error(weight, torch.zeros_like(weight)) == pytest.approx(1)
    assert sample.error(torch.zeros_like(weight), torch.zeros_like(weight)) == 0


def test_the_error_of_half_precision_is_computed_in_float32() -> None:
    x = inputs(300)
    weight = torch.randn(16, 40, generator=torch.Generator().manual_seed(1))
    low, high = InputSample.of(300), InputSample.of(300)
    low.add(x.bfloat16())
    high.add(x.bfloat16().float())
    pruned = (weight * (weight.abs() > 0.5)).bfloat16()
    assert low.error(weight.bfloat16(), pruned) == high.error(
        weight.bfloat16().float(), pruned.float()
    )


def test_the_error_over_the_sample_is_near_that_over_all_tokens() -> None:
    x = inputs(20000) / torch.logspace(-2, 2, 40)
    weight = torch.randn(16, 40, generator=torch.Generator().manual_seed(1))
    pruned = weight * (weight.abs() > 0.5)
    sample, whole = InputSample.of(20000), InputSample(every=1)
    sample.add(x)
    whole.add(x)
    assert len(sample.inputs) < 1024 < len(whole.inputs)
    assert sample.error(weight, pruned) == pytest.approx(whole.error(weight, pruned), rel=0.05)


def test_float64_inputs_are_summed_in_float32() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norms = InputNorms.empty(6, torch.device("cpu"))
    norms.add(x)
    assert norms.sum_sq.dtype == torch.float32
    torch.testing.assert_close(norms.sum_sq.double(), x.square().sum(0), rtol=1e-6, atol=0)


def test_a_large_factor_lies_in_the_half_that_is_not_computed() -> None:
    """And everything that is asked of the sums afterwards is answered as before."""
    n = 1100
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2 * n, n, generator=random) * torch.logspace(-1, 1, n)
    stats = summed(Gram, x)
    apart = summed(Gram, x)
    whole = apart.gram.clone()
    expected = InverseFactor.of(whole, 0.01)
    factor = stats.inverse_factor(0.01)
    assert factor.upper.data_ptr() == stats.sums.data_ptr()
    torch.testing.assert_close(factor.upper.triu(), expected.upper, rtol=1e-4, atol=1e-6)
    assert torch.equal(stats.column(7), whole[:, 7])
    assert torch.equal(stats.diagonal, whole.diagonal())
    assert stats.finite()
    again = stats.inverse_factor(0.1).upper.triu()
    torch.testing.assert_close(again, InverseFactor.of(whole, 0.1).upper, rtol=1e-4, atol=1e-6)
    assert torch.equal(stats.gram, whole)
    stats.inverse_factor(0.01)
    stats.add(x)
    torch.testing.assert_close(stats.gram, 2 * whole, rtol=1e-4, atol=1e-5 * float(whole.max()))
