"""The benchmark of the solvers' kernels: rehearsed on a CPU, and what it does with a kernel that is wrong."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import INTERPRETED

from llmprune.kernels import nm_mask, solver, sweep

pytest.importorskip("triton", reason="triton is not installed on this platform")

SMALL = argparse.Namespace(device="cpu", small=True, repeats=1)


@pytest.fixture
def bench(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    monkeypatch.delenv(solver.SETTING, raising=False)
    monkeypatch.setattr(sweep, "ROWS", 64)  # fewer programs: one interpreted step takes as long
    return importlib.import_module("solver_kernels")


def test_all_of_it_is_rehearsed(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "solver.json"
    command = [sys.executable, "benchmarks/solver_kernels.py", "--device", "cpu", "--small"]
    done = subprocess.run(
        [*command, "--repeats", "1", "--out", str(out)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert set(found["solver"].values()) == {"needs an NVIDIA GPU"}
    assert found["kernels"] == []
    who = {(row["contender"], row["method"], row["pattern"]) for row in found["block"]["rows"]}
    assert len(who) == len(found["block"]["rows"]) == 11
    assert all(share >= 0.999 for share in found["block"]["agreement"].values())
    assert not any("target" in row for row in found["block"]["rows"])
    assert [row["method"] for row in found["whole"]] == ["wanda", "sparsegpt"]
    for row in found["whole"]:
        assert row["extrapolated"] is (row["blocks"] < 3)
        assert row["seconds"] > 0


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the benchmark itself does this")
def test_kernels_are_compared_before_they_are_timed(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = bench.kernels(SMALL)
    assert [row["kernel"] for row in rows] == ["gram", *["sweep"] * 3, *["nm_mask"] * 2]
    assert all(min(row["microseconds"].values()) > 0 for row in rows)
    keep = nm_mask.nm_keep
    monkeypatch.setattr(nm_mask, "nm_keep", lambda *given: ~keep(*given))  # its trial is over
    with pytest.raises(SystemExit, match="nm_mask 12 rows 2:4: the kernel and plain torch differ"):
        bench.kernels(SMALL)


def test_targets_are_judged_and_fewer_blocks_are_told_apart(bench: Any) -> None:
    least = {
        ("two passes", "", ""): 1.0,
        ("llmprune", "sparsegpt", "2:4"): 2.0,
        ("naive", "sparsegpt", "2:4"): 9.0,
        ("llmprune", "wanda", "2:4"): 1.2,
    }
    rows = [bench._row(job, least, False) for job in least]
    assert [row.get("reached") for row in rows] == [None, False, None, True]
    assert rows[1]["faster_than_naive"] == 4.5
    assert "missed" in bench._line(rows[1])
    one = {"rows": rows}
    assert bench.blocks(one, "sparsegpt", 1000, 32) == 32
    assert bench.blocks(one, "sparsegpt", 16 + 8 * 2.0 * 4 / 3, 32) == 8
    assert bench.blocks(one, "sparsegpt", -5, 32) == 2


def test_sums_that_differ_by_more_than_rounding_are_noticed(bench: Any) -> None:
    sums = torch.eye(3) * 4
    assert bench._same((sums,), (sums * (1 + 1e-6),))
    assert not bench._same((sums,), (sums + 1e-2,))
    assert not bench._same((sums, sums.bool()), (sums * (1 + 1e-6), sums.bool()))
