r"""Perplexity of fewer bits, on dense weights and on n:m, side by side with what a weight takes in a file.

    python benchmarks/quantize.py --models DIR demo --train train.txt --test test.txt \
        --windows wikillama-5m=calibration_ids.npy --out benchmarks/results/quantize.json

Sparsity has to be judged against fewer bits. So beside weights that SparseGPT, ALPS or `--quality balanced`
has pruned, in int8 and int4, rounded to the nearest and by the sweep, stand dense weights, rounded to the
nearest and by GPTQ (the sweep with a mask of ones), in as many bits as a 2:4 weight takes: 5 for int8, 3 in
groups of 128 for int4; and in 8 and 4 bits.
All read the same windows and the same test text. `bits` are those of a weight of the pruned matrices in the
format of docs/format.md. The models are float32.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from frontier import commit, fingerprint, folder
from torch import Tensor

import llmprune
from llmprune import calibration, methods
from llmprune.eval.perplexity import perplexity, token_ids
from llmprune.methods import quantized
from llmprune.methods.base import Method, Pruned
from llmprune.methods.quantized import Quantize, Quantized
from llmprune.model import blocks, matrices
from llmprune.pattern import Pattern, Unstructured, Within, parse
from llmprune.preserve import evaluating
from llmprune.provenance import versions
from llmprune.prune_matrix import Task
from llmprune.quality import QUALITIES
from llmprune.stats import Gram
from llmprune.sweep import prune_blocks
from llmprune.whole import checked_walker

KINDS, ROUNDINGS = ("int8", "int4"), ("nearest", "gptq")
METHODS = ("sparsegpt", "alps", "balanced")  # the last is a quality, rounded after its repair
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


@dataclass(frozen=True)
class Narrow(Quantize):
    """Dense weights in other bits than a checkpoint stores, as many as a pruned weight takes with its place.

    Attributes:
        width: bits of a whole number.
    """

    width: int = 8

    @property
    def bits(self) -> int:
        """Of a whole number."""
        return self.width


@dataclass(frozen=True)
class Cell:
    """What becomes of a model: pruned by a method or a quality, then rounded; None leaves that out."""

    pattern: str | None
    method: str | None
    how: Quantize | None

    @property
    def values(self) -> str:
        """In words."""
        return f"int{self.how.bits} {self.how.rounding}" if self.how else "bfloat16"


def every(patterns: Sequence[str], span: str) -> Iterator[Cell]:
    """Dense weights in every number of bits, then each pattern by each method."""
    yield Cell(None, None, None)
    for width, group in ((8, 0), (5, 0), (4, 128), (3, 128)):
        for rounding in ROUNDINGS:
            yield Cell(None, None, Narrow("int8", rounding, span, group, width=width))
    for pattern in patterns:
        for method in METHODS:
            yield Cell(pattern, method, None)
            for kind in KINDS:
                for rounding in ROUNDINGS if method not in QUALITIES else ("gptq",):
                    how = quantized.build(kind, {"rounding": rounding, "range": span})
                    yield Cell(pattern, method, how)


def main() -> None:
    """Measure every cell and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", nargs="+", required=True, help="local checkpoints, or demo")
    parser.add_argument("--train", help="text to calibrate on; demo has its own")
    parser.add_argument("--test", help="text to be judged on; demo has its own")
    parser.add_argument("--windows", nargs="*", default=[], metavar="MODEL=IDS.npy")
    parser.add_argument("--patterns", nargs="*", default=["2:4", "4:8"])
    parser.add_argument("--range", default="search", choices=quantized.RANGES)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--limit", type=int, help="only so many windows of the test text")
    parser.add_argument("--out", type=Path, help="JSON with everything")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    begun = commit()
    print(f"{'model':<14} {'weights':<15} {'values':<13} {'bits':>6} {'perplexity':>11}")
    for name in args.models:
        for row in of_model(name, args):
            rows.append(row)
            weights = f"{row['pattern']} {row['method']}" if row["pattern"] else "dense"
            cells = (row["model"], weights, row["values"], row["bits"], row["perplexity"])
            print("{:<14} {:<15} {:<13} {:>6.3f} {:>11.3f}".format(*cells), flush=True)
    if args.out:
        settings = {key: str(value) for key, value in vars(args).items()}
        about = {
            "versions": versions(torch.device("cpu")),
            "commit": begun,
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
    for cell in every(args.patterns, args.range):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        if cell.pattern or cell.how:
            change(model, windows, cell)
        result = perplexity(model, test, seqlen=args.seqlen, dataset="test", limit=args.limit)
        yield {
            "model": path.name if name != "demo" else name,
            "fingerprint": fingerprint(path),
            "pattern": cell.pattern,
            "method": cell.method,
            "values": cell.values,
            "bits": round(bits(matrices(model), cell), 4),
            "perplexity": round(result.perplexity, 4),
            "standard_error": round(result.standard_error, 4),
        }


@torch.no_grad()
def change(model: Any, windows: Tensor, cell: Cell) -> None:
    """Prune and round `model` in place, block by block."""
    if cell.method in QUALITIES:
        how = (
            {"quantize": cell.how.kind, "quantize_settings": cell.how.as_dict()} if cell.how else {}
        )
        llmprune.prune(
            model,
            calibration=windows,
            sparsity=cell.pattern,
            quality=cell.method,
            progress=False,
            **how,
        )
        return
    inner = methods.build(cell.method) if cell.method else Everything()
    method = Quantized(inner, cell.how) if cell.how else inner
    asked = parse(cell.pattern) if cell.pattern else Unstructured(0.5, "row")
    pattern = method.resolve(asked)
    with evaluating(model):
        walker = checked_walker(model, blocks(model)[1], list(windows.split(8)), lambda line: None)
        for _ in prune_blocks(walker, matrices(model), Task(method, pattern), lambda *told: None):
            pass


def bits(chosen: Sequence[Any], cell: Cell) -> float:
    """Of a weight, mean over all matrices, as docs/format.md stores them."""
    total = weights = 0.0
    for out, features in (m.shape for m in chosen):
        count = out * features
        kept = float(1 - parse(cell.pattern).sparsity) if cell.pattern else 1.0
        total += count * (cell.how.bits if cell.how else VALUE) * kept
        total += out * -(-features // 8) * 8 if cell.pattern else 0
        total += out * -(-features // cell.how.columns(features)) * SCALE if cell.how else 0
        weights += count
    return total / weights


if __name__ == "__main__":
    main()
