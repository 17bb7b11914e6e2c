"""What layers of few bits are held in: every form gives its matrix back, and the choice follows the rules."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from few_bits import dense_of, few
from kernel_harness import assert_as_good_as_dense
from packed_files import equal
from test_kernel_table import MadeUp, usual
from torch import Tensor, nn

from llmprune.kernels import (
    choice,
    dense,
    explain,
    gpu,
    measure,
    prepare,
    s24_bits,
    table,
    tuning,
    words,
)
from llmprune.kernels.few_bits import FewBits, expand_few, in_halves, top_of
from llmprune.kernels.held_few import DenseFew
from llmprune.kernels.held_s24_bits import S24Few, s24_few
from llmprune.kernels.interface import Case, Unheld
from llmprune.kernels.packed import pack_bits
from llmprune.kernels.s24_bits_layout import span_of
from llmprune.kernels.sparse_linear import sparse_linear
from llmprune.kernels.table import Timing
from llmprune.runtime.few_bits import FewBitsLinear, WholeNumbers
from llmprune.runtime.laid_out import held, lay_out

BF16, F16 = torch.bfloat16, torch.float16
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
CASE = Case(
    *((64, 256), 8192, BF16, CUDA, "2:4", "rows", False, 1, False),
    bits=4,
    group=128,
    rounded=BF16,
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No table but what a test makes."""
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(measure, "FAILED", {})
    words._matrix.cache_clear()
    table.current.cache_clear()
    yield
    words._matrix.cache_clear()
    table.current.cache_clear()


def same(one: FewBits, two: FewBits) -> bool:
    """Bit for bit."""
    told = [(f.shape, f.bits, f.group, f.dtype, f.axis) for f in (one, two)]
    parts = ("whole", "scales", "bitmap")
    return told[0] == told[1] and all(equal(getattr(one, n), getattr(two, n)) for n in parts)


@pytest.mark.parametrize(
    ("shape", "bits", "group", "dtype"),
    [
        ((32, 256), 8, 256, BF16),
        ((40, 300), 8, 64, F16),
        ((1, 36), 8, 36, F16),
        ((40, 300), 4, 128, BF16),
        ((32, 512), 4, 256, F16),
        ((1, 36), 4, 32, BF16),
    ],
    ids=str,
)
def test_the_kernels_layout_gives_the_matrix_back(shape, bits, group, dtype):
    for pattern in (True, False):
        found, _ = few(shape, bits, group, dtype, pattern=pattern)
        if not pattern:  # some groups keep fewer than two, and zeros are kept
            found = fewer(found)
        kernel = s24_few(bits, span_of(group, shape[1]))
        layout = kernel.prepare(found)
        assert layout[0].dtype == dtype
        assert same(kernel.packed(layout, shape), found)
        truth = dense_of(found)
        assert equal(kernel.expanded(layout, shape), truth)
        x, other = torch.randn(3, shape[1]).to(dtype), torch.randn(3, shape[0]).to(dtype)
        assert torch.equal(kernel.matmul(x, layout, None, shape, False), x @ truth.T)
        assert torch.equal(kernel.matmul(other, layout, None, shape, True), other @ truth)
        held_dense = DenseFew(bits, lambda case: True)
        layout = held_dense.prepare(found)
        assert same(held_dense.packed(layout, shape), found)
        assert equal(held_dense.expanded(layout, shape), truth)
        assert torch.equal(held_dense.matmul(x, layout, None, shape, False), x @ truth.T)


def fewer(found: FewBits) -> FewBits:
    """Of a mask of any kind, what 2:4 allows: the first two of every group."""
    rows, columns = found.shape
    keep = (found.bitmap[:, :, None] >> torch.arange(8) & 1).reshape(rows, -1)[:, :columns].bool()
    groups = keep.reshape(rows, -1, 4)
    groups &= groups.cumsum(-1) <= 2
    keep = groups.reshape(rows, columns)
    random = torch.Generator().manual_seed(5)
    top = top_of(found.bits)
    whole = torch.randint(-top, top + 1, (int(keep.sum()),), generator=random).to(torch.int8)
    numbers = whole if found.bits == 8 else in_halves(whole)
    return replace(found, whole=numbers, bitmap=pack_bits(keep))


def test_what_it_does_not_hold_is_told_apart():
    kernel = s24_few(4, 128)
    any_mask, _ = few((8, 256), 4, 128, pattern=False)
    with pytest.raises(ValueError, match="not 2:4: a group keeps") as error:
        kernel.prepare(any_mask)
    assert not isinstance(error.value, Unheld)
    found, _ = few((8, 256), 4, 128, F16)
    with pytest.raises(Unheld, match="float16 does not hold the scales"):
        kernel.prepare(replace(found, scales=(found.scales.float() * 2e-5).bfloat16()))


# Choosing


@pytest.fixture
def gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this machine had a GPU on which the kernel passes its trial."""
    monkeypatch.setattr(s24_bits, "unavailable", lambda device: None)
    monkeypatch.setattr(gpu, "identity", lambda device: ("NVIDIA A", "9.0"))
    monkeypatch.setattr(gpu, "missing", lambda device: "no GPU in truth")


@pytest.mark.usefixtures("gpu_here")
@pytest.mark.parametrize(
    ("change", "chosen", "why"),
    [
        ({}, "s24_mma int4/128", ""),
        ({"group": 256}, "s24_mma int4", ""),
        ({"group": 64, "bits": 8}, "s24_mma int8/64", ""),
        ({"group": 96}, "s24_mma int4/32", ""),
        ({"bits": 8, "group": 256, "pattern": "1:2"}, "s24_mma int8", ""),
        ({"transposed": True, "axis": "columns", "shape": (256, 64)}, "s24_mma int4/128", ""),
        ({"group": 20}, "expand int4", "needs groups of whole rows or multiples of 32, not of 20"),
        ({"pattern": "4:8"}, "expand int4", "needs 2:4, not 4:8"),
        ({"pattern": "unstructured"}, "expand int4", "needs 2:4, not unstructured"),
        ({"axis": "columns"}, "expand int4", "these lie along the outputs"),
        ({"dtype": torch.float32}, "expand int4", "needs bfloat16 or float16, not float32"),
        ({"dtype": F16}, "expand int4", "rounded to bfloat16, as they are stored, before"),
        ({"unheld": "a reason"}, "expand int4", "a reason"),
        ({"device": CPU, "bits": 8}, "expand int8", "needs an NVIDIA GPU"),
    ],
    ids=str,
)
def test_the_kernel_follows_from_the_layer(change, chosen, why):
    case = replace(CASE, **change)
    assert choice.choose(case).name == chosen
    assert choice.find(chosen).name == chosen
    assert choice.turns(choice.find(chosen), case) == (case.transposed and "expand" not in chosen)
    told = explain(type("L", (), {"case": lambda _, t: replace(case, tokens=t)})(), 3)
    assert told.kernel == chosen
    assert told.refused["s24_mma"] == f"holds values, and these weights are int{case.bits}"
    if why:
        name = next(n for n in told.refused if n.startswith(f"s24_mma int{case.bits}"))
        assert why in told.refused[name]
    for kernel in choice.KERNELS:
        assert kernel.unfit(case) == f"holds values, and these weights are int{case.bits}"


@pytest.mark.usefixtures("gpu_here")
def test_no_slowdown_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = s24_few(4, 128)
    of_it = kernel.matrix(CUDA, CASE.sides, CASE.dtype)
    assert of_it != s24_few(4, 0).matrix(CUDA, CASE.sides, CASE.dtype)
    table.keep(of_it, [Timing(1, 5, None, None, 30, 10), Timing(64, 12, None, None, 30, 10)])
    monkeypatch.setattr(gpu, "free", lambda device: (10**9, 2 * 10**9))
    assert choice.choose(CASE).name == "dense int4"
    told = explain(type("L", (), {"case": lambda _, t: CASE})(), 1)
    assert told.refused["s24_mma int4/128"] == "measured slower than dense at 64 tokens (0.83x)"
    monkeypatch.setattr(gpu, "free", lambda device: (10**5, 10**6))
    assert not dense.room_for(CASE)
    assert choice.choose(CASE).name == "expand int4"
    for name, chosen in (("s24_mma", "s24_mma int4/128"), ("expand", "expand int4")):
        choice.prefer(name)
        assert choice.choose(CASE).name == chosen
    choice.prefer(None)
    monkeypatch.setenv(table.SETTING, "8")
    assert choice.choose(CASE).name == "s24_mma int4/128"
    assert kernel.route(CASE) == "by the kernel; measured: 5.0 us, dense 10.0 us at 1 token"


def test_it_is_measured_on_a_random_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """With made-up times; what it then multiplies is what it says it is."""
    from llmprune.kernels import held_s24_bits

    monkeypatch.setattr(held_s24_bits, "_BLOCK", 256 * 64)
    monkeypatch.setattr(s24_bits, "s24_bits", lambda x, layout, bias, **_: plain(x, layout, bias))
    for bits, span in ((8, 0), (4, 128)):
        kernel = s24_few(bits, span)
        for rows in (1, 32, 150):
            weight, laid = kernel.sample(CPU, (rows, 256), BF16)
            assert weight.shape == (rows, 256)
            assert torch.equal(kernel.dense(laid, (rows, 256), BF16, False), weight)
        bench = measure.Bench(kernel, CPU, (150, 256), BF16)
        timing = bench.time(8, bench.launches(), MadeUp(usual))
        assert (timing.kernel_us, timing.warps, timing.split) == (6.0, 4, 1)


@pytest.mark.usefixtures("gpu_here")
def test_a_sweep_finds_the_kernels(root: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    sweep = importlib.import_module("sweep")
    cases = sweep._cases(CUDA, ["2:4", "4:8"], [BF16], True, ["int8", "int4"])
    found = [[k.name for k in sweep._kernels(case)] for case in cases if case.bits]
    assert found == [["s24_mma int8"], ["s24_mma int4/128"]]
    jobs, notes = tuning._jobs([CASE, replace(CASE, group=20)])  # and so does `tune`
    assert [matrix.kernel for matrix in jobs] == ["s24_mma int4/128"]
    assert "needs groups of whole rows or multiples of 32, not of 20" in notes[0]


def plain(x: Tensor, layout: Any, bias: Tensor | None) -> Tensor:
    return s24_bits.s24_bits_reference(x, layout, bias)


# Layers in its layout


class Anywhere(S24Few):
    """The kernel as if every device could run it: on a CPU it expands."""

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def static(self, case: Case) -> str | None:
        return super().static(replace(case, device=CUDA))


@pytest.fixture
def _anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = choice.s24_for

    def found(case: Case) -> S24Few:
        kernel = plain(case)
        return Anywhere(kernel.bits, kernel.span)

    monkeypatch.setattr(choice, "s24_for", found)


def laid_layer(transposed: bool = False, bits: int = 4, **options: Any) -> FewBitsLinear:
    axis = "columns" if transposed else "rows"
    shape = (256, 40) if transposed else (40, 256)
    found, kept = few(shape, bits, 128 if bits == 4 else 256, axis=axis, **options)
    return FewBitsLinear(found, kept, None, "2:4", transposed).eval()


@pytest.mark.usefixtures("_anywhere")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_layer_is_laid_out_and_brought_back(transposed, bits):
    layer = laid_layer(transposed, bits)
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    whole, x = layer.weight_whole, torch.randn(3, 256).bfloat16()
    weight = layer.weight.clone()
    given = layer(x)
    assert layer.kernel == ("s24_mma int4/128" if bits == 4 else "s24_mma int8")
    assert prepare(nn.Sequential(layer)) == {layer.kernel: 1}
    assert explain(layer, 1).kernel == layer.kernel
    torch.testing.assert_close(given, x @ weight.T)
    assert (layer.weight_whole.shape, layer.weight_scales.dtype) == (
        before["weight_whole"].shape,
        BF16,
    )
    repr(layer)
    assert held(layer) is not None
    assert torch.equal(layer.weight, weight)
    assert held(layer) is not None  # what is expanded is expanded from there
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), given)
    assert held(layer) is not None
    for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(made(x), given)
    layer(x)
    assert held(layer) is not None
    after = layer.state_dict()
    assert all(equal(after[n], before[n]) for n in before)
    assert held(layer) is None
    assert layer.weight_whole is whole
    assert type(whole) is WholeNumbers


@pytest.mark.usefixtures("_anywhere")
def test_what_the_kernel_cannot_hold_is_expanded_and_told():
    layer = laid_layer(dtype=F16)
    layer.weight_scales.copy_(layer.weight_scales.float() * 2e-5)
    x = torch.randn(3, 256).half()
    expected = x @ expand_few(layer.few).T
    torch.testing.assert_close(layer(x), expected)
    assert layer.kernel is None
    told = explain(layer, 1)
    assert told.kernel == "expand int4"
    assert "float16 does not hold the scales" in told.refused["s24_mma int4/128"]
    layer.load_state_dict(laid_layer(dtype=F16).state_dict())
    assert lay_out(layer) is not None


@pytest.mark.usefixtures("_anywhere")
def test_in_another_dtype_it_is_expanded():
    layer = laid_layer()
    assert lay_out(layer) is not None
    layer.half()
    assert lay_out(layer) is None
    assert torch.equal(layer.weight, dense_of(layer.few).half())
    assert lay_out(layer.bfloat16()) is not None


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "group"), [(8, 2048), (4, 128)])
def test_on_a_gpu_any_number_of_tokens_both_ways(bits: int, group: int, poisoned: Any) -> None:
    found, kept = few((1024, 2048), bits, group)
    truth, found = dense_of(found).cuda(), found.to("cuda")
    case = replace(CASE, shape=found.shape, bits=bits, group=group, device=found.whole.device)
    for kernel in choice.offered(case):
        if kernel.unfit(case) is not None:
            assert kernel.name.split()[0] != "expand" or "int" not in kernel.name
            continue
        layout = kernel.prepare(found)
        assert same(kernel.packed(layout, found.shape), found)
        assert equal(kernel.expanded(layout, found.shape), truth)
        for tokens in (0, 1, 8, 9, 64, 65, 300):
            x = torch.randn(tokens, 2048, device="cuda").bfloat16()
            flow = torch.randn(tokens, 1024, device="cuda").bfloat16()
            y = sparse_linear(x, layout, None, kernel.name, found.shape)
            back = sparse_linear(flow, layout, None, kernel.name, found.shape, True)
            assert poisoned(y) == poisoned(back) == 0
            if tokens:
                assert_as_good_as_dense(y, x, truth)
                assert_as_good_as_dense(back, flow, truth.T.contiguous())
    layer = FewBitsLinear(found, kept, None, "2:4").eval()
    layer(torch.randn(1, 2048, device="cuda").bfloat16())
    assert torch.equal(layer.weight, truth)
    assert same(layer.few, found)
