"""Saving: equal after a reload, verified from the files, and nothing at all when it goes wrong."""

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    SiglipVisionConfig,
)

from llmprune.checkpoint import save as saving
from llmprune.checkpoint import target as targets
from llmprune.checkpoint.save import Expected, check_saveable, check_target, save, verify
from llmprune.checkpoint.verify import expectations, find_key
from llmprune.errors import CheckpointError, ConfigError, ModelError
from llmprune.pattern import NM, Pattern, Unstructured
from llmprune.report import LayerReport, Report

GB = 10**9
UP = "model.layers.0.mlp.up_proj"


def llama(tied: bool = False, layers: int = 2) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ).eval()


def pruned(model: PreTrainedModel, pattern: Pattern) -> tuple[Report, list[Expected]]:
    """Zero weights of every block matrix by magnitude, as a run would, rounded to bfloat16."""
    layers, transposed = [], []
    for name, module in model.named_modules():
        conv = type(module).__name__ == "Conv1D"
        if not (conv or isinstance(module, torch.nn.Linear)) or name == "lm_head":
            continue
        weight = module.weight.detach().T if conv else module.weight.detach()
        keep = pattern.keep(weight.abs())
        result = (weight * keep).bfloat16().float()
        module.weight.data.copy_(result.T if conv else result)
        shape = (weight.shape[0], weight.shape[1])
        kept = int(keep.sum())
        layers.append(LayerReport(name, shape, kept, 1 - kept / keep.numel(), 0.1, None, 0, 0.0))
        if conv:
            transposed.append(name)
    report = Report(recipe={"method": "magnitude"}, model={}, layers=layers)
    return report, expectations(layers, pattern, transposed=transposed)


def bf16(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """Round every parameter to bfloat16, and say that it is stored so."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return {name: torch.bfloat16 for name, _ in model.named_parameters()}


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(20)[None]).logits


@pytest.mark.parametrize(
    "pattern", [NM(2, 4), Unstructured(0.5, "row"), Unstructured(0.3, "matrix")]
)
@pytest.mark.parametrize(
    "build", [llama, gpt2, lambda: llama(tied=True)], ids=["llama", "gpt2", "tied"]
)
def test_reload_gives_equal_logits(tmp_path: Path, build, pattern: Pattern) -> None:
    model = build()
    stored = bf16(model)
    report, expected = pruned(model, pattern)
    check_saveable(model, [e.name for e in expected])
    config = dict(vars(model.config))
    save(model, None, tmp_path / "out", report, card="# card", stored=stored, expected=expected)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert vars(model.config) == config
    saved = json.loads((tmp_path / "out/config.json").read_text())
    assert saved["dtype"] == "bfloat16"
    assert not {"quantization_config", "sparsity_config", "torch_dtype"} & set(saved)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert torch.equal(logits(again), logits(model))
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    )
    assert leftovers(tmp_path) == ["out"]
    assert (tmp_path / "out/README.md").read_text() == "# card"
    assert (
        json.loads((tmp_path / "out/llmprune.json").read_text())["recipe"]["method"] == "magnitude"
    )


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    model = llama(tied=True)
    save(model, None, tmp_path / "out", pruned(model, NM(2, 4))[0], card="", stored=bf16(model))
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_shards_are_verified_and_read_back(tmp_path: Path) -> None:
    model = llama(layers=3)
    report, expected = pruned(model, NM(2, 4))
    save(model, None, tmp_path / "out", report, card="", expected=expected, max_shard_size=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert torch.equal(logits(again), logits(model))


def test_mixed_dtypes_and_buffers(tmp_path: Path) -> None:
    model = llama()
    stored = bf16(model)
    stored["model.norm.weight"] = torch.float32
    rotary = model.model.rotary_emb.inv_freq
    before = rotary.clone()
    save(model, None, tmp_path / "out", pruned(model, NM(2, 4))[0], card="", stored=stored)
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert tensors["model.norm.weight"].dtype == torch.float32
    assert tensors[f"{UP}.weight"].dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq is rotary
    assert torch.equal(rotary, before)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_values_that_bfloat16_cannot_hold_come_back(tmp_path: Path) -> None:
    model = llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    stored = dict.fromkeys(before, torch.bfloat16)
    save(model, None, tmp_path / "out", Report({}, {}, []), card="", stored=stored)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_contradictory_generation_config_is_kept(tmp_path: Path) -> None:
    model = llama()
    model.generation_config = GenerationConfig(do_sample=False, temperature=0.6, top_p=0.9)
    own = model.generation_config
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "plain")
    save(model, None, tmp_path / "out", Report({}, {}, []), card="")
    assert model.generation_config is own
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.generation_config.temperature == 0.6


def test_a_config_that_cannot_be_saved_is_found_before_the_run() -> None:
    model = llama()
    model.config.temperature = 0.5
    with pytest.raises(ModelError, match="generation parameters"):
        check_saveable(model, [])


@pytest.mark.parametrize(
    "where", ["weights", "config", "verify", "flush", "rename", "second rename"]
)
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError, RuntimeError])
def test_an_interrupted_save_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, overwrite: bool, kind: type
) -> None:
    model = llama()
    out = tmp_path / "out"
    if overwrite:
        save(model, None, out, Report({"run": 1}, {}, []), card="first")
    calls = []

    def fail(*_: object, **__: object) -> None:
        calls.append(1)
        raise kind("stop")

    rename = Path.rename

    def second(self: Path, to: Path) -> Path:
        calls.append(1)
        if ".partial-" in self.name:
            raise kind("stop")
        return rename(self, to)

    match where:
        case "weights":
            monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fail)
        case "config":
            monkeypatch.setattr(saving, "_settle_config", fail)
        case "verify":
            monkeypatch.setattr(saving, "verify", fail)
        case "flush":
            monkeypatch.setattr(targets, "_flush_one", fail)
        case "rename":
            monkeypatch.setattr(Path, "rename", second if not overwrite else fail)
        case "second rename":
            monkeypatch.setattr(Path, "rename", second)
    with pytest.raises(CheckpointError if kind is OSError else kind):
        save(
            model, None, out, Report({"run": 2}, {}, []), card="second", overwrite=overwrite,
            stored=bf16(model),
        )  # fmt: skip
    monkeypatch.undo()
    assert calls
    assert leftovers(tmp_path) == (["out"] if overwrite else [])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    if overwrite:
        assert (out / "README.md").read_text() == "first"
        AutoModelForCausalLM.from_pretrained(out)


def test_created_parents_go_with_a_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "verify", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(llama(), None, tmp_path / "a/b/out", Report({}, {}, []), card="")
    assert leftovers(tmp_path) == []


def test_overwrite_replaces_and_otherwise_refuses(tmp_path: Path) -> None:
    out = tmp_path / "out"
    save(llama(layers=3), None, out, Report({}, {}, []), card="first", max_shard_size=20_000)
    with pytest.raises(ConfigError, match="exists"):
        save(llama(), None, out, Report({}, {}, []), card="second")
    save(llama(), None, out, Report({}, {}, []), card="second", overwrite=True)
    assert (out / "README.md").read_text() == "second"
    assert [p.name for p in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert leftovers(tmp_path) == ["out"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk/real")
    save(llama(), None, tmp_path / "out", Report({}, {}, []), card="")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk/real/config.json").is_file()


def _dead_pid() -> int:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


def test_what_a_dead_process_left_is_settled(tmp_path: Path) -> None:
    host, dead = socket.gethostname(), _dead_pid()
    stale = tmp_path / f".out.partial-{host}-{dead}"
    alive = tmp_path / f".out.partial-{host}-{os.getppid()}"
    other = tmp_path / f".other.partial-{host}-{dead}"
    for folder in (stale, alive, other):
        folder.mkdir()
    save(llama(), None, tmp_path / "out", Report({}, {}, []), card="first")
    assert leftovers(tmp_path) == sorted([alive.name, other.name, "out"])
    # killed between the two renames: the old checkpoint comes back, and is then in the way again
    (tmp_path / "out").rename(tmp_path / f".out.old-{host}-{dead}")
    with pytest.raises(ConfigError, match="exists"):
        save(llama(), None, tmp_path / "out", Report({}, {}, []), card="second")
    assert (tmp_path / "out/README.md").read_text() == "first"


def test_check_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_target(tmp_path / "a/b/c", False, 10)
    assert leftovers(tmp_path) == []
    with pytest.raises(CheckpointError, match=r"needs 1000.0 TB.* free"):
        check_target(tmp_path / "a", False, 10**15)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match="is a file"):
        check_target(file, True, 10)
    with pytest.raises(ConfigError, match="is a file"):
        check_target(file / "below", True, 10)
    home = tmp_path / "home"
    (home / "photos").mkdir(parents=True)
    (home / "config.json").write_text('{"editor": "vi"}')
    with pytest.raises(ConfigError, match="exists"):
        check_target(home, False, 10)
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        check_target(home, True, 10)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", True, 10)
    model = tmp_path / "models/llama"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "llama"}')
    check_target(model, True, 10, source="meta-llama/Llama-3.2-1B")
    for target in (model, tmp_path / "models/../models/llama", tmp_path / "models"):
        with pytest.raises(ConfigError, match="holds the model"):
            check_target(target, True, 10, source=model)
    monkeypatch.setattr(os.path, "ismount", lambda _: True)
    with pytest.raises(ConfigError, match="mount point"):
        check_target(model, True, 10)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc to try")
    with pytest.raises(CheckpointError, match="cannot write beside"):
        check_target(Path("/proc/out"), False, 0)
    with pytest.raises(CheckpointError, match="could not be written"):
        save(llama(), None, Path("/proc/out"), Report({}, {}, []), card="")


@pytest.fixture
def small_disk(tmp_path: Path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if mount is None or os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    with pytest.raises(CheckpointError, match="free"):
        check_target(small_disk / "out", False, GB)
    model = llama(layers=12)
    with pytest.raises(CheckpointError, match=r"could not be written.*[Nn]o space"):
        save(model, None, small_disk / "out", Report({}, {}, []), card="")
    assert leftovers(small_disk) == []
    save(llama(layers=1), None, small_disk / "out", Report({}, {}, []), card="")
    (small_disk / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="mount point"):
        check_target(small_disk, True, 0)


def _written(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


def test_verify_finds_what_is_wrong(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 16)
    keep = NM(2, 4).keep(weight.abs())
    good = weight * keep
    entry = Expected(UP, (8, 16), 64, NM(2, 4))
    key = f"{UP}.weight"
    verify(_written(tmp_path / "a", **{key: good}), [entry])
    verify(_written(tmp_path / "a", **{key: good.T}), [Expected(UP, (8, 16), 64, NM(2, 4), True)])
    dense = good.clone()
    dense[0, :4] = 1
    moved = good.clone()  # the right count in the wrong places
    moved[0, :8] = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])
    infinite = good.clone()
    infinite[good != 0] = torch.inf
    cases = [
        (dense, r"holds 66 nonzero weights, 64 were to stay"),
        (moved, r"1 groups that are not 2:4"),
        (infinite, r"64 NaN or Inf"),
        (good.T, r"shape \(16, 8\), expected \(8, 16\)"),
    ]
    for tensor, message in cases:
        with pytest.raises(CheckpointError, match=message) as error:
            verify(_written(tmp_path / "a", **{key: tensor}), [entry])
        assert UP in str(error.value)
    rows = Expected(UP, (8, 16), 64, Unstructured(0.5, "row"))
    verify(_written(tmp_path / "a", **{key: good}), [rows])
    uneven = torch.zeros(8, 16)
    uneven[:4] = 1
    with pytest.raises(CheckpointError, match="keeps 16 of 16 in a row, 8 were"):
        verify(_written(tmp_path / "a", **{key: uneven}), [rows])
    verify(tmp_path / "a", [Expected(UP, (8, 16), 64, Unstructured(0.5, "row"), exact=False)])
    verify(tmp_path / "a", [Expected(UP, (8, 16), 64, Unstructured(0.5, "matrix"))])
    with pytest.raises(CheckpointError, match="no weight for model"):
        verify(tmp_path / "a", [Expected("model.layers.1.mlp.up_proj", (8, 16), 64)])
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(CheckpointError, match="no folder or file"):
        verify(tmp_path / "a", [entry])


def test_a_failed_verification_promotes_nothing(tmp_path: Path) -> None:
    model = llama()
    report, expected = pruned(model, NM(2, 4))
    model.get_parameter(f"{UP}.weight").data.fill_(1)
    with pytest.raises(CheckpointError, match=rf"{UP} holds 1536 nonzero weights, 768"):
        save(model, None, tmp_path / "out", report, card="", expected=expected)
    assert leftovers(tmp_path) == []


def test_a_nested_model_under_other_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, dtype="float32",
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config)
    stored = bf16(model)
    name = "model.language_model.layers.1.mlp.up_proj"
    weight = model.get_parameter(f"{name}.weight")
    weight.data.mul_(NM(2, 4).keep(weight.detach().abs()))
    check_saveable(model, [name])
    expected = [Expected(name, (64, 32), 1024, NM(2, 4))]
    save(
        model, None, tmp_path / "out", Report({}, {}, []), card="", stored=stored, expected=expected
    )
    keys = load_file(tmp_path / "out/model.safetensors").keys()
    assert f"{name}.weight" not in keys
    assert "language_model.model.layers.1.mlp.up_proj.weight" in keys
    saved = json.loads((tmp_path / "out/config.json").read_text())
    assert saved["text_config"]["dtype"] == saved["dtype"] == "bfloat16"


def test_keys_are_found_under_other_prefixes() -> None:
    keys = [
        "language_model.model.layers.0.mlp.up_proj.weight",
        "language_model.model.layers.10.mlp.up_proj.weight",
        "vision_tower.layers.0.mlp.up_proj.weight",
        "lm_head.weight",
    ]
    assert find_key("model.language_model.layers.0.mlp.up_proj", keys) == keys[0]
    assert find_key("lm_head", keys) == "lm_head.weight"
    assert find_key("transformer.h.1.mlp.c_fc", ["h.1.mlp.c_fc.weight"]) == "h.1.mlp.c_fc.weight"
    with pytest.raises(CheckpointError, match="hold no weight for model"):
        find_key("model.layers.1.mlp.up_proj", keys)
    with pytest.raises(CheckpointError, match="could be"):
        find_key("model.layers.0.mlp.up", ["a.layers.0.mlp.up.weight", "b.layers.0.mlp.up.weight"])


def test_the_weights_are_as_readable_as_the_config(tmp_path: Path) -> None:
    """A server that runs as another user must be able to read both."""
    model = llama()
    report, expected = pruned(model, NM(2, 4))
    save(model, None, tmp_path / "out", report, card="", expected=expected)
    modes = {f.name: f.stat().st_mode for f in (tmp_path / "out").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]
