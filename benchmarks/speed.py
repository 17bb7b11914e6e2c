"""The work on one decoder block: llmprune, the papers' formulation and the floor, in one process.

    python benchmarks/speed.py --out benchmarks/results/speed-blocks.json
    python benchmarks/speed.py --device cuda --shapes 8b --windows 128 --seqlen 2048 --dtype bfloat16

A block of random weights, shaped as in a Llama of 110 million, 1 billion or 8 billion parameters, on random
hidden states: observe, prune every matrix, pass the outputs of the pruned block on. Contenders alternate
`--repeats` times, and the least seconds of each are shown, because other work on the machine can only add.
With `--threads 1 --clock cpu` they are seconds of processor time, which is what a machine busy with other
work allows: a second thread there mostly waits for its turn.

*naive* is benchmarks/naive.py, SparseGPT alone. No figure is printed unless its masks and llmprune's
agree on 99.9% of the weights. *floor* is arithmetic that cannot be avoided over the best rate of float32
matrix products measured on this machine in the same run (of `--dtype` for the forwards): two forwards
of the block; for SparseGPT also half of one Gram matrix per input, 2/3 n^3 to factor it, and one
triangular pass of updates per matrix, out * in^2. Factors of up to 1024 features, which llmprune solves in
float64, are counted at the float32 rate too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from compare import _commit
from naive import prune_block as prune_naively
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmprune import methods
from llmprune.memory import default_batch
from llmprune.model import Matrix, matrices
from llmprune.pattern import NM, parse
from llmprune.provenance import versions
from llmprune.prune_matrix import Task
from llmprune.sweep import pass_on, prune_block
from llmprune.walk import Walker

# hidden, intermediate, heads, heads of keys and values, windows, seqlen
SHAPES = {
    "tiny": (256, 704, 8, 4, 8, 128),
    "110m": (768, 2048, 12, 4, 16, 512),
    "1b": (2048, 8192, 32, 8, 16, 512),
    "8b": (4096, 14336, 32, 8, 8, 256),
}
INPUTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Bench:
    """One block, second of two (the first is never run), and what goes into it."""

    model: Any
    hidden: Tensor  # [windows, seqlen, width]

    def __post_init__(self) -> None:
        self.block: nn.Module = self.model.model.layers[1]
        self.dense = {k: v.clone() for k, v in self.block.state_dict().items()}
        ids = torch.zeros(self.hidden.shape[:2], dtype=torch.int64)
        size = default_batch(self.model.device, ids.shape[1])
        self.walker = Walker(self.model, self.model.model.layers, list(ids.split(size)))
        self.batches = list(self.hidden.split(size))
        self.matrices: list[Matrix] = matrices(self.model)

    def ours(self, method: str, pattern: str) -> tuple[dict[str, Tensor], list[Tensor]]:
        """What `llmprune.prune` does with one block that is not the last."""
        chosen = methods.build(method)
        task = Task(chosen, chosen.resolve(parse(pattern)))
        hidden: list[Tensor | None] = list(self.batches)
        masks = {}
        with torch.no_grad(), ExitStack() as later:
            for done in prune_block(self.walker, 1, self.matrices, hidden, task, _quiet):
                later.callback(done.settle)
                masks[done.matrix.name.split("layers.1.")[1]] = done.keep
            pass_on(self.walker, 1, hidden, _quiet)
        return masks, [h for h in hidden if h is not None]

    def naive(self, pattern: str) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The papers' formulation on the same windows, one by one."""
        kept = parse(pattern)
        wanted = (kept.n, kept.m) if isinstance(kept, NM) else kept.sparsity
        return prune_naively(self.block, list(self.hidden.split(1)), self.forward, wanted)

    def forward(self, hidden: Tensor) -> Tensor:
        """The block on `hidden` [batch, seqlen, width]."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        rotary = self.model.model.rotary_emb(hidden, positions)
        out = self.block(hidden, position_embeddings=rotary, position_ids=positions)
        return out if isinstance(out, Tensor) else out[0]

    def operations(self) -> tuple[float, float]:
        """Multiplications and additions of two forwards, and what SparseGPT adds to them."""
        windows, seqlen, width = self.hidden.shape
        tokens = windows * seqlen
        shape = {m.name.split(".")[-1]: m.shape for m in self.matrices}
        forwards = 4 * tokens * sum(out * n for out, n in shape.values())
        forwards += 2 * 4 * tokens * seqlen * width / 2  # scores and values of causal attention
        widths = [shape[names[0]][1] for names in INPUTS]
        solver = sum(tokens * n**2 + 2 / 3 * n**3 for n in widths)
        solver += sum(out * n**2 for out, n in shape.values())
        return float(forwards), float(solver)


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    blocks = []
    for name in args.shapes:
        blocks.append(_measure(name, args))
        print(_table(blocks[-1]), flush=True)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "commit": _commit(),
        "versions": versions(torch.device(args.device)),
        "dtype": args.dtype,
        "clock": args.clock,
        "repeats": args.repeats,
        "load_average": os.getloadavg(),
        "blocks": blocks,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["110m", "1b", "8b"])
    parser.add_argument("--patterns", nargs="+", default=["0.5", "2:4"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--windows", type=int, help="instead of the shape's own number")
    parser.add_argument("--seqlen", type=int, help="likewise")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu needs --threads 1")
    parser.add_argument("--small", action="store_true", help="a rehearsal with one tiny block")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.small:
        args.shapes, args.windows, args.seqlen, args.dtype = ["tiny"], None, None, "float32"
    if args.clock == "cpu" and (args.threads > 1 or args.device != "cpu"):
        parser.error("--clock cpu adds up threads; it needs --threads 1 and --device cpu")
    return args


def _measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every contender on one shape, each result compared before it counts."""
    bench, now = _bench(name, args), CLOCKS[args.clock]
    jobs: dict[tuple[str, str, str], Callable[[], tuple[dict[str, Tensor], list[Tensor]]]] = {}
    for method, pattern in product(("sparsegpt", "wanda"), args.patterns):
        jobs["llmprune", method, pattern] = lambda m=method, p=pattern: bench.ours(m, p)  # type: ignore[misc]
        if method == "sparsegpt":
            jobs["naive", method, pattern] = lambda p=pattern: bench.naive(p)  # type: ignore[misc]
    seconds: dict[tuple[str, str, str], list[float]] = {job: [] for job in jobs}
    found: dict[tuple[str, str, str], dict[str, Tensor]] = {}
    rates: dict[str, float] = {}
    for _ in range(args.repeats):
        for dtype in {torch.float32, bench.hidden.dtype}:
            rate = _rate(bench, dtype, now)
            rates[str(dtype)] = max(rate, rates.get(str(dtype), 0.0))
        for job, work in jobs.items():
            bench.block.load_state_dict(bench.dense)
            _wait(args.device)
            begun = now()
            masks = work()[0]
            _wait(args.device)
            seconds[job].append(now() - begun)
            found.setdefault(job, {name: mask.cpu() for name, mask in masks.items()})
    agreement = _agreement(found)
    forwards, solver = bench.operations()
    base = forwards / rates[str(bench.hidden.dtype)]
    floor = {"wanda": base, "sparsegpt": base + solver / rates["torch.float32"]}
    rows = [_row(job, seconds, floor) for job in jobs]
    return {
        "shape": name,
        "hidden": bench.hidden.shape[2],
        "windows": bench.hidden.shape[0],
        "seqlen": bench.hidden.shape[1],
        "gflops": {dtype: round(rate / 1e9, 1) for dtype, rate in rates.items()},
        "floor": {method: round(value, 3) for method, value in floor.items()},
        "agreement_with_naive": agreement,
        "peak_gb": round(_peak(args.device), 2),
        "rows": rows,
    }


def _bench(name: str, args: argparse.Namespace) -> Bench:
    hidden, intermediate, heads, pairs, windows, seqlen = SHAPES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        max_position_embeddings=4096,
    )
    dtype = getattr(torch, args.dtype)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.model.layers[0] = nn.Identity()  # the walk gives its output; it is never run
    model = model.to_empty(device="cpu").eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02) if parameter.dim() > 1 else parameter.data.fill_(1)
    model = model.to(args.device, dtype)
    states = torch.randn(args.windows or windows, args.seqlen or seqlen, hidden)
    return Bench(model, states.to(args.device, dtype))


def _rate(bench: Bench, dtype: torch.dtype, now: Callable[[], float]) -> float:
    """Operations a second of the block's largest products, the best of a few."""
    tokens, width = 1024, bench.hidden.shape[2]
    wide = max(m.shape[0] for m in bench.matrices)
    device = bench.hidden.device
    best = 0.0
    for rows, inner, columns in (
        (tokens, width, wide),
        (width, width, width),
        (tokens, wide, width),
    ):
        a = torch.randn(rows, inner, device=device, dtype=dtype)
        b = torch.randn(inner, columns, device=device, dtype=dtype)
        for _ in range(5):
            _wait(device.type)
            begun = now()
            a @ b
            _wait(device.type)
            best = max(best, 2 * rows * inner * columns / (now() - begun))
    return best


def _agreement(found: dict[tuple[str, str, str], dict[str, Tensor]]) -> dict[str, float]:
    """Share of weights on which llmprune's masks are the naive ones, by pattern.

    Raises:
        SystemExit: where that is less than 99.9%.
    """
    shares = {}
    for contender, method, pattern in found:
        if contender == "naive":
            theirs, mine = found[contender, method, pattern], found["llmprune", method, pattern]
            same = sum(int((theirs[name] == mine[name]).sum()) for name in theirs)
            shares[pattern] = same / sum(mask.numel() for mask in theirs.values())
    if any(share < 0.999 for share in shares.values()):
        raise SystemExit(f"masks differ from the naive ones: {shares}")
    return shares


def _row(
    job: tuple[str, str, str],
    seconds: dict[tuple[str, str, str], list[float]],
    floor: dict[str, float],
) -> dict[str, Any]:
    contender, method, pattern = job
    least = min(seconds[job])
    row = {"contender": contender, "method": method, "pattern": pattern}
    row |= {"seconds": round(least, 3), "seconds_all": [round(s, 3) for s in seconds[job]]}
    row["of_floor"] = round(least / floor[method], 2)
    if contender == "llmprune" and (naive := seconds.get(("naive", method, pattern))):
        row["faster_than_naive"] = round(min(naive) / least, 2)
    return row


def _table(block: dict[str, Any]) -> str:
    title = (
        f"{block['shape']}: {block['windows']} windows of {block['seqlen']}, floor {block['floor']}"
    )
    lines = [f"{title}, rate {block['gflops']} GFLOP/s, agreement {block['agreement_with_naive']}"]
    for row in block["rows"]:
        times = (
            f", {row['faster_than_naive']:.2f} times as fast as naive"
            if "faster_than_naive" in row
            else ""
        )
        lines.append(
            f"  {row['contender']:<9} {row['method']:<10} {row['pattern']:<4} {row['seconds']:>8.2f} s"
            f"  {row['of_floor']:.2f} of the floor{times}"
        )
    return "\n".join(lines)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak(device: str) -> float:
    """GB: of the device, or resident on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _quiet(text: str) -> None:
    pass


if __name__ == "__main__":
    main()
