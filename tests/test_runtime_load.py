"""llmprune.load: what it gives, what it refuses, and the memory that it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sparse_files import prune, sparse_folder
from test_quantizer import contents, equal, logits
from tiny import llama
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import llmprune
from llmprune.kernels.packed import Packed, pack, unpack
from llmprune.runtime.linear import SparseLinear
from llmprune.runtime.rows import rearranged
from llmprune.runtime.seats import packed_weights


@pytest.fixture(scope="module")
def dense() -> Any:
    model = llama().eval()
    model.generation_config = GenerationConfig(max_new_tokens=7, bos_token_id=0, eos_token_id=1)
    prune(model)
    return model


@pytest.fixture(scope="module")
def folder(dense: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse_folder(dense, tmp_path_factory.mktemp("sparse"), shard="3KB")


def test_matrices_stay_packed(dense: Any, folder: Path) -> None:
    model = llmprune.load(folder)
    assert isinstance(model.model.layers[0].mlp.up_proj, SparseLinear)
    assert not model.training
    assert model.generation_config.max_new_tokens == 7
    assert torch.equal(logits(model), logits(dense))


def test_or_are_expanded(dense: Any, folder: Path) -> None:
    model = llmprune.load(str(folder), sparse=False, device="cpu")
    assert not packed_weights(model)
    assert equal(model, dense)


def test_a_dense_checkpoint_loads_as_it_is(dense: Any, tmp_path: Path) -> None:
    dense.save_pretrained(tmp_path)
    assert equal(llmprune.load(tmp_path), dense)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
@pytest.mark.parametrize("sparse", [True, False])
def test_in_another_dtype(dtype: Any, sparse: bool, dense: Any, folder: Path) -> None:
    model = llmprune.load(folder, dtype=dtype, sparse=sparse)
    wanted = torch.bfloat16 if dtype == "bfloat16" else dtype
    assert {p.dtype for p in model.parameters()} == {wanted}
    llmprune.densify(model)
    plain = llama()
    plain.load_state_dict(dense.state_dict())
    assert equal(model, plain.to(wanted))


def test_it_is_saved_as_from_pretrained_would(folder: Path, tmp_path: Path) -> None:
    llmprune.load(folder).save_pretrained(tmp_path / "a")
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dtype": "float8"}, "no dtype 'float8'"),
        ({"dtype": torch.int8}, "no model computes in torch.int8"),
        ({"device": "gpu"}, "no device 'gpu'"),
        ({"model": "/no/such/folder"}, "no folder"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], told: str, folder: Path) -> None:
    with pytest.raises(llmprune.LLMPruneError, match=told) as error:
        llmprune.load(**{"model": folder, **options})
    assert "\n" not in str(error.value)


def _spoiled(folder: Path, copy: Path, change: Any) -> Path:
    """A copy of a folder whose tensors went through `change`, in one file."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, str] = {}
    described: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            about |= opened.metadata()
            described |= json.loads(opened.metadata().get("llmprune.packed", "{}"))
    change(tensors, described)
    about["llmprune.packed"] = json.dumps(described)
    copy.mkdir()
    save_file(tensors, copy / "model.safetensors", metadata=about)
    for name in ("config.json", "generation_config.json"):
        (copy / name).write_bytes((folder / name).read_bytes())
    return copy


MATRIX = "model.layers.1.mlp.up_proj.weight"


def test_a_bitmap_that_does_not_fit(folder: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], described: Any) -> None:
        tensors[f"{MATRIX}_bitmap"][0, 0] ^= 1

    spoiled = _spoiled(folder, tmp_path / "spoiled", change)
    for sparse in (True, False):
        with pytest.raises(llmprune.LLMPruneError, match="bit") as error:
            llmprune.load(spoiled, sparse=sparse)
        assert "\n" not in str(error.value)


def test_missing_weights(folder: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], described: Any) -> None:
        del tensors[f"{MATRIX}_bitmap"], tensors[f"{MATRIX}_values"], described[MATRIX]
        tensors.pop(MATRIX, None)

    spoiled = _spoiled(folder, tmp_path / "spoiled", change)
    with pytest.raises(
        llmprune.LLMPruneError, match=r"lacks 1 of .* model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        llmprune.load(spoiled)


def test_a_shape_that_the_config_does_not_have(folder: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], described: Any) -> None:
        described[MATRIX]["shape"][0] -= 1
        dense = torch.ones(described[MATRIX]["shape"])
        packed = pack(dense)
        tensors[f"{MATRIX}_bitmap"], tensors[f"{MATRIX}_values"] = packed.bitmap, packed.values

    spoiled = _spoiled(folder, tmp_path / "spoiled", change)
    with pytest.raises(llmprune.LLMPruneError, match=r"shape \[23, 16\].* \[24, 16\]"):
        llmprune.load(spoiled)


PEAK = """
import sys, torch, llmprune
import transformers, llmprune.runtime.load
transformers.PreTrainedModel
def peak():
    return int(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
before = peak()
model = llmprune.load(sys.argv[1], progress=False)
print(before, peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_memory(kind: str, tmp_path: Path) -> None:
    """Peak RSS of a process that loads: what is packed, one shard, and half a GiB for everything else."""
    common = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 8,
        "vocab_size": 8000,
        "dtype": "bfloat16",
    }
    with torch.device("meta"):
        if kind == "llama":
            model: Any = LlamaForCausalLM(LlamaConfig(**common, num_hidden_layers=4))
        else:
            config = MixtralConfig(**common, num_hidden_layers=2, num_local_experts=8)
            model = MixtralForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.view(torch.int16).random_(generator=random).bitwise_and_(0x3FFF)
    prune(model)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.data.fill_(1)  # nobody prunes a router
    sparse_folder(model, tmp_path, shard="40MB")
    sizes = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert len(sizes) > 2
    del model
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    before, peak = (int(kib) * 1024 for kib in done.stdout.split())
    # of everything else, what a torch built for CUDA takes by being imported is not the loader's
    assert peak <= sum(sizes) + max(sizes) + max(2**29, before + 2**27)


def _packed(*shape: int, seed: int = 0) -> Packed:
    random = torch.Generator().manual_seed(seed)
    dense = torch.randn(shape, generator=random)
    dense[torch.rand(shape, generator=random) < 0.5] = 0
    dense[..., :1, :] = 0  # a row without a value
    return pack(dense)


ROWS: dict[str, Any] = {
    "stacked": lambda t: {"c": torch.stack([t["a"], t["b"]])},
    "one below the other": lambda t: {"c": torch.cat([t["b"], t["a"]])},
    "merged and set below": lambda t: {
        "c": torch.cat([torch.stack([t["a"], t["b"]]), torch.stack([t["b"], t["a"]])], dim=1)
    },
    "taken apart": lambda t: dict(zip("cd", t["a"].chunk(2), strict=True)),
    "halves in turn": lambda t: {"c": t["a"].reshape(2, 3, -1).transpose(0, 1).reshape(6, -1)},
}
OTHER: dict[str, Any] = {
    "transposed": lambda t: {"c": t["a"].T},
    "side by side": lambda t: {"c": torch.cat([t["a"], t["b"]], dim=1)},
    "columns turned around": lambda t: {"c": t["a"].flip(1)},
    "columns apart": lambda t: dict(zip("cd", t["a"].split([4, 5], dim=1), strict=True)),
}


@pytest.mark.parametrize("change", ROWS)
def test_rows_move_packed(change: str) -> None:
    sources = {"a": _packed(6, 9), "b": _packed(6, 9, seed=1)}
    found = rearranged(sources, ROWS[change])
    expected = ROWS[change]({name: unpack(packed) for name, packed in sources.items()})
    assert found is not None
    assert found.keys() == expected.keys()
    for name, dense in expected.items():
        assert torch.equal(unpack(found[name]), dense)
        assert found[name].shape == tuple(dense.shape)


@pytest.mark.parametrize("change", OTHER)
def test_what_moves_more_than_rows_is_left(change: str) -> None:
    assert rearranged({"a": _packed(6, 9), "b": _packed(6, 9, seed=1)}, OTHER[change]) is None
