"""PEFT finds packed layers by itself: LoRA attaches, trains and merges, and no zero is lost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import tiny
from tiny import llama
from torch import Tensor

import llmprune
from llmprune.model import matrices
from llmprune.runtime.linear import SparseLinear

peft = pytest.importorskip("peft")

IDS = torch.arange(3, 35).view(4, 8)


def halved(model: Any, packed: bool = True) -> Any:
    """A model of which half of each decoder matrix is zero, packed unless told otherwise."""
    random = torch.Generator().manual_seed(3)
    for matrix in matrices(model):
        weight = matrix.weight.clone()
        weight[torch.rand(weight.shape, generator=random) < 0.5] = 0
        matrix.write(weight)
    if packed:
        llmprune.sparsify(model)
    for module in model.modules():
        if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
            module.attention_dropout = 0.0
    return model


def adapted(model: Any, targets: Any, **settings: Any) -> Any:
    """With adapters of rank 4 that are not zero."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, **settings)
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return out


def weights(model: Any) -> dict[str, Tensor]:
    """Every packed weight, dense: [out, in] by the name of its layer."""
    return {
        n.removesuffix(".base_layer").removeprefix("base_model.model."): m.weight.clone()
        for n, m in model.named_modules()
        if isinstance(m, SparseLinear)
    }


def deltas(model: Any) -> dict[str, Tensor]:
    """What the adapters add, by the name of the layer."""
    return {
        n.removeprefix("base_model.model."): m.get_delta_weight("default")
        for n, m in model.named_modules()
        if hasattr(m, "get_delta_weight")
    }


TARGETS = {
    "some": ("llama", ["q_proj", "down_proj"], 4),
    "all-linear": ("llama", "all-linear", 14),
    "biases": ("qwen2", ["q_proj", "v_proj"], 6),
    "conv1d": ("gpt2", ["c_attn", "c_proj"], 9),
}


def build(kind: str, packed: bool = True) -> tuple[Any, Any, int]:
    family, targets, count = TARGETS[kind]
    model = llama() if family == "llama" else tiny(family)
    return halved(model, packed), targets, count


@pytest.mark.parametrize("kind", TARGETS)
def test_an_adapted_packed_model_computes_what_an_adapted_dense_one_does(kind):
    sparse, targets, count = build(kind)
    dense, _, _ = build(kind, packed=False)
    sparse, dense = adapted(sparse, targets), adapted(dense, targets)
    assert len(deltas(sparse)) == len(deltas(dense)) == count
    torch.testing.assert_close(logits(sparse), logits(dense))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("kind", TARGETS)
def test_adapters_train_and_nothing_else_does(kind, checkpointing):
    model, targets, _ = build(kind)
    model = adapted(model, targets)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    optimiser = torch.optim.AdamW(trained, 0.02)
    model.train()
    losses = []
    for _ in range(12):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed
    assert all("lora_" in n for n in changed)


@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe merge"])
@pytest.mark.parametrize("kind", TARGETS)
def test_a_merge_keeps_every_zero_and_adds_what_the_mask_lets_through(kind, safe):
    model, targets, count = build(kind)
    before = weights(model)
    model = adapted(model, targets)
    added = deltas(model)
    merged = model.merge_and_unload(safe_merge=safe)
    after = weights(merged)
    assert after.keys() == before.keys()
    assert len(added) == count
    assert not any("lora" in n for n, _ in merged.named_modules())
    for name, weight in before.items():
        delta = added.get(name, torch.zeros_like(weight))
        assert torch.equal(after[name], torch.where(weight != 0, weight + delta, 0))


def test_the_merged_model_is_the_dense_one_merged_under_the_mask():
    model, targets, _ = build("all-linear")
    dense = copy.deepcopy(model)
    llmprune.densify(dense)
    masks = llmprune.masks(dense)
    merged = adapted(model, targets).merge_and_unload()
    dense = adapted(dense, targets).merge_and_unload()
    for matrix in matrices(dense):
        matrix.write(matrix.weight * masks[matrix.name])
    torch.testing.assert_close(logits(merged), logits(dense))


def test_merging_and_unmerging_comes_back():
    model, targets, _ = build("all-linear")
    before = weights(model)
    model = adapted(model, targets)
    truth, added = logits(model), deltas(model)
    model.merge_adapter()
    for name, weight in weights(model).items():
        expected = torch.where(before[name] != 0, before[name] + added[name], 0)
        assert torch.equal(weight, expected)
    assert not torch.allclose(logits(model), truth)  # what the mask holds back is missing
    model.unmerge_adapter()
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, before[name])
        assert torch.equal(weight == 0, before[name] == 0)
    torch.testing.assert_close(logits(model), truth)


def test_two_adapters_merge_one_after_the_other():
    model, targets, _ = build("some")
    before = weights(model)
    model = adapted(model, targets)
    model.add_adapter(
        "second", peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    )
    name = "model.layers.0.self_attn.q_proj"
    layer = model.base_model.model.get_submodule(name)
    added = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    expected = torch.where(before[name] != 0, before[name] + added, 0)
    torch.testing.assert_close(weights(merged)[name], expected)
    assert torch.equal(weights(merged)[name] == 0, before[name] == 0)


def test_adapters_are_saved_and_loaded(tmp_path):
    model, targets, _ = build("some")
    model = adapted(model, targets)
    truth = logits(model)
    model.save_pretrained(tmp_path)
    files = {f.name for f in tmp_path.iterdir()}
    assert "adapter_model.safetensors" in files
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 10_000
    again = peft.PeftModel.from_pretrained(build("some")[0], tmp_path)
    torch.testing.assert_close(logits(again), truth)


def test_dora_and_half_types():
    model, targets, _ = build("some")
    before = weights(model)
    merged = adapted(model, targets, use_dora=True).merge_and_unload()
    for name, weight in weights(merged).items():
        assert torch.equal(weight == 0, before[name] == 0)
    model = adapted(halved(llama().bfloat16()), targets)
    assert logits(model).dtype == torch.bfloat16
    for parameter in model.parameters():
        assert parameter.dtype != torch.uint8
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(input_ids=IDS, labels=IDS).loss
    loss.backward()
    merged = model.merge_and_unload()
    assert {p.dtype for n, p in merged.named_parameters()} == {torch.bfloat16}


def test_a_merged_model_is_expanded_with_its_zeros():
    model, targets, _ = build("all-linear")
    share = llmprune.sparsity(model)
    merged = adapted(model, targets).merge_and_unload()
    truth = logits(merged)
    llmprune.densify(merged)
    assert llmprune.sparsity(merged) == share
    torch.testing.assert_close(logits(merged), truth)


def test_experts_stay_packed_beside_adapters():
    model = halved(tiny("qwen3_moe"))
    plain = logits(model)
    model = adapted(model, "all-linear")
    loss = model.train()(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert not torch.equal(logits(model), plain)
    merged = model.merge_and_unload()
    assert any(n.endswith("gate_up_proj_values") for n, _ in merged.named_parameters())
