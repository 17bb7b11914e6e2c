r"""What the solvers that use a whole Gram matrix cost and lose on a layer as wide as those of large models.

    python benchmarks/wide_layer.py --out benchmarks/results/wide-layer.json

A matrix [4096, 4096] on one processor, of which some rows are solved: what all rows share (a factor, an
eigendecomposition) and what each row takes are told apart by two numbers of rows, and the seconds of the
whole matrix follow. Weights are normal; the inputs have a spectrum that falls as that of hidden states does,
and features of uneven size. The loss is the share of the output's energy that is gone on other tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from damping import lost
from torch import Tensor

from llmprune import methods
from llmprune.methods import swaps
from llmprune.pattern import parse
from llmprune.provenance import versions
from llmprune.stats import Gram

CASES: dict[str, tuple[str, dict[str, Any], int]] = {  # and how many times as many rows, if quick
    "sparsegpt": ("sparsegpt", {}, 16),
    "sparsegpt + refit": ("sparsegpt", {"refit": True}, 4),
    "wanda + swaps": ("wanda", {"refit": True, "refit_swaps": 1}, 1),
    "sparsegpt + swaps": ("sparsegpt", {"refit": True, "refit_swaps": 1}, 1),
    "alps": ("alps", {}, 1),
    "alps, quick steps": ("alps", {"growth": 1.2, "look": 1}, 1),
}
SWAPS = "wanda + swaps"  # is measured in narrower and wider parts, too
WIDTHS = (32, swaps.WIDTH, 128)


def main() -> None:
    """Measure every case and write them all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--width", type=int, default=4096, help="inputs, and rows of the matrix")
    parser.add_argument("--rows", type=int, nargs=2, default=(32, 128), help="that are solved")
    parser.add_argument("--patterns", nargs="*", default=("2:4", "0.7"))
    parser.add_argument("--out", type=Path, required=True, help="JSON with everything")
    args = parser.parse_args()
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    inputs = tokens(args.width, 2 * args.width, random)
    near, away = (gram(part) for part in inputs.chunk(2))
    weight = torch.randn(16 * args.rows[1], args.width, generator=random)
    rows = []
    for pattern in args.patterns:
        for case, width in cases():
            swaps.WIDTH = width
            row = measured(case, pattern, weight, near, away, args.rows)
            rows.append({**row, "part": width} if case == SWAPS else row)
            print(json.dumps(rows[-1]), flush=True)
            args.out.write_text(_text(args, rows))


def cases() -> Iterator[tuple[str, int]]:
    """Every case with the width of the parts that swaps are made in."""
    for case in CASES:
        for width in WIDTHS if case == SWAPS else (WIDTHS[1],):
            yield case, width


def tokens(width: int, count: int, random: torch.Generator) -> Tensor:
    """Inputs [count, width] float32."""
    turn = torch.linalg.qr(torch.randn(width, width, generator=random)).Q
    fall = torch.arange(1, width + 1) ** -0.5
    size = torch.exp(0.5 * torch.randn(width, generator=random))
    return torch.randn(count, width, generator=random) * fall @ turn * size


def gram(inputs: Tensor) -> Gram:
    """Their sums."""
    found = Gram.empty(inputs.shape[1], torch.device("cpu"))
    found.add(inputs)
    return found


def measured(
    case: str, share: str, weight: Tensor, near: Gram, away: Gram, solved: tuple[int, int]
) -> dict[str, Any]:
    """Seconds for a square matrix and the loss of the rows that every case solves."""
    name, settings, more = CASES[case]
    few, many = (more * count for count in solved)
    method = methods.build(name, settings)
    pattern = method.resolve(parse(share, None if ":" in share else "row"))
    seconds = []
    for count in (few, many):
        near.parts()  # drops what an earlier case derived
        begun = time.process_time()
        pruned = method.prune(weight[:count], near, pattern).weight
        seconds.append(time.process_time() - begun)
    each = max(0.0, (seconds[1] - seconds[0]) / (many - few))
    shared = max(0.0, seconds[0] - few * each)
    return {
        "case": case,
        "pattern": share,
        "seconds_shared": round(shared, 2),
        "seconds_per_row": round(each, 4),
        "seconds_matrix": round(shared + each * weight.shape[1], 2),
        "loss": round(lost(weight[: solved[1]], pruned[: solved[1]], away), 5),
    }


def _text(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """The file: what the figures depend on, then a line for each row."""
    from compare import _commit

    about = {
        "width": args.width,
        "rows": list(args.rows),
        "tokens": args.width,
        "clock": "processor",
        "load": [
            round(load, 1) for load in os.getloadavg()
        ],  # busy machines make that clock run fast
        "versions": versions(torch.device("cpu")),
        "commit": _commit(),
        "command": "benchmarks/wide_layer.py",
    }
    lines = ",\n".join(map(json.dumps, rows))
    return f'{json.dumps(about)[:-1]}, "rows": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    main()
