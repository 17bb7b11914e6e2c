r"""Every solver on one model: perplexity, layer error and seconds, with and without the exact refit.

    python benchmarks/solvers.py --model DIR --windows ids.npy --test test_ids.npy \
        --out benchmarks/results/solvers-wikillama-5m.json

Seconds are those of `llmprune.prune` from a loaded model, by the clock or, with `--clock cpu`, of the
process, which a busy machine disturbs less; cases of one pattern take turns. The layer error is what the
report says: the share of the output's energy that is lost, mean over matrices, on tokens of the calibration.
Rows that `--out` holds already are not measured again; more `--repeats` add to them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

PATTERNS = ("0.5", "0.6", "0.7", "2:4", "4:8")
CASES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "magnitude": ("magnitude", {}, None),
    "magnitude + refit": ("magnitude", {"refit": True}, None),
    "wanda": ("wanda", {}, None),
    "wanda + refit": ("wanda", {"refit": True}, None),
    "ria": ("ria", {}, None),
    "ria + refit": ("ria", {"refit": True}, None),
    "dsnot": ("dsnot", {}, None),
    "sparsegpt": ("sparsegpt", {}, None),
    "sparsegpt + refit": ("sparsegpt", {"refit": True}, None),
    "alps": ("alps", {}, None),
    "alps within rows": ("alps", {}, "row"),
}


def main() -> None:
    """Measure what is missing and write it after each case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="local checkpoint, dense")
    parser.add_argument("--windows", type=Path, required=True, help=".npy of ids [n, seqlen]")
    parser.add_argument("--test", type=Path, required=True, help=".npy of ids [tokens]")
    parser.add_argument("--patterns", nargs="*", default=PATTERNS)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=1, help="timings of each case")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--out", type=Path, required=True, help="JSON with everything")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    for repeat in range(args.repeats):
        for pattern in args.patterns:
            for case in args.cases:
                row = _row(rows, case, pattern)
                if len(row["seconds_all"]) <= repeat:
                    _measure(row, args)
                    print(json.dumps(row), flush=True)
                    args.out.write_text(_text(args, rows))


def _row(rows: list[dict[str, Any]], case: str, pattern: str) -> dict[str, Any]:
    """The row of a case, an empty one if there is none yet."""
    for row in rows:
        if (row["case"], row["pattern"]) == (case, pattern):
            return row
    rows.append({"case": case, "pattern": pattern, "seconds_all": []})
    return rows[-1]


def _measure(row: dict[str, Any], args: argparse.Namespace) -> None:
    """Prune once more; the first time measure what came out, too."""
    from transformers import AutoModelForCausalLM

    import llmprune
    from llmprune.eval.perplexity import perplexity

    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    method, settings, within = CASES[row["case"]]
    if ":" in row["pattern"]:
        within = None
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    windows = torch.from_numpy(np.load(args.windows)).long()
    begun = clock()
    report = llmprune.prune(
        model, calibration=windows, method=method, settings=settings, sparsity=row["pattern"],
        within=within, progress=False,
    )  # fmt: skip
    row["seconds_all"].append(round(clock() - begun, 2))
    row["seconds"] = statistics.median(row["seconds_all"])
    if "perplexity" in row:
        return
    test = torch.from_numpy(np.load(args.test)).long().flatten()
    found = perplexity(model, test, seqlen=windows.shape[1], dataset=args.test.name)
    errors = [layer.output_error for layer in report.layers if layer.output_error is not None]
    row["settings"] = report.recipe["settings"]
    row["sparsity"] = round(report.sparsity, 6)
    row["perplexity"] = round(found.perplexity, 3)
    row["standard_error"] = round(found.standard_error, 3)
    row["layer_error"] = round(statistics.fmean(errors), 5) if errors else None
    notes = {key for layer in report.layers for key in layer.notes}
    row["notes"] = sorted(notes)


def _text(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """The file: what the figures depend on, then a line for each row."""
    from compare import _commit

    from llmprune.provenance import versions

    command = f"benchmarks/solvers.py --repeats {args.repeats} --clock {args.clock}"
    about = {
        "model": args.model.name,
        "windows": list(np.load(args.windows).shape),
        "clock": args.clock,
        "versions": versions(torch.device("cpu")),
        "commit": _commit(),
        "command": command,
    }
    lines = ",\n".join(map(json.dumps, rows))
    return f'{json.dumps(about)[:-1]}, "rows": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    main()
