"""How the benchmarks for GPUs take the time of a product, and what they write down beside a figure.

Cold: each call of a CUDA graph reads another copy of the weights, as many as fill the L2 cache four times.
Graphs of at least 20 calls are replayed 30 times, all contenders in turn, one more time beforehand; what is
slow is replayed less often, and the row says how often. On a CPU, in rehearsals, calls are timed one by one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmprune.provenance import versions

CALLS, REPLAYS, CACHES = 20, 30, 4
PATIENCE = 1.0  # seconds for all replays of one contender; beyond, there are fewer, three at least

Call = Callable[[], object]
Run = Callable[[], float]
"""Gives the microseconds of a call, of the mean call of one graph."""


def copies(tensor: Tensor) -> list[Tensor]:
    """The tensor and as many copies as fill the L2 cache `CACHES` times; alone on a CPU."""
    if tensor.device.type == "cpu":
        return [tensor]
    cache = torch.cuda.get_device_properties(tensor.device).L2_cache_size
    return [tensor, *(tensor.clone() for _ in range(CACHES * cache // tensor.nbytes))]


def graphed(calls: Sequence[Call], device: torch.device) -> Run:
    """A function that runs `calls` in turn, at least `CALLS` of them: on a GPU, as one graph.

    Raises:
        RuntimeError: when a call cannot be captured.
    """
    for (
        call
    ) in calls:  # compiles; layers lay out their weights, which a graph that is recorded prevents
        call()
    if device.type == "cpu":
        return lambda: clock(calls[0])
    torch.cuda.synchronize(device)
    count = max(CALLS, len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / count

    return replay


def in_turn(runs: dict[str, Run], device: torch.device) -> dict[str, list[float]]:
    """Microseconds of every replay of each run, one after the other, after one that does not count."""
    calls = 1 if device.type == "cpu" else CALLS
    first = {name: run() for name, run in runs.items()}
    most = 3 if device.type == "cpu" else REPLAYS
    often = {
        name: max(3, min(most, int(PATIENCE * 1e6 / (us * calls)))) for name, us in first.items()
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(most):
        for name, run in runs.items():
            if turn < often[name]:
                times[name].append(run())
    return times


def quartiles(times: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile; of a single one, itself."""
    several = times if len(times) > 1 else [*times, *times]
    return statistics.quantiles(several, n=4, method="inclusive")


def clock(job: Call) -> float:
    """Microseconds of `job`, by the clock of the machine."""
    begun = time.perf_counter()
    job()
    return (time.perf_counter() - begun) * 1e6


def copy_speed(device: torch.device, small: bool) -> float:
    """GB/s that a plain copy reads and writes, the best of ten."""
    source = torch.zeros(2**20 if small else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device) / 1e9


def matmul_rate(device: torch.device, small: bool) -> float:
    """TFLOP/s of a large bfloat16 product of random matrices, the best of ten."""
    side = 64 if small else 8192
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    return 2 * side**3 / _best(lambda: a @ b, device) / 1e12


def _best(job: Call, device: torch.device) -> float:
    """Seconds of the fastest of ten runs, after one."""
    job()
    best = math.inf
    for _ in range(10):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            job()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) / 1e3)
        else:
            best = min(best, clock(job) / 1e6)
    return best


def circumstances(device: torch.device, small: bool) -> dict[str, Any]:
    """What every figure depends on: versions, device, clocks, settings, commit, command."""
    found = versions(device)
    for name in ("triton", "torchao"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found |= {"capability": f"{major}.{minor}", "cuda": str(torch.version.cuda)}
    return {
        "versions": found,
        "clocks": _clocks() if device.type == "cuda" else None,
        "settings": {name: of for name, of in os.environ.items() if name.startswith("LLMPRUNE_")},
        "commit": commit(),
        "command": " ".join(sys.argv),
        "small": small,
    }


def commit() -> str:
    """Of this checkout; without git or its folder, what the variable COMMIT says."""
    if shutil.which("git") is None or not Path(".git").exists():
        return os.environ.get("COMMIT", "unknown")
    head = ["git", "rev-parse", "--short=12", "HEAD"]
    done = subprocess.run(head, capture_output=True, text=True)
    dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True).stdout
    return done.stdout.strip() + (" + changes" if dirty.strip() else "")


def _clocks() -> dict[str, str] | None:
    """What nvidia-smi reads: nothing is set."""
    names = ["driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw"]
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    first = done.stdout.splitlines()[:1]
    return dict(zip(names, map(str.strip, first[0].split(",")), strict=False)) if first else None


def write(out: Path, result: dict[str, Any]) -> None:
    """Write `result`, so that whatever ends the process leaves a whole file."""
    beside = out.with_name(out.name + ".part")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(out)
