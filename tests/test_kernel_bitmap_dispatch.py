"""Layers with any mask, and with n of 32: what holds them, and that they stay what they were."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETED
from kernel_harness import (
    MASKS,
    assert_as_good_as_dense,
    assert_within,
    bits,
    nm_matrix,
    truth,
)
from test_kernel_bitmap import any_matrix, same
from test_kernel_dispatch import keep_of
from test_runtime_linear import KINDS
from test_runtime_linear import dense as a_layer
from torch import Tensor

from llmprune.kernels import bitmap, choice, gpu, held_bitmap, measure, table
from llmprune.kernels.held_bitmap import bitmap_n, bitmap_of, bitmap_percent
from llmprune.kernels.interface import Case
from llmprune.kernels.measure import Bench
from llmprune.kernels.packed import pack, unpack
from llmprune.kernels.sparse_linear import expanded_layout, sparse_linear
from llmprune.kernels.table import Timing
from llmprune.kernels.words import Measured, Words
from llmprune.runtime.laid_out import bring_back, held, lay_out
from llmprune.runtime.linear import SparseLinear

ids = {"ids": lambda value: getattr(value, "name", str(value).removeprefix("torch."))}
CUDA = Case(
    (64, 128),
    4096,
    torch.bfloat16,
    torch.device("cuda", 0),
    "unstructured",
    "rows",
    False,
    1,
    False,
)


@pytest.fixture(autouse=True)
def _own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing asked for, nothing measured."""
    monkeypatch.delenv(choice.SETTING, raising=False)
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "cache"))
    table.current.cache_clear()
    yield
    choice.prefer(None)
    table.current.cache_clear()


@pytest.fixture
def gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this machine had a GPU on which `bitmap` and `nm_gemv` pass their trials."""
    monkeypatch.setattr(held_bitmap.bitmap, "unavailable", lambda device, n: None)
    monkeypatch.setattr("llmprune.kernels.nm_gemv.unavailable", lambda device, n, m: None)
    monkeypatch.setattr(gpu, "identity", lambda device: ("NVIDIA A", "8.9"))
    monkeypatch.setattr(gpu, "missing", lambda device: "no GPU in truth")
    monkeypatch.setattr(gpu, "free", lambda device: (10**9, 10**9))
    monkeypatch.setattr(gpu, "occupied", lambda device: False)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels may hold layers wherever these are: on a CPU they are interpreted."""
    for kind in (held_bitmap.Bitmap, held_bitmap.BitmapN):
        monkeypatch.setattr(kind, "static", kind._misfit)
        monkeypatch.setattr(kind, "unavailable", lambda self, device: None)


# Layouts


@pytest.mark.parametrize("n", [1, 10, 16])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("full", [True, False], ids=["full groups", "short groups"])
def test_a_layout_of_n_of_32_gives_back_what_was_packed(mask: str, full: bool, n: int) -> None:
    """Groups that keep fewer, and kept zeros, for which the bitmap stays if groups are short."""
    kernel, shape = bitmap_n(n), (37, 96)
    plain = pack(nm_matrix(*shape, n, 32, torch.float16, mask))
    keep = keep_of(*shape, n, 32, full)
    random = torch.Generator().manual_seed(n)
    words = torch.randint(-(2**15), 2**15, shape, generator=random, dtype=torch.int16)
    words.masked_fill_(torch.rand(shape, generator=random) < 0.2, 0)
    odd = pack(torch.where(keep, words, 0).view(torch.bfloat16), keep)
    for packed, parts in ((plain, 2), (odd, 2 if full else 3)):
        layout = kernel.prepare(packed)
        assert len(layout) == parts
        assert same(kernel.packed(layout, shape), packed)
        assert torch.equal(bits(kernel.expanded(layout, shape)), bits(unpack(packed)))


@pytest.mark.parametrize("kernel", [bitmap_percent(50), bitmap_n(16)], **ids)
@pytest.mark.parametrize("tokens", [0, 1, 65])
def test_any_number_of_tokens_both_ways(
    kernel: Measured[object],
    tokens: int,
    device: torch.device,
    poisoned: Callable[[Tensor], int],
) -> None:
    any_mask = kernel is bitmap_percent(50)
    dense = (
        any_matrix(9, 40, torch.bfloat16) if any_mask else nm_matrix(9, 64, 16, 32, torch.float16)
    )
    packed = pack(dense.to(device))
    layout = kernel.prepare(packed)  # type: ignore[attr-defined]
    torch.manual_seed(0)
    for transposed in (False, True):
        to, features = dense.shape[::-1] if transposed else dense.shape
        x = torch.randn(tokens, features).to(device, dense.dtype)
        bias = torch.randn(to).to(device, dense.dtype)
        y = sparse_linear(x, layout, bias, kernel.name, packed.shape, transposed)
        assert y.shape == (tokens, to)
        assert poisoned(y) == 0
        if tokens:
            matrix = dense.to(device)
            assert_within(y, *truth(x, matrix.T if transposed else matrix, bias))


def test_opcheck() -> None:
    for name, dense in (
        ("bitmap 50%", any_matrix(3, 40, torch.float32)),
        ("bitmap 16:32", nm_matrix(3, 32, 16, 32, torch.float16)),
    ):
        layout = choice.find(name).prepare(pack(dense))
        x = torch.randn(17, dense.shape[1]).to(dense.dtype).requires_grad_()
        shape = list(dense.shape)
        torch.library.opcheck(
            torch.ops.llmprune.sparse_linear.default, (x, layout, None, name, shape, False)
        )
        torch.library.opcheck(
            torch.ops.llmprune.sparse_expand_layout.default, (layout, name, shape)
        )


# Choosing


@pytest.mark.usefixtures("gpu_here")
@pytest.mark.parametrize(
    ("change", "chosen"),
    [
        ({}, "bitmap 50%"),
        ({"dtype": torch.float16}, "bitmap 50%"),
        ({"dtype": torch.float32}, "bitmap 50%"),
        ({"dtype": torch.float64}, "expand"),
        ({"kept": 2000}, "bitmap 25%"),
        ({"kept": 10}, "bitmap 5%"),
        ({"kept": 7400}, "bitmap 90%"),
        ({"kept": 7700}, "expand"),  # more bytes than dense
        ({"kept": 7700, "dtype": torch.float32}, "bitmap 95%"),
        ({"trains": True}, "expand"),
        ({"device": torch.device("cpu")}, "expand"),
        ({"shape": (64, 0), "kept": 0}, "expand"),
        ({"transposed": True}, "bitmap 50%"),
        ({"pattern": "16:32"}, "bitmap 16:32"),
        ({"pattern": "10:32", "kept": 2560}, "bitmap 10:32"),
        ({"pattern": "30:32", "kept": 7000}, "bitmap 85%"),
        ({"pattern": "16:32", "axis": "columns"}, "bitmap 50%"),
        ({"pattern": "16:32", "axis": "columns", "transposed": True}, "bitmap 16:32"),
        ({"pattern": "16:32", "dtype": torch.float32}, "bitmap 50%"),
        ({"pattern": "4:8"}, "nm_gemv 4:8"),
        ({"pattern": "4:8", "axis": "columns"}, "bitmap 50%"),
        ({"pattern": "13:16", "kept": 6656}, "bitmap 80%"),
    ],
    **ids,
)
def test_the_kernel_follows_from_the_layer_alone(change: dict[str, object], chosen: str) -> None:
    case = replace(CUDA, **change)
    for tokens in (0, 1, 17, 10_000):
        kernel = choice.choose(replace(case, tokens=tokens))
        assert kernel.name == chosen
    assert choice.turns(kernel, case) == (case.transposed and chosen != "expand")
    assert choice.find(chosen) is kernel


@pytest.mark.usefixtures("gpu_here")
def test_bitmap_is_asked_for_by_its_first_name() -> None:
    choice.prefer("bitmap")
    assert choice.choose(replace(CUDA, pattern="2:4")).name == "bitmap 50%"
    assert choice.choose(replace(CUDA, pattern="16:32")).name == "bitmap 16:32"
    choice.prefer("expand")
    assert choice.choose(CUDA).name == "expand"
    with pytest.raises(ValueError, match=r"no kernel 'bitmap'; known: .*bitmap n:32, bitmap p%"):
        choice.find("bitmap")


@pytest.mark.usefixtures("gpu_here")
def test_shares_of_kept_weights_are_measured_apart() -> None:
    """Half the weights take half the bytes: what is slow at one share says nothing of another."""
    slow = bitmap_of(4096, 8192).matrix(CUDA.device, CUDA.sides, CUDA.dtype)
    assert (slow.kernel, slow.pattern) == ("bitmap 50%", "50%")
    table.keep(slow, [Timing(1, 12, None, None, 30, 10)])
    assert choice.choose(CUDA).name == "dense"
    told = choice.explain(type("L", (), {"case": lambda _, t: CUDA, "kernel": "dense"})(), 1)
    assert told.refused["bitmap 50%"] == "measured slower than dense at 1 token (0.83x)"
    assert choice.choose(replace(CUDA, kept=4200)).name == "dense"  # 51%
    assert choice.choose(replace(CUDA, kept=3600)).name == "bitmap 45%"
    table.current.cache_clear()  # from the file
    assert choice.choose(CUDA).name == "dense"


@pytest.mark.parametrize("kernel", [bitmap_percent(30), bitmap_n(10)], **ids)
def test_what_is_measured_is_what_is_held(
    kernel: Measured[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_bitmap, "_BLOCK", 1024)
    for rows in (1, 8, 20):
        dense, read = kernel.sample(torch.device("cpu"), (rows, 128), torch.bfloat16)
        assert dense.shape == (rows, 128)
        assert torch.equal(kernel.dense(read, dense.shape, dense.dtype, False), dense)
        laid = kernel.read(kernel.prepare(pack(dense)))  # type: ignore[attr-defined]
        for one, other in zip(
            *([p] if isinstance(p, Tensor) else p for p in (read, laid)), strict=True
        ):
            assert torch.equal(one, other)
        kept = float((dense != 0).float().mean())
        assert abs(kept - 0.3) < 0.06 or rows == 1


@pytest.mark.skipif(not INTERPRETED, reason="made-up times of a CPU")
@pytest.mark.parametrize("kernel", [bitmap_percent(50), bitmap_n(16)], **ids)
def test_measuring_compares_the_product_first(kernel: Measured[object]) -> None:
    bench = Bench(kernel, torch.device("cpu"), (5, 64), torch.bfloat16)
    found = bench.time(2, [(1, 1), (2, 2)], lambda device, ways: [float(4 - i) for i in range(4)])
    assert (found.kernel_us, found.warps, found.split) == (1.0, 2, 2)
    assert kernel.splits((4096, 14336), 8) == [1, 2, 4]
    assert kernel.splits((128, 300), 8) == [1]
    copies = measure._copies([torch.zeros(3), torch.zeros(4)])
    assert [len(part) for part in copies[0]] == [3, 4]


def test_a_sweep_asks_for_any_mask_by_the_share_that_it_keeps(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    sweep = importlib.import_module("sweep")
    cases = sweep._cases(torch.device("cuda"), ["30%", "16:32"], [torch.float16], True)
    found = [(case.pattern, case.kept, case.shape) for case in cases]
    assert found == [("unstructured", 4915, (64, 256)), ("16:32", 8192, (64, 256))]
    assert bitmap_of(4915, 64 * 256) is bitmap_percent(30)


# Layers


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_held_and_stays_what_it_was(kind: str) -> None:
    layer = a_layer(kind).eval().requires_grad_(False)
    sparse = SparseLinear.from_linear(layer)
    values, kept = sparse.weight_values.clone(), sparse.weight_bitmap.clone()
    lay_out(sparse)
    laid = held(sparse)
    assert laid is not None
    assert laid.kernel == bitmap_of(len(values), 12 * 24).name
    x = torch.randn(2, 24, requires_grad=True)
    y = sparse(x)
    torch.testing.assert_close(y, layer(x))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, sparse.weight.sum(0).expand(2, -1))
    assert held(sparse) is not None
    other = copy.deepcopy(sparse)
    for one in (sparse, other):
        assert torch.equal(one.state_dict()["weight_values"], values)
        assert torch.equal(one.weight_bitmap + 0, kept)
    lay_out(sparse)
    with torch.no_grad():
        sparse.weight_values.mul_(2)
    bring_back(sparse)
    assert torch.equal(sparse.weight_values, values * 2)


@pytest.mark.usefixtures("here")
def test_a_layer_of_n_of_32_is_held() -> None:
    layer = torch.nn.Linear(64, 6).half().eval().requires_grad_(False)
    layer.weight.data = nm_matrix(6, 64, 10, 32, torch.float16)
    sparse = SparseLinear.from_linear(layer)
    lay_out(sparse)
    assert (sparse.pattern, sparse.kernel) == ("10:32", "bitmap 10:32")
    x = torch.randn(1, 64).half()
    assert_within(sparse(x), *truth(x, layer.weight, layer.bias))
    assert torch.equal(sparse.weight + 0, layer.weight)


# On a GPU


def on_gpu(name: str) -> tuple[Tensor, list[Tensor]]:
    """A dense matrix and its layout; skips where the kernel says that it cannot run."""
    kernel, device = choice.find(name), torch.device("cuda", torch.cuda.current_device())
    if isinstance(kernel, Words):
        dense, pattern = (
            nm_matrix(1024, 2048, 16, 32, torch.bfloat16, "fewer", device="cuda"),
            "16:32",
        )
    else:
        dense, pattern = any_matrix(1024, 2000, torch.bfloat16).cuda(), "unstructured"
    kept = int((dense != 0).sum())
    case = replace(CUDA, device=device, shape=tuple(dense.shape), pattern=pattern, kept=kept)
    if (why := kernel.unfit(case)) is not None:
        pytest.skip(f"{name} {why}")
    assert bitmap.unavailable(device, 16 if pattern == "16:32" else 0) is None
    return dense, kernel.prepare(pack(dense))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bitmap 50%", "bitmap 16:32"])
def test_on_a_gpu_any_number_of_tokens_both_ways(
    name: str, poisoned: Callable[[Tensor], int]
) -> None:
    dense, layout = on_gpu(name)
    out, features = dense.shape
    assert same(choice.find(name).packed(layout, dense.shape), pack(dense))
    assert torch.equal(bits(expanded_layout(layout, name, dense.shape)), bits(dense))
    for tokens in (0, 1, 7, 8, 9, 16, 17, 33, 65, 300):
        x = torch.randn(tokens, features, device="cuda").bfloat16()
        bias = torch.randn(out, device="cuda").bfloat16()
        y = sparse_linear(x, layout, bias, name, dense.shape)
        flow = torch.randn(tokens, out, device="cuda").bfloat16()
        back = sparse_linear(flow, layout, None, name, dense.shape, True)
        assert (y.shape, back.shape) == ((tokens, out), (tokens, features))
        assert poisoned(y) == poisoned(back) == 0
        if tokens:
            assert_as_good_as_dense(y, x, dense, bias)
            assert_as_good_as_dense(back, flow, dense.T.contiguous())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bitmap 50%", "bitmap 16:32"])
@pytest.mark.parametrize("tokens", [1, 8, 16, 65])
def test_a_cuda_graph_records_each_way(name: str, tokens: int) -> None:
    dense, layout = on_gpu(name)
    x = torch.randn(tokens, dense.shape[1], device="cuda").bfloat16()
    for _ in range(2):
        sparse_linear(x, layout, None, name, dense.shape)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse_linear(x, layout, None, name, dense.shape)
    x.normal_()
    graph.replay()
    assert torch.equal(y, sparse_linear(x, layout, None, name, dense.shape))
