"""from_pretrained and save_pretrained of sparse checkpoints, held against the dense model they came from."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sparse_files import prune, sparse_folder
from tiny import llama
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Qwen3MoeConfig,
)

import llmprune
from llmprune.runtime.linear import SparseLinear
from llmprune.runtime.seats import packed_weights

IDS = torch.arange(12).reshape(2, 6)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


def contents(folder: Path) -> dict[str, Any]:
    """Everything in a folder's files: which tensors each holds, their bytes, and the metadata."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        found[path.name] = json.loads(path.read_text())
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            # safetensors writes the entries of the metadata in no particular order
            found[path.name] = {"metadata": file.metadata()}
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)
                raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
                found[path.name][key] = str(tensor.dtype), tuple(tensor.shape), raw
    return found


def equal(left: nn.Module, right: nn.Module) -> bool:
    """Whether two dense models have the same weights, bit for bit."""
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(
        torch.equal(a[k].contiguous().view(torch.uint8), b[k].contiguous().view(torch.uint8))
        for k in a
    )


@pytest.fixture(scope="module")
def dense() -> Any:
    model = llama().eval()
    prune(model)
    return model


@pytest.fixture(scope="module")
def folder(dense: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse_folder(dense, tmp_path_factory.mktemp("sparse"))


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, LlamaForCausalLM])
def test_it_loads_packed_and_computes_the_same(kind: Any, dense: Any, folder: Path) -> None:
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    layers = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    assert layers
    assert all(type(m) is SparseLinear for m in layers)
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(logits(model), logits(dense))


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, LlamaForCausalLM])
def test_it_expands_when_asked_to(kind: Any, dense: Any, folder: Path) -> None:
    with pytest.warns(UserWarning, match="loading attributes"):
        model, info = kind.from_pretrained(
            folder,
            output_loading_info=True,
            quantization_config=llmprune.SparseConfig(expand=True),
        )
    assert not any(info.values())
    assert not any(isinstance(m, SparseLinear) for m in model.modules())
    assert equal(model, dense)
    assert not hasattr(model.config, "quantization_config")


def test_an_expanded_model_is_saved_dense(dense: Any, folder: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(
        folder, quantization_config=llmprune.SparseConfig(expand=True)
    )
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert equal(LlamaForCausalLM.from_pretrained(tmp_path), dense)


def test_dequantize_gives_the_dense_model(dense: Any, folder: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    model = model.dequantize()
    assert equal(model, dense)
    model.save_pretrained(tmp_path)
    assert equal(LlamaForCausalLM.from_pretrained(tmp_path), dense)


@pytest.mark.parametrize("shard", ["50GB", 2000, 700])
def test_saving_and_saving_again_gives_the_same(
    shard: Any, dense: Any, folder: Path, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "a", max_shard_size=shard)
    again, info = LlamaForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(again), logits(dense))
    again.save_pretrained(tmp_path / "b", max_shard_size=shard)
    first = contents(tmp_path / "a")
    assert first == contents(tmp_path / "b")
    if shard == 700:  # parts of a matrix in two files, which must not matter
        files = [set(found) for name, found in first.items() if name.endswith(".safetensors")]
        values = {key.removesuffix("_values") for keys in files for key in keys}
        assert any(f"{v}_values" in k and f"{v}_bitmap" not in k for v in values for k in files)


def test_it_trains_only_what_is_asked_to(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "model.norm.weight" in trained
    assert not [n for n in trained if n.endswith("_values")]
    quantizer = model.hf_quantizer
    assert quantizer.is_trainable
    assert quantizer.is_qat_trainable
    assert quantizer.is_compileable
    assert quantizer.is_serializable()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_cast_as_dense_weights_are(
    dtype: torch.dtype, dense: Any, folder: Path, tmp_path: Path
) -> None:
    dense.save_pretrained(tmp_path)
    plain = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert equal(model.dequantize(), plain)


def test_a_model_that_was_cast_is_saved_in_its_new_dtype(folder: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "a")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "a")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    again.save_pretrained(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert {p.dtype for p in model.half().float().parameters()} == {torch.float32}
    assert equal(again.dequantize().half().float(), model.dequantize())


def test_conv1d_and_tied_embeddings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    dense = GPT2LMHeadModel(config).eval()
    prune(dense)
    model, info = AutoModelForCausalLM.from_pretrained(
        sparse_folder(dense, tmp_path / "sparse"), output_loading_info=True
    )
    assert not any(info.values())
    assert type(model.transformer.h[0].attn.c_attn) is SparseLinear
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.allclose(logits(model), logits(dense), atol=1e-6)
    model.save_pretrained(tmp_path / "a")
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert equal(model.dequantize(), dense)


COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
}
MIXTURES: dict[str, Callable[[], Any]] = {
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **COMMON, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=8
    ),
    "mixtral": lambda: MixtralConfig(**COMMON, num_local_experts=4, tie_word_embeddings=True),
    "gpt_oss": lambda: GptOssConfig(
        **COMMON, num_local_experts=4, head_dim=8, num_experts_per_tok=2, dtype="bfloat16"
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**COMMON, "num_key_value_heads": 4},
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
}


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(dense model, sparse folder of it) of a family whose files hold experts otherwise than the model."""
    torch.manual_seed(0)
    config = MIXTURES[request.param]()
    dense = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32).eval()
    prune(dense)
    return dense, sparse_folder(dense, tmp_path_factory.mktemp(request.param), shard="20KB")


def test_experts_stay_packed(mixture: Any, tmp_path: Path) -> None:
    dense, folder = mixture
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    names = packed_weights(model)
    assert any("experts" in name and held.values.numel() for name, held in names.items())
    assert torch.allclose(logits(model), logits(dense), atol=1e-5)
    model.save_pretrained(tmp_path / "a", max_shard_size=9000)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(info.values())
    assert packed_weights(again).keys() == names.keys()
    again.save_pretrained(tmp_path / "b", max_shard_size=9000)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert equal(again.dequantize(), dense)


def test_experts_are_expanded(mixture: Any) -> None:
    dense, folder = mixture
    config = llmprune.SparseConfig(expand=True)
    with pytest.warns(UserWarning, match="loading attributes"):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, quantization_config=config
        )
    assert not any(info.values())
    assert equal(model, dense)


def test_a_model_packed_in_memory_is_saved_packed(mixture: Any, tmp_path: Path) -> None:
    dense, folder = mixture
    model = copy.deepcopy(dense)
    llmprune.sparsify(model)
    model.save_pretrained(tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "b")
    assert contents(tmp_path / "a").keys() == contents(tmp_path / "b").keys()
    llmprune.densify(model)
    assert equal(model, dense)
    model.save_pretrained(tmp_path / "c")
    dense.save_pretrained(tmp_path / "d")
    files = [contents(tmp_path / name)["model.safetensors"] for name in ("c", "d")]
    assert files[0] == files[1]


def test_kept_zeros_and_dense_experts_survive(tmp_path: Path) -> None:
    """Of an expert that nothing was taken from, nothing is said; a kept zero is kept by its bit."""
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(MIXTURES["qwen3_moe"]()).eval()
    prune(dense)
    kept = "model.layers.0.mlp.experts.1.gate_proj.weight"
    with torch.no_grad():
        dense.model.layers[0].mlp.experts.gate_up_proj[1, :16] = torch.randn(16, 32)
    folder = sparse_folder(dense, tmp_path / "sparse")
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        about = opened.metadata()
    assert kept in tensors
    zero = "model.layers.0.mlp.experts.2.up_proj.weight_values"
    tensors[zero][3:5] = torch.tensor([0.0, -0.0])
    save_file(tensors, file, metadata=about)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "a")
    saved = contents(tmp_path / "a")["model.safetensors"]
    before = contents(folder)["model.safetensors"]
    assert {k: saved[k] for k in (kept, zero)} == {k: before[k] for k in (kept, zero)}
    assert kept + "_values" not in saved


MAPS: dict[str, Any] = {
    "cpu": "cpu",
    "auto": "auto",
    "disk": {"model.layers.0": "cpu", "model.layers.1": "disk"}
    | dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"),
}


@pytest.mark.parametrize("where", MAPS)
def test_device_maps(where: str, mixture: Any, tmp_path: Path) -> None:
    dense, folder = mixture
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=MAPS[where], offload_folder=str(tmp_path / "offload")
    )
    assert torch.allclose(logits(model), logits(dense), atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that weights on a disk are read to be saved
        model.save_pretrained(tmp_path / "a")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_values_and_bitmaps_that_disagree_are_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        about = opened.metadata()
    tensors["model.layers.1.mlp.up_proj.weight_bitmap"][0, 0] ^= 1
    save_file(tensors, file, metadata=about)
    with pytest.raises(llmprune.LLMPruneError, match=r"layers.1.mlp.up_proj.weight: .* keeps"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_dense_checkpoint_is_refused_with_a_sparse_config(dense: Any, tmp_path: Path) -> None:
    dense.save_pretrained(tmp_path)
    with pytest.raises(llmprune.LLMPruneError, match="this one is dense"):
        LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=llmprune.SparseConfig())


def test_another_version_of_the_format_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(llmprune.LLMPruneError, match="version 3 "):
        LlamaForCausalLM.from_pretrained(tmp_path)


ORDERS = {
    "llmprune first": "import llmprune, transformers",
    "transformers first": "import transformers, transformers.quantizers.auto, llmprune",
    "ours first, and again": "import llmprune; llmprune.SparseConfig; import transformers, importlib; "
    "importlib.reload(llmprune)",
}


@pytest.mark.parametrize("order", ORDERS)
def test_import_llmprune_is_enough(order: str, folder: Path) -> None:
    code = (
        f"{ORDERS[order]}\n"
        "for kind in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):\n"
        f"    print(type(kind.from_pretrained({str(folder)!r}).model.layers[0].mlp.up_proj).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["SparseLinear"] * 2, done.stderr
    assert "Unknown quantization type" not in done.stderr


def test_a_failed_import_of_transformers_does_not_lose_the_registration() -> None:
    code = (
        "import sys, llmprune\n"
        "sys.modules['transformers.quantizers.quantizer_aqlm'] = None\n"
        "try: import transformers.quantizers.auto\n"
        "except ImportError: pass\n"
        "else: raise SystemExit('imported')\n"
        "del sys.modules['transformers.quantizers.quantizer_aqlm']\n"
        "import transformers.quantizers.auto as auto\n"
        "assert 'llmprune' in auto.AUTO_QUANTIZER_MAPPING\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
