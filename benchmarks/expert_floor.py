r"""How few tokens each method can learn from: the measurement behind `Method.needs_tokens`.

    python benchmarks/expert_floor.py --model DIR --windows ids.npy --test test_ids.npy \
        --out benchmarks/results/expert-floor.json

An expert may see a few tokens only. Here every matrix of a dense model stands in for an expert: it is
pruned with the statistics of n random calibration tokens, all matrices from what enters them in the dense
model. SparseGPT needs tokens in proportion to the inputs (its Gram matrix has no higher rank than n), Wanda
may not (it learns each input's norm by itself): n is a share of the inputs, and for Wanda a fixed number too.

Per method, pattern, n and draw: the mean over matrices of the relative output error on held-out tokens, in
all and by the number of inputs, and the perplexity of the model so pruned.

A method that falls back keeps the pattern it was run with, so Wanda and magnitude are measured in the
comparison groups of SparseGPT (a block of columns) and of Wanda (a row). Rows that `--out` holds already are
not measured again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmprune import methods, pattern
from llmprune.model import Matrix, matrices

SHARES = (1 / 256, 1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 1.5, 2, 4)  # tokens per input feature
COUNTS = (4, 16, 32, 64, 128, 256)  # tokens, whatever the number of inputs
CASES = (
    ("sparsegpt", "0.5", "columns"),
    ("wanda", "0.5", "columns"),
    ("magnitude", "0.5", "columns"),
    ("wanda", "0.5", "row"),
    ("magnitude", "0.5", "row"),
    ("sparsegpt", "2:4", None),
    ("wanda", "2:4", None),
    ("magnitude", "2:4", None),
)


def main() -> None:
    """Measure every case and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="local checkpoint, dense")
    parser.add_argument("--windows", type=Path, required=True, help=".npy of ids [n, seqlen]")
    parser.add_argument("--test", type=Path, required=True, help=".npy of ids [tokens]")
    parser.add_argument("--draws", type=int, default=3, help="choices of tokens")
    parser.add_argument("--limit", type=int, default=64, help="test windows for perplexity")
    parser.add_argument("--out", type=Path, help="JSON with everything")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM

    from llmprune.provenance import versions

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    windows = torch.from_numpy(np.load(args.windows)).long()
    test = torch.from_numpy(np.load(args.test)).long().flatten()
    chosen = matrices(model)
    width = windows.shape[1]
    seen = inputs_of(model, chosen, windows)
    # the last windows of the test text: not those that perplexity is measured on
    held_out = inputs_of(model, chosen, test[-16 * width :].view(16, width))
    result = {
        "model": args.model.name,
        "windows": list(windows.shape),
        "test windows": args.limit,
        "held-out tokens": 16 * width,
        "versions": versions(torch.device("cpu")),
    }
    rows = json.loads(args.out.read_text())["rows"] if args.out and args.out.exists() else []
    for row in wanted_rows(args.draws):
        if any(row.items() <= there.items() for there in rows):
            continue
        with torch.no_grad():
            row |= measured(model, chosen, seen, held_out, row, test, width, args.limit)
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.out:
            lines = ",\n".join(map(json.dumps, rows))
            args.out.write_text(f'{json.dumps(result)[:-1]}, "rows": [\n{lines}\n]}}\n')


def wanted_rows(draws: int) -> list[dict[str, Any]]:
    """What to measure: method, sparsity, comparison group, tokens, draw."""
    rows = []
    for name, sparsity, within in CASES:
        amounts = [{"tokens_per_feature": share} for share in SHARES]
        if name == "wanda":
            amounts += [{"tokens": count} for count in COUNTS]
        if name == "magnitude":
            amounts = [{"tokens_per_feature": 0}]
        for amount in amounts:
            for draw in range(draws if name != "magnitude" else 1):
                case = {"method": name, "sparsity": sparsity, "within": within}
                rows.append({**case, **amount, "draw": draw})
    return rows


@torch.no_grad()
def inputs_of(model: Any, chosen: list[Matrix], windows: Tensor) -> dict[str, Tensor]:
    """What enters each matrix of the dense model: [tokens, in] float32 by name."""
    found: dict[str, list[Tensor]] = {m.name: [] for m in chosen}
    handles = [
        m.module.register_forward_pre_hook(
            lambda module, args, name=m.name: found[name].append(args[0].flatten(0, -2))
        )
        for m in chosen
    ]
    for batch in windows.split(4):
        model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def measured(
    model: Any,
    chosen: list[Matrix],
    seen: dict[str, Tensor],
    held_out: dict[str, Tensor],
    row: dict[str, Any],
    test: Tensor,
    width: int,
    limit: int,
) -> dict[str, Any]:
    """Held-out output error and perplexity of `model` pruned as `row` says; it is dense afterwards."""
    from llmprune.eval.perplexity import perplexity

    method = methods.build(row["method"])
    wanted = method.resolve(pattern.parse(row["sparsity"], row["within"]))
    generator = torch.Generator().manual_seed(row["draw"])
    dense = {m.name: m.weight.clone() for m in chosen}
    errors: dict[int, list[float]] = {}
    for matrix in chosen:
        x, weight = seen[matrix.name], dense[matrix.name]
        features = weight.shape[1]
        stats = method.stats.empty(features, x.device)
        if row["method"] != "magnitude":
            count = row.get("tokens") or max(1, round(features * row["tokens_per_feature"]))
            stats.add(x[torch.randperm(len(x), generator=generator)[:count]])
        matrix.write(method.prune(weight, stats, wanted).weight)
        y = held_out[matrix.name]
        change = (y @ (weight - matrix.weight).T).square().sum()
        error = float(change / (y @ weight.T).square().sum())
        errors.setdefault(features, []).append(error)
    result = perplexity(model, test, seqlen=width, dataset="test", limit=limit)
    for matrix in chosen:
        matrix.write(dense[matrix.name])
    every = [error for some in errors.values() for error in some]
    return {
        "output_error": round(fmean(every), 5),
        "by_width": {width: round(fmean(some), 5) for width, some in errors.items()},
        "perplexity": round(result.perplexity, 3),
    }


if __name__ == "__main__":
    main()
