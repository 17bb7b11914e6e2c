"""Layouts that layers are held in, and which of them is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETED
from gluon_on_cpu import on_cpu
from kernel_harness import (
    MASKS,
    assert_as_good_as_dense,
    assert_within,
    bits,
    nm_matrix,
    truth,
)
from torch import Tensor

from llmprune.kernels import choice, cusparselt, gpu, held
from llmprune.kernels.held import N8, S24_MMA, gemv
from llmprune.kernels.interface import Case, Kernel
from llmprune.kernels.packed import Packed, pack, unpack
from llmprune.kernels.sparse_linear import expanded_layout, sparse_linear
from llmprune.kernels.words import Words

HALVES = (torch.bfloat16, torch.float16)
KERNELS: list[Words] = [S24_MMA, gemv(2, 4), gemv(1, 2), gemv(4, 8), gemv(5, 16)]
KERNELS += [N8(4), N8(3), N8(2)]
ids = {"ids": lambda value: getattr(value, "name", str(value).removeprefix("torch."))}


@pytest.fixture(autouse=True)
def _nothing_asked_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(choice.SETTING, raising=False)
    yield
    choice.prefer(None)


def same(a: Packed, b: Packed) -> bool:
    return (
        a.shape == b.shape
        and torch.equal(a.bitmap, b.bitmap)
        and torch.equal(bits(a.values), bits(b.values))
    )


def keep_of(rows: int, columns: int, n: int, m: int, full: bool, seed: int = 0) -> Tensor:
    """Bool, n of every m, or fewer in some groups."""
    random = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, columns // m, m, generator=random).argsort(-1)
    keep = order < n
    if not full:
        keep &= torch.rand(keep.shape, generator=random) < 0.8
    return keep.reshape(rows, columns)


@pytest.mark.parametrize("kernel", KERNELS, **ids)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(1, 16), (37, 48), (64, 272)], **ids)
def test_a_layout_gives_back_what_was_packed(
    kernel: Words, mask: str, shape: tuple[int, int]
) -> None:
    packed = pack(nm_matrix(*shape, kernel.n, kernel.m, HALVES[shape[0] % 2], mask))
    layout = kernel.prepare(packed)
    assert len(layout) == 2
    assert (layout[0].dtype, layout[0].numel()) == (packed.values.dtype, 0)
    assert same(kernel.packed(layout, packed.shape), packed)
    assert torch.equal(bits(kernel.expanded(layout, packed.shape)), bits(unpack(packed)))


@pytest.mark.parametrize("kernel", KERNELS, **ids)
@pytest.mark.parametrize("full", [True, False], ids=["full groups", "short groups"])
@pytest.mark.parametrize("fill", [0.0, -0.0, float("nan"), None], **ids)
def test_kept_zeros_of_both_signs_come_back(kernel: Words, full: bool, fill: float | None) -> None:
    """And NaN with its payload. The bitmap stays only where the slots cannot tell."""
    keep = keep_of(37, 96, kernel.n, kernel.m, full)
    random = torch.Generator().manual_seed(1)
    words = torch.randint(-(2**15), 2**15, keep.shape, generator=random, dtype=torch.int16)
    if fill is not None:
        some = torch.rand(keep.shape, generator=random) < 0.3
        words = torch.where(some, torch.tensor(fill).bfloat16().view(torch.int16), words)
    dense = torch.where(keep, words, 0).view(torch.bfloat16)
    packed = pack(dense, keep)
    layout = kernel.prepare(packed)
    zeros = bool((packed.values.view(torch.int16) == 0).any())
    assert zeros or fill != 0 or str(fill) == "-0.0"
    assert len(layout) == (3 if zeros and not full else 2)
    assert same(kernel.packed(layout, packed.shape), packed)
    assert torch.equal(bits(kernel.expanded(layout, packed.shape)), bits(dense))


def test_a_matrix_that_keeps_more_is_refused() -> None:
    """Its zeros too: what gives way to a zero would not come back."""
    dense = nm_matrix(4, 16, 2, 4, torch.bfloat16)
    keep = dense != 0
    keep[1, :4] = True
    for kernel in (S24_MMA, gemv(2, 4)):
        with pytest.raises(ValueError, match="not 2:4: a group keeps 4"):
            kernel.prepare(pack(dense, keep))
        with pytest.raises(ValueError, match="multiple of 4 weights, got 6"):
            kernel.prepare(pack(torch.ones(2, 6).bfloat16()))


@pytest.fixture
def emulated(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """s24_mma and n8_mma run their own source, in an emulator."""
    if not INTERPRETED:
        pytest.skip("runs on the GPU here")
    for kernel in (held.S24, held.N8):
        monkeypatch.setattr(kernel, "launches", lambda self, device: True)
    kernels = root / "kernels"
    with on_cpu(kernels / "s24_gluon.py"), on_cpu(kernels / "n8_gluon.py"):
        yield


@pytest.mark.parametrize("kernel", [S24_MMA, gemv(2, 4), gemv(4, 8), N8(3)], **ids)
@pytest.mark.parametrize("tokens", [0, 1, 3, 65])
@pytest.mark.usefixtures("emulated")
def test_any_number_of_tokens_both_ways(
    kernel: Words, tokens: int, poisoned: Callable[[Tensor], int]
) -> None:
    dense = nm_matrix(24, 64, kernel.n, kernel.m, torch.bfloat16)
    packed = pack(dense)
    layout = kernel.prepare(packed)
    torch.manual_seed(0)
    for transposed, (features, out) in ((False, (64, 24)), (True, (24, 64))):
        x = torch.randn(tokens, features).bfloat16()
        for bias in (None, torch.randn(out).bfloat16()):
            y = sparse_linear(x, layout, bias, kernel.name, packed.shape, transposed)
            assert y.shape == (tokens, out)
            assert poisoned(y) == 0
            if tokens:
                assert_within(y, *truth(x, dense.T if transposed else dense, bias))


def test_few_tokens_go_to_the_kernel_and_many_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, packed = gemv(2, 4), pack(nm_matrix(8, 16, 2, 4, torch.float16))
    layout, seen = kernel.prepare(packed), list[int]()

    def product(self: Words, x: Tensor, *rest: object) -> Tensor:
        seen.append(len(x))
        return x.new_zeros(len(x), 8)

    monkeypatch.setattr(held.Gemv, "product", product)
    monkeypatch.setattr(held.Gemv, "launches", lambda self, device: True)
    for tokens in (0, 1, 8, 9, 200):
        kernel.matmul(torch.zeros(tokens, 16).half(), layout, None, (8, 16), False)
    kernel.matmul(torch.zeros(1, 8).half(), layout, None, (8, 16), True)
    assert seen == [1, 8]


@pytest.mark.parametrize("kernel", [S24_MMA, gemv(2, 4), choice.DENSE], **ids)
def test_gradients_and_autocast(kernel: Kernel) -> None:
    """The backward expands; autocast to another dtype goes through the dense matrix."""
    dense = nm_matrix(24, 64, 2, 4, torch.bfloat16)
    layout = kernel.prepare(pack(dense))
    x = torch.randn(2, 9, 64).bfloat16().requires_grad_()
    flow = torch.randn(2, 9, 24).bfloat16()
    y = sparse_linear(x, layout, None, kernel.name, dense.shape)
    (gradient,) = torch.autograd.grad(y, x, flow)
    assert_within(gradient.flatten(0, 1), *truth(flow.flatten(0, 1), dense.T))
    assert torch.equal(expanded_layout(layout, kernel.name, dense.shape), dense)
    wide = x.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.float16):
        y = sparse_linear(wide, layout, None, kernel.name, dense.shape)
        expected = torch.nn.functional.linear(wide, dense)
    assert y.dtype == torch.float16
    assert torch.equal(y, expected)
    y.sum().backward()
    assert wide.grad is not None


def test_opcheck_of_words() -> None:
    dense = nm_matrix(8, 16, 2, 4, torch.bfloat16)
    layout = gemv(2, 4).prepare(pack(dense))
    x = torch.randn(2, 9, 16).bfloat16().requires_grad_()
    torch.library.opcheck(
        torch.ops.llmprune.sparse_linear.default, (x, layout, None, "nm_gemv 2:4", [8, 16], False)
    )
    torch.library.opcheck(
        torch.ops.llmprune.sparse_expand_layout.default, (layout, "nm_gemv 2:4", [8, 16])
    )


# Choosing

CUDA = Case(
    (64, 128), 4096, torch.bfloat16, torch.device("cuda", 0), "2:4", "rows", False, 1, False
)


@pytest.fixture
def gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this machine had a GPU on which all kernels pass their trials."""
    monkeypatch.setattr(held.S24, "unavailable", lambda self, device: None)
    monkeypatch.setattr(held.n8_mma, "unavailable", lambda device, n: None)
    monkeypatch.setattr(held.nm_gemv, "unavailable", lambda device, n, m: None)
    monkeypatch.setattr(cusparselt, "unavailable", lambda device: None)
    monkeypatch.setattr(gpu, "identity", lambda device: ("NVIDIA A", "9.0"))
    monkeypatch.setattr(gpu, "missing", lambda device: "no GPU in truth")


@pytest.mark.usefixtures("gpu_here")
@pytest.mark.parametrize(
    ("change", "chosen"),
    [
        ({}, "s24_mma"),
        ({"dtype": torch.float16}, "s24_mma"),
        ({"pattern": "1:2"}, "s24_mma"),
        ({"pattern": "1:4"}, "nm_gemv 1:4"),
        ({"pattern": "4:8"}, "n8_mma 4:8"),
        ({"pattern": "3:8", "dtype": torch.float16}, "n8_mma 3:8"),
        ({"pattern": "2:8"}, "n8_mma 2:8"),
        ({"pattern": "1:8"}, "nm_gemv 1:8"),
        ({"pattern": "5:8"}, "nm_gemv 5:8"),
        ({"pattern": "8:16"}, "nm_gemv 8:16"),
        ({"pattern": "13:16"}, "expand"),
        ({"pattern": "16:32"}, "expand"),
        ({"pattern": "unstructured"}, "expand"),
        ({"dtype": torch.float32}, "expand"),
        ({"trains": True}, "expand"),
        ({"device": torch.device("cpu")}, "expand"),
        ({"shape": (64, 0)}, "expand"),
        ({"axis": "columns"}, "expand"),
        ({"transposed": True}, "expand"),
        ({"transposed": True, "axis": "columns"}, "s24_mma"),
    ],
    **ids,
)
def test_the_kernel_follows_from_the_layer_alone(change: dict[str, object], chosen: str) -> None:
    case = replace(CUDA, **change)
    for tokens in (0, 1, 8, 9, 64, 65, 10_000):
        assert choice.choose(replace(case, tokens=tokens)).name == chosen
    kernel = choice.choose(case)
    assert choice.turns(kernel, case) == (case.transposed and chosen != "expand")


@pytest.mark.usefixtures("gpu_here")
def test_what_is_asked_for_comes_first_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, chosen in [
        ("cusparselt", "cusparselt"),
        ("nm_gemv", "nm_gemv 2:4"),
        ("dense", "dense"),
        ("expand", "expand"),
    ]:
        choice.prefer(name)
        assert choice.choose(CUDA).name == chosen
    choice.prefer("cusparselt")
    assert choice.choose(replace(CUDA, pattern="4:8")).name == "n8_mma 4:8"
    for name in ("n8_mma", "nm_gemv"):
        choice.prefer(name)
        assert choice.choose(replace(CUDA, pattern="4:8")).name == f"{name} 4:8"
    choice.prefer("n8_mma")
    assert choice.choose(CUDA).name == "s24_mma"
    choice.prefer("cusparselt")
    assert choice.choose(replace(CUDA, shape=(65, 128))).name == "s24_mma"
    choice.prefer(None)
    monkeypatch.setenv(choice.SETTING, "nm_gemv")
    assert choice.choose(CUDA).name == "nm_gemv 2:4"
    monkeypatch.setenv(choice.SETTING, "fast")
    with pytest.raises(ValueError, match="LLMPRUNE_KERNEL got 'fast'"):
        choice.choose(CUDA)
    with pytest.raises(ValueError, match="prefer got 'nm_gemv 2:4'"):
        choice.prefer("nm_gemv 2:4")


def test_no_kernel_is_tried_that_does_not_come_into_question(
    gpu_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial compiles for seconds."""
    tried = list[str]()
    monkeypatch.setattr(held.S24, "unavailable", lambda self, device: tried.append("s24_mma"))
    monkeypatch.setattr(held.n8_mma, "unavailable", lambda device, n: tried.append(f"n8_mma {n}:8"))
    monkeypatch.setattr(
        held.nm_gemv, "unavailable", lambda device, n, m: tried.append(f"nm_gemv {n}:{m}")
    )
    monkeypatch.setattr(cusparselt, "unavailable", lambda device: tried.append("cusparselt"))
    for change in (
        {"pattern": "unstructured"},
        {"dtype": torch.float32},
        {"trains": True},
        {"device": torch.device("cpu")},
        {"pattern": "16:32"},
    ):
        assert choice.choose(replace(CUDA, **change)).name == "expand"
    assert tried == []
    layer = type("L", (), {"case": lambda _, t: CUDA})()
    assert choice.choose(CUDA).name == choice.explain(layer, 1).kernel == "s24_mma"
    assert set(tried) == {"s24_mma"}
    tried.clear()
    choice.choose(replace(CUDA, pattern="4:8"))
    assert set(tried) == {"n8_mma 4:8"}
    tried.clear()
    choice.choose(replace(CUDA, pattern="8:16"))
    assert set(tried) == {"nm_gemv 8:16"}


@pytest.mark.usefixtures("gpu_here")
def test_where_n8_mma_fails_its_trial_nm_gemv_comes_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held.n8_mma, "unavailable", lambda device, n: f"gives a wrong {n}:8")
    case = replace(CUDA, pattern="3:8")
    assert choice.choose(case).name == "nm_gemv 3:8"
    told = choice.explain(type("L", (), {"case": lambda _, t: case})(), 1)
    assert told.refused["n8_mma 3:8"] == "gives a wrong 3:8"


def test_names_are_found() -> None:
    for name in ("s24_mma", "cusparselt", "dense", "expand", "nm_gemv 2:4", "nm_gemv 12:16"):
        assert choice.find(name).name == name
    assert choice.find("nm_gemv 4:8") is gemv(4, 8)
    assert choice.find("n8_mma 3:8") is choice.find("n8_mma 3:8")
    for name in ("nm_gemv", "n8_mma", "n8_mma 5:8", "n8_mma 2:4", "s24_mma 2:4"):
        with pytest.raises(ValueError, match=f"no kernel '{name}'; known: .*, n8_mma n:8, nm_gemv"):
            choice.find(name)


# cuSPARSELt, whose operations no CPU has: here they hold and multiply the dense matrix


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the inputs that torch's operation was given."""
    given = list[tuple[int, ...]]()

    def multiply(
        compressed: Tensor, b: Tensor, bias: Tensor | None, transpose_result: bool
    ) -> Tensor:
        assert transpose_result
        assert b.T.is_contiguous()
        given.append(tuple(b.shape))
        return torch.nn.functional.linear(b.T, compressed, bias)

    monkeypatch.setattr(torch, "_cslt_compress", torch.clone, raising=False)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply, raising=False)
    return given


def test_cusparselt_takes_many_tokens(stand_in: list[tuple[int, ...]]) -> None:
    kernel, dense = choice.find("cusparselt"), nm_matrix(32, 64, 2, 4, torch.bfloat16)
    packed = pack(dense)
    layout = kernel.prepare(packed)
    assert same(kernel.packed(layout, packed.shape), packed)
    assert torch.equal(kernel.expanded(layout, packed.shape), dense)
    torch.manual_seed(0)
    for tokens in (0, 1, 64, 65, 72, 100):
        x, bias = torch.randn(tokens, 64).bfloat16(), torch.randn(32).bfloat16()
        y = sparse_linear(x, layout, bias, "cusparselt", packed.shape)
        assert y.is_contiguous()
        if tokens:
            assert_within(y, *truth(x, dense, bias))
    assert stand_in == [(64, 72), (64, 72), (64, 104)]  # padded to a multiple of 8
    flow = torch.randn(80, 32).bfloat16()
    y = kernel.matmul(flow, layout, None, packed.shape, True)
    assert_within(y, *truth(flow, dense.T))
    assert len(stand_in) == 3


@pytest.mark.usefixtures("stand_in")
def test_the_trial_of_cusparselt_finds_a_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert cusparselt.unavailable(cpu) == "needs an NVIDIA GPU"
    assert cusparselt._wrong(cpu) is None
    plain = torch._cslt_sparse_mm
    monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda *a, **k: plain(*a, **k) * 1.1)
    assert cusparselt._wrong(cpu) == "77 tokens of [64, 128] torch.bfloat16"


def test_cusparselt_says_when_torch_is_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "missing", lambda device: None)
    monkeypatch.setattr(gpu, "occupied", lambda device: False)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    why = cusparselt.unavailable(torch.device("cuda", 7))
    assert why == "this torch was built without cuSPARSELt"


@pytest.mark.usefixtures("gpu_here")
def test_cusparselt_is_explained() -> None:
    told = choice.explain(type("L", (), {"case": lambda _, t: CUDA, "kernel": "s24_mma"})(), 1)
    assert told.refused == {
        "cusparselt": 'only when asked for: llmprune.kernels.prefer("cusparselt")'
    }
    kernel = choice.find("cusparselt")
    assert kernel.route(CUDA).startswith("as s24_mma: by the kernel")
    assert kernel.route(replace(CUDA, tokens=65)) == "by cuSPARSELt"
    assert "multiples of 16" in str(kernel.unfit(replace(CUDA, shape=(72, 128))))


# On a GPU

ON_GPU = ["s24_mma", "n8_mma 4:8", "n8_mma 3:8", "n8_mma 2:8"]
ON_GPU += ["nm_gemv 2:4", "nm_gemv 4:8", "nm_gemv 8:16", "expand", "dense", "cusparselt"]


def on_gpu(name: str) -> tuple[Kernel, Tensor, list[Tensor]]:
    """A kernel, a dense matrix and its layout; skips where the kernel says that it cannot run."""
    kernel, device = choice.find(name), torch.device("cuda", torch.cuda.current_device())
    n, m = (kernel.n, kernel.m) if isinstance(kernel, Words) else (2, 4)
    case = replace(CUDA, device=device, shape=(1024, 2048), pattern=f"{n}:{m}")
    if (why := kernel.unfit(case)) is not None:
        pytest.skip(f"{name} {why}")
    dense = nm_matrix(1024, 2048, n, m, torch.bfloat16, "fewer", device="cuda")
    return kernel, dense, kernel.prepare(pack(dense))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu_any_number_of_tokens_both_ways(
    name: str, poisoned: Callable[[Tensor], int]
) -> None:
    kernel, dense, layout = on_gpu(name)
    assert same(kernel.packed(layout, dense.shape), pack(dense))
    assert torch.equal(bits(kernel.expanded(layout, dense.shape)), bits(dense))
    for tokens in (0, 1, 7, 8, 9, 33, 64, 65, 300):
        x = torch.randn(tokens, 2048, device="cuda").bfloat16()
        bias = torch.randn(1024, device="cuda").bfloat16()
        y = sparse_linear(x, layout, bias, name, dense.shape)
        flow = torch.randn(tokens, 1024, device="cuda").bfloat16()
        back = sparse_linear(flow, layout, None, name, dense.shape, True)
        assert (y.shape, back.shape) == ((tokens, 1024), (tokens, 2048))
        assert poisoned(y) == poisoned(back) == 0
        if tokens:
            assert_as_good_as_dense(y, x, dense, bias)
            assert_as_good_as_dense(back, flow, dense.T.contiguous())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU[:-1])  # whether cuSPARSELt can be recorded is not known
@pytest.mark.parametrize("tokens", [1, 8, 64, 65])
def test_a_cuda_graph_records_each_way(name: str, tokens: int) -> None:
    _, dense, layout = on_gpu(name)
    x = torch.randn(tokens, 2048, device="cuda").bfloat16()
    for _ in range(2):
        sparse_linear(x, layout, None, name, dense.shape)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse_linear(x, layout, None, name, dense.shape)
    x.normal_()
    graph.replay()
    assert torch.equal(y, sparse_linear(x, layout, None, name, dense.shape))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nm_gemv 2:4", "expand"])
def test_streams_do_not_write_into_each_others_scratch(name: str) -> None:
    _, dense, layout = on_gpu(name)
    x = torch.randn(300, 2048, device="cuda").bfloat16()
    other = choice.find(name).prepare(pack(dense.flip(0).contiguous()))
    expected = [sparse_linear(x, held, None, name, dense.shape) for held in (layout, other)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    given: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for stream, held_, into in zip(streams, (layout, other), given, strict=True):
            with torch.cuda.stream(stream):
                into.append(sparse_linear(x, held_, None, name, dense.shape))
    torch.cuda.synchronize()
    for right, found in zip(expected, given, strict=True):
        assert all(torch.equal(right, y) for y in found)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu_that_is_not_the_current_one(name: str) -> None:
    kernel, dense, _ = on_gpu(name)
    dense = dense.to("cuda:1")
    layout = kernel.prepare(pack(dense))
    for tokens in (1, 100):
        x = torch.randn(tokens, 2048, device="cuda:1").bfloat16()
        y = sparse_linear(x, layout, None, name, dense.shape)
        assert y.device == x.device
        assert_as_good_as_dense(y, x, dense)
