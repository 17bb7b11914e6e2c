"""A pruned model packed and expanded again in memory computes what it computed, and loses no bit."""

from __future__ import annotations

import copy
import json
import pickle
import weakref
from typing import Any

import pytest
import torch
from families import logits, tiny
from tiny import llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmprune
from llmprune.errors import ConfigError, ModelError
from llmprune.model import matrices
from llmprune.runtime.linear import SparseLinear

IDS = torch.arange(3, 19).view(2, 8)


def halved(model: Any, pattern: str = "") -> Any:
    """Half of each decoder matrix zero, in place."""
    random = torch.Generator().manual_seed(3)
    for matrix in matrices(model):
        weight = matrix.weight.clone()
        noise = torch.rand(weight.shape, generator=random)
        if pattern == "2:4":
            groups = noise.reshape(-1, 4)
            keep = torch.zeros_like(groups, dtype=torch.bool)
            keep.scatter_(1, groups.topk(2).indices, True)
            weight[~keep.reshape(weight.shape)] = 0
        else:
            weight[noise < 0.5] = 0
        matrix.write(weight)
    return model.eval()


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's bits, by name."""
    widths = {2: torch.int16, 4: torch.int32}
    return {
        n: p.detach().clone().contiguous().view(widths[p.element_size()])
        for n, p in model.named_parameters()
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "qwen3"])
def test_there_and_back_is_bit_for_bit(family, dtype):
    model = halved(tiny(family).to(dtype))
    before, truth = bits(model), logits(model)
    chosen = {m.parameter_name: m.weight.nbytes for m in matrices(model)}
    done = llmprune.sparsify(model)
    assert set(done.patterns) == set(chosen)
    assert (done.dense_bytes, done.left) == (sum(chosen.values()), {})
    assert done.packed_bytes < 0.6 * done.dense_bytes + len(chosen) * 64
    room = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(logits(model), truth, atol=room, rtol=room)
    back = llmprune.densify(model)
    assert (back.patterns, back.dense_bytes, back.packed_bytes) == (
        done.patterns,
        done.dense_bytes,
        done.packed_bytes,
    )
    assert same(bits(model), before)
    assert torch.equal(logits(model), truth)


def test_the_kinds_of_layers_come_back():
    for family in ("llama", "gpt2", "falcon"):
        model = tiny(family)
        kinds = [(n, type(m), str(m)) for n, m in model.named_modules()]
        llmprune.sparsify(halved(model))
        assert not any(type(m).__name__ == "Conv1D" for m in model.modules())
        llmprune.densify(model)
        assert [(n, type(m), str(m)) for n, m in model.named_modules()] == kinds


def test_memory_and_dtype_are_told_as_they_are():
    model = halved(llama().bfloat16())
    dense = model.get_memory_footprint()
    done = llmprune.sparsify(model)
    assert model.get_memory_footprint() == dense - done.dense_bytes + done.packed_bytes
    assert model.dtype == torch.bfloat16
    kept = sum(p.numel() for n, p in model.named_parameters() if n.endswith("weight_values"))
    outside = sum(p.numel() for n, p in model.named_parameters() if "_values" not in n)
    assert model.num_parameters() == kept + outside
    assert not any(p.requires_grad for n, p in model.named_parameters() if "_values" in n)


def test_one_matrix_is_dense_and_packed_at_a_time(monkeypatch):
    """When a matrix has been packed, those before it are gone from memory."""
    model = halved(llama())
    layers = [weakref.ref(m.module) for m in matrices(model)]
    alive = []
    replace = SparseLinear.from_packed

    def noted(*args: Any) -> SparseLinear:
        alive.append(sum(layer() is not None for layer in layers))
        return replace(*args)

    monkeypatch.setattr(SparseLinear, "from_packed", noted)
    llmprune.sparsify(model)
    assert alive == list(range(14, 0, -1))


def test_one_matrix_is_packed_and_dense_at_a_time(monkeypatch):
    """And when they are expanded, packed ones go one by one."""
    model = halved(llama())
    llmprune.sparsify(model)
    layers = [weakref.ref(m) for m in model.modules() if isinstance(m, SparseLinear)]
    alive = []
    expand = SparseLinear.to_linear

    def noted(layer: SparseLinear) -> nn.Module:
        alive.append(sum(ref() is not None for ref in layers))
        return expand(layer)

    monkeypatch.setattr(SparseLinear, "to_linear", noted)
    llmprune.densify(model)
    assert alive == sorted(alive, reverse=True)
    assert alive[-1] <= 2


def test_patterns_are_found():
    model = halved(llama(), "2:4")
    done = llmprune.sparsify(model)
    assert set(done.patterns.values()) == {"2:4"}
    assert str(done).startswith("14 matrices (14 x 2:4): ")
    model = halved(tiny("gpt2"), "2:4")
    llmprune.sparsify(model)
    kinds = {(m.pattern, m.axis) for m in model.modules() if isinstance(m, SparseLinear)}
    assert kinds == {("2:4", "columns")}


# What is left dense


def test_a_model_that_is_not_pruned_is_refused():
    model = llama()
    before = bits(model)
    with pytest.raises(
        ModelError, match="14 matrices not smaller when packed; is this model pruned"
    ):
        llmprune.sparsify(model)
    assert same(bits(model), before)


def test_zeros_with_a_sign_are_told():
    model = llama()
    with torch.no_grad():
        for matrix in matrices(model):
            matrix.write(-torch.zeros(matrix.shape))
    with pytest.raises(ModelError, match=r"their zeros are -0\.0"):
        llmprune.sparsify(model)


def test_tied_weights_are_never_packed():
    model = halved(tiny("gpt2"))
    head = model.get_output_embeddings()
    with pytest.raises(ModelError, match="tied to the embedding"):
        llmprune.sparsify(model, targets=["lm_head"])
    llmprune.sparsify(model)
    assert model.get_output_embeddings() is head
    assert head.weight is model.get_input_embeddings().weight


def test_a_parameter_of_two_layers_stays_dense():
    model = halved(llama())
    first, second = (block.mlp.up_proj for block in model.model.layers)
    second.weight = first.weight
    truth = logits(model, IDS)
    done = llmprune.sparsify(model)
    assert done.left == {"model.layers.0.mlp.up_proj.weight": "shared"}
    assert first.weight is second.weight
    torch.testing.assert_close(logits(model, IDS), truth)


def test_a_module_in_two_places_is_packed_once_for_both():
    model = halved(llama())
    model.model.layers[1].mlp = model.model.layers[0].mlp
    truth = logits(model, IDS)
    done = llmprune.sparsify(model)
    assert len(done.patterns) == 11
    assert model.model.layers[1].mlp.up_proj is model.model.layers[0].mlp.up_proj
    torch.testing.assert_close(logits(model, IDS), truth)
    llmprune.densify(model)
    torch.testing.assert_close(logits(model, IDS), truth)


def test_targets_and_ignore_choose():
    model = halved(llama())
    done = llmprune.sparsify(model, targets=["*_proj"], ignore=["mlp.down_proj"])
    assert len(done.patterns) == 12
    assert isinstance(model.model.layers[0].mlp.up_proj, SparseLinear)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    more = llmprune.sparsify(model)
    assert set(more.patterns) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    with pytest.raises(ModelError, match="packed already"):
        llmprune.sparsify(model)


def test_what_is_named_is_packed_even_if_it_gets_larger():
    model = llama()
    done = llmprune.sparsify(model, targets=["lm_head"])
    assert done.packed_bytes > done.dense_bytes
    assert isinstance(model.lm_head, SparseLinear)


def test_weights_that_are_elsewhere_or_of_another_dtype():
    with pytest.raises(ModelError, match="not in memory"):
        llmprune.sparsify(llama().to("meta"))
    with pytest.raises(ModelError, match="14 matrices of float64"):
        llmprune.sparsify(halved(llama()).double())


def test_densify_leaves_a_dense_model_alone():
    model = llama()
    modules = list(model.modules())
    assert llmprune.densify(model).patterns == {}
    assert list(model.modules()) == modules


# Masks


def test_masks_keep_zeros_and_drop_signs():
    model = halved(llama())
    masks = llmprune.masks(model)
    name = "model.layers.0.mlp.up_proj"
    weight = model.get_submodule(name).weight
    with torch.no_grad():
        weight[masks[name]] = 0
        weight[~masks[name]] = -0.0
    llmprune.sparsify(model, masks=masks)
    assert model.get_submodule(name).weight_values.numel() == int(masks[name].sum())
    assert not torch.signbit(model.get_submodule(name).weight).any()


def test_masks_that_do_not_fit():
    model = halved(llama())
    masks = llmprune.masks(model)
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(ConfigError, match="a mask is for up_proj, which is no matrix"):
        llmprune.sparsify(model, masks={"up_proj": masks[name]})
    with pytest.raises(
        ConfigError, match=r"up_proj is torch.bool \[16, 24\]; give bool \[24, 16\]"
    ):
        llmprune.sparsify(model, masks={name: masks[name].T})
    with pytest.raises(ConfigError, match=r"up_proj has \d+ weights outside of its mask"):
        llmprune.sparsify(model, masks={name: torch.zeros_like(masks[name])})
    assert not any(isinstance(m, SparseLinear) for m in model.modules())


def test_masks_of_experts():
    model = halved(tiny("qwen3_moe"))
    masks = llmprune.masks(model)
    chosen = {n: m for n, m in masks.items() if "experts.1." in n and "layers.0" in n}
    assert len(chosen) == 2
    for matrix in matrices(model):
        if matrix.name in chosen:
            matrix.write(torch.zeros(matrix.shape))
    llmprune.sparsify(model, masks=chosen)
    experts = model.model.layers[0].mlp.experts
    kept = sum(int(m.sum()) for n, m in masks.items() if "layers.0" in n and "gate_up_proj" in n)
    assert experts.gate_up_proj_values.numel() == kept
    assert not experts.gate_up_proj[1].expanded().any()


# What else llmprune and transformers do to a model


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "qwen3_moe"])
def test_sparsity_and_masks_are_read_off_packed_models(family):
    model = halved(tiny(family))
    share, masks = llmprune.sparsity(model), llmprune.masks(model)
    llmprune.sparsify(model)
    assert llmprune.sparsity(model) == share > 0.4
    found = llmprune.masks(model)
    assert found.keys() == masks.keys()
    assert all(torch.equal(found[name], masks[name]) for name in masks)


def test_a_packed_model_is_not_pruned():
    model = halved(llama())
    llmprune.sparsify(model)
    with pytest.raises(ModelError, match=r"llmprune\.densify\(model\)"):
        llmprune.prune(model, sparsity=0.7, method="magnitude")
    llmprune.densify(model)
    llmprune.prune(model, sparsity=0.7, method="magnitude")
    assert llmprune.sparsity(model) > 0.69


def test_hooks_go_with_the_layer():
    model = halved(llama())
    seen = []
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda module, args, out: seen.append(type(module))
    )
    llmprune.sparsify(model)
    logits(model, IDS)
    llmprune.densify(model)
    logits(model, IDS)
    handle.remove()
    logits(model, IDS)
    assert seen == [SparseLinear, nn.Linear]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("family", ["llama", "falcon", "gpt2"])
def test_a_packed_model_is_copied(family, copied):
    model = halved(tiny(family))
    llmprune.sparsify(model)
    truth = logits(model)
    twin = copied(model)
    assert torch.equal(logits(twin), truth)
    other = halved(tiny(family))
    llmprune.sparsify(other)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), truth)


def test_the_initialiser_of_a_family_leaves_a_packed_model_alone():
    model = halved(llama())
    llmprune.sparsify(model)
    before = bits(model)
    model.initialize_weights()
    values = {n for n in before if n.endswith("_values")}
    after = bits(model)
    assert all(torch.equal(before[n], after[n]) for n in values)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_and_training_of_the_values(reentrant):
    dense = halved(llama())
    for block in dense.model.layers:
        block.self_attn.attention_dropout = 0.0
    sparse = copy.deepcopy(dense)
    llmprune.sparsify(sparse)
    for name, parameter in sparse.named_parameters():
        parameter.requires_grad_("weight_values" in name or "embed" in name)
    for model in (dense, sparse):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=IDS, labels=IDS).loss.backward()
    plain = dict(dense.named_parameters())
    for name, parameter in sparse.named_parameters():
        if name.endswith("weight_values"):
            weight = plain[name.removesuffix("_values")]
            torch.testing.assert_close(parameter.grad, weight.grad[weight != 0])
    torch.testing.assert_close(
        sparse.model.embed_tokens.weight.grad, dense.model.embed_tokens.weight.grad
    )


# Generation


def generated(model: Any, tokens: int = 24, **settings: Any) -> Tensor:
    ids = torch.arange(3, 11).view(2, 4)
    out: Tensor = model.generate(
        ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0, **settings
    )
    return out


@pytest.mark.parametrize(
    "settings",
    [{}, {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}],
    ids=["cache", "static cache", "no cache"],
)
def test_generates_what_the_dense_model_does(settings):
    model = halved(llama())
    truth = generated(model, **settings)
    llmprune.sparsify(model)
    assert torch.equal(generated(model, **settings), truth)


def test_generates_the_same_when_compiled():
    model = halved(llama())
    settings = {"cache_implementation": "static", "disable_compile": True}
    truth = generated(model, **settings)
    llmprune.sparsify(model)
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(generated(model, **settings), truth)
    torch.compiler.reset()


def test_generates_what_the_trained_model_does(shared):
    from transformers import AutoTokenizer

    folder = shared / "models" / "wikillama-5m"
    model = halved(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    ids = AutoTokenizer.from_pretrained(folder)("The history of", return_tensors="pt").input_ids
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    truth = model.generate(ids, **settings)
    llmprune.sparsify(model)
    assert torch.equal(model.generate(ids, **settings), truth)


# Saving


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "qwen3_moe", "gpt_oss"])
def test_a_packed_model_is_saved_in_the_sparse_format(family, tmp_path):
    model = halved(tiny(family))
    before = bits(model)
    llmprune.sparsify(model)
    model.save_pretrained(tmp_path / "sparse")
    llmprune.densify(model)
    model.save_pretrained(tmp_path / "dense")
    sizes = {
        name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("sparse", "dense")
    }
    assert sizes["sparse"] < 0.75 * sizes["dense"]
    for name in ("sparse", "dense"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert ("quantization_config" in config) == (name == "sparse")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        llmprune.densify(again)
        assert same(bits(again), before)
        assert getattr(again.config, "quantization_config", None) is None


def test_a_model_that_was_loaded_packed_is_pruned_once_it_is_dense(tmp_path):
    model = halved(llama())
    llmprune.sparsify(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="densify"):
        llmprune.prune(again, sparsity=0.7, method="magnitude")
    llmprune.densify(again)
    llmprune.prune(again, sparsity=0.7, method="magnitude")
    assert llmprune.sparsity(again) > 0.69
