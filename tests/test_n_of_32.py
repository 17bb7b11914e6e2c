"""16:32 and the like from the command line to a loaded model: masks of 32 neighbours in every room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from streamed import save_llama, write_text

import llmprune
from llmprune.cli import main
from llmprune.kernels import held_bitmap, prepare
from llmprune.runtime.linear import SparseLinear


@pytest.mark.parametrize(
    ("pattern", "method"), [("16:32", "wanda"), ("10:32", "sparsegpt"), ("8:32", "magnitude")]
)
def test_n_of_32_from_end_to_end(
    pattern: str,
    method: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    n = int(pattern.partition(":")[0])
    changes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    model, out = save_llama(tmp_path / "model", **changes), tmp_path / "out"
    command = ["--model", model, "--calibration", write_text(tmp_path / "text.txt"), "--seqlen", 16]
    command += ["--samples", 4, "--sparsity", pattern, "--method", method, "--save", out]
    command += ["--format", "sparse", "--no-eval", "--quiet", "--dtype", "bfloat16"]
    assert main([str(part) for part in command]) == 0
    capsys.readouterr()

    assert main(["inspect", str(out), "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    patterns = {row["pattern"] for row in told["tensors"] if row.get("pattern")}
    assert patterns == {pattern}

    assert main(["convert", str(out), str(tmp_path / "dense"), "--format", "dense", "--quiet"]) == 0
    dense = llmprune.load(tmp_path / "dense", dtype=torch.bfloat16, progress=False)
    sparse = llmprune.load(out, dtype=torch.bfloat16, progress=False)
    found = {name: m for name, m in sparse.named_modules() if isinstance(m, SparseLinear)}
    assert len(found) == 14
    for name, layer in found.items():
        weight = dense.get_submodule(name).weight
        assert layer.pattern == pattern
        assert torch.equal(layer.expanded(), weight)
        assert int((weight != 0).unflatten(1, (-1, 32)).sum(-1).max()) == n
    monkeypatch.setattr(held_bitmap.BitmapN, "static", held_bitmap.BitmapN._misfit)
    monkeypatch.setattr(held_bitmap.BitmapN, "unavailable", lambda self, device: None)
    assert prepare(sparse) == {f"bitmap {pattern}": 14}
    assert torch.equal(layer.expanded(), weight)
