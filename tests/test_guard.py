"""Without `import llmprune`, transformers must not load a sparse checkpoint with random weights in it.

docs/format.md, The guard, says which guard holds where; here transformers runs in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sparse_files import GUARD, prune, sparse_folder
from tiny import llama
from transformers import MixtralConfig, MixtralForCausalLM

CHILD = """
import json, sys, tempfile
import torch, transformers
assert "llmprune" not in sys.modules
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
kinds = {"auto": transformers.AutoModelForCausalLM, "llama": transformers.LlamaForCausalLM}
kinds["mixtral"] = transformers.MixtralForCausalLM

def attempt(folder, kind, own_config=False, **options):
    if own_config:
        options["config"] = transformers.LlamaConfig.from_pretrained(folder)
        del options["config"].transformers_weights, options["config"].quantization_config
    if "disk" in str(options.get("device_map")):
        options["offload_folder"] = tempfile.mkdtemp()
    try:
        model = kinds[kind].from_pretrained(folder, **options)
    except (ValueError, RuntimeError) as error:
        return type(error).__name__ + ": " + str(error)
    try:
        model(torch.arange(4)[None])
    except (RuntimeError, KeyError, ValueError) as error:
        return "forward: " + str(error)
    return "loaded"

json.dump([attempt(*names, **options) for names, options in json.load(sys.stdin)], sys.stdout)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A sparse Llama, one in shards, and a Mixtral of which the experts alone are packed; without the key."""
    import llmprune

    root = tmp_path_factory.mktemp("guard")
    dense = llama().eval()
    prune(dense)
    made = {"llama": sparse_folder(dense, root / "llama")}
    made["shards"] = sparse_folder(dense, root / "shards", shard="3KB")
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        vocab_size=63,
    )
    moe = MixtralForCausalLM(config).eval()
    prune(moe, least=3)
    made["mixtral"] = sparse_folder(moe, root / "mixtral")
    assert llmprune.SparseConfig
    model = type(dense).from_pretrained(made["llama"])
    model.save_pretrained(root / "saved", max_shard_size=3000)  # by transformers, ours registered
    made["saved"] = root / "saved"
    for name in ("llama", "shards", "mixtral"):
        made[f"{name}, no key"] = _without_key(made[name], root / f"{name} without")
    return {name: str(folder) for name, folder in made.items()}


def _without_key(folder: Path, copy: Path) -> Path:
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    assert config.pop("transformers_weights") == GUARD
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def _device_map(first: str) -> dict[str, str]:
    """The first block on `first`, the other on the disk."""
    rest = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    return {"model.layers.0": first, "model.layers.1": "disk", **dict.fromkeys(rest, "cpu")}


KEY = "ValueError: The transformers file in the config seems to be incorrect"
SIZE = "RuntimeError: You set `ignore_mismatched_sizes` to `False`"
MERGE = "RuntimeError: We encountered some issues during automatic conversion of the weights"
CASES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "auto": ("llama", "auto", {}, KEY),
    "its own class": ("llama", "llama", {}, KEY),
    "shards": ("shards", "auto", {}, KEY),
    "experts": ("mixtral", "auto", {}, KEY),
    "sizes ignored": ("llama", "auto", {"ignore_mismatched_sizes": True}, KEY),
    "disk": ("llama", "auto", {"device_map": _device_map("disk")}, KEY),
    "tensor": ("llama, no key", "auto", {}, SIZE),
    "tensor, its own class": ("llama, no key", "llama", {}, SIZE),
    "tensor, shards": ("shards, no key", "auto", {}, SIZE),
    "tensor, experts": ("mixtral, no key", "auto", {}, MERGE),
    "tensor, experts' own class": ("mixtral, no key", "mixtral", {}, MERGE),
    "tensor, experts, sizes ignored": (
        "mixtral, no key",
        "auto",
        {"ignore_mismatched_sizes": True},
        MERGE,
    ),
    "tensor, cpu": ("llama, no key", "auto", {"device_map": "cpu"}, SIZE),
    "tensor, auto": ("llama, no key", "auto", {"device_map": "auto"}, SIZE),
    "tensor, disk": ("llama, no key", "auto", {"device_map": _device_map("cpu")}, SIZE),
    "tensor, all on disk": (
        "llama, no key",
        "auto",
        {"device_map": _device_map("disk")},
        "forward:",
    ),
    "tensor, own config": ("llama", "llama", {"own_config": True}, SIZE),
    "saved by transformers": ("saved", "auto", {}, SIZE),
    "saved by transformers, all on disk": (
        "saved",
        "auto",
        {"device_map": _device_map("disk")},
        "forward:",
    ),
    "nothing left": ("llama, no key", "auto", {"ignore_mismatched_sizes": True}, "loaded"),
}


@pytest.fixture(scope="module")
def outcomes(folders: dict[str, str]) -> dict[str, str]:
    """What became of every case, all in one process that never imports llmprune."""
    cases = [((folders[folder], kind), options) for folder, kind, options, _ in CASES.values()]
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps(cases), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_what_stops_transformers(case: str, outcomes: dict[str, str]) -> None:
    expected = CASES[case][-1]
    assert outcomes[case].startswith(expected)
    if expected == KEY:
        assert GUARD in outcomes[case]
