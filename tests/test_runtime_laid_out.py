"""A layer in the layout of a kernel computes the same, and is the stored one to all who ask for that."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import pytest
import torch
from laying import Scrambled, laid, layers, only
from test_runtime_linear import KINDS, oriented, same
from test_runtime_linear import dense as in_training
from torch import Tensor, nn
from torch.nn import functional as F

import llmprune
from llmprune.errors import CheckpointError, ModelError
from llmprune.kernels import choice, explain, prepare
from llmprune.kernels.packed import Packed, pack
from llmprune.runtime import laid_out as rooms
from llmprune.runtime.absent import AbsentBitmap, AbsentValues
from llmprune.runtime.laid_out import bring_back, held, lay_out, tell_expanded
from llmprune.runtime.linear import SparseLinear


@pytest.fixture(autouse=True)
def _kernel() -> Iterator[None]:
    with only(Scrambled()):
        yield


def dense(*args: Any, **options: Any) -> nn.Module:
    """In eval mode, as a model is that has been loaded."""
    return in_training(*args, **options).eval()


def laid_out(kind: str = "linear", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """(a dense layer, the same in a layout)."""
    layer = dense(kind, **options).to(dtype)
    sparse = SparseLinear.from_linear(layer)
    assert lay_out(sparse) is not None
    return layer, sparse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", ["", "2:4"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)], ids=str)
def test_forward_is_that_of_the_dense_layer(leading, kind, pattern, dtype):
    layer, sparse = laid_out(kind, dtype, pattern=pattern)
    x = torch.randn(*leading, 24).to(dtype)
    truth = layer(x.view(-1, 24)).view(*leading, 12)
    given = sparse(x)
    assert sparse.kernel == "scrambled"
    assert given.shape == truth.shape
    torch.testing.assert_close(given, truth)


def test_a_forward_lays_out_what_is_not_trained():
    sparse = SparseLinear.from_linear(dense())
    assert held(sparse) is None
    x = torch.randn(2, 24)
    before = sparse(x)
    assert held(sparse) is not None
    assert torch.equal(sparse(x), before)
    sparse.weight_values.requires_grad_()
    sparse(x)
    assert held(sparse) is None
    sparse.weight_values.requires_grad_(False)
    sparse(x)
    assert held(sparse) is not None


def test_a_forward_of_training_lays_nothing_out():
    sparse = SparseLinear.from_linear(in_training())
    x = torch.randn(2, 24)
    truth = sparse(x)
    assert held(sparse) is None
    with torch.no_grad():
        assert torch.equal(sparse(x), truth)
    assert held(sparse) is not None
    assert torch.equal(sparse(x), truth)
    assert held(sparse) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_one_form_alone_is_in_memory(kind):
    sparse = SparseLinear.from_linear(dense(kind))
    values, bitmap = sparse.weight_values, sparse.weight_bitmap
    memory = [weakref.ref(t.untyped_storage()) for t in (values, bitmap)]
    kept, room = values.shape, bitmap.shape
    del bitmap
    lay_out(sparse)
    gc.collect()
    assert memory[0]() is None
    assert sparse.weight_values is values
    assert type(values) is AbsentValues
    assert type(sparse.weight_bitmap) is AbsentBitmap
    assert (values.shape, sparse.weight_bitmap.shape) == (kept, room)
    for part in (values, sparse.weight_bitmap):
        with torch._C.DisableTorchFunctionSubclass():
            assert part.untyped_storage().nbytes() == part.element_size()
    layout = weakref.ref(held(sparse).layout[1])
    bring_back(sparse)
    gc.collect()
    assert layout() is None
    assert type(values) is nn.Parameter
    assert type(sparse.weight_bitmap) is Tensor


def test_what_follows_from_shape_and_dtype_leaves_the_layout_alone():
    _, sparse = laid_out(dtype=torch.bfloat16)
    model = nn.ModuleList([sparse])
    values = sparse.weight_values
    kept = values.shape[0]
    assert (values.dtype, values.device.type, values.dim()) == (torch.bfloat16, "cpu", 1)
    assert (values.numel(), values.element_size(), values.nbytes) == (kept, 2, 2 * kept)
    assert not values.requires_grad
    assert values.is_leaf
    assert values.grad is None
    assert {values: 1}[values] == 1
    assert isinstance(values, nn.Parameter)
    assert sum(b.nelement() for b in model.buffers()) == 12 * 3
    assert "2:4" not in repr(sparse)
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.requires_grad_(False)
    torch.optim.AdamW(model.parameters()).zero_grad()
    values.grad = None
    assert sparse.weight.shape == (12, 24)
    assert sparse.packed.values.shape == (kept,)
    assert explain(sparse, 1).kernel == "scrambled"
    assert laid(model)


def saved(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


ASKED: dict[str, Callable[[SparseLinear], Tensor]] = {
    "values": lambda m: m.weight_values,
    "their data": lambda m: m.weight_values.data,
    "detached": lambda m: m.weight_values.detach(),
    "a sum": lambda m: m.weight_values + 0,
    "stacked": lambda m: torch.stack([m.weight_values])[0],
    "as a vector": lambda m: nn.utils.parameters_to_vector([m.weight_values]),
    "of all parameters": lambda m: dict(m.named_parameters())["weight_values"].clone(),
    "state_dict": lambda m: m.state_dict()["weight_values"],
    "state_dict with parameters": lambda m: m.state_dict(keep_vars=True)["weight_values"],
    "numpy": lambda m: torch.from_numpy(m.weight_values.numpy().copy()),
    "a list": lambda m: torch.tensor(m.weight_values.tolist()),
    "a view of the memory": lambda m: torch.tensor([]).set_(m.weight_values.untyped_storage()),
    "dlpack": lambda m: torch.from_dlpack(m.weight_values),
    "deepcopy of the layer": lambda m: copy.deepcopy(m).weight_values,
    "deepcopy of the parameter": lambda m: copy.deepcopy(m.weight_values),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)).weight_values,
    "pickle of the parameter": lambda m: pickle.loads(pickle.dumps(m.weight_values)),
    "torch.save": lambda m: saved(m).weight_values,
    "to": lambda m: m.to("cpu").weight_values,
    "to and back": lambda m: m.double().float().weight_values,
    "packed": lambda m: m.packed.values,
    "an iterator": lambda m: torch.stack(list(iter(m.weight_values))),
    "a keyword": lambda m: torch.add(input=m.weight_values, other=torch.zeros(())),
    "bits": lambda m: m.weight[m.weight != 0] if not m.transposed else m.weight.T[m.weight.T != 0],
    "expanded": lambda m: m.expanded()[m.expanded() != 0],
}


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("pattern", ["", "2:4"])
@pytest.mark.parametrize("asked", ASKED)
def test_whoever_asks_for_the_values_gets_them(asked, pattern, kind):
    sparse = SparseLinear.from_linear(dense(kind, pattern=pattern))
    truth, bitmap = sparse.weight_values.detach().clone(), sparse.weight_bitmap.clone()
    parameter = sparse.weight_values
    x = torch.randn(3, 24)
    lay_out(sparse)
    product = sparse(x)
    found = ASKED[asked](sparse)
    assert same(found.detach(), truth)
    assert sparse.weight_values is parameter
    assert torch.equal(sparse(x), product)
    assert torch.equal(sparse.weight_bitmap + 0, bitmap)
    assert type(parameter) is nn.Parameter
    assert same(parameter.detach(), truth)
    assert torch.equal(sparse(x), product)


def test_the_parameter_outlives_its_layer():
    _, sparse = laid_out()
    truth = sparse.packed.values
    values, bitmap = sparse.weight_values, sparse.weight_bitmap
    ref = weakref.ref(sparse)
    del sparse
    assert ref() is None  # and no garbage collection is needed to be rid of the layer
    assert same(values + 0, truth)
    assert bitmap.any()


def test_nothing_keeps_a_layout_alive():
    _, sparse = laid_out()
    layout = weakref.ref(held(sparse).layout[1])
    del sparse
    assert layout() is None


@pytest.mark.parametrize("kind", KINDS)
def test_kept_zeros_and_odd_bits_come_back(kind):
    layer = dense(kind)
    keep = oriented(layer).detach() != 0
    with torch.no_grad():
        layer.weight[0, :4] = torch.tensor([-0.0, torch.inf, torch.nan, 0])
    keep[:4, :4] = True
    sparse = SparseLinear.from_linear(layer, keep)
    truth = sparse.weight_values.detach().clone()
    bits = sparse.weight_bitmap.clone()
    lay_out(sparse)
    assert same(sparse.state_dict()["weight_values"], truth)
    assert torch.equal(sparse.weight_bitmap, bits)


# Changing the weights


@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_from_a_layout_and_keeps_the_parameter(kind):
    layer, sparse = laid_out(kind)
    keep = oriented(layer).detach() != 0
    optimiser = torch.optim.SGD(sparse.parameters(), 0.1)
    assert held(sparse) is not None
    values = next(p for n, p in sparse.named_parameters() if n == "weight_values")
    values.requires_grad_()
    x = torch.randn(4, 24)
    plain = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(2):
        for one, stepper in ((sparse, optimiser), (layer, plain)):
            stepper.zero_grad()
            F.mse_loss(one(x), x[:, :12]).backward()
        layer.weight.grad.mul_(keep.T if kind == "conv1d" else keep)
        optimiser.step()
        plain.step()
    assert sparse.weight_values is values
    torch.testing.assert_close(sparse.weight.detach()[keep], oriented(layer).detach()[keep])
    values.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), layer(x))
    assert held(sparse) is not None


def test_a_frozen_layer_passes_gradients_on_in_its_layout():
    layer, sparse = laid_out()
    gradients = []
    for one in (layer, sparse):
        x = torch.ones(2, 24, requires_grad=True)
        one(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
    assert held(sparse) is not None
    torch.testing.assert_close(sparse.bias.grad, layer.bias.grad)


CHANGES: dict[str, Callable[[SparseLinear], Any]] = {
    "in place": lambda m: m.weight_values.mul_(2),
    "data in place": lambda m: m.weight_values.data.mul_(2),
    "data": lambda m: setattr(m.weight_values, "data", m.weight_values.data * 2),
    "assigned": lambda m: setattr(m, "weight_values", nn.Parameter(m.weight_values * 2, False)),
    "written over": lambda m: m._parameters.update(
        weight_values=nn.Parameter(m.packed.values * 2, False)
    ),
    "foreach": lambda m: torch._foreach_mul_([m.weight_values], 2),
    "dense": lambda m: setattr(m.weight, "data", m.weight.data * 2),
    "dense in place": lambda m: m.weight.data.mul_(2),
    "write": lambda m: m.write(m.weight * 2),
    "state_dict": lambda m: m.state_dict()["weight_values"].mul_(2),
    "load": lambda m: m.load_state_dict({**m.state_dict(), "weight_values": m.weight_values * 2}),
    "assign": lambda m: m.load_state_dict(
        {**m.state_dict(), "weight_values": m.weight_values * 2}, assign=True
    ),
    "dense load": lambda m: m.load_state_dict({"weight": m.weight * 2, "bias": m.bias}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_change_of_the_weights_reaches_the_product(kind, change):
    if kind == "conv1d" and change == "dense load":
        pytest.skip("a dense weight is loaded as it is stored")
    layer, sparse = laid_out(kind)
    sparse.bias.requires_grad_(False)
    x = torch.randn(3, 24)
    with torch.no_grad():
        sparse(x)
        CHANGES[change](sparse)
        layer.weight.mul_(2)
        for _ in range(2):
            torch.testing.assert_close(sparse(x), layer(x))
    assert held(sparse) is not None
    torch.testing.assert_close(sparse.weight, oriented(layer).detach())


def test_other_weights_for_one_call():
    _, sparse = laid_out()
    x = torch.randn(3, 24)
    before = sparse(x)
    other = {"weight_values": sparse.packed.values * 2, "bias": sparse.bias * 2}
    torch.testing.assert_close(torch.func.functional_call(sparse, other, (x,)), before * 2)
    assert torch.equal(sparse(x), before)


def test_two_layers_with_the_same_parameter():
    one = SparseLinear.from_linear(dense())
    other = SparseLinear.from_linear(dense())
    other.weight_values = one.weight_values
    x = torch.randn(3, 24)
    truth = dense()(x)
    for _ in range(2):
        for layer in (one, other):
            torch.testing.assert_close(layer(x), truth)
    assert one.weight_values is other.weight_values


def test_a_backward_reads_what_its_forward_read():
    """Frozen values give up their memory between the two."""
    layer = dense()
    sparse = SparseLinear.from_linear(layer)
    x = torch.randn(3, 24, requires_grad=True)
    sparse.weight_values.requires_grad_()
    sparse(x)  # nothing is laid out yet
    sparse.weight_values.requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmprune.runtime.laid_out._may_be_laid_out", lambda layer: False)
        out = sparse(x)
    lay_out(sparse)
    (given,) = torch.autograd.grad(out.sum(), x)
    (truth,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(given, truth)
    out = sparse(x)  # and the other way around
    bring_back(sparse)
    (given,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(given, truth)


@pytest.mark.parametrize("where", ["loaded", "run"])
def test_inference_mode(where):
    layer = dense()
    x = torch.randn(3, 24)
    if where == "loaded":
        with torch.inference_mode():
            sparse = SparseLinear.from_linear(layer)
    else:
        sparse = SparseLinear.from_linear(layer)
    truth = sparse.packed.values.clone()
    with torch.inference_mode():
        torch.testing.assert_close(sparse(x), layer(x))
    assert held(sparse) is not None
    if where == "run":  # no layer that was made in inference mode can do this
        y = torch.ones(3, 24, requires_grad=True)
        sparse(y).sum().backward()
        torch.testing.assert_close(y.grad, layer.weight.detach().sum(0).expand(3, -1))
    with torch.inference_mode():
        assert same(sparse.weight_values + 0, truth)
        assert torch.equal(sparse(x), sparse(x))
    assert same(sparse.state_dict()["weight_values"], truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("into", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(into, dtype):
    layer, sparse = laid_out(dtype=dtype)
    x = torch.randn(3, 24)
    with torch.autocast("cpu", into):
        given, truth = sparse(x), layer(x)
    assert given.dtype == truth.dtype == into
    torch.testing.assert_close(given, truth, atol=0.05, rtol=0.05)
    with torch.autocast("cpu", into), torch.no_grad():
        other = SparseLinear.from_linear(layer)
        torch.testing.assert_close(other(x), truth, atol=0.05, rtol=0.05)
    assert same(other.state_dict()["weight_values"], sparse.state_dict()["weight_values"])


def test_an_input_of_another_dtype_is_refused():
    _, sparse = laid_out()
    with pytest.raises(RuntimeError, match=r"inputs are torch.bfloat16"):
        sparse(torch.zeros(2, 24).bfloat16())


# What may not be laid out


def test_a_matrix_that_lies_about_its_pattern():
    class Strict(Scrambled):
        def prepare(self, packed: Packed) -> list[Tensor]:
            raise ValueError("not 2:4: 3 of 72 groups keep more than 2")

    sparse = SparseLinear.from_linear(dense(pattern="2:4"))
    with only(Strict()):
        assert sparse.to("cpu") is sparse  # no reason to fail, when weights may be still to come
        with pytest.raises(CheckpointError, match="is said to hold 2:4, but: not 2:4: 3 of 72"):
            sparse(torch.zeros(2, 24))
        with pytest.raises(CheckpointError, match="is said to hold 2:4"):
            prepare(sparse)
    assert sparse(torch.zeros(2, 24)).isfinite().all()


def test_a_kernel_that_loses_a_weight_is_caught():
    class Loses(Scrambled):
        def packed(self, layout, shape):
            found = super().packed(layout, shape)
            found.values[0] += 1
            return found

    sparse = SparseLinear.from_linear(dense())
    with only(Loses()), pytest.raises(ModelError, match="LLMPRUNE_KERNEL=expand"):
        sparse(torch.zeros(2, 24))
    assert same(sparse.weight, dense().weight)


def test_to_empty_makes_room():
    _, sparse = laid_out(pattern="2:4")
    state = {n: t.clone() for n, t in sparse.state_dict().items()}
    x = torch.randn(2, 24)
    truth = sparse(x)
    room = copy.deepcopy(sparse).to("meta")
    assert held(room) is None
    room.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(room(x), truth)
    assert held(room) is not None


def test_threads_may_share_a_layer():
    layer, sparse = laid_out()
    x = torch.randn(3, 24)
    truth = sparse(x)
    wrong, stop = [], threading.Event()

    def forward() -> None:
        while not stop.is_set():
            if not torch.equal(sparse(x), truth):
                wrong.append("product")

    def ask() -> None:
        for _ in range(100):
            bring_back(sparse)
            if not same(sparse.packed.values + 0, values):
                wrong.append("values")
            if not same(sparse.weight, layer.weight):
                wrong.append("weight")

    values = sparse.packed.values
    runners = [threading.Thread(target=forward) for _ in range(2)]
    askers = [threading.Thread(target=ask) for _ in range(2)]
    for thread in (*runners, *askers):
        thread.start()
    for thread in askers:
        thread.join()
    stop.set()
    for thread in runners:
        thread.join()
    assert not wrong


def test_a_replica_of_data_parallel():
    """What torch.nn.parallel.replicate does, without GPUs."""
    layer, sparse = laid_out()
    x = torch.randn(3, 24)
    values, bitmap = sparse.weight_values, sparse.weight_bitmap
    for part in (values, bitmap):
        part.is_complex()  # as torch.nn.parallel.comm asks of what it copies then
    with torch._C.DisableTorchFunctionSubclass():
        copies = values.data.clone(), bitmap.data.clone()
    for form in (bring_back, lay_out):
        form(sparse)
        replica = sparse._replicate_for_data_parallel()
        replica.weight_values, replica.weight_bitmap = copies
        replica.bias = sparse.bias.detach()
        assert torch.equal(replica(x), sparse(x))
        torch.testing.assert_close(replica(x), layer(x))


def test_accelerate_brings_weights_for_one_forward():
    layer, sparse = laid_out()
    x = torch.randn(3, 24)
    truth = sparse(x)
    model = nn.Sequential(sparse)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert torch.equal(model(x), truth)
    assert laid(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert sparse.weight_values.is_meta
    assert torch.equal(model(x), truth)
    assert held(sparse) is None
    assert sparse.weight_values.is_meta
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(model(x), truth)
    assert laid(model)
    assert same(sparse.weight, layer.weight)


def test_distributed_data_parallel(tmp_path):
    """It broadcasts parameters and buffers when it is made, and buffers again before each forward."""
    layer, sparse = laid_out()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert sparse.bias.requires_grad
        model = nn.parallel.DistributedDataParallel(sparse).train()
        x = torch.randn(3, 24)
        for _ in range(2):
            model(x).sum().backward()
            assert held(sparse) is None
        for _ in range(2):
            with torch.no_grad():
                torch.testing.assert_close(model(x), layer(x))
            assert held(sparse) is None
        with torch.no_grad():
            sparse(x)
        assert held(sparse) is not None
        model = nn.parallel.DistributedDataParallel(sparse).eval()
        torch.testing.assert_close(model(x), layer(x))
        assert sparse.bias.grad.tolist() == [6.0] * 12
        assert same(sparse.weight, layer.weight)
    finally:
        torch.distributed.destroy_process_group()


def test_prepare_goes_through_a_model_and_changes_to_what_is_chosen_now():
    class Other(Scrambled):
        name = "other"

    model = nn.Sequential(*(SparseLinear.from_linear(dense(features=12)) for _ in range(2)))
    model.append(nn.Linear(12, 12))
    assert prepare is llmprune.kernels.prepare
    assert prepare(model) == {"scrambled": 2}
    x = torch.randn(3, 12)
    truth = model(x)
    with only(Other()):
        assert prepare(model) == {"other": 2}
        assert torch.equal(model(x), truth)
        model[0].weight_values.requires_grad_()
        assert prepare(model) == {"expand": 1, "other": 1}
        assert torch.equal(model(x), truth)
        assert [layer.kernel for layer in layers(model)] == [None, "other"]


def test_a_choice_of_the_stored_form_holds_until_it_is_asked_for_again(monkeypatch):
    class Refusing(Scrambled):
        asked = 0

        def refuses(self, case):
            self.asked += 1
            return "slow"

    sparse = SparseLinear.from_linear(dense())
    x = torch.randn(2, 24)
    monkeypatch.setattr(choice, "KERNELS", [Refusing(), *choice.KERNELS[1:]])
    refusing = choice.KERNELS[0]
    for _ in range(3):
        sparse(x)
    assert refusing.asked == 1
    sparse.half().float()
    assert refusing.asked == 3
    assert prepare(sparse) == {"expand": 1}
    assert refusing.asked == 4


def test_an_explanation_tells_of_the_layout():
    _, sparse = laid_out()
    told = explain(sparse, 3)
    assert (told.kernel, told.route) == ("scrambled", "as ever")
    assert pack(dense().weight).values.shape == sparse.weight_values.shape


def test_what_no_kernel_takes_is_told_on_a_gpu(monkeypatch, capfd):
    model = nn.Sequential(laid_out()[1], laid_out()[1])
    bring_back(model[0])
    tell_expanded(model)
    assert capfd.readouterr().err == ""  # on a CPU there is nothing to be had
    monkeypatch.setattr(rooms, "_on_gpu", lambda tensor: True)
    tell_expanded(model)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("llmprune: 1 of 2 packed parameters are expanded in each forward: ")
    assert held(model[1]) is not None
    prepare(model)
    tell_expanded(model)
    assert capfd.readouterr().err == ""
