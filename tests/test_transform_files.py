"""Transforms from disk to disk: the same bits as in memory, resumed, untied, and said in the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from transformers import AutoModelForCausalLM

import llmprune
from llmprune import job, stream, transformed
from llmprune.choices import ModelChoice, Voice
from llmprune.cli import main
from llmprune.errors import CheckpointError
from llmprune.order import Job
from llmprune.run import PruneConfig

QUIET = Voice(quiet=True)
SETTINGS = {"steps": 3, "sweeps": 3}


def saved(kind: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A tiny checkpoint with gains that are not one."""
    model = families.tiny(kind)
    random = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=random)
    model.to(dtype).save_pretrained(folder)
    return folder


def config(*names: str, **more: Any) -> PruneConfig:
    settings = {
        k: v for k, v in SETTINGS.items() if {"steps": "rotate", "sweeps": "permute"}[k] in names
    }
    given = {"method": "wanda", "sparsity": "2:4", **more}
    return PruneConfig(
        calibration=families.WINDOWS,
        batch_size=2,
        transforms=names,
        transform_settings=settings,
        **given,
    )


def run(dense: Path, target: Path, asked: PruneConfig, **more: Any) -> Any:
    choice = ModelChoice(str(dense), device="cpu")
    return job.run(Job(choice, asked, QUIET, save=target, evaluate=False, **more))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return dict(model.state_dict())


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2", "mixtral"])
def test_the_same_bits_in_memory_and_from_disk(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, asked = saved(kind, tmp_path / "dense"), config("rotate", "permute")
    streamed = run(dense, tmp_path / "streamed", asked)
    monkeypatch.setattr(job, "run_to_disk", lambda *args: None)
    whole = run(dense, tmp_path / "whole", asked)
    assert streamed.transforms == whole.transforms
    assert whole.transforms["rotate"]["done"] == ["stream", "values"]
    one, two = tensors(tmp_path / "streamed"), tensors(tmp_path / "whole")
    assert one.keys() == two.keys()
    assert not [name for name in one if not torch.equal(one[name], two[name])]
    note = json.loads((tmp_path / "streamed" / "llmprune.json").read_text())
    assert note["transforms"] == streamed.transforms
    assert note["recipe"]["transforms"] == ["rotate", "permute"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("kind", ["gemma", "qwen2"])
def test_a_tied_head_is_saved_with_weights_of_its_own(kind: str, tmp_path: Path) -> None:
    model = families.tiny(kind)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.model.norm.weight.data += 0.5
    model.save_pretrained(tmp_path / "dense")
    run(tmp_path / "dense", tmp_path / "out", config("fold"))
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_nothing_is_pruned_away_from_the_function(tmp_path: Path) -> None:
    """With next to nothing pruned, the saved model computes what the dense one did."""
    dense = saved("llama", tmp_path / "dense", torch.float32)
    run(dense, tmp_path / "out", config("rotate", sparsity=0.004, method="magnitude"))
    before, after = families.reloaded(dense), families.reloaded(tmp_path / "out")
    other = run(dense, tmp_path / "plain", config(sparsity=0.004, method="magnitude"))
    assert other.transforms == {}
    plain = families.reloaded(tmp_path / "plain")
    scale = before.abs().max()
    assert (after - before).abs().max() < 3 * (plain - before).abs().max() + 1e-4 * scale
    assert (after - before).abs().max() < 0.1 * scale


def test_a_run_that_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, asked, target = saved("llama", tmp_path / "dense"), config("rotate"), tmp_path / "out"
    run(dense, tmp_path / "straight", asked)
    prune, calls = stream.Streaming._block, []

    def once(self: Any, index: int, hidden: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        prune(self, index, hidden)

    with monkeypatch.context() as broken:
        broken.setattr(stream.Streaming, "_block", once)
        with pytest.raises(KeyboardInterrupt):
            run(dense, target, asked)
    assert transformed.place(target).is_dir()
    make = transformed._make
    monkeypatch.setattr(transformed, "_make", lambda *a: calls.append(1) or make(*a))
    with pytest.raises(llmprune.LLMPruneError, match="transform"):
        run(dense, target, replace(asked, transforms=["fold"], transform_settings={}))
    assert calls == [1]  # something else is made anew, and then refused
    run(dense, target, asked)
    one, two = tensors(target), tensors(tmp_path / "straight")
    assert not [name for name in one if not torch.equal(one[name], two[name])]
    assert not transformed.place(target).exists()


def test_a_disk_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = saved("llama", tmp_path / "dense")
    full = type("Usage", (), {"free": 10})()
    monkeypatch.setattr(transformed.shutil, "disk_usage", lambda path: full)
    with pytest.raises(CheckpointError, match="for the transformed model"):
        run(dense, tmp_path / "out", config("fold"))
    assert not list(tmp_path.glob(".*"))


def test_what_is_computed_in_float32_is_rounded_to_what_is_saved() -> None:
    model = families.tiny("llama")
    stored = {name: torch.bfloat16 for name, _ in model.named_parameters()}
    from llmprune.run import prune_with

    model.bfloat16().float()
    prune_with(config("rotate"), model, progress=False, stored=stored)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, parameter.bfloat16().float()), name


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = saved("llama", tmp_path / "dense")
    import numpy as np

    np.save(tmp_path / "ids.npy", families.WINDOWS.numpy())
    argv = ["--model", str(dense), "--sparsity", "2:4", "--calibration", str(tmp_path / "ids.npy")]
    argv += ["--transform", "fold", "permute", "--transform-set", "sweeps=2", "--no-eval"]
    assert main([*argv, "--json", "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["transforms"]["permute"]["done"] == ["features", "values", "stream"]
    assert report["recipe"]["transform_settings"]["permute"]["sweeps"] == 2
    assert main([*argv, "--transform-set", "swaps=2"]) == 2
    assert "no setting 'swaps'" in capsys.readouterr().err
    assert main([*argv, "--transform-set", "swaps"]) == 2
    assert "--transform-set takes key=value" in capsys.readouterr().err
