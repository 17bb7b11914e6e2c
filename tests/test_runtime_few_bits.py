"""A layer of whole numbers and scales is, bit for bit, the one of the values that these stand for."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from few_bits import dense_of, few, layer
from test_runtime_linear import same
from torch import Tensor, nn
from torch.nn import functional as F

from llmprune.errors import CheckpointError, ConfigError
from llmprune.kernels import expand, explain
from llmprune.kernels.few_bits import expand_few, packed_few
from llmprune.kernels.held_few import few_of, layout_of, transposed_few
from llmprune.runtime.few_bits import FewBitsLinear, WholeNumbers
from llmprune.runtime.linear import SparseLinear

HALVES = [torch.bfloat16, torch.float16, torch.float32]


def of_values(few: FewBitsLinear) -> SparseLinear:
    """The same layer, its weights held as values."""
    packed = packed_few(few.few)
    axis = few.axis
    held = SparseLinear.from_packed(packed, few.bias, few.pattern, axis, few.transposed)
    return held.to(few.dtype).eval()


@pytest.mark.parametrize("tile", [40, 1 << 19])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize(("group", "pattern"), [(8, True), (24, True), (5, False), (1, False)])
def test_expanded_it_is_what_it_stands_for(tile, dtype, bits, axis, group, pattern, monkeypatch):
    monkeypatch.setattr(expand, "TILE", tile)  # tiles begin in the middle of a byte
    shape = (13, 24) if axis == "rows" and not pattern else (24, 24)
    matrix, _ = few(shape, bits, group, dtype, axis, pattern=pattern)
    truth, layout = dense_of(matrix), layout_of(matrix, dtype)
    assert few_of(layout, shape) == matrix
    kernel = torch.ops.llmprune.sparse_expand_layout
    assert same(kernel(layout, f"expand int{bits}", shape), truth)
    assert same(expand_few(matrix), truth)
    turned = transposed_few(matrix)
    assert same(dense_of(turned), truth.T)
    assert transposed_few(turned).shape == matrix.shape
    back = transposed_few(turned)
    assert all(
        torch.equal(getattr(back, n), getattr(matrix, n)) for n in ("whole", "scales", "bitmap")
    )


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_forward_is_that_of_values_bit_for_bit(leading, dtype, bits, transposed, monkeypatch):
    for pattern, tile in ((True, 1 << 19), (False, 40)):
        monkeypatch.setattr(expand, "TILE", tile)
        held = layer(bits, transposed, dtype=dtype, pattern=pattern)
        x = torch.randn(*leading, 24).to(dtype)
        given = held(x)
        assert given.shape == (*leading, 12)
        assert torch.equal(given, of_values(held)(x))
        assert held.kernel is None


@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_a_linear_layer_that_says_what_it_holds(bits):
    held = layer(bits)
    assert isinstance(held, nn.Linear)
    assert same(held.weight, dense_of(held.few))
    assert same(held.to_linear().weight, dense_of(held.few))
    assert held.packed.values.numel() == held.kept == 12 * 24 // 2
    assert held.bytes == held.few.bytes
    assert f"int{bits} in groups of 8" in repr(held)
    assert f"{8 * held.bytes / 288:.3f} bits per weight" in repr(held)
    told = explain(held, 3)
    assert told.kernel == f"expand int{bits}"
    assert told.refused["s24_mma"] == f"holds values, and these weights are int{bits}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_another_dtype_is_that_of_the_dense_weight(dtype):
    held = layer(8)
    truth = dense_of(held.few)
    assert held.to(dtype) is held
    assert held.weight_scales.dtype == torch.bfloat16
    assert held.bias.dtype == dtype
    assert same(held.weight, truth.to(dtype))
    x = torch.randn(3, 24).to(dtype)
    assert torch.equal(held(x), of_values(held)(x))
    assert (
        same(held.packed.values, truth.to(dtype)[truth != 0]) or held.kept > truth.count_nonzero()
    )
    assert same(held.bfloat16().weight, truth)


def test_it_moves_and_becomes_empty_as_any_layer():
    held = layer()
    scales = held.weight_scales
    assert held.to("cpu").weight_scales is scales
    empty = copy.deepcopy(held).to_empty(device="meta")
    assert (empty.weight_scales.dtype, empty.weight_whole.dtype) == (torch.bfloat16, torch.uint8)
    empty.load_state_dict(held.state_dict(), assign=True)
    assert same(empty.weight, held.weight)
    assert type(empty.weight_whole) is WholeNumbers


def copies(held: nn.Module) -> dict[str, nn.Module]:
    saved = io.BytesIO()
    torch.save(held, saved)
    saved.seek(0)
    fresh = layer(4, pattern=False, seed=9)
    fresh.load_state_dict(held.state_dict())
    return {
        "deepcopy": copy.deepcopy(held),
        "pickle": pickle.loads(pickle.dumps(held)),
        "torch.save": torch.load(saved, weights_only=False),
        "state_dict": fresh,
    }


def test_copies_are_whole():
    held = layer(pattern=False)
    assert held.kept % 2 == 1
    assert set(held.state_dict()) == {
        "weight_whole", "weight_scales", "weight_bitmap", "bias"
    }  # fmt: skip
    x = torch.randn(2, 24).bfloat16()
    for made in copies(held).values():
        assert isinstance(made, FewBitsLinear)
        assert made.kept == held.kept
        assert torch.equal(made(x), held(x))
        assert made.weight_whole.data_ptr() != held.weight_whole.data_ptr()
        with pytest.raises(ConfigError, match="few_bits=False"):
            made.weight_whole.requires_grad_()


def test_what_does_not_fit_is_not_loaded():
    held = layer()
    state = held.state_dict()
    for name, change in {
        "weight_whole": lambda t: t[1:],
        "weight_scales": lambda t: -t,
        "weight_bitmap": lambda t: t | 255,
    }.items():
        with pytest.raises(CheckpointError):
            held.load_state_dict(state | {name: change(state[name])})
    for other in (of_values(held), held.to_linear()):
        with pytest.raises(CheckpointError, match="has values, and the layer holds int4"):
            held.load_state_dict(other.state_dict())
    matrix, kept = few()
    with pytest.raises(CheckpointError, match="keeps"):
        FewBitsLinear(matrix, kept - 1)


def asked(held: FewBitsLinear, how: str) -> Any:
    match how:
        case "values":
            return held.weight_values.requires_grad_()
        case "parameter":
            return held.weight_whole.requires_grad_()
        case "setter":
            held.weight_whole.requires_grad = True
        case "model":
            return nn.Sequential(held).requires_grad_()
        case "write":
            held.weight.data += 1
        case "assign":
            held.weight = torch.randn(12, 24)


@pytest.mark.parametrize("how", ["values", "parameter", "setter", "model", "write", "assign"])
def test_training_and_writing_say_what_works_instead(how):
    held = layer()
    before = held.weight.clone()
    with pytest.raises(ConfigError, match=r"few_bits=False.* or train adapters"):
        asked(held, how)
    assert same(held.weight, before)
    held.requires_grad_(False)
    held.weight = before  # what is there already
    held.weight.data *= 1


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_go_through_it(transposed):
    held = layer(8, transposed, dtype=torch.float32)
    x, other = (torch.ones(3, 24).mul_(0.3).requires_grad_() for _ in range(2))
    held(x).square().sum().backward()
    weight = dense_of(held.few)
    dense = F.linear(other, weight.T if transposed else weight, held.bias.detach())
    dense.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(held.bias.grad, 2 * dense.sum(0))


def test_autocast_and_compile_take_it_whole():
    held = layer(8, dtype=torch.float32)
    x = torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        given = held(x)
        assert torch.equal(given, F.linear(x, dense_of(held.few), held.bias))
    compiled: Any = torch.compile(held, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), held(x))
    assert same(compiled.weight, held.weight)
    compiled(x.requires_grad_()).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("bits", [4, 8])
def test_the_operators_are_what_torch_asks_of_them(bits):
    matrix, _ = few(bits=bits, dtype=torch.float32)
    layout = layout_of(matrix, torch.float32)
    name, x = f"expand int{bits}", torch.randn(2, 24, requires_grad=True)
    arguments: tuple[Any, ...] = (x, layout, torch.randn(12), name, matrix.shape, False)
    torch.library.opcheck(torch.ops.llmprune.sparse_linear.default, arguments)
    torch.library.opcheck(
        torch.ops.llmprune.sparse_expand_layout.default, (layout, name, matrix.shape)
    )


def test_memory_is_that_of_few_bits():
    matrix, kept = few((64, 4096), 4, 128)
    held = FewBitsLinear(matrix, kept, None, "2:4")
    tensors: list[Tensor] = [*held.parameters(), *held.buffers()]
    assert 8 * sum(t.nbytes for t in tensors) / (64 * 4096) == 3.125
    matrix, kept = few((64, 4096), 8, 4096)
    held = FewBitsLinear(matrix, kept, None, "2:4")
    tensors = [*held.parameters(), *held.buffers()]
    assert 8 * sum(t.nbytes for t in tensors) / (64 * 4096) == pytest.approx(5.004, abs=1e-3)
