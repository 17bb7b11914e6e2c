"""SparseLinear is a linear layer in all that torch and transformers do to one."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import llmprune
from llmprune.errors import CheckpointError, ConfigError
from llmprune.kernels import explain
from llmprune.kernels.packed import Packed, pack
from llmprune.runtime.linear import SparseLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["linear", "linear without bias", "conv1d"]


def dense(kind: str = "linear", features: int = 24, out: int = 12, pattern: str = "") -> nn.Module:
    """A layer of random weights, half of them zero (2:4 along its inputs where asked)."""
    torch.manual_seed(features * 100 + out)
    layer: nn.Module
    if kind == "conv1d":
        layer = Conv1D(out, features)
        torch.nn.init.normal_(layer.bias)
    else:
        layer = nn.Linear(features, out, bias=kind == "linear")
    weight = layer.weight.data.T if kind == "conv1d" else layer.weight.data
    if pattern:
        keep = torch.rand(out, features // 4, 4).argsort(-1) < 2
        weight[~keep.reshape(out, features)] = 0
    else:
        weight[torch.rand(out, features) < 0.5] = 0
    return layer


def oriented(layer: nn.Module) -> Tensor:
    """Its weight as [out, in]."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(width), b.contiguous().view(width)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)], ids=str)
def test_forward_is_that_of_the_dense_layer(leading, kind, dtype):
    layer = dense(kind).to(dtype)
    sparse = SparseLinear.from_linear(layer)
    x = torch.randn(*leading, 24).to(dtype)
    truth = layer(x.view(-1, 24)).view(*leading, 12)
    given = sparse(x)
    assert given.shape == truth.shape
    assert given.dtype == dtype
    torch.testing.assert_close(given, truth)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_bit_for_bit(kind):
    layer = dense(kind)
    with torch.no_grad():
        layer.weight[0, :3] = torch.tensor([-0.0, torch.inf, torch.nan])
    sparse = SparseLinear.from_linear(layer)
    assert isinstance(sparse, nn.Linear)
    assert (sparse.in_features, sparse.out_features) == (24, 12)
    assert same(sparse.weight, oriented(layer))
    back = sparse.to_linear()
    assert type(back) is type(layer)
    assert same(back.weight, layer.weight)
    assert back.bias is layer.bias
    x = torch.randn(3, 24)
    assert torch.equal(back(x).nan_to_num(7), layer(x).nan_to_num(7))
    assert repr(back) == repr(layer)


def test_the_tightest_pattern_is_found_along_either_axis():
    assert SparseLinear.from_linear(dense(pattern="2:4")).pattern == "2:4"
    flipped = SparseLinear.from_linear(dense("conv1d", pattern="2:4"))
    assert (flipped.pattern, flipped.axis, flipped.transposed) == ("2:4", "columns", True)
    assert SparseLinear.from_linear(dense()).pattern == "unstructured"


def test_a_pattern_that_is_named_is_held_against_the_weights():
    layer = dense(pattern="2:4")
    assert SparseLinear.from_linear(layer, pattern="4:8").pattern == "4:8"
    assert SparseLinear.from_linear(layer, pattern="unstructured").pattern == "unstructured"
    with pytest.raises(ConfigError, match="do not hold 1:4"):
        SparseLinear.from_linear(layer, pattern="1:4")
    with pytest.raises(ConfigError, match=r"'0\.5' is none"):
        SparseLinear.from_linear(layer, pattern="0.5")


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_keeps_zeros(kind):
    layer = dense(kind)
    keep = oriented(layer) != 0
    keep[0] = True
    sparse = SparseLinear.from_linear(layer, keep)
    assert sparse.weight_values.numel() == int(keep.sum()) > int((layer.weight != 0).sum())
    assert same(sparse.weight, oriented(layer))
    keep[0] = False
    with pytest.raises(ConfigError, match="outside the mask"):
        SparseLinear.from_linear(layer, keep)


@pytest.mark.parametrize(
    "keep", [torch.ones(12, 23).bool(), torch.ones(12, 24)], ids=["shape", "dtype"]
)
def test_a_mask_has_the_shape_of_the_weight_and_is_bool(keep):
    with pytest.raises(ConfigError, match="mask"):
        SparseLinear.from_linear(dense(), keep)


@pytest.mark.parametrize("module", [nn.Embedding(4, 8), nn.Linear(8, 4).double()], ids=str)
def test_what_cannot_be_packed(module):
    with pytest.raises(ConfigError, match="cannot pack"):
        SparseLinear.from_linear(module)


def test_a_packed_layer_is_not_packed_twice():
    with pytest.raises(ConfigError, match="cannot pack SparseLinear"):
        SparseLinear.from_linear(SparseLinear.from_linear(dense()))


# What modules go through


def through_bytes(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), through_bytes],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_apart_and_equal(kind, copied):
    sparse = SparseLinear.from_linear(dense(kind))
    twin = copied(sparse)
    x = torch.randn(3, 24)
    before = sparse(x)
    assert torch.equal(twin(x), before)
    assert repr(twin) == repr(sparse)
    with torch.no_grad():
        twin.weight_values.zero_()
    assert torch.equal(sparse(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_to_another_dtype_is_that_of_the_dense_layer(kind):
    layer, sparse = dense(kind), SparseLinear.from_linear(dense(kind))
    for change in ("half", "float", "bfloat16", "double", "float"):
        getattr(layer, change)()
        getattr(sparse, change)()
        assert sparse.weight_bitmap.dtype == torch.uint8
        assert same(sparse.weight, oriented(layer))
        x = torch.randn(2, 24, dtype=layer.weight.dtype)
        torch.testing.assert_close(sparse(x), layer(x))
    assert sparse.to(torch.bfloat16).weight_values.dtype == torch.bfloat16
    away = sparse.to("meta")
    assert away(torch.empty(2, 24, device="meta", dtype=torch.bfloat16)).shape == (2, 12)
    assert away.to_empty(device="cpu").weight_bitmap.device.type == "cpu"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_state_dict_holds_the_names_of_the_format(kind, assign):
    sparse = SparseLinear.from_linear(dense(kind))
    state = sparse.state_dict()
    names = {"weight_values", "weight_bitmap"} | ({"bias"} if sparse.bias is not None else set())
    assert set(state) == names
    biased = sparse.bias is not None
    empty = SparseLinear(24, 12, biased, "meta" if assign else None, transposed=sparse.transposed)
    empty.load_state_dict(state, assign=assign)
    x = torch.randn(3, 24)
    assert torch.equal(empty(x), sparse(x))
    assert not empty.weight_values.requires_grad


def test_a_dense_weight_is_loaded_under_the_mask():
    layer = dense()
    sparse = SparseLinear.from_linear(layer)
    with torch.no_grad():
        layer.weight.mul_(2)
    nn.Sequential(sparse).load_state_dict({f"0.{k}": v for k, v in layer.state_dict().items()})
    assert same(sparse.weight, layer.weight)
    with pytest.raises(CheckpointError, match="weights that are zero here"):
        sparse.load_state_dict(dense().state_dict() | {"weight": torch.ones(12, 24)})
    with pytest.raises(CheckpointError, match=r"weight is \[24, 12\], the layer \[12, 24\]"):
        sparse.load_state_dict({"weight": torch.ones(24, 12), "bias": torch.ones(12)})


def test_a_state_dict_lacks_nothing():
    sparse = SparseLinear.from_linear(dense())
    state = sparse.state_dict()
    del state["weight_bitmap"]
    with pytest.raises(RuntimeError, match="Missing key"):
        sparse.load_state_dict(state)


def broken() -> dict[str, tuple[Tensor, Tensor, str]]:
    packed = pack(dense(features=21).weight)
    values, bitmap = packed.values, packed.bitmap
    stray = bitmap.clone()
    stray[0, -1] |= 0x80
    return {
        "too few values": (values[:-1], bitmap, "keeps"),
        "too many values": (torch.cat([values, values]), bitmap, "keeps"),
        "no values": (values[:0], bitmap, "keeps"),
        "stray bits": (torch.cat([values, values[:1]]), stray, "behind the last column"),
        "bitmap of another shape": (values, bitmap[:-1], "a bitmap is"),
        "bitmap of another dtype": (values, bitmap.to(torch.int32), "a bitmap is"),
        "values of two dimensions": (values[None], bitmap, "packed values are"),
        "whole numbers": (values.to(torch.int32), bitmap, "packed values are"),
    }


@pytest.mark.parametrize("case", list(broken()))
def test_what_does_not_fit_is_refused_when_built_and_when_loaded(case):
    values, bitmap, says = broken()[case]
    with pytest.raises(CheckpointError, match=says):
        SparseLinear.from_packed(Packed(values, bitmap, (12, 21)))
    for assign in (False, True):
        sparse = SparseLinear(21, 12, False)
        with pytest.raises(CheckpointError, match=says):
            sparse.load_state_dict(
                {"weight_values": values, "weight_bitmap": bitmap}, assign=assign
            )


def test_repr_says_what_it_is():
    text = repr(SparseLinear.from_linear(dense("conv1d", pattern="2:4")))
    assert "in_features=24, out_features=12, bias=True, 2:4, stored [in, out], 50.0% kept" in text
    assert f"{144 * 4 + 24 * 2} bytes" in text


def test_it_is_exported_and_explained():
    assert llmprune.SparseLinear is SparseLinear
    told = explain(SparseLinear.from_linear(dense(pattern="2:4")), tokens=3)
    assert told.kernel == "expand"
    assert "12 x 24 2:4, cpu, float32" in str(told)


def test_compiles_whole():
    sparse = SparseLinear.from_linear(dense())
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: sparse(x.sin()) + x @ sparse.weight.T, fullgraph=True, backend="aot_eager"
    )
    for shape in ((2, 24), (5, 24), (2, 3, 24)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), sparse(x.sin()) + x @ sparse.weight.T)


def test_autocast_and_a_dtype_that_does_not_fit():
    layer = dense()
    sparse = SparseLinear.from_linear(layer)
    x = torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(sparse(x), layer(x))
    for one in (layer, sparse):
        with pytest.raises(RuntimeError):
            one(x.bfloat16())


# Training


@pytest.mark.parametrize("kind", KINDS)
def test_training_keeps_the_mask_and_follows_the_dense_gradient(kind):
    layer = dense(kind)
    keep = oriented(layer).detach() != 0
    sparse = SparseLinear.from_linear(copy.deepcopy(layer))
    assert not sparse.weight_values.requires_grad
    sparse.weight_values.requires_grad_()
    runs = {
        "dense": torch.optim.AdamW(layer.parameters(), 0.1, weight_decay=0.1),
        "sparse": torch.optim.AdamW(sparse.parameters(), 0.1, weight_decay=0.1),
    }
    for step in range(3):
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(step))
        for one, optimiser in zip((layer, sparse), runs.values(), strict=True):
            optimiser.zero_grad()
            F.mse_loss(one(x), x[:, :12]).backward()
        gradient = oriented(layer).grad if kind != "conv1d" else layer.weight.grad.T
        stored = gradient.T if kind == "conv1d" else gradient
        kept = keep.T if kind == "conv1d" else keep
        torch.testing.assert_close(sparse.weight_values.grad, stored[kept])
        layer.weight.grad.mul_(kept)
        for optimiser in runs.values():
            optimiser.step()
    torch.testing.assert_close(sparse.weight.detach()[keep], oriented(layer).detach()[keep])
    assert not sparse.weight[~keep].any()


def test_a_frozen_layer_passes_the_gradient_on():
    layer = dense()
    sparse = SparseLinear.from_linear(layer)
    grads = []
    for one in (layer, sparse):
        x = torch.ones(2, 24, requires_grad=True)
        one(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)
    assert sparse.weight_values.grad is None


def test_the_expanded_weight_passes_gradients_on():
    sparse = SparseLinear.from_linear(dense())
    sparse.weight_values.requires_grad_()
    x = torch.randn(3, 24)
    (one,) = torch.autograd.grad((x @ sparse.weight.T).square().sum(), sparse.weight_values)
    (two,) = torch.autograd.grad(F.linear(x, sparse.weight).square().sum(), sparse.weight_values)
    torch.testing.assert_close(one, two)
    assert one.any()


# Writing to the weight


WRITES = {
    "data plus": lambda layer, new: setattr(layer.weight, "data", layer.weight.data + new),
    "data in place": lambda layer, new: layer.weight.data.add_(new),
    "data operator": lambda layer, new: _plus(layer.weight, new),
    "in place": lambda layer, new: layer.weight.add_(new),
    "item": lambda layer, new: layer.weight.__setitem__(slice(None), layer.weight + new),
    "out": lambda layer, new: torch.add(layer.weight, new, out=layer.weight),
    "assigned": lambda layer, new: setattr(layer, "weight", layer.weight + new),
    "copied": lambda layer, new: layer.weight.copy_(layer.weight + new),
    "write": lambda layer, new: layer.write(layer.weight + new),
}


def _plus(weight: Tensor, new: Tensor) -> None:
    weight.data += new


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_what_is_written_reaches_kept_weights_alone(write, kind):
    layer = dense(kind)
    before = oriented(layer).detach().clone()
    sparse = SparseLinear.from_linear(layer)
    new = torch.randn(12, 24)
    with torch.no_grad():
        write(sparse, new)
    assert torch.equal(sparse.weight, torch.where(before != 0, before + new, 0))


def test_weights_of_another_shape_are_not_written():
    sparse = SparseLinear.from_linear(dense())
    with pytest.raises(ConfigError, match=r"\[24, 12\] do not fit a layer of \[12, 24\]"):
        sparse.weight = torch.zeros(24, 12)


def test_operations_on_the_weight_give_plain_tensors():
    weight = SparseLinear.from_linear(dense()).weight
    assert (
        type(weight + 1)
        is type(weight.T)
        is type(weight.clone())
        is type(weight.detach())
        is Tensor
    )
    assert nn.Parameter(weight.clone()).requires_grad


def test_initialisers_of_transformers_leave_it_alone():
    from transformers import PreTrainedModel
    from transformers import initialization as init

    sparse = SparseLinear.from_linear(dense())
    before = sparse.weight.clone(), sparse.bias.clone()
    init.normal_(sparse.weight)
    sparse.reset_parameters()

    class Owner:
        _is_remote_code = staticmethod(lambda: False)

        @staticmethod
        def _init_weights(module: nn.Module) -> None:
            raise AssertionError("was initialised")

    PreTrainedModel._initialize_weights(Owner, sparse)
    assert torch.equal(sparse.weight, before[0])
    assert torch.equal(sparse.bias, before[1])
