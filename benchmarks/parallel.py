"""Seconds per phase of a run by one and by two processes, one thread each, and the bytes between them.

    OMP_NUM_THREADS=1 python benchmarks/parallel.py --out benchmarks/results/parallel.json

Runs alternate. Before any number is printed, the masks of both are compared. Phases are seconds of
processor time, which is what a machine busy with other work allows, of the process with the most; waiting
for each other is not in them.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
WIDE = "--sums float64"  # without it, any rounding turns a percent of the masks of random weights
TALK = ("all-reduce", "gather", "messages")


def worker(place: Path, argv: list[str]) -> int:
    """One process of a run, timed."""
    import torch

    from llmprune import prune_matrix, stream
    from llmprune.checkpoint.shelf import Shelf
    from llmprune.cli import main
    from llmprune.deliver import Delivery
    from llmprune.factor import InverseFactor
    from llmprune.methods.sparsegpt import SparseGPT
    from llmprune.methods.wanda import Wanda
    from llmprune.parallel import Ranks
    from llmprune.stats import Gram, InputNorms
    from llmprune.walk import Walker

    torch.set_num_threads(1)
    seconds: dict[str, float] = defaultdict(float)
    sent: dict[str, int] = defaultdict(int)
    inside: list[
        tuple[str, list[float]]
    ] = []  # phases that are open, with the time of those within

    def timed(owner: Any, name: str, phase: str) -> None:
        """Let `owner.name` add its processor time, less that of timed calls inside it, to `phase`."""
        inner: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(inner)
        def run(*args: Any, **kwargs: Any) -> Any:
            here = phase
            if phase == "observe" and inside and inside[-1][0] in ("pass on", "self-check"):
                here = inside[-1][0]
            begun = time.process_time()
            inside.append((here, [0.0]))
            try:
                return inner(*args, **kwargs)
            finally:
                spent = time.process_time() - begun
                seconds[here] += spent - inside.pop()[1][0]
                if inside:
                    inside[-1][1][0] += spent
                if phase in TALK[:2]:
                    tensors = args[1] if phase == "all-reduce" else args[1:2]
                    sent[phase] += sum(t.nbytes for t in tensors)

        setattr(owner, name, run)

    timed(stream, "check_walk", "self-check")
    timed(stream, "pass_on", "pass on")
    timed(Walker, "run", "observe")
    timed(Gram, "add", "sums")
    timed(InputNorms, "add", "sums")
    timed(InverseFactor, "of", "factor")
    timed(SparseGPT, "_sweep", "solve")
    timed(Wanda, "prune", "solve")
    timed(prune_matrix, "_put", "check and measure")
    timed(Shelf, "load", "read")
    timed(Delivery, "block", "write and read back")
    timed(Ranks, "add_up", "all-reduce")
    timed(Ranks, "hand_out", "gather")
    timed(Ranks, "gather", "messages")
    begun = time.process_time()
    status = main(argv)
    seconds["all"] = time.process_time() - begun
    rank = os.environ.get("RANK", "0")
    found = {"seconds": seconds, "bytes": sent}
    (place / f"{rank}.json").write_text(json.dumps(found))
    return status


def once(world: int, argv: list[str], place: Path) -> dict[str, Any]:
    """One run by `world` processes: seconds per phase, in all, and of pruning; bytes per process."""
    for path in place.glob("*.json"):
        path.unlink()
    launcher = [sys.executable]
    if world > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    begun = time.perf_counter()
    subprocess.run(
        [*launcher, __file__, "--worker", str(place), *argv],
        env=env,
        cwd=ROOT,
        check=True,
        stderr=subprocess.PIPE,
    )
    wall = time.perf_counter() - begun
    told = [json.loads((place / f"{r}.json").read_text()) for r in range(world)]
    phases = sorted({phase for one in told for phase in one["seconds"]})
    seconds = {phase: max(one["seconds"].get(phase, 0.0) for one in told) for phase in phases}
    return {"wall": wall, "phases": seconds, "bytes": told[0]["bytes"]}


def masks_differ(left: Path, right: Path) -> tuple[int, int]:
    """Of all weights of two checkpoints, how many are zero in one only; and how many there are."""
    from safetensors.torch import load_file

    differ = total = 0
    for file in sorted(left.glob("*.safetensors")):
        one, two = load_file(file), load_file(right / file.name)
        differ += sum(int(((one[k] != 0) != (two[k] != 0)).sum()) for k in one)
        total += sum(t.numel() for t in one.values())
    return differ, total


def random_model(folder: Path) -> Path:
    """Six blocks of width 1024, as a third of a 1B model; the head is small."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=6, num_attention_heads=16,
        num_key_value_heads=4, vocab_size=1024, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def windows(path: Path, count: int, vocabulary: int) -> Path:
    """Random token ids, `count` windows of 256."""
    import numpy as np

    np.save(path, np.random.default_rng(0).integers(0, vocabulary, (count, 256)))
    return path


def measure(
    name: str, options: list[str], place: Path, repeats: int, method: str
) -> dict[str, Any]:
    """One and two processes, alternating; medians."""
    runs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for turn in range(repeats):
        for world in (1, 2):
            out = place / f"{name}-{method.split()[0]}-{world}"
            argv = [*options, "--method", *method.split(), "--no-eval", "--quiet", "--overwrite"]
            runs[world].append(once(world, [*argv, "--save", str(out)], place))
            print(name, method, world, f"{runs[world][-1]['wall']:.1f}s", "run", turn, flush=True)
    differ, total = masks_differ(*(place / f"{name}-{method.split()[0]}-{w}" for w in (1, 2)))
    if differ > 1e-4 * total:
        raise SystemExit(
            f"{name}: {differ} of {total} mask bits differ; no time is printed for that"
        )
    found: dict[str, Any] = {"model": name, "method": method, "masks differ": differ, "of": total}
    for world, some in runs.items():
        found[f"{world} processes"] = {
            "wall": [round(r["wall"], 2) for r in some],
            "phases": {
                phase: round(statistics.median(r["phases"][phase] for r in some), 3)
                for phase in some[0]["phases"]
            },
            "bytes": some[0]["bytes"],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    import torch

    from llmprune.provenance import versions

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        small = ["--model", str(SHARED / "models" / "wikillama-5m"), "--samples", "128"]
        small += ["--calibration", str(SHARED / "oracles" / "calibration_ids.npy")]
        large = ["--model", str(random_model(place / "random"))]
        large += ["--calibration", str(windows(place / "ids.npy", 32, 1024))]
        found = [
            measure("wikillama-5m", small, place, args.repeats, "sparsegpt --sparsity 0.5"),
            measure("wikillama-5m", small, place, args.repeats, "wanda --sparsity 2:4"),
            measure("random-75m", large, place, args.repeats, f"sparsegpt --sparsity 0.5 {WIDE}"),
        ]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    about = {
        "command": "OMP_NUM_THREADS=1 " + " ".join(["python", *sys.argv]),
        "commit": commit,
        "versions": versions(torch.device("cpu")),
        "load average": os.getloadavg(),
        "cores": os.cpu_count(),
    }
    args.out.write_text(json.dumps({**about, "runs": found}, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(worker(Path(sys.argv[2]), sys.argv[3:]))
    main()
