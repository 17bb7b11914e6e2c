"""Fewer bits in whole models: families with odd layouts, from disk to disk, on several processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import WINDOWS, tiny
from streamed import Runs, save_llama, save_mixtral, write_text
from torch import Tensor

import llmprune
from llmprune.checkpoint import tensors
from llmprune.checkpoint.files import find
from llmprune.errors import ConfigError
from llmprune.model import matrices
from llmprune.run import PruneConfig

TOP = {"int8": 127, "int4": 7}
GROUPS = {"int8": 0, "int4": 128}


def on_a_grid(values: Tensor, top: int) -> bool:
    """Whether some bfloat16 scale makes whole numbers up to `top` of all `values`: all are tried."""
    largest = values.abs().max()
    if largest == 0:
        return True
    for step in range(top, 0, -1):
        first = (largest / step).bfloat16().view(torch.int16)
        for near in range(-2, 3):
            scale = (first + near).view(torch.bfloat16).float()
            whole = (values.float() / scale).round()
            fits = torch.equal((whole * scale).to(values.dtype), values)
            if fits and float(whole.abs().max()) <= top:
                return True
    return False


def check(weight: Tensor, kind: str, group: int) -> None:
    """Every group of some rows of `weight` [out, in] lies on a grid of its own."""
    for row in weight[:: max(1, len(weight) // 2)]:
        for part in row.split(group or len(row)):
            assert on_a_grid(part, TOP[kind])


@pytest.mark.parametrize(
    ("family", "kind"),
    [("gpt2", "int8"), ("opt", "int4"), ("mixtral", "int4"), ("gpt_oss", "int8")],
)
def test_every_matrix_of_a_family_lies_on_its_grid(family: str, kind: str) -> None:
    model = tiny(family)
    masks: dict[str, Tensor] = {}
    config = PruneConfig(
        sparsity="2:4",
        method="sparsegpt",
        calibration=WINDOWS,
        quantize=kind,
        quantize_settings={"group": 16},
    )
    report = llmprune.run.prune_with(
        config, model, progress=False, on_mask=lambda m, r, keep: masks.update({m.name: keep})
    )
    for matrix, layer in zip(matrices(model), report.layers, strict=True):
        assert layer.notes["quantize"] == kind
        assert not matrix.weight[~masks[matrix.name]].any()
        check(matrix.weight.contiguous(), kind, 16)
    assert f"rounded to {kind} (gptq): {len(report.layers)} of" in report.table()


def test_experts_with_few_tokens_are_rounded_to_the_nearest() -> None:
    model = tiny("mixtral")
    report = llmprune.prune(
        model,
        calibration=WINDOWS[:1],
        sparsity="2:4",
        method="wanda",
        quantize="int8",
        progress=False,
    )
    routed = [layer for layer in report.layers if layer.expert is not None]
    assert all(layer.notes["rounding"] == "nearest" for layer in routed)
    assert {layer.notes["fallback"] for layer in routed} == {"magnitude in int8"}
    for matrix in matrices(model):
        check(matrix.weight.contiguous(), "int8", 0)


def test_a_model_in_half_precision_holds_rounded_products() -> None:
    model = tiny("llama").bfloat16()
    llmprune.prune(
        model, calibration=WINDOWS, sparsity=0.5, method="alps", quantize="int4", progress=False
    )
    for matrix in matrices(model):
        check(matrix.weight, "int4", 128)


def test_what_a_repair_leaves_is_rounded_and_the_masks_stay() -> None:
    """Nothing but the kept weights differs from the same run without rounding, in the first block."""
    found: dict[str | None, dict[str, Tensor]] = {}
    masks: dict[str | None, dict[str, Tensor]] = {None: {}, "int8": {}, "int4": {}}
    for kind in masks:
        model = tiny("mixtral").bfloat16()
        config = PruneConfig(
            sparsity="2:4",
            method="sparsegpt",
            calibration=WINDOWS,
            repair=True,
            repair_settings={"epochs": 1},
            quantize=kind,
        )
        kept = masks[kind]
        report = llmprune.run.prune_with(
            config,
            model,
            progress=False,
            on_mask=lambda m, r, k, kept=kept: kept.update({m.name: k}),
        )
        found[kind] = {m.name: m.weight.contiguous().clone() for m in matrices(model)}
        assert len(report.repair) == model.config.num_hidden_layers
        for layer in report.layers:
            assert layer.notes.get("quantize") == kind
            assert not found[kind][layer.name][~masks[kind][layer.name]].any()
    for name, plain in found[None].items():
        for kind in ("int8", "int4"):
            check(found[kind][name], kind, GROUPS[kind])
            assert not torch.equal(found[kind][name], plain)
        if ".layers.0." in name:
            assert torch.equal(masks["int4"][name], masks[None][name])
            near = (found["int8"][name] - plain).float().norm() / plain.float().norm()
            assert near < 0.03  # a step is 1 / 127 of the largest weight of a row
            far = (found["int4"][name] - plain).float().norm() / plain.float().norm()
            assert near < far < 0.3


def test_rounding_after_a_repair_goes_from_disk_to_disk(place: Path, tmp_path: Path) -> None:
    options = ("--sparsity", "2:4", "--method", "sparsegpt", "--repair", "--repair-set", "epochs=1")
    options += ("--quantize", "int4", "--no-eval", "--quiet", "--samples", 8)
    run = Runs(tmp_path, place / "llama", place / "text.txt", options)
    assert run() == 0
    report = json.loads((run.out / "llmprune.json").read_text())
    assert all(layer["notes"]["quantize"] == "int4" for layer in report["layers"])
    assert any(block["best_epoch"] for block in report["repair"])
    stored = tensors.index(find(str(run.out)))
    looked = 0
    for key, entry in stored.items():
        if len(entry.shape) == 2 and ".layers." in key:
            check(tensors.load(entry), "int4", 128)
            looked += 1
    assert looked == len(report["layers"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_llama(folder / "llama")
    save_mixtral(folder / "mixtral")
    write_text(folder / "text.txt")
    return folder


@pytest.mark.parametrize(("model", "method"), [("llama", "sparsegpt"), ("mixtral", "wanda")])
def test_what_is_written_lies_on_the_grid(
    place: Path, tmp_path: Path, model: str, method: str
) -> None:
    options = (
        "--sparsity",
        "2:4",
        "--method",
        method,
        "--quantize",
        "int4",
        "--no-eval",
        "--quiet",
        "--samples",
        8,
    )
    run = Runs(tmp_path, place / model, place / "text.txt", options)
    assert run() == 0
    report = json.loads((run.out / "llmprune.json").read_text())
    assert report["recipe"]["quantize"] == "int4"
    assert report["recipe"]["quantize_settings"]["group"] == 128
    assert "| rounded to | int4 |" in (run.out / "README.md").read_text()
    stored = tensors.index(find(str(run.out)))
    looked = 0
    for key, entry in stored.items():
        if len(entry.shape) == 2 and ".layers." in key and "gate.weight" not in key:
            weight = tensors.load(entry)
            assert weight.dtype == torch.bfloat16
            check(weight, "int4", 128)
            looked += 1
    assert looked


def test_packing_keeps_every_bit(place: Path, tmp_path: Path) -> None:
    options = ("--sparsity", "2:4", "--quantize", "int8", "--no-eval", "--quiet", "--samples", 8)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    dense = Runs(tmp_path / "a", place / "llama", place / "text.txt", options)
    sparse = Runs(
        tmp_path / "b", place / "llama", place / "text.txt", (*options, "--format", "sparse")
    )
    assert dense() == sparse() == 0
    one, two = (tensors.index(find(str(run.out))) for run in (dense, sparse))
    assert one.keys() == two.keys()
    for key in one:
        assert torch.equal(tensors.load(one[key]), tensors.load(two[key]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"fisher": True, "method": "sparsegpt"},
            "lie on no grid of int8; add --fisher-set rows=false",
        ),
        ({"method": "dsnot"}, "dsnot learns what a Gram matrix does not hold"),
        ({"method": "dsnot", "repair": True}, "dsnot learns what a Gram matrix does not hold"),
        ({"quantize": "int3"}, "no quantize 'int3'"),
        (
            {"quantize": None, "quantize_settings": {"group": 1}},
            "group is of fewer bits: add --quantize",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruneConfig(**{"sparsity": 0.5, "quantize": "int8", **config})


@pytest.mark.parametrize(
    "config",
    [
        {"fisher": True, "sparsity": "2:4", "method": "sparsegpt"},
        {"fisher": True, "fisher_settings": {"rows": False}, "method": "sparsegpt"},
    ],
)
def test_fisher_information_goes_with_it_where_rows_do_not_compete(config: dict[str, Any]) -> None:
    given: dict[str, Any] = {"sparsity": 0.5, "quantize": "int8", **config}
    assert PruneConfig(**given).built()[0].called == "sparsegpt in int8"
