r"""What a block repair gains by its settings: the measurement behind the defaults in refine/settings.py.

    python benchmarks/repair.py --model DIR --windows ids.npy --out benchmarks/results/repair.json

The first blocks are pruned and repaired with each setting. Told are, for the last of them, the error of its
output before and after on the windows that were held out and on windows that were learnt from, and the
processor's seconds of all. No other text is read, and no perplexity is measured: benchmarks/frontier.py does
that. Rows that `--out` holds already stay.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import llmprune
from llmprune.model import blocks

CASES: tuple[dict[str, float], ...] = (
    {"rate": 0.1},
    {"rate": 0.2},
    {"rate": 0.3},
    {"rate": 0.6},
    {"tokens": 512},
    {"tokens": 4096},
    {"epochs": 1},
    {"epochs": 8},
)


def main() -> None:
    """Measure every case that is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="local checkpoint, dense")
    parser.add_argument("--windows", type=Path, required=True, help=".npy of ids [n, seqlen]")
    parser.add_argument("--blocks", type=int, default=2, help="how many, from the first")
    parser.add_argument("--sparsity", nargs="+", default=["0.7"])
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--out", type=Path, required=True, help="JSON with everything")
    args = parser.parse_args()
    windows = torch.from_numpy(np.load(args.windows)).long()
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    for sparsity in args.sparsity:
        for case in CASES:
            key = {"sparsity": sparsity, "settings": case}
            if not any(row.items() >= key.items() for row in rows):
                rows.append({**key, **measured(args, windows, sparsity, case)})
                args.out.write_text(_text(args, rows))
                print(json.dumps(rows[-1]), flush=True)


def measured(
    args: argparse.Namespace, windows: Tensor, sparsity: str, case: dict[str, float]
) -> dict[str, Any]:
    """One row: the last block's errors, and the seconds of pruning and repairing all."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    name = blocks(model)[0]
    begun = time.process_time()
    report = llmprune.prune(
        model,
        calibration=windows,
        sparsity=sparsity,
        method=args.method,
        settings={"refit": True} if args.method != "alps" else {},
        targets=[f"{name}.{i}.*" for i in range(args.blocks)],
        repair=True,
        repair_settings=case,
        progress=False,
    )
    last = report.repair[-1]
    return {
        "held out before": round(last.held_out_before, 6),
        "held out": round(last.held_out_after, 6),
        "learnt": round(last.after, 6),
        "best epoch": last.best_epoch,
        "cpu seconds": round(time.process_time() - begun, 1),
    }


def _text(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """The file: what the figures depend on, then a line for each row."""
    from compare import _commit

    from llmprune.provenance import versions
    from llmprune.refine.settings import Repair

    about = {
        "model": args.model.name,
        "windows": args.windows.name,
        "blocks": args.blocks,
        "method": args.method,
        "defaults": Repair().as_dict(),
        "versions": versions(torch.device("cpu")),
        "commit": _commit(),
        "command": f"benchmarks/repair.py --blocks {args.blocks} --method {args.method}",
    }
    lines = ",\n".join(map(json.dumps, rows))
    return f'{json.dumps(about)[:-1]}, "rows": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    main()
