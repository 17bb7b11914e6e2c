"""Whole models on layers that are laid out: generation, torch.compile, CUDA graphs, streams, devices.

What a GPU alone can show runs there through the kernels that it has; the same tests run on a CPU through a
kernel of the tests, and one through Triton's interpreter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from laying import Interpreted, Scrambled, laid, layers, only
from test_runtime_swap import halved
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompileConfig

import llmprune
from llmprune.kernels import prepare
from llmprune.runtime.laid_out import bring_back
from llmprune.runtime.linear import SparseLinear

PLACES = [
    "cpu",
    *(pytest.param(f"cuda {k}", marks=pytest.mark.gpu) for k in ("nm_gemv", "s24_mma")),
]
FAMILIES = ["llama", "gpt2", "qwen3"]
IDS = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6]])


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device; on it, layers are held in the layout of one kernel, however slow at their sizes."""
    device, _, kernel = request.param.partition(" ")
    torch.compiler.reset()
    if device == "cuda":
        monkeypatch.setenv("LLMPRUNE_KERNEL", kernel)
        yield device
    else:
        with only(Scrambled()):
            yield device
    torch.compiler.reset()


def dtype_of(place: str) -> torch.dtype:
    return torch.float32 if place == "cpu" else torch.bfloat16


def pruned(family: str, blocks: int) -> Any:
    """A tiny model of so many blocks: torch.compile takes its time with each."""
    model = tiny(family)
    del (model.transformer.h if family == "gpt2" else model.model.layers)[blocks:]
    model.config.num_hidden_layers = blocks
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:blocks]
    return halved(model, "2:4")


def pair(family: str, place: str, blocks: int = 1) -> tuple[Any, Any]:
    """(dense, packed): a pruned tiny model, and the same laid out."""
    dense = pruned(family, blocks).to(place, dtype_of(place))
    sparse = copy.deepcopy(dense)
    llmprune.sparsify(sparse)
    assert laid(sparse)  # at once, before any forward
    return dense, sparse


def linear(place: str, rows: int = 96, columns: int = 160) -> tuple[nn.Linear, SparseLinear]:
    """(dense, laid out), 2:4 with a bias, frozen."""
    torch.manual_seed(0)
    dense = nn.Linear(columns, rows).requires_grad_(False)
    order = torch.rand(rows, columns // 4, 4).argsort(-1)
    dense.weight[(order < 2).reshape(rows, columns)] = 0
    dense = dense.to(place, dtype_of(place))
    sparse = SparseLinear.from_linear(dense)
    assert prepare(sparse).keys() != {"expand"}
    return dense, sparse


def assert_near(given: Tensor, truth: Tensor) -> None:
    """Equal but for the order of float32 sums and the rounding of their dtype."""
    eps = torch.finfo(truth.dtype).eps
    room = 4 * eps * float(truth.abs().max())
    torch.testing.assert_close(given, truth, rtol=4 * eps, atol=room)


def generated(model: Any, place: str, tokens: int = 8, **settings: Any) -> Tensor:
    ids = IDS.to(place)
    room = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    out: Tensor = model.generate(ids, max_new_tokens=tokens, **room, **settings)
    return out


def assert_greedy(dense: Any, sequence: Tensor) -> None:
    """Each generated token is the dense model's best one, or as good as that but for rounding."""
    with torch.no_grad():
        logits = dense(sequence).logits[:, IDS.shape[1] - 1 : -1].float()
    chosen = sequence[:, IDS.shape[1] :, None]
    lost = logits.max(-1).values - logits.gather(-1, chosen)[..., 0]
    assert float(lost.max()) <= 0.03 * float(logits.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_with_a_static_cache_uncompiled(family, place):
    dense, sparse = pair(family, place)
    settings = {"cache_implementation": "static", "disable_compile": True}
    given = generated(sparse, place, **settings)
    assert_greedy(dense, given)
    if place == "cpu":
        assert torch.equal(given, generated(dense, place, **settings))
    assert laid(sparse)


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_with_a_static_cache_compiled_by_transformers(family, place):
    """On a GPU by mode="reduce-overhead", which records CUDA graphs; twice, for these are replayed then."""
    dense, sparse = pair(family, place)
    config = CompileConfig(fullgraph=True)
    if place == "cpu":
        config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
        config._compile_all_devices = True
    settings = {"cache_implementation": "static", "compile_config": config}
    first = generated(sparse, place, **settings).clone()
    again = generated(sparse, place, **settings).clone()
    assert torch.equal(first, again)
    assert_greedy(dense, first)
    if place == "cpu":
        assert torch.equal(first, generated(dense, place, cache_implementation="static"))
    assert laid(sparse)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_whole(family, mode, place):
    settings: dict[str, Any] = {"mode": mode}
    if place == "cpu":
        if mode != "default":
            pytest.skip("there are no CUDA graphs, and inductor's C++ takes its time")
        settings = {"backend": "aot_eager"}
    dense, sparse = pair(family, place)
    compiled = torch.compile(sparse, fullgraph=True, **settings)
    with torch.no_grad():
        for step in range(4):
            ids = ((IDS + step) % 60).to(place)
            assert_near(compiled(ids, use_cache=False).logits.clone(), dense(ids).logits)
    assert laid(sparse)


def test_a_compiled_model_follows_its_weights(place):
    """Changed, then traced in the form that is at hand, then laid out again."""
    dense, sparse = linear(place)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 160, device=place, dtype=dtype_of(place))
    with torch.no_grad():
        assert_near(compiled(x), dense(x))
        sparse.weight_values.mul_(2)
        dense.weight.mul_(2)
        assert_near(compiled(x), dense(x))
        assert not laid(sparse)  # torch.compile changes no form
        prepare(sparse)
        assert_near(compiled(x), dense(x))
        assert laid(sparse)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_gradients_of_inputs_through_a_compiled_layer(backend, place):
    dense, sparse = linear(place)
    x = torch.randn(3, 160, device=place, dtype=dtype_of(place), requires_grad=True)
    compiled = torch.compile(lambda x: sparse(x).square(), fullgraph=True, backend=backend)
    (given,) = torch.autograd.grad(compiled(x).sum(), x)
    (truth,) = torch.autograd.grad(dense(x).square().sum(), x)
    assert_near(given, truth)
    assert laid(sparse)


def test_weights_are_static_inputs_of_a_graph(place):
    """Else CUDA graphs of torch.compile would copy every weight for every replay."""
    _, sparse = linear(place)
    found: dict[str, Any] = {}

    def look(graph: Any, _: Any) -> Any:
        for node in graph.graph.find_nodes(op="placeholder"):
            found[node.name] = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
        return graph

    x = torch.randn(3, 160, device=place, dtype=dtype_of(place))
    torch.compile(sparse, fullgraph=True, backend=look)(x)
    kinds = {name: kind for name, kind in found.items() if "layout" in name}
    assert len(kinds) == len(sparse._laid.layout)
    assert set(kinds.values()) == {"unguarded"}


def recorded(run: Callable[[], Tensor], place: str) -> Callable[[], Tensor]:
    """What replays `run`, recorded as a CUDA graph; on a CPU `run` itself."""
    if place == "cpu":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out.clone()

    return replay


@pytest.mark.parametrize("form", ["laid out", "stored", "trained"])
@pytest.mark.parametrize("tokens", [1, 3, 8, 16, 33, 100])
@torch.no_grad()
def test_a_recorded_graph_follows_its_inputs(tokens, form, place, monkeypatch):
    dense, sparse = linear(place)
    if form == "stored":  # as a layer is that was brought back right before
        bring_back(sparse)
        monkeypatch.setattr("llmprune.runtime.laid_out._may_be_laid_out", lambda layer: False)
    sparse.weight_values.requires_grad_(form == "trained")
    x = torch.zeros(tokens, 160, device=place, dtype=dtype_of(place))
    replay = recorded(lambda: sparse(x), place)
    for seed in range(4):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        assert torch.equal(replay(), replay())
        assert_near(replay(), dense(x))
    assert laid(sparse) == (form == "laid out")


@torch.no_grad()
def test_a_recorded_model_follows_its_inputs(place):
    dense, sparse = pair("llama", place)
    ids = IDS.to(place).clone()
    replay = recorded(lambda: sparse(ids, use_cache=False).logits, place)
    for step in range(3):
        ids.copy_(((IDS + step) % 60).to(place))
        assert_near(replay(), dense(ids).logits)


@torch.no_grad()
def test_a_hundred_times_the_same(place):
    _, sparse = pair("llama", place)
    ids = IDS.to(place)
    first = sparse(ids).logits
    for _ in range(100 if place == "cuda" else 3):
        assert torch.equal(sparse(ids).logits, first)
    sparse = copy.deepcopy(sparse)
    assert torch.equal(sparse(ids).logits, first)  # and when laid out anew


class Here:
    """A stream on a CPU."""

    def wait_stream(self, other: Any) -> None:
        """There is one alone."""


def streams(place: str, count: int) -> list[Any]:
    return [torch.cuda.Stream() if place == "cuda" else Here() for _ in range(count)]


def on(stream: Any) -> Any:
    return torch.cuda.stream(None if isinstance(stream, Here) else stream)


def current(place: str) -> Any:
    return torch.cuda.current_stream() if place == "cuda" else Here()


@torch.no_grad()
def test_side_streams(place):
    """Inputs made on one stream, products on others at once, results read on the first."""
    dense, sparse = linear(place, 512, 1024)
    sides = streams(place, 3)
    for tokens in (1, 5, 16, 100):
        for _ in range(5):
            x = torch.randn(tokens, 1024, device=place, dtype=dtype_of(place))
            outs = []
            for side in sides:
                side.wait_stream(current(place))
                with on(side):
                    out = sparse(x)
                if place == "cuda":
                    x.record_stream(side)
                    out.record_stream(current(place))
                outs.append(out)
            for side in sides:
                current(place).wait_stream(side)
            truth = dense(x)
            for out in outs:
                assert_near(out, truth)


@torch.no_grad()
def test_a_layer_that_changes_form_on_a_stream_is_right_on_another(place):
    """Nobody who runs a forward elsewhere knows that he would have to wait for weights."""
    dense, sparse = linear(place, 2048, 4096)
    x = torch.randn(3, 4096, device=place, dtype=dtype_of(place))
    truth = dense(x)
    one, other = streams(place, 2)
    for side in (one, other):
        side.wait_stream(current(place))
    for _ in range(5):
        with on(one):
            bring_back(sparse)
            sparse(x)  # lays it out
        with on(other):
            out = sparse(x)
        if place == "cuda":
            other.synchronize()
        assert_near(out, truth)


@pytest.mark.parametrize("into", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast(of, into, place):
    dense, sparse = linear(place)
    dense, sparse = dense.to(of), sparse.to(of)
    x = torch.randn(5, 160, device=place)
    with torch.autocast(place, into):
        given, truth = sparse(x), dense(x)
    assert given.dtype == truth.dtype == into
    assert_near(given, truth)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices_in_one_process(monkeypatch, tmp_path):
    """Whichever is the current one."""
    for kernel in ("nm_gemv", "s24_mma"):
        monkeypatch.setenv("LLMPRUNE_KERNEL", kernel)
        dense, sparse = pair("llama", "cuda", blocks=3)
        truth = dense(IDS.to("cuda")).logits
        moved = copy.deepcopy(sparse).to("cuda:1")
        assert laid(moved)
        for index in (0, 1):
            with torch.cuda.device(index), torch.no_grad():
                assert_near(sparse(IDS.to("cuda:0")).logits, truth)
                assert_near(moved(IDS.to("cuda:1")).logits.to("cuda:0"), truth)
        sparse.save_pretrained(tmp_path / kernel)
        split = {"model.layers.0": 0} | dict.fromkeys(
            ("model.layers.1", "model.layers.2", "model.norm", "lm_head"), 1
        )
        split |= {"model.embed_tokens": 0, "model.rotary_emb": 0}
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / kernel, device_map=split)
        assert laid(loaded)
        with torch.no_grad():
            assert_near(loaded(IDS.to("cuda:0")).logits.to("cuda:0"), truth)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_data_parallel(monkeypatch):
    monkeypatch.setenv("LLMPRUNE_KERNEL", "nm_gemv")
    dense, sparse = linear("cuda:0")
    x = torch.randn(8, 160, device="cuda:0").bfloat16()
    with torch.no_grad():
        for _ in range(2):
            assert_near(nn.DataParallel(sparse, [0, 1])(x), dense(x))
    assert_near(sparse(x), dense(x))


@pytest.mark.parametrize("loaded", ["llmprune.load", "from_pretrained", "from_pretrained, moved"])
def test_a_loaded_model_is_laid_out_and_saved_as_it_was(loaded, place, tmp_path: Path):
    _, sparse = pair("llama", place)
    sparse.save_pretrained(tmp_path / "a")
    if loaded == "llmprune.load":
        model = llmprune.load(tmp_path / "a", device=place, progress=False)
    elif loaded == "from_pretrained":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", device_map=place)
    else:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "a").to(place)
    assert laid(model)
    ids = IDS.to(place)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, sparse(ids).logits)
    model.save_pretrained(tmp_path / "b")
    read = [(tmp_path / n / "model.safetensors").read_bytes() for n in "ab"]
    assert len(read[0]) == len(read[1])
    state, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / n, device_map="cpu").state_dict()
        for n in "ab"
    )
    assert state.keys() == other.keys()
    assert all(torch.equal(state[n], other[n]) for n in state)
    assert model.get_memory_footprint() == sparse.get_memory_footprint()


@pytest.mark.gpu
def test_memory_on_a_gpu(monkeypatch):
    """One form of each layer; and while they change, no more is needed for many layers than for one."""
    monkeypatch.setenv("LLMPRUNE_KERNEL", "nm_gemv")
    one = linear("cuda", 2048, 2048)[1]
    bring_back(one)
    stored, peaks = one.packed.bytes, []
    for count in (1, 16):
        model = nn.Sequential(*(copy.deepcopy(one) for _ in range(count)))
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        assert prepare(model) == {"nm_gemv 2:4": count}
        assert torch.cuda.memory_allocated() <= before + count * (0.02 * stored + 4096)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        for layer in layers(model):
            bring_back(layer)
        assert torch.cuda.memory_allocated() <= before + count * 4096
        del model, layer
    assert peaks[1] <= peaks[0] + stored


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_runs_compiled_on_the_interpreted_kernel(family):
    """The kernel that GPUs run, in bfloat16; interpreted, each product takes half a second."""
    dense = pruned(family, 1).to(torch.bfloat16)
    sparse = copy.deepcopy(dense)
    torch.compiler.reset()
    with only(Interpreted(2, 4)), torch.no_grad():
        llmprune.sparsify(sparse)
        assert {layer.kernel for layer in layers(sparse)} == {"nm_gemv 2:4"}
        compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
        ids = torch.tensor([[5, 9]])
        assert_near(compiled(ids, use_cache=False).logits, dense(ids).logits)
    torch.compiler.reset()
