"""The golden files in tests/golden: answers from numpy in float64, and facts from the papers' code."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmprune import methods
from llmprune.pattern import parse

GOLDEN = Path(__file__).parent / "golden"
CASES = [
    f"{name} {pattern}"
    for name in ("magnitude", "wanda", "sparsegpt")
    for pattern in ("0.5", "2:4", "4:8")
]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "problem.safetensors")


def keep(golden: dict[str, Tensor], case: str) -> Tensor:
    shape = golden["weight"].shape
    bits = np.unpackbits(golden[f"keep {case}"].numpy())[: shape.numel()]
    return torch.from_numpy(bits).bool().reshape(shape)


def pruned(golden: dict[str, Tensor], case: str, dtype: torch.dtype, batch: int = 96) -> Any:
    name, pattern = case.split()
    method = methods.build(name)
    stats = method.stats.empty(golden["inputs"].shape[1], torch.device("cpu"))
    for inputs in golden["inputs"].split(batch):
        stats.add(inputs)
    return method.prune(golden["weight"].to(dtype), stats, method.resolve(parse(pattern)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_masks_are_those_of_float64(
    golden: dict[str, Tensor], case: str, dtype: torch.dtype
) -> None:
    assert torch.equal(golden["weight"].bfloat16().float(), golden["weight"])
    for batch in (96, 10):
        assert torch.equal(pruned(golden, case, dtype, batch).keep, keep(golden, case))


@pytest.mark.parametrize("case", [case for case in CASES if "sparsegpt" in case])
def test_weights_are_those_of_float64(golden: dict[str, Tensor], case: str) -> None:
    result = pruned(golden, case, torch.float32)
    weight = result.weight if result.passed_on is None else result.passed_on
    expected = golden[f"weight {case}"]
    assert torch.equal(weight != 0, expected != 0)
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if "sparsegpt" not in case])
def test_scores_leave_the_kept_as_they_are(golden: dict[str, Tensor], case: str) -> None:
    result = pruned(golden, case, torch.float32)
    assert torch.equal(result.weight, golden["weight"] * keep(golden, case))


def test_the_files_are_what_the_script_makes(golden: dict[str, Tensor]) -> None:
    made = runpy.run_path(str(GOLDEN / "make.py"))
    answers = made["answers"](*made["problem"]())
    assert answers.keys() == golden.keys()
    for name, value in answers.items():
        stored = golden[name].numpy()
        if value.dtype == np.uint8 or name == "weight":
            assert np.array_equal(value, stored), name
        else:  # a matrix product may round otherwise on another processor
            np.testing.assert_allclose(value, stored, rtol=1e-4, atol=1e-6, err_msg=name)


def test_facts_are_of_one_model() -> None:
    facts = json.loads((GOLDEN / "oracles.json").read_text())
    masks = facts["kept, sha256 of packed bits"]
    weights = {"0.5": 0.5, "0.6": 0.6, "0.7": 0.7, "2:4": 0.5, "4:8": 0.5}
    for case, matrices in masks.items():
        assert case in facts["perplexity"]
        assert len(matrices) == 42
        kept = sum(count for count, _ in matrices.values())
        assert kept / 4_423_680 == pytest.approx(1 - weights[case.split()[1]], abs=0.003)
    half = {case: sum(c for c, _ in masks[case].values()) for case in masks if ":" in case}
    assert set(half.values()) == {4_423_680 // 2}
    for pattern in weights:  # the order that the papers found
        sparsegpt, wanda = (facts["perplexity"][f"{m} {pattern}"] for m in ("sparsegpt", "wanda"))
        assert facts["perplexity"]["dense"] < sparsegpt < wanda


def test_facts_are_those_of_the_masks(shared: Path) -> None:
    made = runpy.run_path(str(GOLDEN / "make.py"))
    assert made["facts"](shared / "oracles") == json.loads((GOLDEN / "oracles.json").read_text())
