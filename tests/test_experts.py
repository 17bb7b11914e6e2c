"""Mixtures of experts: every expert is a matrix of its own, seen with the tokens that reach it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from llmprune.errors import ModelError
from llmprune.experts import refuse_flat
from llmprune.model import Matrix, masks, matrices, sparsity

SHAPE = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def mixtral(**changes: Any) -> Any:
    return MixtralForCausalLM(
        MixtralConfig(
            **{
                **SHAPE,
                "intermediate_size": 24,
                "num_key_value_heads": 1,
                "num_local_experts": 4,
                "initializer_range": 0.5,
                **changes,
            }
        )
    )


def gpt_oss() -> Any:
    return GptOssForCausalLM(
        GptOssConfig(
            **SHAPE,
            head_dim=8,
            intermediate_size=16,  # square: shapes do not tell how it is stored
            num_key_value_heads=1,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=8,
        )
    )


def jetmoe(**changes: Any) -> Any:
    return JetMoeForCausalLM(
        JetMoeConfig(
            **{
                **SHAPE,
                "num_key_value_heads": 2,
                "kv_channels": 8,
                "intermediate_size": 24,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                **changes,
            }
        )
    )


def named(model: nn.Module) -> dict[str, Matrix]:
    return {m.name: m for m in matrices(model)}


def test_each_expert_is_a_matrix() -> None:
    model = mixtral()
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
    found = named(gpt_oss())
    down = found["model.layers.0.mlp.experts.2.down_proj"]
    assert down.transposed
    assert torch.equal(down.weight, down.parameter[2].T)
    down.write(torch.arange(256.0).reshape(16, 16))
    assert torch.equal(down.parameter[2], torch.arange(256.0).reshape(16, 16).T)
    assert not any("bias" in name or "router" in name for name in found)


@pytest.mark.parametrize("width", [24, 8])
def test_parallel_experts_have_no_expert_in_their_name(width: int) -> None:
    model = jetmoe(intermediate_size=width)  # 8: as many out (gate and up) as in
    found = named(model)
    up = found["model.layers.0.mlp.input_linear.3"]
    assert up.parameter_name == "model.layers.0.mlp.input_linear.weight"
    assert up.shape == (2 * width, 16)
    assert not up.transposed
    assert "model.layers.1.self_attention.experts.output_linear.0" in found


def test_patterns_choose_experts() -> None:
    model = mixtral()
    chosen = matrices(model, ["experts.*.down_proj"], ["re:.*experts\\.[12]\\."])
    assert [m.name.split("layers.")[1] for m in chosen] == [
        f"{block}.mlp.experts.{e}.down_proj" for block in (0, 1) for e in (0, 3)
    ]
    assert len(matrices(model, ["MixtralExperts"])) == 16


def test_masks_and_sparsity_count_experts() -> None:
    model = mixtral()
    name = "model.layers.0.mlp.experts.1.gate_up_proj"
    named(model)[name].write(torch.zeros(48, 16))
    assert not masks(model)[name].any()
    total = sum(m.weight.numel() for m in matrices(model))
    assert sparsity(model) == pytest.approx(48 * 16 / total)


def test_experts_in_one_flat_matrix_are_refused() -> None:
    class DbrxLikeExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.ones(4 * 8, 16))
            self.w1_bias = nn.Parameter(torch.ones(4, 8))

    with pytest.raises(ModelError, match=r"DbrxLikeExperts holds .* one matrix \(0\.w1\)"):
        refuse_flat(nn.ModuleList([DbrxLikeExperts()]))
