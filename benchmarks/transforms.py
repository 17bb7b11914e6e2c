r"""What transforms of the dense model gain, alone and together, by method, pattern and calibration seed.

    python benchmarks/transforms.py --models DIR --train train.txt --test test.txt \
        --windows wikillama-5m=calibration_ids.npy --out benchmarks/results/transforms.json

Cells, seeds and options are those of `benchmarks/frontier.py`, which runs them: each recipe is a method after
no transform or some, and what `--out` holds is not measured again. With `--rounding DIR` it only measures
what rounding costs the dense model: its perplexity as it is, folded and rotated in the dtype of its files,
and rotated in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import frontier
import numpy as np
import torch

METHODS = ("sparsegpt", "wanda", "alps")
CHANGES: dict[str, dict[str, Any]] = {
    "": {},
    " + fold": {"transforms": ["fold"]},
    " + rotate": {"transforms": ["rotate"]},
    " + random rotate": {
        "transforms": ["rotate"],
        "transform_settings": {"stream": "random", "values": "random"},
    },
    " + permute": {"transforms": ["permute"]},
    " + rotate, permute": {"transforms": ["rotate", "permute"]},
}
PATTERNS = ("2:4", "0.7", "0.5")


def main() -> None:
    """Measure the cells that are missing, or the cost of rounding."""
    if "--rounding" in sys.argv:
        return rounding(sys.argv[1:])
    frontier.RECIPES = {
        m + name: {"method": m, **c} for name, c in CHANGES.items() for m in METHODS
    }
    frontier.PATTERNS = PATTERNS
    frontier.main()
    return None


def rounding(argv: list[str]) -> None:
    """Print, and add to `--out`, the perplexity of a dense model that only transforms have changed."""
    parser = argparse.ArgumentParser(description="What rounding costs a dense model.")
    parser.add_argument("--rounding", type=Path, required=True, help="local checkpoint")
    parser.add_argument("--ids", type=Path, required=True, help=".npy of ids [n, seqlen]")
    parser.add_argument("--test", type=Path, required=True, help=".npy of ids [tokens]")
    parser.add_argument("--limit", type=int, help="only so many windows of the test text")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    from llmprune.provenance import versions

    windows = torch.from_numpy(np.load(args.ids)).long()
    rows = []
    for names, dtype in (
        ([], "as stored"),
        (["fold"], "as stored"),
        (["rotate"], "as stored"),
        (["rotate"], "float32"),
    ):
        rows.append({"transforms": names, "rounded": dtype})
        rows[-1]["perplexity"] = round(_perplexity(args, windows, names, dtype), 4)
        print(json.dumps(rows[-1]), flush=True)
    about = {
        "model": args.rounding.name,
        "limit": args.limit,
        "commit": frontier.commit(),
        "versions": versions(torch.device("cpu")),
        "command": "benchmarks/transforms.py --rounding",
        "rows": rows,
    }
    args.out.write_text(json.dumps(about, indent=1) + "\n")


def _perplexity(
    args: argparse.Namespace, windows: torch.Tensor, names: list[str], dtype: str
) -> float:
    """Perplexity of the dense model after transforms, each weight rounded to `dtype`."""
    from llmprune import loading
    from llmprune.config import PruneConfig
    from llmprune.eval.perplexity import perplexity
    from llmprune.model import blocks
    from llmprune.preserve import evaluating
    from llmprune.transforms.apply import in_memory
    from llmprune.whole import checked_walker

    opened = loading.open_model(loading.check(str(args.rounding)), device="cpu")
    config = PruneConfig(transforms=names)
    stored = opened.stored if dtype == "as stored" else {}
    with evaluating(opened.model):
        batches = list(windows.split(4))
        walker = checked_walker(opened.model, blocks(opened.model)[1], batches, print)
        todo, task = config.transformations(), config.task()
        in_memory(walker, todo, task, stored, print, False)
    test = torch.from_numpy(np.load(args.test)).long().flatten()
    found = perplexity(
        opened.model, test, seqlen=windows.shape[1], dataset="test", limit=args.limit
    )
    return float(found.perplexity)


if __name__ == "__main__":
    main()
