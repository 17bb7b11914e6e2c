"""Sparse matrix products for few tokens against cuBLAS: first that they are right, then how long they take.

    python benchmarks/few_tokens.py --out FILE [--seconds 150]     on a machine with CUDA
    python benchmarks/few_tokens.py --out FILE --device cpu --small    a rehearsal, in Triton's interpreter

Cold: each call of a CUDA graph reads another copy of the weights, as many as fill the L2 cache four times.
Graphs of at least 20 calls and all copies are replayed 30 times, all contenders in turn; microseconds of a
call are the median with quartiles. Bandwidth is set against that of a copy measured in the same process.
Shapes are taken in turn until `--seconds` are over; what was left out is written down. Every loss stays in
the table.

This file is not called kernels.py: the folder of a script stands first in Python's path, and transformers
imports a package of that name.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

from compare import _commit

from llmprune.kernels.nm_gemv import nm_gemv, pack_gemv
from llmprune.kernels.packed import pack
from llmprune.kernels.s24_mma import pack_s24, s24_mma, unavailable
from llmprune.provenance import versions

SHAPES = {  # [out, in] of the linear layers, q, k and v as one, gate and up as one
    "Llama-3-8B qkv": (6144, 4096),
    "Llama-3-8B o": (4096, 4096),
    "Llama-3-8B gate_up": (28672, 4096),
    "Llama-3-8B down": (4096, 14336),
    "Llama-3-70B qkv": (10240, 8192),
    "Llama-3-70B o": (8192, 8192),
    "Llama-3-70B gate_up": (57344, 8192),
    "Llama-3-70B down": (8192, 28672),
    "Qwen3-4B gate_up": (19456, 2560),
    "Qwen3-4B down": (2560, 9728),
}
TOKENS = (1, 8, 16, 4, 32, 64)
CALLS, REPLAYS, CACHES = 20, 30, 4

DENSE = "dense"  # F.linear: cuBLAS on a GPU
Product = Callable[[Tensor], Tensor]
"""x -> x @ weight.T, for one copy of the weight."""


@dataclass(frozen=True)
class Contender:
    """One way to multiply: up to how many tokens, bytes of the weight, a product for each copy of it."""

    name: str
    tokens: int
    bytes: int
    products: list[Product]


def main() -> None:
    """Measure, write the JSON file, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a rehearsal with tiny shapes")
    parser.add_argument("--seconds", type=float, default=150, help="when to begin no further shape")
    args = parser.parse_args()
    device, begun = torch.device(args.device), time.monotonic()
    shapes = {"small": (64, 256), "ragged": (37, 300)} if args.small else SHAPES
    copied = _copy_speed(device, args.small)
    refused = unavailable(device)
    rows, left = list[dict[str, Any]](), list[str]()
    for name, shape in shapes.items():
        if time.monotonic() - begun > args.seconds:
            left.append(name)
            continue
        random = torch.Generator(device).manual_seed(0)
        dense = _matrix(shape, device, random)
        contenders = list(_contenders(dense, refused is None))
        for tokens in (1, 3) if args.small else TOKENS:
            x = torch.randn(tokens, shape[1], device=device, generator=random).bfloat16()
            now = [c for c in contenders if tokens <= c.tokens]
            _check(name, now, x, dense)
            for row in _measure(now, x, copied):
                rows.append({"shape": name, "size": shape, "tokens": tokens, **row})
                print(_line(rows[-1]), flush=True)
    result = {
        "versions": {**versions(device), "triton": version("triton")},
        "commit": _commit(),
        "command": " ".join(sys.argv),
        "small": args.small,
        "copy_gb_per_s": copied,
        "s24_mma_refused": refused,
        "rows": rows,
        "geometric_means": _means(rows),
        "left_out": left,
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    for what, mean in result["geometric_means"].items():
        print(f"geometric mean over the shapes, {what}: {mean:.3f} x dense")
    if refused:
        print(f"not s24_mma: {refused}")
    if left:
        print(f"left out after {args.seconds:.0f} s: {'; '.join(left)}")


def _contenders(dense: Tensor, with_s24: bool) -> Iterator[Contender]:
    """The dense product and the kernels, each on copies of its own weight."""
    linear = torch.nn.functional.linear
    yield Contender(DENSE, 10**9, dense.nbytes, [partial(linear, weight=w) for w in _copies(dense)])
    packed = pack(dense)
    gemv = pack_gemv(packed, 2, 4)
    layouts = [replace(gemv, words=words) for words in _copies(gemv.words)]
    yield Contender("nm_gemv", 8, gemv.bytes, [partial(nm_gemv, layout=w) for w in layouts])
    if with_s24:
        s24 = pack_s24(packed)
        copies = [replace(s24, words=words) for words in _copies(s24.words)]
        yield Contender("s24_mma", 64, s24.bytes, [partial(s24_mma, layout=w) for w in copies])


def _check(name: str, contenders: list[Contender], x: Tensor, dense: Tensor) -> None:
    """Stop unless each error against float64 is at most twice that of the dense product, the first."""
    exact = x.double() @ dense.double().T
    errors = {c.name: float((c.products[0](x).double() - exact).abs().max()) for c in contenders}
    most = 2 * errors[DENSE]
    if x.device.type == "cpu":  # the interpreter cuts off instead of rounding
        most += float(exact.abs().max()) * 2**-7
    if not all(error <= most for error in errors.values()):  # a NaN is wrong, too
        raise SystemExit(f"wrong on {name}, {len(x)} tokens: errors {errors}, at most {most}")


def _measure(contenders: list[Contender], x: Tensor, copied: float) -> Iterator[dict[str, Any]]:
    """Quartiles of the microseconds of a call, all contenders in turn."""
    runs = {c.name: _run(c.products, x) for c in contenders}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(3 if x.device.type == "cpu" else REPLAYS):
        for name, run in runs.items():
            times[name].append(run())
    for c in contenders:
        middle = statistics.median(times[c.name])
        yield {
            "kernel": c.name,
            "us": statistics.quantiles(times[c.name], n=4, method="inclusive"),
            "against_dense": statistics.median(times[DENSE]) / middle,
            "of_copy": c.bytes / middle / 1e3 / copied,
        }


def _copies(tensor: Tensor) -> list[Tensor]:
    """As many copies as fill the L2 cache `CACHES` times; one on a CPU."""
    if tensor.device.type == "cpu":
        return [tensor]
    cache = torch.cuda.get_device_properties(tensor.device).L2_cache_size
    return [tensor, *(tensor.clone() for _ in range(CACHES * cache // tensor.nbytes))]


def _matrix(shape: tuple[int, int], device: torch.device, random: torch.Generator) -> Tensor:
    """A random 2:4 matrix: the two smallest of every four are zero."""
    groups = torch.randn(shape[0], shape[1] // 4, 4, device=device, generator=random).bfloat16()
    least = groups.abs().topk(2, dim=-1, largest=False).indices
    return groups.scatter(-1, least, 0).reshape(shape)


def _run(products: list[Product], x: Tensor) -> Callable[[], float]:
    """A function that gives the microseconds of a call: on a GPU, of the mean call of one graph."""
    products[0](x)
    if x.device.type == "cpu":
        return lambda: _clock(lambda: products[0](x))
    torch.cuda.synchronize()
    calls = max(CALLS, len(products))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            products[i % len(products)](x)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / calls

    replay()
    return replay


def _clock(job: Callable[[], object]) -> float:
    begun = time.perf_counter()
    job()
    return (time.perf_counter() - begun) * 1e6


def _copy_speed(device: torch.device, small: bool) -> float:
    """GB/s that a plain copy reads and writes, the best of ten."""
    source = torch.zeros(2**20 if small else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(10):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) / 1e3)
        else:
            best = min(best, _clock(lambda: target.copy_(source)) / 1e6)
    return 2 * source.nbytes / best / 1e9


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Geometric mean of the gain over all shapes, by kernel and tokens: losses among them."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row["kernel"] != DENSE:
            key = f"{row['kernel']}, {row['tokens']} tokens"
            groups.setdefault(key, []).append(row["against_dense"])
    return {key: statistics.geometric_mean(gains) for key, gains in groups.items()}


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['shape']:<20} {row['tokens']:>3} tokens  {row['kernel']:<8} {row['us'][1]:>9.1f} us  "
        f"{row['against_dense']:.2f} x dense  {row['of_copy']:.0%} of a copy"
    )


if __name__ == "__main__":
    main()
