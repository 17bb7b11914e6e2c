r"""How much damping a refit needs for how many tokens: the measurement behind `DAMPING` in methods/refit.py.

    python benchmarks/damping.py --model DIR --windows ids.npy --held-out validation.txt \
        --out benchmarks/results/damping.json

Every matrix of a few blocks is pruned from what enters it in the dense model, with the first n calibration
windows and a damping of lambda on a diagonal of ones. Per method, pattern, n, number of inputs and lambda:
the share of the output's energy that is lost on held-out text, mean over matrices. Methods that do not refit
stand beside them, to show with how few tokens each is still worth it. At the end: what a damping of c inputs
per token costs against the best lambda of each row, for several c. Rows that `--out` holds already stay,
each with its commit.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from compare import _commit
from torch import Tensor

from llmprune import methods, pattern
from llmprune.model import Matrix, matrices
from llmprune.stats import Gram

LAMBDAS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
RULES = (0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 1.0)  # lambda = rule * inputs / tokens
PATTERNS = ("2:4", "0.7")
COUNTS = (8, 16, 32, 64, 128, 0.25, 1, 4)  # windows
PLAIN = ("magnitude", "wanda", "sparsegpt")
REFIT = {
    "wanda + refit": ("wanda", "refit_damping", {"refit": True}),
    "alps": ("alps", "damping", {}),
}


def main() -> None:
    """Measure every case that is missing, then sum up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="local checkpoint, dense")
    parser.add_argument("--windows", type=Path, required=True, help=".npy of ids [n, seqlen]")
    parser.add_argument("--held-out", type=Path, required=True, help="text that nothing else reads")
    parser.add_argument("--held-windows", type=int, default=32)
    parser.add_argument("--blocks", nargs="*", type=int, default=[1, 4])
    parser.add_argument("--out", type=Path, required=True, help="JSON with everything")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = torch.from_numpy(np.load(args.windows)).long()
    width = windows.shape[1]
    ids = tokenizer(args.held_out.read_text(), add_special_tokens=False).input_ids
    held = torch.tensor(ids[: args.held_windows * width]).view(-1, width)
    chosen = [m for m in matrices(model) if m.block in args.blocks]
    rows, at = earlier(args.out), _commit()
    with torch.no_grad():
        away = grams(model, chosen, held)
        for count in COUNTS:
            near = grams(model, chosen, _first(windows, count))
            for case, share in ((c, p) for p in PATTERNS for c in (*PLAIN, *REFIT)):
                if any(
                    (r["case"], r["pattern"], r["windows"]) == (case, share, count) for r in rows
                ):
                    continue
                found = measured(chosen, near, away, case, share, count)
                rows += [{**row, "commit": at} for row in found]
                args.out.write_text(_text(args, rows))
                print(case, share, count, flush=True)
    for line in summary(rows):
        print(json.dumps(line))


def earlier(path: Path) -> list[dict[str, Any]]:
    """The rows that are there, each with the commit it was measured at."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    return [{**row, "commit": row.get("commit", found["commit"])} for row in found["rows"]]


def _first(windows: Tensor, count: float) -> Tensor:
    """So many windows; of less than one, its first tokens."""
    return windows[: math.ceil(count), : int(windows.shape[1] * min(1, count))]


def grams(model: Any, chosen: list[Matrix], windows: Tensor) -> dict[str, Gram]:
    """The Gram matrix of what enters each matrix of the dense model, by its name."""
    found = {m.name: Gram.empty(m.shape[1], torch.device("cpu")) for m in chosen}
    handles = [
        m.module.register_forward_pre_hook(lambda module, x, name=m.name: found[name].add(x[0]))
        for m in chosen
    ]
    for batch in windows.split(4):
        model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def measured(
    chosen: list[Matrix],
    near: dict[str, Gram],
    away: dict[str, Gram],
    case: str,
    share: str,
    count: float,
) -> list[dict[str, Any]]:
    """The rows of one case: of each number of inputs, and of each lambda where there is one."""
    name, key, settings = REFIT.get(case, (case, "", {}))
    found = []
    for damping in LAMBDAS if key else (None,):
        errors: dict[int, list[float]] = {}
        for matrix in chosen:
            known = near[matrix.name]
            features = matrix.shape[1]
            chosen_one = {} if damping is None else {key: damping * known.tokens / features}
            method = methods.build(name, {**settings, **chosen_one})
            stats = method.stats.empty(features, torch.device("cpu"))
            stats = known if method.stats is Gram else known.norms() if name == "wanda" else stats
            wanted = method.resolve(pattern.parse(share))
            pruned = method.prune(matrix.weight, stats, wanted).weight
            errors.setdefault(features, []).append(lost(matrix.weight, pruned, away[matrix.name]))
        for features, some in errors.items():
            row = {"case": case, "pattern": share, "windows": count, "inputs": features}
            tokens = near[chosen[0].name].tokens
            found.append(
                {**row, "tokens": tokens, "lambda": damping, "error": round(fmean(some), 6)}
            )
    return found


def lost(dense: Tensor, pruned: Tensor, held: Gram) -> float:
    """The share of the output's energy that is gone."""
    gap, gram = (dense - pruned).double(), held.gram.double()
    return float(((gap @ gram) * gap).sum() / ((dense.double() @ gram) * dense).sum())


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each c: the error under lambda = c * inputs / tokens over the least one, mean and worst."""
    cases: dict[tuple[Any, ...], dict[float, float]] = {}
    for row in rows:
        if row["lambda"] is not None:
            key = (row["case"], row["pattern"], row["windows"], row["inputs"], row["tokens"])
            cases.setdefault(key, {})[row["lambda"]] = row["error"]
    found = []
    for rule in RULES:
        over = [
            between(errors, rule * key[3] / key[4]) / min(errors.values())
            for key, errors in cases.items()
            if key[4] >= key[3] / 4
        ]
        found.append({"rule": rule, "mean": round(fmean(over), 4), "worst": round(max(over), 4)})
    return found


def between(errors: dict[float, float], damping: float) -> float:
    """The error at a lambda between two that were measured, along its logarithm."""
    order = sorted(errors)
    logs = [math.log(value) for value in order]
    at = math.log(min(max(damping, order[0]), order[-1]))
    return float(np.interp(at, logs, [errors[value] for value in order]))


def _text(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """The file: what the figures depend on, the summary, then a line for each row."""
    from llmprune.provenance import versions

    about = {
        "model": args.model.name,
        "held-out windows": args.held_windows,
        "blocks": args.blocks,
        "versions": versions(torch.device("cpu")),
        "commit": ", ".join(sorted({row["commit"] for row in rows})),
        "command": "benchmarks/damping.py",
        "summary": summary(rows) if any(r["lambda"] is not None for r in rows) else [],
    }
    lines = ",\n".join(map(json.dumps, rows))
    return f'{json.dumps(about)[:-1]}, "rows": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    main()
