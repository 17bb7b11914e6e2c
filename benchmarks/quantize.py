r"""Perplexity of fewer bits, on dense weights and on 2:4, side by side with what a weight takes in a file.

    python benchmarks/quantize.py --models DIR demo --train train.txt --test test.txt \
        --windows wikillama-5m=calibration_ids.npy --out benchmarks/results/quantize.json

Sparsity has to be judged against fewer bits: beside 2:4 of SparseGPT in int8 and int4, rounded to the nearest
and by the sweep, stand dense weights, rounded to the nearest and by GPTQ (the sweep with a mask of ones).
All read the same windows and the same test text. `bits` are those of a weight of the pruned matrices in the
formats of docs/format.md; fewer bits are a proposal there, not yet written. The models are float32.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from frontier import commit, fingerprint, folder
from torch import Tensor

from llmprune import calibration, methods
from llmprune.eval.perplexity import perplexity, token_ids
from llmprune.methods import quantized
from llmprune.methods.base import Method, Pruned
from llmprune.methods.quantized import Quantized
from llmprune.model import blocks, matrices
from llmprune.pattern import NM, Pattern, Unstructured, Within
from llmprune.preserve import evaluating
from llmprune.provenance import versions
from llmprune.prune_matrix import Task
from llmprune.stats import Gram
from llmprune.sweep import prune_blocks
from llmprune.whole import checked_walker

KINDS, ROUNDINGS = ("int8", "int4"), ("nearest", "gptq")
VALUE, SCALE = 16, 16  # bits of a bfloat16 number


@dataclass(frozen=True)
class Everything(Method[Gram]):
    """Removes nothing: what dense weights are rounded with."""

    name: ClassVar[str] = "dense"
    stats: ClassVar[type[Gram]] = Gram
    within: ClassVar[Within] = "row"
    paper: ClassVar[str] = ""
    exact: ClassVar[bool] = False  # type: ignore[assignment]

    def prune(self, weight: Tensor, stats: Gram, pattern: Pattern) -> Pruned:
        """`weight` as it is."""
        return Pruned(weight, torch.ones_like(weight, dtype=torch.bool))


def main() -> None:
    """Measure every cell and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", nargs="+", required=True, help="local checkpoints, or demo")
    parser.add_argument("--train", help="text to calibrate on; demo has its own")
    parser.add_argument("--test", help="text to be judged on; demo has its own")
    parser.add_argument("--windows", nargs="*", default=[], metavar="MODEL=IDS.npy")
    parser.add_argument("--range", default="search", choices=quantized.RANGES)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--limit", type=int, help="only so many windows of the test text")
    parser.add_argument("--out", type=Path, help="JSON with everything")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"{'model':<14} {'weights':<8} {'values':<14} {'bits':>6} {'perplexity':>11}")
    for name in args.models:
        for row in of_model(name, args):
            rows.append(row)
            cells = (row["model"], row["weights"], row["values"], row["bits"], row["perplexity"])
            print("{:<14} {:<8} {:<14} {:>6.3f} {:>11.3f}".format(*cells), flush=True)
    if args.out:
        settings = {key: str(value) for key, value in vars(args).items()}
        about = {
            "versions": versions(torch.device("cpu")),
            "commit": commit(),
            "settings": settings,
        }
        args.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def of_model(name: str, args: argparse.Namespace) -> Any:
    """Every cell of one model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = folder(name, args.models)
    tokenizer = AutoTokenizer.from_pretrained(path)
    given = dict(pair.split("=", 1) for pair in args.windows)
    if path.name in given:
        windows = torch.from_numpy(np.load(given[path.name])).long()
    else:
        source = "demo" if name == "demo" else args.train
        windows = calibration.load(source, tokenizer, samples=args.samples, seqlen=args.seqlen).ids
    test = token_ids("demo" if name == "demo" else args.test, tokenizer)[0]
    for sparse in (False, True):
        for kind, rounding in ((None, ""), *((k, r) for k in KINDS for r in ROUNDINGS)):
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            how = None
            if kind is not None:
                how = quantized.build(kind, {"rounding": rounding, "range": args.range})
            if sparse or how:
                change(model, windows, sparse, how)
            result = perplexity(model, test, seqlen=args.seqlen, dataset="test", limit=args.limit)
            yield {
                "model": path.name if name != "demo" else name,
                "fingerprint": fingerprint(path),
                "weights": "2:4" if sparse else "dense",
                "values": f"{kind} {rounding}" if kind else "bfloat16",
                "bits": round(bits(matrices(model), sparse, how), 4),
                "perplexity": round(result.perplexity, 4),
                "standard_error": round(result.standard_error, 4),
            }


@torch.no_grad()
def change(model: Any, windows: Tensor, sparse: bool, how: quantized.Quantize | None) -> None:
    """Prune and round `model` in place, block by block."""
    inner = methods.build("sparsegpt") if sparse else Everything()
    method = Quantized(inner, how) if how else inner
    pattern: Pattern = NM(2, 4) if sparse else Unstructured(0.5, "row")
    with evaluating(model):
        walker = checked_walker(model, blocks(model)[1], list(windows.split(8)), lambda line: None)
        for _ in prune_blocks(walker, matrices(model), Task(method, pattern), lambda *told: None):
            pass


def bits(chosen: Sequence[Any], sparse: bool, how: quantized.Quantize | None) -> float:
    """Of a weight, mean over all matrices, as docs/format.md stores them."""
    total = weights = 0.0
    for out, features in (m.shape for m in chosen):
        count = out * features
        total += count * (how.bits if how else VALUE) * (0.5 if sparse else 1)
        total += out * -(-features // 8) * 8 if sparse else 0
        total += out * -(-features // how.columns(features)) * SCALE if how else 0
        weights += count
    return total / weights


if __name__ == "__main__":
    main()
