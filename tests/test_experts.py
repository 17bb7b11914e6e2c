"""Mixtures of experts: every expert is a matrix of its own, seen with the tokens that reach it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import llama
from torch import Tensor, nn

import llmprune
from llmprune.checkpoint.inspect import inspect
from llmprune.checkpoint.save import check_saveable, expectations, save
from llmprune.checkpoint.verify import verify_zeros
from llmprune.cli import main
from llmprune.errors import CheckpointError, ConfigError, ModelError, WalkError
from llmprune.methods import Scored, build
from llmprune.methods.sparsegpt import SparseGPT
from llmprune.methods.wanda import Wanda
from llmprune.model import Matrix, blocks, masks, matrices, sparsity
from llmprune.observe import Observer
from llmprune.pattern import parse
from llmprune.prune_matrix import Task, prune_matrix
from llmprune.stats import Gram, InputNorms, NoStats
from llmprune.walk import Walker

SHAPE = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {"num_key_value_heads": 1}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {**GROUPED, "intermediate_size": 24, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            **GROUPED,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            **GROUPED,
            "head_dim": 8,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_next": (
        "Qwen3Next",
        {
            **GROUPED,
            "head_dim": 8,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **ROUTED,
            "num_key_value_heads": 2,
            "intermediate_size": 24,
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "n_group": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            **GROUPED,
            "head_dim": 8,
            "intermediate_size": 16,  # square: shapes do not tell how it is stored
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
        },
    ),
    "granitemoe": (
        "GraniteMoe",
        {
            **GROUPED,
            "intermediate_size": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "llama4": (
        "Llama4Text",
        {
            **GROUPED,
            "head_dim": 8,
            "intermediate_size": 24,
            "intermediate_size_mlp": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "moe_layers": [1],
            "attention_chunk_size": 8,
        },
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            **GROUPED,
            **ROUTED,
            "head_dim": 8,
            "intermediate_size": 24,
            "moe_intermediate_size": 16,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "jamba": (
        "Jamba",
        {
            **GROUPED,
            "intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
    ),
    "nemotron_h": (
        "NemotronH",
        {
            **GROUPED,
            **ROUTED,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "head_dim": 8,
            "intermediate_size": 24,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 24,
            "ssm_state_size": 4,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "n_groups": 2,
        },
    ),
    "jetmoe": (
        "JetMoe",
        {
            "num_key_value_heads": 2,
            "kv_channels": 8,
            "intermediate_size": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
}
FLOODABLE = sorted(FAMILIES.keys() - {"llama4", "jetmoe"})
IGNORED = {"jamba": ["dt_proj"]}  # Mamba uses it without its module: no input to see


def family(name: str, **changes: Any) -> Any:
    prefix, settings = FAMILIES[name]
    config = getattr(transformers, f"{prefix}Config")(
        **{**SHAPE, "initializer_range": 0.5, **settings, **changes}
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tokens(windows: int = 6, seqlen: int = 32) -> Tensor:
    return torch.randint(0, 64, (windows, seqlen), generator=torch.Generator().manual_seed(1))


def named(model: nn.Module) -> dict[str, Matrix]:
    return {m.name: m for m in matrices(model)}


def test_each_expert_is_a_matrix() -> None:
    model = family("mixtral")
    found = named(model)
    parameters = dict(model.named_parameters())
    up = found["model.layers.1.mlp.experts.3.gate_up_proj"]
    whole = parameters["model.layers.1.mlp.experts.gate_up_proj"]
    assert (up.block, up.expert, up.attribute, up.shape) == (1, 3, "gate_up_proj", (48, 16))
    assert torch.equal(up.weight, whole[3])
    assert up.weight.data_ptr() == whole[3].data_ptr()
    assert len(found) == 2 * (4 + 4 * 2)
    for matrix in found.values():
        assert parameters[matrix.parameter_name] is matrix.parameter
    before = whole.detach().clone()
    up.write(torch.ones(48, 16))
    assert torch.equal(whole[:3], before[:3])
    assert torch.equal(whole[3], torch.ones(48, 16))


def test_experts_that_are_stored_the_other_way_round() -> None:
    found = named(family("gpt_oss"))
    down = found["model.layers.0.mlp.experts.2.down_proj"]
    assert down.transposed
    assert torch.equal(down.weight, down.parameter[2].T)
    down.write(torch.arange(256.0).reshape(16, 16))
    assert torch.equal(down.parameter[2], torch.arange(256.0).reshape(16, 16).T)
    assert not any("bias" in name or "router" in name for name in found)


@pytest.mark.parametrize("width", [24, 8])
def test_parallel_experts_have_no_expert_in_their_name(width: int) -> None:
    model = family("jetmoe", intermediate_size=width)  # 8: as many out (gate and up) as in
    found = named(model)
    up = found["model.layers.0.mlp.input_linear.3"]
    assert up.parameter_name == "model.layers.0.mlp.input_linear.weight"
    assert up.shape == (2 * width, 16)
    assert not up.transposed
    assert "model.layers.1.self_attention.experts.output_linear.0" in found


def test_a_square_parameter_is_stored_like_others_of_its_class() -> None:
    model = family("jetmoe").to("meta")  # no forward can show it
    found = named(model)
    assert found["model.layers.0.self_attention.experts.input_linear.1"].shape == (16, 16)
    assert not any(m.transposed for m in found.values())


def test_patterns_choose_experts() -> None:
    model = family("mixtral")
    chosen = matrices(model, ["experts.*.down_proj"], ["re:.*experts\\.[12]\\."])
    assert [m.name.split("layers.")[1] for m in chosen] == [
        f"{block}.mlp.experts.{e}.down_proj" for block in (0, 1) for e in (0, 3)
    ]
    assert len(matrices(model, ["MixtralExperts"])) == 16


def test_masks_and_sparsity_count_experts() -> None:
    model = family("mixtral")
    name = "model.layers.0.mlp.experts.1.gate_up_proj"
    named(model)[name].write(torch.zeros(48, 16))
    assert not masks(model)[name].any()
    total = sum(m.weight.numel() for m in matrices(model))
    assert sparsity(model) == pytest.approx(48 * 16 / total)


def test_experts_in_one_flat_matrix_are_refused() -> None:
    settings = {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 64, "vocab_size": 64}
    config = transformers.DbrxConfig(
        **settings,
        attn_config={"kv_n_heads": 1, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "hidden_size": 16},
    )
    with pytest.raises(ModelError, match=r"DbrxExpertGLU holds .* one matrix .*mlp\.w1.*--targets"):
        matrices(transformers.DbrxForCausalLM(config))


def test_a_convolution_is_no_expert() -> None:
    model = family("jamba")
    convolution = "model.layers.0.mamba.conv1d"
    assert model.get_parameter(f"{convolution}.weight").dim() == 3
    assert not any(name.startswith(convolution) for name in named(model))


# What enters each expert


@torch.no_grad()
def statistics(model: Any, ids: Tensor, all_experts: bool = False) -> dict[str, Gram]:
    """What the walk collects on the dense model, by name of the expert's matrix."""
    layers = blocks(model)[1]
    walker = Walker(model, layers, list(ids.split(2)))
    walker.self_check()
    chosen = matrices(model)
    hidden: list[Tensor | None] = [None] * len(walker.batches)
    found: dict[str, Gram] = {}
    for index in range(len(layers)):
        here = [m for m in chosen if m.block == index and m.expert is not None]
        observer = Observer(SparseGPT(), ids.numel(), torch.device("cpu"), all_experts)
        with observer.watching(here):
            for b in range(len(walker.batches)):
                observer.next_batch()
                out = walker.run(index, b, hidden[b])
        for b in range(len(walker.batches)):
            hidden[b] = walker.run(index, b, hidden[b])
        torch.testing.assert_close(out, hidden[-1], rtol=1e-4, atol=1e-4)  # the routed output
        found |= {m.name: seen.stats for seen in observer.inputs for m in seen.readers}
    return found


@torch.no_grad()
def entering(model: Any, ids: Tensor, kind: str) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of every module whose class name ends in `kind`, in plain forwards, by module name."""
    seen: dict[str, list[tuple[Any, ...]]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: seen.setdefault(name, []).append(
                (*args, *kwargs.values())
            ),
            with_kwargs=True,
        )
        for name, module in model.named_modules()
        if type(module).__name__.endswith(kind)
    ]
    for batch in ids.split(2):
        model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    assert seen
    return seen


def same_sums(stats: Gram, rows: Tensor) -> None:
    """Whether `stats` are of exactly these `rows` [n, in]."""
    assert stats.tokens == len(rows)
    torch.testing.assert_close(stats.gram, rows.T @ rows, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def mixtral_by_hand(block: Any, x: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """Rows of `x` [n, in] that Mixtral's two best experts include, and what they become in between."""
    best = (x @ block.gate.weight.T).softmax(-1).topk(2).indices
    rows = x[(best == expert).any(-1)]
    gate, up = (rows @ block.experts.gate_up_proj[expert].T).tensor_split(2, dim=1)
    return rows, gate * gate.sigmoid() * up


@torch.no_grad()
def gpt_oss_by_hand(block: Any, x: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """gpt-oss: gate and up interleaved, with biases, clamped."""
    best = (x @ block.router.weight.T + block.router.bias).topk(2).indices
    rows = x[(best == expert).any(-1)]
    both = rows @ block.experts.gate_up_proj[expert] + block.experts.gate_up_proj_bias[expert]
    gate, up = both[:, 0::2].clamp(max=7), both[:, 1::2].clamp(-7, 7)
    return rows, (up + 1) * gate * torch.sigmoid(1.702 * gate)


@torch.no_grad()
def llama4_by_hand(block: Any, x: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """Llama 4: one expert, fed with its input times the sigmoid of its score."""
    scores, best = (x @ block.router.weight.T).max(-1)
    mine = best == expert
    rows = x[mine] * scores[mine].sigmoid()[:, None]
    gate, up = (rows @ block.experts.gate_up_proj[expert]).tensor_split(2, dim=1)
    return rows, gate * gate.sigmoid() * up


@pytest.mark.parametrize(
    ("name", "kind", "by_hand"),
    [
        ("mixtral", "SparseMoeBlock", mixtral_by_hand),
        ("gpt_oss", "MLP", gpt_oss_by_hand),
        ("llama4", "TextMoe", llama4_by_hand),
    ],
)
def test_each_expert_is_seen_with_its_own_tokens(name: str, kind: str, by_hand: Any) -> None:
    model, ids = family(name), tokens()
    found = statistics(model, ids)
    checked = 0
    for block, calls in entering(model, ids, kind).items():
        x = torch.cat([args[0].reshape(-1, 16) for args in calls])
        for expert in range(4):
            rows, between = by_hand(model.get_submodule(block), x, expert)
            same_sums(found.pop(f"{block}.experts.{expert}.gate_up_proj"), rows)
            same_sums(found.pop(f"{block}.experts.{expert}.down_proj"), between)
            checked += len(rows)
    assert checked == ids.numel() * model.config.num_experts_per_tok * (
        1 if name == "llama4" else 2
    )
    assert not found


@pytest.mark.parametrize("name", FLOODABLE)
def test_statistics_are_those_of_the_routers_choice(name: str) -> None:
    model, ids = family(name), tokens()
    found = statistics(model, ids)
    for path, calls in entering(model, ids, "Experts").items():
        hidden = torch.cat([args[0] for args in calls])
        index = torch.cat([args[1] for args in calls])
        top_k = index.shape[1]
        up = "gate_up_proj" if hasattr(model.get_submodule(path), "gate_up_proj") else "up_proj"
        mine = {e: found.pop(f"{path}.{e}.{up}", None) for e in range(model_experts(model, path))}
        down = {e: found.pop(f"{path}.{e}.down_proj", None) for e in mine}
        for expert, stats in mine.items():
            rows = hidden[(index == expert).any(-1)]
            if stats is None:
                assert len(rows) == 0
            else:
                same_sums(stats, rows)
            assert (stats is None) == (down[expert] is None)
            assert stats is None or stats.tokens == down[expert].tokens
        seen = [s for s in mine.values() if s is not None]
        assert sum(s.tokens for s in seen) == ids.numel() * top_k
        total = sum((rows := hidden[(index == e).any(-1)]).T @ rows for e in range(len(mine)))
        torch.testing.assert_close(sum(s.gram for s in seen), total, rtol=1e-4, atol=1e-4)
    assert not found


def model_experts(model: Any, path: str) -> int:
    """Number of experts in the module at `path`."""
    return len(model.get_submodule(path).down_proj)


def test_parallel_experts_share_the_tokens_out() -> None:
    model, ids = family("jetmoe"), tokens()
    found = statistics(model, ids)
    for path, calls in entering(model, ids, "ParallelExperts").items():
        parts: dict[int, list[Tensor]] = {}
        for inputs, sizes in calls:
            for expert, rows in enumerate(inputs.split(sizes)):
                parts.setdefault(expert, []).append(rows)
        for expert, rows in parts.items():
            same_sums(found.pop(f"{path}.{expert}"), torch.cat(rows))
    assert not found


@pytest.mark.parametrize("name", FLOODABLE)
def test_all_experts_may_learn_from_all_tokens(name: str) -> None:
    model, ids = family(name), tokens()
    found = statistics(model, ids, all_experts=True)
    for path, calls in entering(model, ids, "Experts").items():
        hidden = torch.cat([args[0] for args in calls])
        for expert in range(model_experts(model, path)):
            up = found.pop(f"{path}.{expert}.gate_up_proj", None)
            same_sums(up or found.pop(f"{path}.{expert}.up_proj"), hidden)
            assert found.pop(f"{path}.{expert}.down_proj").tokens == ids.numel()
    assert not found


# Pruned, saved, reloaded


METHODS = [("wanda", "2:4"), ("sparsegpt", "0.5"), ("magnitude", "2:4")]


@pytest.mark.parametrize(("method", "sparsity"), METHODS)
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_family_is_pruned_saved_and_reloaded_equal(
    name: str, method: str, sparsity: str, tmp_path: Path
) -> None:
    model, ids, ignore = family(name), tokens(16, 64), IGNORED.get(name, [])
    model.save_pretrained(tmp_path / "dense")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    report = llmprune.prune(
        model, calibration=ids, sparsity=sparsity, method=method, ignore=ignore, progress=False
    )
    assert any(layer.expert is not None and not layer.notes for layer in report.layers)
    chosen = matrices(model, ignore=ignore)
    pruned = {m.parameter_name for m in chosen}
    for parameter, was in before.items():
        assert torch.equal(was, model.get_parameter(parameter)) == (parameter not in pruned)
    assert not any(re.search("router|gate$|norm|bias|shared_expert_gate", p) for p in pruned)
    built, pattern = build(method), build(method).resolve(parse(sparsity))
    for matrix, layer in zip(chosen, report.layers, strict=True):
        assert int((matrix.weight == 0).sum()) == matrix.weight.numel() // 2, layer.name
        if sparsity == "2:4":
            assert (matrix.weight.reshape(-1, 4) != 0).sum(1).eq(2).all()
    flipped = {m.name for m in chosen if m.transposed}
    expected = expectations(report.layers, pattern, transposed=flipped, exact=built.exact)
    check_saveable(model, [m.name for m in chosen])
    save(model, None, tmp_path / "out", report, card="", expected=expected)
    dense, out = (load_file(tmp_path / d / "model.safetensors") for d in ("dense", "out"))
    assert {k: v.shape for k, v in dense.items()} == {k: v.shape for k, v in out.items()}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    held = inspect(tmp_path / "out")
    weights = sum(m.weight.numel() for m in chosen)
    assert sum(t.zeros for t in held.decoder) == weights // 2
    if not ignore:
        assert sum(t.weights for t in held.decoder) == weights
        assert held.pattern == (sparsity if ":" in sparsity else None)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("mixtral", ()),
        ("mixtral", ("--calibrate-all-experts",)),
        ("gpt_oss", ()),
        ("llama4", ()),
        ("jetmoe", ()),
    ],
)
def test_the_command_line_does_the_same_from_disk_to_disk(
    name: str, extra: tuple[str, ...], tmp_path: Path
) -> None:
    model, ids = family(name), tokens(16, 64)
    model.save_pretrained(tmp_path / "dense")
    np.save(tmp_path / "ids.npy", ids.numpy())
    out = tmp_path / "out"
    command = (
        f"--model {tmp_path / 'dense'} --calibration {tmp_path / 'ids.npy'} --save {out} --quiet"
    )
    settings = ("--sparsity", "2:4", "--method", "sparsegpt", "--no-eval", *extra)
    assert main([*command.split(), *settings]) == 0
    report = llmprune.prune(
        model,
        calibration=ids,
        sparsity="2:4",
        method="sparsegpt",
        calibrate_all_experts=bool(extra),
        progress=False,
    )
    written = json.loads((out / "llmprune.json").read_text())
    for here, there in zip(report.layers, written["layers"], strict=True):
        assert (here.name, here.tokens, here.expert) == (
            there["name"],
            there["tokens"],
            there["expert"],
        )
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    for parameter, weight in again.named_parameters():
        torch.testing.assert_close(weight, model.get_parameter(parameter), rtol=1e-4, atol=1e-4)


def test_files_that_hold_more_of_an_expert_than_was_decided_are_refused(tmp_path: Path) -> None:
    model = family("mixtral")
    report = llmprune.prune(model, calibration=tokens(), sparsity="2:4", progress=False)
    expected = expectations(report.layers, parse("2:4"))
    model.save_pretrained(tmp_path / "files")
    path = tmp_path / "files/model.safetensors"
    name = "model.layers.0.mlp.experts.gate_up_proj"
    keep = {
        f"model.layers.0.block_sparse_moe.experts.{e}.w{w}.weight": part
        for e in range(4)
        for w, part in zip((1, 3), (model.get_parameter(name)[e] != 0).chunk(2), strict=True)
    }
    verify_zeros(tmp_path / "files", name, keep)
    key = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
    good = load_file(path)
    for tensor, message in (
        (good[key].clone().fill_(1), f"{key}.* holds 192 weights that were to go"),
        (good[key].clone().fill_(float("nan")), "NaN"),
        (good[key].T.contiguous(), r"has shape \(16, 24\), expected \(24, 16\)"),
    ):
        save_file({**good, key: tensor}, path)
        with pytest.raises(CheckpointError, match=message):
            verify_zeros(tmp_path / "files", name, keep)
    named(model)["model.layers.1.mlp.experts.3.down_proj"].write(torch.ones(16, 24))
    with pytest.raises(CheckpointError, match=r"experts\.3\.down_proj.* 384 nonzero.* 192 were"):
        save(model, None, tmp_path / "out", report, card="", expected=expected)
    assert not (tmp_path / "out").exists()


def test_an_experts_implementation_is_as_before_also_after_an_exception() -> None:
    model = family("mixtral").train()
    experts = model.model.layers[1].mlp.experts
    inner = experts.act_fn.forward
    seen: list[str] = []

    def failing(x: Tensor) -> Tensor:
        seen.append(model.config._experts_implementation)
        if seen.count("eager") == 3:
            raise RuntimeError("out of luck")
        return inner(x)

    experts.act_fn.forward = failing
    before = model.config._experts_implementation
    assert before != "eager"
    with pytest.raises(RuntimeError, match="out of luck"):
        llmprune.prune(model, calibration=tokens(), sparsity="2:4", progress=False)
    assert "eager" in seen
    assert model.config._experts_implementation == before
    assert model.training
    assert all("forward" not in vars(m) for m in model.modules() if m is not experts.act_fn)


# Too few tokens


def starved() -> Any:
    """Mixtral whose first block sends every token to one of its first two experts."""
    model = family("mixtral", num_experts_per_tok=1)
    gate = model.model.layers[0].mlp.gate.weight.data
    gate[1] = -gate[0]
    gate[2:] = 0  # the better of the first two is above zero
    return model


def test_an_expert_without_tokens_falls_back_to_magnitude() -> None:
    report = llmprune.prune(
        starved(), calibration=tokens(16, 64), sparsity="2:4", method="sparsegpt", progress=False
    )
    layers = {
        layer.name.removeprefix("model.layers.0.mlp.experts."): layer for layer in report.layers
    }
    for name in ("2.gate_up_proj", "3.down_proj"):
        layer = layers[name]
        assert (layer.tokens, layer.output_error) == (0, None)
        assert layer.notes == {"fallback": "magnitude"}
        assert layer.sparsity == 0.5
    assert "fallback" not in layers["0.gate_up_proj"].notes
    fell = [
        n for n in report.layers if n.expert is not None and n.notes == {"fallback": "magnitude"}
    ]
    most = max(layer.tokens for layer in fell)
    table = report.table()
    assert "tokens per expert: 0 (model.layers.0.mlp.experts.2.gate_up_proj) to " in table
    assert f"by magnitude: {len(fell)} of 16 expert matrices (up to {most} tokens)" in table


@pytest.mark.parametrize(
    ("method", "count", "by"),
    [
        ("sparsegpt", "many", "sparsegpt"),
        ("sparsegpt", "some", "wanda"),
        ("sparsegpt", "few", "magnitude"),
        ("wanda", "some", "wanda"),
        ("wanda", "few", "magnitude"),
        ("magnitude", "few", "magnitude"),
    ],
)
def test_too_few_tokens_make_an_expert_fall_back(method: str, count: str, by: str) -> None:
    """What comes out is what the simpler method gives, from the same tokens and in the same groups."""
    torch.manual_seed(0)
    width = 256
    number = {
        "many": SparseGPT().needs_tokens(width),
        "some": SparseGPT().needs_tokens(width) - 1,
        "few": Wanda().needs_tokens(width) - 1,
    }[count]
    x = torch.randn(number, width) * torch.rand(width)
    dense = torch.randn(4, width)
    pattern = build(method).resolve(parse("0.5"))

    def pruned(matrix: Matrix, how: str) -> tuple[Tensor, Any]:
        stats = build(how).stats.empty(width, x.device)
        stats.add(x)
        matrix.write(dense)
        done = prune_matrix(matrix, stats, None, Task(build(how), pattern))
        done.settle()
        return matrix.weight.clone(), done.report

    holder = nn.Module()
    holder.weight = nn.Parameter(torch.zeros(3, 4, width))
    expert = Matrix("experts.1", holder, False, 0, "weight", 1)
    linear = Matrix("up", nn.Linear(width, 4), False, 0)
    weight, report = pruned(expert, method)
    assert torch.equal(weight, pruned(linear, by)[0])
    assert report.notes.get("fallback") == (by if by != method else None)
    assert (report.tokens, report.expert) == (number, 1)
    assert not holder.weight[0].any()
    # a matrix that every token reaches keeps the method that was asked for
    assert "fallback" not in pruned(linear, method)[1].notes


def test_a_method_that_says_nothing_falls_back_without_tokens_only() -> None:
    @dataclass(frozen=True)
    class Plain(Scored[InputNorms]):
        stats = InputNorms
        within = "row"

        def score(self, weight: Tensor, stats: InputNorms) -> Tensor:
            return weight.abs() * stats.norm

    assert (Plain().needs_tokens(64), build("magnitude").needs_tokens(64)) == (1, 0)
    method, stats = Plain().fallback(InputNorms.empty(0, torch.device("cpu")))
    assert method.name == "magnitude"
    assert isinstance(stats, NoStats)


# Experts that are modules of their own


class Unfused(nn.Module):
    """Four experts as lists of linear layers; the last is never chosen, the third by even windows."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(16, 16, bias=False) for n in ("w1", "w2", "w3")})
            for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 16)
        best = self.gate(flat)[:, :3].argmax(1)
        out = torch.zeros_like(flat)
        for e in best.unique().tolist():
            rows, expert = flat[best == e], self.experts[e]
            out[best == e] = expert["w2"](expert["w1"](rows).relu() * expert["w3"](rows))
        return out.reshape(x.shape)


@pytest.mark.parametrize(("method", "sparsity"), METHODS)
def test_experts_that_are_modules_see_their_own_tokens(method: str, sparsity: str) -> None:
    model, ids = llama().eval(), tokens() % 63
    for layer in model.model.layers:
        layer.mlp = Unfused()
    calls = entering(model, ids, "Unfused")
    report = llmprune.prune(
        model,
        calibration=ids,
        sparsity=sparsity,
        method=method,
        batch_size=1,
        progress=False,
    )
    layers = {layer.name: layer for layer in report.layers}
    assert not any(name.endswith("gate") for name in layers)
    if method == "magnitude":
        return
    name = "model.layers.0.mlp"
    best = torch.cat(
        [model.get_submodule(name).gate(a[0].reshape(-1, 16))[:, :3].argmax(1) for a in calls[name]]
    )
    for e in range(4):
        here = [layers[f"{name}.experts.{e}.{w}"] for w in ("w1", "w2", "w3")]
        assert {layer.expert for layer in here} == {e}
        assert {layer.tokens for layer in here} == {int((best == e).sum())} or method != "wanda"
    last = layers[f"{name}.experts.3.w2"]
    assert (last.tokens, last.notes) == (0, {"fallback": "magnitude"})


# All tokens for all experts


def test_all_tokens_for_all_experts_is_a_setting_of_the_run() -> None:
    model = starved()
    report = llmprune.prune(
        model, calibration=tokens(), sparsity="2:4", calibrate_all_experts=True, progress=False
    )
    assert report.recipe["calibrate_all_experts"] is True
    assert {layer.tokens for layer in report.layers} == {tokens().numel()}
    assert not any(layer.notes for layer in report.layers)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama4", "every expert of Llama4TextExperts"),
        ("jetmoe", "every expert of JetMoeParallelExperts"),
        ("unfused", r"layers\.0\.mlp\.experts\.0\.w1 is a module of its own"),
        ("dense", "no matrix to prune is an expert's"),
    ],
)
def test_all_tokens_for_all_experts_is_refused_where_it_cannot_be(name: str, message: str) -> None:
    model = family(name) if name in FAMILIES else llama()
    if name == "unfused":
        model.model.layers[0].mlp = Unfused()
    with pytest.raises(ConfigError, match=message):
        llmprune.prune(model, calibration=tokens() % 63, calibrate_all_experts=True, progress=False)


# What cannot be seen


class Odd(nn.Module):
    """Fused experts, square, of which it does not say how they are stored; used as `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.randn(2, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.split(x.shape[1] // 2, dim=1)
        w = self.weight
        match self.how:
            case "columns":
                y = [one @ w[0], two @ w[1]]
            case "rows":
                y = [nn.functional.linear(one, w[0]), nn.functional.linear(two, w[1])]
            case "left":
                y = [(w[0] @ one.mT).mT, (w[1] @ two.mT).mT]
            case "halves":
                y = [
                    torch.cat([part @ half.T for half in v.chunk(2)], -1)
                    for part, v in ((one, w[0]), (two, w[1]))
                ]
            case "all at once":
                y = list(torch.einsum("bed,eod->ebo", torch.stack([one[:, 0], two[:, 0]], 1), w))
                y = [part[:, None].expand_as(one) for part in y]
            case "copy":
                y = [one @ (2 * w[0]), two @ w[1]]
            case "elements":
                y = [(one[..., None, :] * w[0]).sum(-1), two @ w[1]]
            case other:
                raise ValueError(other)
        return torch.cat(y, 1)


class OddExperts(Odd):
    pass


@pytest.mark.parametrize(
    ("how", "flipped"),
    [
        ("columns", True),
        ("rows", False),
        ("left", False),
        ("halves", False),
        ("all at once", False),
    ],
)
def test_how_a_square_parameter_is_stored_is_seen_in_its_use(how: str, flipped: bool) -> None:
    model, ids = llama().eval(), tokens() % 63
    model.model.layers[0].mlp = OddExperts(how)
    matrix = named(model)["model.layers.0.mlp.1"]
    assert matrix.transposed is flipped
    found = statistics(model, ids)
    x = torch.cat([a[0] for a in entering(model, ids, "OddExperts")["model.layers.0.mlp"]])
    mine = x[:, 16:] if how != "all at once" else x[:, 16]
    same_sums(found["model.layers.0.mlp.1"], mine.reshape(-1, 16))


@pytest.mark.parametrize("how", ["copy", "elements"])
def test_a_use_that_hides_the_inputs_is_refused(how: str) -> None:
    model = llama().eval()
    model.model.layers[0].mlp = OddExperts(how)
    with pytest.raises(WalkError, match=r"OddExperts uses weight in aten\.mul"):
        llmprune.prune(model, calibration=tokens() % 63, progress=False)


def test_a_layout_that_is_declared_wrongly_is_refused() -> None:
    model = llama().eval()
    model.model.layers[0].mlp = OddExperts("columns")
    model.model.layers[0].mlp.is_transposed = False
    with pytest.raises(WalkError, match=r"stored \[experts, in, out\], against"):
        llmprune.prune(model, calibration=tokens() % 63, progress=False)


def test_a_layout_that_nothing_tells_is_refused() -> None:
    model = llama().to("meta")
    model.model.layers[0].mlp = OddExperts("columns").to("meta")
    with pytest.raises(ModelError, match=r"OddExperts\.weight \(2, 16, 16\) does not tell"):
        matrices(model)
