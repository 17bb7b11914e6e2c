r"""What sharing sparsity out over blocks or matrices gains, against the same method without.

    python benchmarks/allocation.py --model DIR --windows ids.npy --train train.npy --test test_ids.npy \
        --out benchmarks/results/allocation.json

Seed 0 are the windows of `--windows` as they stand; the others are as many windows at random offsets of
`--train`, the ids of a whole training text. The search sees calibration windows alone. Seconds are
those of the process (`--clock cpu`), which a busy machine disturbs less, or of the clock on the wall. Rows
that `--out` holds already are not measured again, so that it can be run in parts.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmprune.demo import MODEL_DIR

ALLOCATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform": ("uniform", {}),
    "owl": ("owl", {}),
    "owl bound=0.04": ("owl", {"bound": 0.04}),
    "owl bound=0.15": ("owl", {"bound": 0.15}),
    "owl 8": ("owl", {"levels": "3:8,4:8,5:8"}),
    "alphapruning": ("alphapruning", {}),
    "alphapruning tau=0.1": ("alphapruning", {"tau": 0.1}),
    "alphapruning 8": ("alphapruning", {"tau": 0.15, "levels": "3:8,4:8,5:8"}),
    "search": ("search", {}),
    "search block": ("search", {"grain": "block"}),
}  # fmt: skip


def main() -> None:
    """Measure what is missing and write it after each case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--model", type=Path, required=True, help="local checkpoint, dense; one run each"
    )
    parser.add_argument("--windows", type=Path, required=True, help=".npy of ids [n, seqlen]")
    parser.add_argument("--train", type=Path, help=".npy of ids [tokens]; needed for seeds above 0")
    parser.add_argument("--test", type=Path, required=True, help=".npy of ids [tokens]")
    parser.add_argument("--limit", type=int, help="test windows; all of them if not given")
    parser.add_argument("--methods", nargs="*", default=["wanda", "sparsegpt", "alps"])
    parser.add_argument("--patterns", nargs="*", default=["0.6", "0.7", "2:4"])
    parser.add_argument("--allocations", nargs="*", default=["uniform", "owl", "alphapruning", "search"],
                        help=f"of {', '.join(ALLOCATIONS)}, or added ones")  # fmt: skip
    parser.add_argument("--add", nargs=3, action="append", default=[],
                        metavar=("NAME", "ALLOCATION", "SETTINGS"), help="settings as JSON")  # fmt: skip
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--out", type=Path, required=True, help="JSON with everything")
    args = parser.parse_args()
    ALLOCATIONS.update({name: (kind, json.loads(text)) for name, kind, text in args.add})
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    model = "demo" if args.model.resolve() == MODEL_DIR.resolve() else args.model.name
    for seed in args.seeds:
        for pattern in args.patterns:
            for method in args.methods:
                for allocation in args.allocations:
                    key = {"model": model, "method": method, "pattern": pattern,
                           "allocation": allocation, "seed": seed, "test_windows": args.limit}  # fmt: skip
                    if any(key.items() <= row.items() for row in rows):
                        continue
                    rows.append({**key, **_measured(key, args)})
                    print(json.dumps(rows[-1]), flush=True)
                    args.out.write_text(_text(args, rows))


def windows(args: argparse.Namespace, seed: int) -> torch.Tensor:
    """Calibration windows [n, seqlen] of a seed."""
    given = torch.from_numpy(np.load(args.windows)).long()
    if seed == 0:
        return given
    text = torch.from_numpy(np.load(args.train)).long().flatten()
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(text) - given.shape[1], (len(given),), generator=draw)
    return torch.stack([text[s : s + given.shape[1]] for s in starts.tolist()])


def _measured(key: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    from compare import _commit
    from transformers import AutoModelForCausalLM

    import llmprune
    from llmprune.eval.perplexity import perplexity

    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    name, settings = ALLOCATIONS[key["allocation"]]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    ids = windows(args, key["seed"])
    begun = clock()
    report = llmprune.prune(
        model, calibration=ids, method=key["method"], sparsity=key["pattern"], allocation=name,
        allocation_settings=settings, progress=False,
    )  # fmt: skip
    seconds = clock() - begun
    test = torch.from_numpy(np.load(args.test)).long().flatten()
    found = perplexity(model, test, seqlen=ids.shape[1], dataset=args.test.name, limit=args.limit)
    blocks: dict[int, list[int]] = {}
    for layer in report.layers:
        index = next(int(part) for part in layer.name.split(".") if part.isdigit())
        counts = blocks.setdefault(index, [0, 0])
        counts[0] += math.prod(layer.shape) - layer.kept
        counts[1] += math.prod(layer.shape)
    return {
        "calibration": list(ids.shape),
        "settings": report.recipe["allocation_settings"],
        "perplexity": round(found.perplexity, 4),
        "windows": found.windows,
        "seconds": round(seconds, 1),
        "removed": sum(math.prod(layer.shape) - layer.kept for layer in report.layers),
        "blocks": [round(gone / size, 4) for gone, size in blocks.values()],
        "mix": Counter(layer.pattern or "dense" for layer in report.layers)
        if ":" in key["pattern"]
        else None,
        "found": {k: v for k, v in report.allocation.items() if isinstance(v, float | int)},
        "commit": _commit(),
    }  # fmt: skip


def _text(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """The file: what the figures depend on, the mean change of each case over seeds, then every row."""
    from llmprune.provenance import versions

    about = {
        "clock": args.clock,
        "versions": versions(torch.device("cpu")),
        "command": f"benchmarks/allocation.py --clock {args.clock}",
        "gains": gains(rows),
    }
    lines = ",\n".join(map(json.dumps, rows))
    return f'{json.dumps(about)[:-1]}, "rows": [\n{lines}\n]}}\n'


def gains(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case, over the seeds it shares with uniform: ln(perplexity / uniform's), a gain below zero."""
    keys = ("model", "method", "pattern", "test_windows")
    plain = {(*(r[k] for k in keys), r["seed"]): r for r in rows if r["allocation"] == "uniform"}
    found: dict[tuple[Any, ...], list[tuple[float, float, float]]] = {}
    for row in rows:
        base = plain.get((*(row[k] for k in keys), row["seed"]))
        if base is not None and row["allocation"] != "uniform":
            gain = math.log(row["perplexity"] / base["perplexity"])
            case = (*(row[k] for k in keys), row["allocation"])
            found.setdefault(case, []).append(
                (gain, row["perplexity"], row["seconds"] - base["seconds"])
            )
    return [
        {
            **dict(zip((*keys, "allocation"), case, strict=True)),
            "seeds": len(some),
            "perplexity": round(statistics.fmean(p for _, p, _ in some), 3),
            "ln_change": round(statistics.fmean(g for g, _, _ in some), 5),
            "standard_error": round(statistics.stdev(g for g, _, _ in some) / math.sqrt(len(some)), 5)
            if len(some) > 1
            else None,
            "more_seconds": round(statistics.fmean(s for _, _, s in some), 1),
        }
        for case, some in found.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main()
