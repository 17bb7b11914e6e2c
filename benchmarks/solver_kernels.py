"""The kernels of the solvers: that they are right, what they gain, seconds of a block and of a model.

    python benchmarks/solver_kernels.py --out benchmarks/results/solver-kernels.json
    python benchmarks/solver_kernels.py --device cpu --small --out rehearsal.json

Right: each kernel against plain torch at the size of a layer of Llama-3-8B; what is wrong ends it. Then, in
one process and in turn, the least of `--repeats`: each kernel and plain torch; one Llama-3-8B-shaped block on
128 windows of 2048 random hidden states, by llmprune with kernels and without, by the papers' formulation
(benchmarks/naive.py) and as two plain forward passes. Last a whole Llama-3-8B-shaped model of random bfloat16
weights at 2:4: 32 blocks, or as many as `--seconds` leave time for; then its row says that its seconds are
extrapolated. Targets: SparseGPT at least 5 times as fast as the papers' formulation, Wanda at most 1.25 times
two passes; a rehearsal has none.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from compare import _commit
from gpu import _timed
from speed import Bench, _agreement, _bench
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import llmprune
from llmprune.kernels import gram, solver, sweep
from llmprune.methods import sparsegpt
from llmprune.pattern import NM, Pattern, Unstructured
from llmprune.provenance import versions

FASTER, SLOWER = 5.0, 1.25  # the targets
CASES = (("sparsegpt", "2:4"), ("sparsegpt", "0.5"), ("wanda", "2:4"), ("wanda", "0.5"))
Work = Callable[[], Any]


def main() -> None:
    args = _arguments()
    begun = time.perf_counter()
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "commit": _commit(),
        "versions": versions(torch.device(args.device)),
        "small": args.small,
        "solver": solver.state(torch.device(args.device)),
    }
    print("solver kernels here:", result["solver"], flush=True)

    def add(name: str, found: Any) -> None:
        result[name] = found
        args.out.write_text(json.dumps(result, indent=2) + "\n")

    add("kernels", kernels(args))
    add("block", block(args))
    rows = []
    for method in ("wanda", "sparsegpt"):
        left = args.seconds - (time.perf_counter() - begun)
        share = left if method == "sparsegpt" else left * 0.4
        rows.append(whole(args, method, blocks(result["block"], method, share, args.blocks)))
        add("whole", rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a rehearsal with tiny shapes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=420, help="for everything, about")
    parser.add_argument("--blocks", type=int, default=32, help="of the whole model")
    args = parser.parse_args()
    args.dtype, args.windows, args.seqlen = "bfloat16", 128, 2048  # what speed._bench asks for
    if args.small:
        args.dtype, args.windows, args.seqlen, args.blocks = "float32", 8, 128, 3
    return args


@contextmanager
def by(name: str | None) -> Iterator[None]:
    """With LLMPRUNE_SOLVER set so, or not at all."""
    before = os.environ.pop(solver.SETTING, None)
    try:
        if name is not None:
            os.environ[solver.SETTING] = name
        yield
    finally:
        os.environ.pop(solver.SETTING, None)
        if before is not None:
            os.environ[solver.SETTING] = before


def kernels(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Microseconds of each kernel that runs here and of plain torch, once their results agree.

    Raises:
        SystemExit: where they do not.
    """
    rows = []
    with by("triton"):
        runs = solver.state(torch.device(args.device))
    for name, what, make in _kernel_cases(torch.device(args.device), args.small):
        if runs[name] != "triton":
            print(f"  {name} {what}: {runs[name]}")
            continue
        found, least = {}, dict[str, float]()
        for turn in range(1 + args.repeats):
            for how in ("triton", "torch"):
                work, result = make(turn > 0)
                with by(how):
                    seconds, _ = _timed(work, args.device)
                if turn == 0:  # compiles, too
                    found[how] = result()
                else:
                    least[how] = min(seconds, least.get(how, seconds))
        if not _same(found["triton"], found["torch"]):
            raise SystemExit(f"{name} {what}: the kernel and plain torch differ")
        micros = {how: round(seconds * 1e6, 1) for how, seconds in least.items()}
        gain = round(least["torch"] / least["triton"], 2)
        rows.append({"kernel": name, "case": what, "microseconds": micros, "gain": gain})
        print(f"  {name} {what}: {micros['triton']} us, torch {micros['torch']} us, {gain:.2f} x")
    return rows


Made = tuple[Work, Callable[[], tuple[Tensor, ...]]]


def _kernel_cases(
    device: torch.device, small: bool
) -> Iterator[tuple[str, str, Callable[[bool], Made]]]:
    """(kernel, case, what makes the work and gives what it found); timed on values that stay small."""
    random = torch.Generator(device).manual_seed(0)
    for tokens, features in ((40, 72),) if small else ((8192, 4096), (8192, 14336)):
        x = torch.randn(tokens, features, generator=random, device=device).bfloat16()
        yield "gram", f"{tokens} x {features}", lambda timed, x=x: _gram(x)  # type: ignore[misc]
    patterns: tuple[Pattern, ...] = (Unstructured(0.5), NM(2, 4), NM(4, 8))
    for rows in (24,) if small else (4096, 28672):
        for pattern in patterns:
            yield (
                "sweep",
                f"{rows} x {sweep.WIDTH} {pattern}",
                lambda timed, r=rows, p=pattern: _sweep(r, p, device, timed),  # type: ignore[misc]
            )
    score = torch.rand((12, 64) if small else (1024, 4096), generator=random, device=device)
    for nm in (NM(2, 4), NM(4, 8)):
        yield "nm_mask", f"{len(score)} rows {nm}", lambda timed, p=nm: _mask(score, p)  # type: ignore[misc]


def _gram(x: Tensor) -> Made:
    sums = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    return lambda: gram.add_gram(sums, x), lambda: (sums.triu(),)


def _sweep(rows: int, pattern: Pattern, device: torch.device, timed: bool) -> Made:
    wt, upper = sweep.exact_case(rows, sweep.WIDTH, device)
    if timed:
        upper = torch.eye(len(upper), device=device)
    kt, errors = (wt * 7 % 3 != 0).contiguous(), torch.empty_like(wt)
    return lambda: sparsegpt._solve(wt, kt, errors, upper, pattern), lambda: (wt, kt, errors)


def _mask(score: Tensor, pattern: NM) -> Made:
    found: list[Tensor] = []
    return lambda: found.append(pattern.keep(score)), lambda: (found[-1],)


def _same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    """Masks and what is exact to the bit; sums of products to the rounding of float32."""
    if len(ours) > 1 or ours[0].dtype == torch.bool:
        return all(map(torch.equal, ours, theirs))
    scale = theirs[0].diagonal().sqrt()
    return bool(((ours[0] - theirs[0]).abs() <= 1e-4 * scale[:, None] * scale).all())


def block(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of one block for every contender, in turn; masks must be those of the papers' formulation."""
    bench = _bench("tiny" if args.small else "8b", args)
    jobs: dict[tuple[str, str, str], Work] = {("two passes", "", ""): lambda: _twice(bench)}
    for method, pattern in CASES:
        jobs["llmprune", method, pattern] = lambda m=method, p=pattern: bench.ours(m, p)  # type: ignore[misc]
        jobs["by torch", method, pattern] = lambda m=method, p=pattern: _by_torch(bench, m, p)  # type: ignore[misc]
        if method == "sparsegpt":
            jobs["naive", method, pattern] = lambda p=pattern: bench.naive(p)  # type: ignore[misc]
    least: dict[tuple[str, str, str], float] = {}
    masks: dict[tuple[str, str, str], dict[str, Tensor]] = {}
    for _ in range(args.repeats):
        for job, work in jobs.items():
            bench.block.load_state_dict(bench.dense)
            found: list[Any] = []
            seconds, _ = _timed(lambda w=work, f=found: f.append(w()), args.device)  # type: ignore[misc]
            least[job] = min(seconds, least.get(job, seconds))
            if found[0] is not None and job not in masks:
                masks[job] = {name: mask.cpu() for name, mask in found[0][0].items()}
    agreement = _agreement(masks)  # ends it where they are not
    rows = [_row(job, least, args.small) for job in jobs]
    print(f"one block, {args.windows} windows of {args.seqlen}; masks as the papers' {agreement}")
    for row in rows:
        print("  " + _line(row), flush=True)
    return {"windows": args.windows, "seqlen": args.seqlen, "agreement": agreement, "rows": rows}


@torch.no_grad()
def _twice(bench: Bench) -> None:
    for _ in range(2):
        for hidden in bench.batches:
            bench.forward(hidden)


def _by_torch(bench: Bench, method: str, pattern: str) -> Any:
    with by("torch"):
        return bench.ours(method, pattern)


def _row(
    job: tuple[str, str, str], least: dict[tuple[str, str, str], float], small: bool
) -> dict[str, Any]:
    who, method, pattern = job
    row: dict[str, Any] = {"contender": who, "method": method, "pattern": pattern}
    row["seconds"] = round(least[job], 4)
    row["of_two_passes"] = round(least[job] / least["two passes", "", ""], 3)
    if who != "naive" and (naive := least.get(("naive", method, pattern))):
        row["faster_than_naive"] = round(naive / least[job], 2)
    if small or who != "llmprune":
        return row
    if method == "sparsegpt":
        row["target"] = f"at least {FASTER} x the papers' formulation"
        row["reached"] = row["faster_than_naive"] >= FASTER
    else:
        row["target"] = f"at most {SLOWER} x two passes"
        row["reached"] = row["of_two_passes"] <= SLOWER
    return row


def _line(row: dict[str, Any]) -> str:
    text = f"{row['contender']:<10} {row['method']:<9} {row['pattern']:<4} {row['seconds']:>8.3f} s"
    text += f"  {row['of_two_passes']:.2f} of two passes"
    if "faster_than_naive" in row:
        text += f"  {row['faster_than_naive']:.2f} x naive"
    if "target" in row:
        text += f"  ({row['target']}: {'reached' if row['reached'] else 'missed'})"
    return text


def blocks(one: dict[str, Any], method: str, left: float, depth: int) -> int:
    """How many blocks there is time for, by what one took and a third more; two at least."""
    (took,) = (
        row["seconds"]
        for row in one["rows"]
        if (row["contender"], row["method"], row["pattern"]) == ("llmprune", method, "2:4")
    )
    return max(2, min(depth, int((left - 15) / (took * 4 / 3))))


def whole(args: argparse.Namespace, method: str, depth: int) -> dict[str, Any]:
    """Seconds of `llmprune.prune` on a model of `depth` blocks at 2:4; what fewer blocks say is marked."""
    model = _llama(args, depth)
    words = int(model.config.vocab_size)
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(0, words, (args.windows, args.seqlen), generator=random)
    seconds, peak = _timed(
        lambda: llmprune.prune(
            model, calibration=ids, method=method, sparsity="2:4", progress=False
        ),
        args.device,
    )
    row = {
        "method": method,
        "pattern": "2:4",
        "blocks": depth,
        "measured_seconds": round(seconds, 2),
    }
    row |= {
        "of_blocks": args.blocks,
        "peak_gb": round(peak, 1),
        "extrapolated": depth < args.blocks,
    }
    row["seconds"] = round(seconds * args.blocks / depth, 2)
    how = f"EXTRAPOLATED from {depth} blocks" if row["extrapolated"] else "measured"
    print(
        f"a model of {args.blocks} blocks, {method} 2:4: {row['seconds']} s ({how}), peak {peak:.1f} GB",
        flush=True,
    )
    return row


def _llama(args: argparse.Namespace, depth: int) -> Any:
    """A Llama-3-8B-shaped model (small: a tiny one) of so many blocks, with random weights."""
    hidden, intermediate, heads, words = (
        (256, 704, 8, 512) if args.small else (4096, 14336, 32, 128256)
    )
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        vocab_size=words,
        max_position_embeddings=8192,
    )
    with torch.device("meta"):
        made: Any = LlamaForCausalLM(config)
    made = made.to(getattr(torch, args.dtype)).to_empty(device=args.device).eval()
    made.model.rotary_emb = type(made.model.rotary_emb)(config).to(args.device)
    torch.manual_seed(0)
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.02) if parameter.dim() > 1 else parameter.data.fill_(1)
    return made


if __name__ == "__main__":
    main()
