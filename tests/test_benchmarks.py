"""The benchmarks that publish figures: they run, and print none for a wrong result."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def speed(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module("speed")


def test_the_papers_formulation_and_llmprune_agree_on_a_tiny_block(
    root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "speed.json"
    command = [sys.executable, "benchmarks/speed.py", "--small", "--repeats", "1"]
    command += ["--threads", "1", "--clock", "cpu", "--out", str(out)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (block,) = json.loads(out.read_text())["blocks"]
    assert set(block["agreement_with_naive"]) == {"0.5", "2:4"}
    assert all(0.999 <= share <= 1 for share in block["agreement_with_naive"].values())
    assert len(block["rows"]) == 6
    assert done.stdout.count("times as fast as naive") == 2


def test_no_figure_for_masks_that_differ(speed: Any) -> None:
    mine = torch.ones(100, 100, dtype=torch.bool)
    theirs = mine.clone()
    found = {
        ("llmprune", "sparsegpt", "0.5"): {"q": mine},
        ("naive", "sparsegpt", "0.5"): {"q": theirs},
    }
    theirs[0, :10] = False
    assert speed._agreement(found) == {"0.5": 0.999}
    theirs[0, 10] = False
    with pytest.raises(SystemExit, match="masks differ"):
        speed._agreement(found)


def test_the_outputs_of_both_are_the_same(speed: Any) -> None:
    """Both pass on what the pruned block gives: nearly the same, as their masks are."""
    args = argparse.Namespace(device="cpu", dtype="float32", windows=4, seqlen=64)
    bench = speed._bench("tiny", args)
    _, mine = bench.ours("sparsegpt", "2:4")
    bench.block.load_state_dict(bench.dense)
    _, theirs = bench.naive("2:4")
    a, b = torch.cat(mine), torch.cat(theirs)
    assert a.shape == b.shape == (4, 64, 256)
    assert (a - b).norm() < 1e-3 * b.norm()
    bench.block.load_state_dict(bench.dense)
    dense = bench.forward(bench.hidden)
    assert (a - dense).norm() > 10 * (a - b).norm()  # pruning itself changed far more


def test_packing_is_timed_beside_copies(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "codec.json"
    command = [sys.executable, "benchmarks/codec.py", "--small", "--out", str(out)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cases = json.loads(out.read_text())["cases"]
    assert [(c["dtype"], c["pattern"], c["threads"]) for c in cases] == list(
        product(("bfloat16", "float16", "float32"), ("0.5", "0.7", "2:4"), (1, 2))
    )
    jobs = ["copy", "clone", "pack", "pack by mask", "unpack", "unpack fresh"]
    assert [[row["job"] for row in case["rows"]][:6] for case in cases] == [jobs] * 18
    assert 0.55 < cases[0]["packed_share"] < 0.57  # 9 bits of 16
    for row in (row for case in cases for row in case["rows"]):
        low, high = row["quartiles"]
        assert 0 < low <= row["gb_s"] <= high


def test_no_figure_for_a_matrix_that_differs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    codec = importlib.import_module("codec")
    dense, keep = codec._matrix([8, 40], torch.float32, "0.5")
    codec._checked(dense, keep)
    monkeypatch.setattr(codec, "unpack", lambda packed: -dense)
    with pytest.raises(SystemExit, match="differ"):
        codec._checked(dense, keep)


@pytest.mark.slow
def test_sparse_checkpoints_are_measured_beside_dense_ones(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "sparse.json"
    command = [sys.executable, "benchmarks/sparse.py", "--small", "--threads", "1"]
    command += ["--folder", str(tmp_path), "--out", str(out)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    (case,) = found["cases"]
    assert case["logits"]["difference"] < 0.02
    sizes, forms = case["matrices_bytes"], case["forms"]
    assert sizes["sparse"] / sizes["dense"] == 0.5625  # 9 bits of 16
    assert case["disk_bytes"]["sparse"] < case["disk_bytes"]["dense"]
    assert list(forms) == ["dense", "sparse", "expanded"]
    for form in forms.values():
        assert form["rss_imported"] <= form["rss_loaded"] <= form["rss_peak_loading"]
        assert min(form[f"{kind}_tokens_s"] for kind in ("prompt", "decode")) > 0
    assert [row["tokens"] for row in found["products"]] == [1, 8, 1, 8]
    assert list(tmp_path.iterdir()) == [out]


def test_no_figure_for_logits_that_differ(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of another model are far from being a matter of rounding."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    sparse = importlib.import_module("sparse")
    monkeypatch.setattr(sparse, "_prune_files", lambda *args: None)
    monkeypatch.setattr(sparse.subprocess, "run", lambda *args, **kwargs: None)
    monkeypatch.setattr(sparse, "_child", lambda *args: {"difference": 0.03, "dtype": "bfloat16"})
    args = argparse.Namespace(
        folder=None, threads=1, prompt=1, decode=1, tokens=[1], sparsities=[], repeats=1
    )
    with pytest.raises(SystemExit, match="logits differ"):
        sparse._case("any", root, "0.5", args)


def test_the_frontier_is_measured_cell_by_cell_and_taken_up_again(
    root: Path, tmp_path: Path
) -> None:
    out, picture = tmp_path / "frontier.json", tmp_path / "frontier.png"
    command = [sys.executable, "benchmarks/frontier.py", "--models", "demo", "--patterns", "2:4"]
    command += ["--samples", "2", "--seqlen", "64", "--limit", "4", "--seeds", "0"]
    command += ["--out", str(out), "--plot", str(picture)]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    environment = {**os.environ, "PYTHONPATH": str(root)}

    def told(*more: str) -> str:
        given = [*command, *more]
        done = subprocess.run(given, cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = told("--recipes", "sparsegpt")
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["dense", "sparsegpt"]
    assert rows[1]["sparsity"] == 0.5
    assert rows[1]["perplexity"] > rows[0]["perplexity"] > 1
    assert 0 < rows[1]["layer_error"] < 1
    assert "| demo, 4 windows | 2:4 | sparsegpt |" in first
    assert "| 1.00 |" in first  # of its own excess
    assert picture.stat().st_size > 10_000
    assert "| demo, 4 windows | 2:4 | sparsegpt |" in told("--recipes", "wanda", "--minutes", "0")
    assert json.loads(out.read_text())["rows"] == rows  # nothing was measured again
    told("--add", "again", '{"method": "sparsegpt"}', "--recipes", "again")
    assert json.loads(out.read_text())["rows"] == [*rows, {**rows[1], "name": "again"}]


def test_the_frontiers_shares_are_of_the_same_seeds(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    figures = importlib.import_module("frontier_figures")

    def row(name: str, seed: int, perplexity: float) -> dict[str, Any]:
        cell = {"model": "m", "weights": "w", "pattern": "2:4", "name": name, "seed": seed}
        cell |= {"windows": "drawn, 128 x 256", "commit": "c"}
        return {**cell, "perplexity": perplexity, "seconds": 1.0, "peak_mb": 1}

    e = 2.718281828459045
    rows = [row("dense", 0, 1.0), row("sparsegpt", 0, e**0.2), row("sparsegpt", 1, e**0.4)]
    found = {s["name"]: s for s in figures.summed([*rows, row("alps", 1, e**0.1)])}
    assert found["alps"]["share"] == pytest.approx(0.25)  # of 0.4, not of the mean 0.3
    assert found["alps"]["error"] is None
    assert found["sparsegpt"]["share"] == pytest.approx(1)
    assert found["sparsegpt"]["excess"] == pytest.approx(0.3)
    half = (e**0.4 - e**0.2) / 2
    assert found["sparsegpt"]["error"] == pytest.approx(half)  # of the mean of two: stdev / sqrt(2)
    assert "cells by commit: 3 of c; this is d" in figures.told(rows, "d")
    fewer = [
        {**r, "windows": "given, 128 x 256, 9", "perplexity": r["perplexity"] * 2} for r in rows
    ]
    split = {(s["model"], s["name"]): s["excess"] for s in figures.summed([*rows, *fewer])}
    assert split["m", "sparsegpt"] == pytest.approx(split["m, 9 windows", "sparsegpt"])


def test_what_a_quality_is_made_of_is_found_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    frontier = importlib.import_module("frontier")
    for name, recipe in frontier.RECIPES.items():
        said = frontier.spelled(recipe, "2:4")
        assert json.loads(json.dumps(said)) == said, name


def test_the_page_says_what_was_measured(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/frontier.md is of benchmarks/results/frontier.json; what makes it counts draws, and pairs them."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    frontier, page = (importlib.import_module(m) for m in ("frontier", "frontier_page"))
    rows = json.loads(page.CELLS.read_text())["rows"]
    _, _, below = page.PAGE.read_text().partition(page.HEADING)
    assert below == page.cells(rows)
    readme = (root / "README.md").read_text()
    for quality in ("balanced", "best"):
        assert f"| {page.multiple(rows, quality)} | {page.left(rows, quality)} |" in readme
        assert page.left(rows, quality, page.DRAWN[:1]).replace(" | ", ", ") in readme
        for r in rows:  # figures are of what the quality is made of today
            if r["name"] == quality:
                assert r["recipe"] == frontier.spelled({"quality": quality}, r["pattern"])

    def row(name: str, seed: int, perplexity: float) -> dict[str, Any]:
        cell = {"model": "m", "pattern": "2:4", "name": name, "seed": seed}
        return {**cell, "windows": "drawn", "perplexity": perplexity, "seconds": 4.0}

    found = [row("dense", 0, 1.0), *(row("best", s, 1.0 + s) for s in range(3))]
    found += [row("best untransformed", s, 1.5 + s) for s in (1, 2)]
    told = page.cells(found)
    assert "### m: dense 1.000" in told
    assert "| best |  |  |  | 2.000 ± 0.5774 |  | 4 |" in told
    assert "| best untransformed |  |  |  | +0.5000 ± 0.0000 (2) |  |" in told


def test_fewer_bits_are_set_beside_dense_weights_of_as_many(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each number of bits of a 2:4 weight has a dense one within a tenth, and every grid is its own."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    quantize = importlib.import_module("quantize")
    llama = argparse.Namespace(shape=(512, 512))
    found: dict[str, dict[str, float]] = {"dense": {}, "2:4": {}}
    for cell in quantize.every(["2:4"], "search"):
        if cell.method in (None, "sparsegpt"):
            found[cell.pattern or "dense"][cell.values] = quantize.bits([llama], cell)
    assert found["2:4"]["bfloat16"] == 9
    assert found["2:4"]["int8 gptq"] == pytest.approx(found["dense"]["int5 gptq"])
    assert found["2:4"]["int4 gptq"] == pytest.approx(found["dense"]["int3 gptq"])
    assert found["2:4"]["int4 nearest"] == pytest.approx(2 + 1 + 16 / 128)
    weight = torch.linspace(-1, 1, 512).expand(4, 512)
    for bits, levels in ((3, 7), (5, 31)):
        how = quantize.Narrow("int8", "nearest", "max", width=bits)
        grid = quantize.Quantized(quantize.Everything(), how)
        stats = quantize.Gram.empty(512, torch.device("cpu"))
        stats.add(torch.eye(512))
        done = grid.prune(weight, stats, quantize.Unstructured(0.5, "row"))
        assert len(done.weight.unique()) == levels


@pytest.mark.parametrize("shape", ["qwen3", "gpt2"])
def test_a_second_family_is_trained_and_loads(root: Path, tmp_path: Path, shape: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The river runs past the old mill and the mill stands still.\n" * 400)
    command = [sys.executable, "benchmarks/second_family.py", "--train", str(text)]
    command += ["--validation", str(text), "--steps", "2", "--shape", shape]
    command += ["--out", str(tmp_path / "model")]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "model" / "training.json").read_text())
    assert about["steps"] == 2
    assert about["tokens"] == 2 * 8 * 256
    assert 1 < about["validation perplexity"] < 3000
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == shape


def test_a_quality_is_timed_beside_sparsegpt(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    command = [sys.executable, "benchmarks/quality_cost.py", "--width", "64", "--seqlen", "16"]
    command += ["--counts", "4", "8", "--patterns", "0.5", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["windows"] for row in rows] == [4, 8]
    assert all(row["times"] > 1 and row["quality"] == "balanced" for row in rows)


def test_solvers_are_timed_on_a_wide_layer(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "wide.json"
    command = [sys.executable, "benchmarks/wide_layer.py", "--width", "64", "--rows", "8", "32"]
    command += ["--patterns", "2:4", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    every = json.loads(out.read_text())["rows"]
    assert [row["part"] for row in every if "part" in row] == [32, 64, 128]
    rows = {row["case"]: row for row in every}
    assert rows["alps"]["loss"] < rows["sparsegpt + refit"]["loss"] < rows["sparsegpt"]["loss"]
    assert rows["sparsegpt + swaps"]["loss"] < rows["sparsegpt + refit"]["loss"]
    assert all(row["seconds_matrix"] >= row["seconds_shared"] >= 0 for row in rows.values())
