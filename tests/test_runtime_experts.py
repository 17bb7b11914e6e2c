"""Fused experts held packed compute what the family's own loop over dense ones does."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from families import WINDOWS, logits, tiny
from torch import Tensor, nn
from torch.nn import functional as F

import llmprune
from llmprune.errors import CheckpointError
from llmprune.kernels import explain
from llmprune.kernels.packed import Packed, pack, unpack
from llmprune.model import matrices
from llmprune.runtime.experts import PackedModule, hold, release
from llmprune.runtime.view import PackedMatrix

FAMILIES = [
    "qwen3_moe",
    "qwen2_moe",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "granitemoe",
    "llama4_text",
    "nemotron_h",
    "jetmoe",
]


def halved(family: str) -> Any:
    """A tiny model with half of each decoder matrix zero, its experts run one by one."""
    model = tiny(family)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    random = torch.Generator().manual_seed(3)
    for matrix in matrices(model):
        weight = matrix.weight.clone()
        weight[torch.rand(weight.shape, generator=random) < 0.5] = 0
        matrix.write(weight)
    return model


def packed_modules(model: nn.Module) -> list[PackedModule]:
    return [m for m in model.modules() if isinstance(m, PackedModule)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_computes_the_same_and_comes_back(family):
    model = halved(family)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    kinds = [type(m) for m in model.modules()]
    truth = logits(model)
    llmprune.sparsify(model)
    assert packed_modules(model)
    assert not any(p.dim() == 3 and "expert" in n for n, p in model.named_parameters())
    assert torch.equal(logits(model), truth)
    llmprune.densify(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n].view(torch.int32), before[n].view(torch.int32)) for n in before)
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(logits(model), truth)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_they_run_one_by_one_whatever_the_config_says(implementation):
    model = halved("qwen3_moe")
    truth = logits(model)
    llmprune.sparsify(model)
    model.set_experts_implementation(implementation)
    assert torch.equal(logits(model), truth)
    llmprune.densify(model)
    torch.testing.assert_close(logits(model), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_half_types(family, dtype):
    model = halved(family).to(dtype)
    truth = logits(model)
    llmprune.sparsify(model)
    torch.testing.assert_close(logits(model), truth, atol=0.02, rtol=0.02)
    llmprune.densify(model)
    assert torch.equal(logits(model), truth)


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [(f, c) for f in ("qwen3_moe", "gpt_oss", "llama4_text") for c in (False, True)]
    + [("jetmoe", False)],
)
def test_gradients_are_the_dense_ones_at_kept_positions(family, checkpointing):
    dense = halved(family)
    sparse = copy.deepcopy(dense)
    llmprune.sparsify(sparse)
    for name, parameter in sparse.named_parameters():
        parameter.requires_grad_(not name.endswith("_values") or "experts" in name)
    for model in (dense, sparse):
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=WINDOWS, use_cache=False).logits.square().mean().backward()
    plain = dict(dense.named_parameters())
    tested = 0
    for name, parameter in sparse.named_parameters():
        if name.endswith("_values"):
            weight = plain[name.removesuffix("_values")]
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, weight.grad[weight != 0])
                tested += 1
        elif plain[name].grad is not None:
            torch.testing.assert_close(parameter.grad, plain[name].grad)
    assert tested


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_copies_are_apart_and_equal(family, copied):
    model = halved(family)
    llmprune.sparsify(model)
    truth = logits(model)
    twin = copied(model)
    assert torch.equal(logits(twin), truth)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(model), truth)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin), truth)
    assert repr(twin) == repr(model)


def test_names_are_those_of_the_format_and_follow_the_module():
    model = halved("qwen3_moe")
    llmprune.sparsify(model)
    experts = packed_modules(model)[0]
    names = {"gate_up_proj_values", "gate_up_proj_bitmap", "down_proj_values", "down_proj_bitmap"}
    assert set(experts.state_dict()) == names
    assert not any(p.requires_grad for p in experts.parameters())
    model.bfloat16()
    assert experts.gate_up_proj_values.dtype == experts.gate_up_proj.dtype == torch.bfloat16
    assert experts.gate_up_proj_bitmap.dtype == torch.uint8
    assert logits(model).dtype == torch.bfloat16
    assert "gate_up_proj: unstructured, " in repr(experts)


# A module on its own


class OwnExperts(nn.Module):
    """Three experts of odd sizes, and every way to read them."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        up = torch.randn(3, 5, 13, generator=random)
        up[torch.rand(3, 5, 13, generator=random) < 0.5] = 0
        up[1] = 0  # an expert that keeps nothing
        self.up = nn.Parameter(up)
        self.up_bias = nn.Parameter(torch.randn(3, 5, generator=random))

    def forward(self, x: Tensor, way: str) -> Any:
        return WAYS[way](self, x)


WAYS = {
    "linear": lambda m, x: [F.linear(x, m.up[e], m.up_bias[e]) for e in range(3)],
    "linear without bias": lambda m, x: [F.linear(x, m.up[torch.tensor(e)]) for e in range(-3, 0)],
    "bias by name": lambda m, x: [F.linear(x, m.up[e], bias=m.up_bias[e]) for e in range(3)],
    "product": lambda m, x: [x @ m.up[e].T for e in range(3)],
    "product, flipped": lambda m, x: [x[:, :5] @ m.up[e] for e in range(3)],
    "matmul": lambda m, x: [torch.matmul(x, m.up[e].t()) for e in range(3)],
    "mm": lambda m, x: [x.mm(m.up[e].T) for e in range(3)],
    "left": lambda m, x: [m.up[e] @ x.T if isinstance(m.up, Tensor) else torch.matmul(m.up[e], x.T)
                          for e in range(3)],
    "bmm": lambda m, x: torch.bmm(x.expand(3, -1, -1), m.up.transpose(1, 2)),
    "bmm, flipped": lambda m, x: torch.bmm(x[:, :5].expand(3, -1, -1), m.up),
    "batched product": lambda m, x: x.expand(3, -1, -1) @ m.up.transpose(-1, -2),
    "einsum": lambda m, x: torch.einsum("ti,eoi->eto", x, m.up),
    "gathered": lambda m, x: m.up[torch.tensor([2, 0])] * 2,
    "sliced": lambda m, x: m.up[1:],
    "cast": lambda m, x: [x.double() @ m.up[e].double().T for e in range(3)],
    "chunked": lambda m, x: [part.sum() for part in m.up[2].chunk(2)],
    "transposed": lambda m, x: m.up.transpose(0, 1).contiguous(),
    "facts": lambda m, x: [torch.tensor(m.up.shape), torch.tensor(m.up[1].T.shape),
                           torch.zeros(len(m.up), m.up.dim(), dtype=m.up.dtype, device=m.up.device)],
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_view_is_read_as_a_tensor_is(way):
    module = OwnExperts()
    x = torch.randn(4, 13, generator=torch.Generator().manual_seed(1))
    truth = module(x, way)
    hold(module, "up", pack(module.up), "unstructured", "rows")
    given = module(x, way)
    for one, other in zip(given, truth, strict=True):
        torch.testing.assert_close(one, other)


def test_an_expert_that_is_not_there():
    module = OwnExperts()
    hold(module, "up", pack(module.up), "unstructured", "rows")
    for number in (3, -4):
        with pytest.raises(IndexError, match=f"expert {number} of 3"):
            module.up[number]


def test_no_expert_is_dense_in_a_product(monkeypatch):
    """A product with an expert does not expand it, and keeps nothing dense for the backward."""

    def expanded(self: PackedMatrix) -> Tensor:
        raise AssertionError("was expanded")

    module = OwnExperts()
    hold(module, "up", pack(module.up), "unstructured", "rows")
    module.up_values.requires_grad_()
    monkeypatch.setattr(PackedMatrix, "expanded", expanded)
    x = torch.randn(4, 13, requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append((t.dtype, t.numel())) or t, lambda t: t
    ):
        for way in ("linear", "product", "product, flipped", "bmm", "batched product"):
            for out in module(x, way):
                out.sum().backward(retain_graph=True)
    assert (torch.float32, 65) not in sizes


def test_it_is_explained():
    module = OwnExperts()
    hold(module, "up", pack(module.up), "unstructured", "rows")
    told = explain(module.up[0], tokens=2)
    assert told.kernel == "expand"
    assert "5 x 13 unstructured, cpu, float32" in str(told)


def test_where_experts_begin_is_counted_anew_when_the_bitmap_changes():
    one, other = OwnExperts(), OwnExperts()
    with torch.no_grad():
        other.up[0] = 0
        other.up[1] = 1.5
    dense = other.up.detach().clone()
    for module in (one, other):
        hold(module, "up", pack(module.up), "unstructured", "rows")
        module.up[2].expanded()
    one.load_state_dict(other.state_dict())
    assert torch.equal(torch.stack([one.up[e].expanded() for e in range(3)]), dense)
    one.float()
    assert "_counted" not in vars(one)


def test_a_class_for_each_class_and_back():
    module, other = OwnExperts(), OwnExperts()
    before = module.up.detach().clone()
    for each in (module, other):
        hold(each, "up", pack(each.up), "unstructured", "rows")
    assert type(module) is type(other) is not OwnExperts
    assert isinstance(module, OwnExperts)
    assert type(module).__name__ == "OwnExperts"
    release(module, "up")
    assert type(module) is OwnExperts
    assert torch.equal(module.up, before)
    assert set(module.state_dict()) == {"up", "up_bias"}
    assert "rooms" not in vars(module)


def test_room_is_made_on_the_meta_device_and_filled():
    full = OwnExperts()
    packed = pack(full.up)
    hold(full, "up", packed, "unstructured", "rows")
    room = OwnExperts().to("meta")
    empty = Packed(packed.values[:0].to("meta"), packed.bitmap.to("meta"), packed.shape)
    hold(room, "up", empty, "unstructured", "rows")
    room.load_state_dict(full.state_dict(), assign=True)
    x = torch.randn(4, 13)
    for one, other in zip(room(x, "linear"), full(x, "linear"), strict=True):
        assert torch.equal(one, other)


def test_what_does_not_fit_is_refused():
    packed = pack(OwnExperts().up)
    short = Packed(packed.values[:-1], packed.bitmap, packed.shape)
    with pytest.raises(CheckpointError, match="keeps"):
        hold(OwnExperts(), "up", short, "unstructured", "rows")
    module = OwnExperts()
    hold(module, "up", packed, "unstructured", "rows")
    state = module.state_dict()
    with pytest.raises(CheckpointError, match="keeps"):
        module.load_state_dict(state | {"up_values": packed.values[:-1]})
    with pytest.raises(CheckpointError, match="weights that are zero here"):
        module.load_state_dict({"up": torch.ones(3, 5, 13), "up_bias": state["up_bias"]})
    doubled = unpack(packed) * 2
    module.load_state_dict({"up": doubled, "up_bias": state["up_bias"]})
    assert torch.equal(module.up.expanded(), doubled)
    module.check()
    module.up_values = nn.Parameter(packed.values[:-1])
    with pytest.raises(CheckpointError, match="keeps"):
        module.check()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text", "nemotron_h"])
def test_a_compiled_block_holds_them_as_one_operator(family):
    model = halved(family)
    truth = logits(model)
    llmprune.sparsify(model)
    torch.compiler.reset()
    for experts in packed_modules(model):
        experts.forward = torch.compile(experts.forward, backend="aot_eager", fullgraph=True)
    assert torch.equal(logits(model), truth)
    torch.compiler.reset()


def test_a_compiled_model_is_one_graph():
    model = halved("qwen3_moe")
    truth = logits(model)
    llmprune.sparsify(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(WINDOWS, use_cache=False).logits, truth)
        one = compiled(WINDOWS[:1], use_cache=False).logits
        torch.testing.assert_close(one, truth[:1])
        twin = copy.deepcopy(model)  # has a number of its own
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(logits(twin), truth)
        compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(WINDOWS, use_cache=False).logits, truth)
    torch.compiler.reset()


def test_a_model_whose_gradients_are_wanted_runs_them_outside_of_the_graph():
    dense = halved("qwen3_moe")
    sparse = copy.deepcopy(dense)
    llmprune.sparsify(sparse)
    for name, parameter in sparse.named_parameters():
        parameter.requires_grad_(not name.endswith("_values") or "layers.1.mlp.experts" in name)
    torch.compiler.reset()
    block = sparse.model.layers[1]
    block.forward = torch.compile(block.forward, backend="aot_eager")
    for model in (dense, sparse):
        model(input_ids=WINDOWS, use_cache=False).logits.square().mean().backward()
    plain = dict(dense.named_parameters())
    for name, parameter in sparse.named_parameters():
        if parameter.requires_grad and name.endswith("_values"):
            weight = plain[name.removesuffix("_values")]
            torch.testing.assert_close(parameter.grad, weight.grad[weight != 0])
        elif parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, plain[name].grad)
    torch.compiler.reset()


def test_experts_that_give_another_shape_are_refused_in_a_graph():
    class Wide(OwnExperts):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Parameter(self.up.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.up[0]) + F.linear(x, self.down[0])

    module = Wide().requires_grad_(False)
    x = torch.randn(4, 13)
    truth = module(x)
    for name in ("up", "down"):
        hold(module, name, pack(getattr(module, name)), "unstructured", "rows")
    torch.testing.assert_close(module(x), truth)
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match=r"Wide gives torch.float32 \[4, 5\] for inputs"):
        torch.compile(module, backend="aot_eager")(x)
    torch.compiler.reset()


def test_a_linear_layer_with_a_forward_of_its_own_stays_in_the_graph():
    model = halved("falcon")
    truth = logits(model)
    llmprune.sparsify(model)
    assert packed_modules(model)
    torch.compiler.reset()
    block = model.transformer.h[1]
    block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(model), truth)
    torch.compiler.reset()
