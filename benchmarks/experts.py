"""Fused experts of mixtures, 2:4 and packed, against the dense ones: first that they are right, then how
long.

    python benchmarks/experts.py --out FILE [--seconds 45]     on a machine with CUDA
    python benchmarks/experts.py --out FILE --device cpu --small    a rehearsal, by plain torch

A module of transformers with random 2:4 weights, at the sizes of Qwen3-30B-A3B and Mixtral-8x7B. `dense` is
its own forward with grouped_mm, what transformers runs; `s24_experts` the same module packed and laid out
for the kernel; `expanded` the same with all experts expanded in each call, which is what many tokens may
get. Tokens are routed at random and evenly, each call otherwise, so that the weights of one call are not in
the L2 cache for the next. How time is taken says `timing.py`.

Right: the error against float64 (one expert after the other) is at most twice that of dense, in the worst
element and on average; repeats are the same bit for bit, a replayed CUDA graph with another routing gives
the same, nothing is left unwritten (fresh memory is NaN). What is wrong gets no figure, and the status is
1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from correct import _poisoned as poisoned
from timing import circumstances, copy_speed, graphed, in_turn, quartiles, write
from torch import Tensor, nn

from llmprune.kernels import experts as forms
from llmprune.kernels.packed import pack
from llmprune.runtime import fused
from llmprune.runtime.fused import Matrices

TOKENS = (1, 4, 16, 64, 512)
TURNS = 16  # routings that calls take in turn, at most


@dataclass(frozen=True)
class Mixture:
    """The experts of a block."""

    family: str
    experts: int
    hidden: int
    intermediate: int
    chosen: int

    def module(self) -> Any:
        """Of transformers, with no weights."""
        if self.family == "mixtral":
            from transformers.models.mixtral import modeling_mixtral as mixtral

            config: Any = mixtral.MixtralConfig(
                num_local_experts=self.experts, hidden_size=self.hidden,
                intermediate_size=self.intermediate, num_experts_per_tok=self.chosen,
            )  # fmt: skip
            kind: Any = mixtral.MixtralExperts
        else:
            from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

            config = qwen3.Qwen3MoeConfig(
                num_experts=self.experts, hidden_size=self.hidden,
                moe_intermediate_size=self.intermediate, num_experts_per_tok=self.chosen,
            )  # fmt: skip
            kind = qwen3.Qwen3MoeExperts
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            return kind(config).eval()


MIXTURES = {
    "Qwen3-30B-A3B": Mixture("qwen3_moe", 128, 2048, 768, 8),
    "Mixtral-8x7B": Mixture("mixtral", 8, 4096, 14336, 2),
}
SMALL = {
    "small Qwen3": Mixture("qwen3_moe", 8, 64, 32, 4),
    "small Mixtral": Mixture("mixtral", 4, 64, 40, 2),
}
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden states, experts of each token, their weights) -> outputs."""


def main() -> None:
    """Compare, measure, write the JSON file, print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a rehearsal with tiny shapes")
    parser.add_argument("--seconds", type=float, default=45, help="when to begin no further case")
    args = parser.parse_args()
    device, begun = torch.device(args.device), time.monotonic()
    why = forms.S24_EXPERTS.unavailable(device)
    result: dict[str, Any] = {
        **circumstances(device, args.small),
        "copy_gb_per_s": copy_speed(device, args.small),
        "not_here": {"s24_experts": why} if why else {},
    }
    rows, wrong, left = list[dict[str, Any]](), list[str](), list[str]()
    if why and device.type == "cuda":
        wrong.append(f"s24_experts: {why}")
    for name, mixture in (SMALL if args.small else MIXTURES).items():
        ways = _ways(mixture, device, why is None)
        for tokens in (1, 5) if args.small else TOKENS:
            if time.monotonic() - begun > args.seconds:
                left.append(f"{name}, {tokens} tokens")
                continue
            for row in _measure(mixture, ways, tokens, device, f"{name}, {tokens} tokens", wrong):
                rows.append({"mixture": name, "tokens": tokens, **row})
                print(_line(rows[-1]), flush=True)
            write(args.out, {**result, "rows": rows, "wrong": wrong, "left_out": left})
        del ways
    write(args.out, {**result, "rows": rows, "wrong": wrong, "left_out": left})
    if left:
        print(f"left out after {args.seconds:.0f} s: {'; '.join(left)}")
    if wrong:
        raise SystemExit(f"wrong: {'; '.join(wrong)}")


@torch.no_grad()
def _ways(mixture: Mixture, device: torch.device, kernel: bool) -> dict[str, Forward]:
    """The dense module first, then ours; on a CPU the layout is multiplied by plain torch."""
    dense, held = mixture.module(), dict[str, Matrices]()
    number, hidden, inside = mixture.experts, mixture.hidden, mixture.intermediate
    shapes = {"gate_up_proj": (number, 2 * inside, hidden), "down_proj": (number, hidden, inside)}
    for seed, (name, shape) in enumerate(shapes.items()):
        weight = _two_of_four(shape, device, seed)
        setattr(dense, name, nn.Parameter(weight, requires_grad=False))
        layout = forms.S24_EXPERTS.prepare(pack(weight), False)
        held[name] = forms.S24_EXPERTS.name, shape, layout
    ways: dict[str, Forward] = {"dense": dense}
    if kernel or device.type == "cpu":
        ways["s24_experts"] = partial(fused.forward, dense, held)
    ways["expanded"] = partial(_expanded, dense, held)
    return ways


def _expanded(dense: nn.Module, held: dict[str, Matrices], *inputs: Tensor) -> Tensor:
    """The forward that expands all experts before each product."""

    def one(shape: tuple[int, ...], layout: list[Tensor]) -> Matrices:
        number, rows, columns = shape
        weight = forms.S24_EXPERTS.expanded(layout, (number, rows, columns))
        return forms.DENSE_EXPERTS.name, shape, [weight]

    hidden, index, weights = inputs
    whole = {name: one(shape, layout) for name, (_, shape, layout) in held.items()}
    return fused.forward(dense, whole, hidden, index, weights)


def _two_of_four(shape: tuple[int, int, int], device: torch.device, seed: int) -> Tensor:
    """Random weights of which every four keep two, some fewer."""
    random = torch.Generator(device).manual_seed(seed)
    out = torch.empty(shape, dtype=torch.bfloat16, device=device)
    for expert in out:
        groups = torch.randn(shape[1], shape[2] // 4, 4, generator=random, device=device)
        groups.scatter_(-1, groups.abs().topk(2, dim=-1, largest=False).indices, 0)
        groups[::8, ::3, :2] = 0
        expert.copy_(groups.flatten(1) / shape[2] ** 0.5)
    return out


def _inputs(
    mixture: Mixture, tokens: int, device: torch.device
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Hidden states, several routings, and the weights of the experts."""
    random = torch.Generator(device).manual_seed(tokens)
    hidden = torch.randn(tokens, mixture.hidden, generator=random, device=device).bfloat16()
    chance = torch.rand(tokens, mixture.experts, generator=random, device=device)
    first, each = chance.argsort(1)[:, : mixture.chosen], mixture.chosen
    turns = max(2, min(TURNS, mixture.experts // each))
    index = [(first + turn * each) % mixture.experts for turn in range(turns)]
    weights = torch.rand(tokens, each, generator=random, device=device)
    return hidden, index, (weights / weights.sum(1, keepdim=True)).bfloat16()


def _measure(
    mixture: Mixture,
    ways: dict[str, Forward],
    tokens: int,
    device: torch.device,
    where: str,
    wrong: list[str],
) -> Iterator[dict[str, Any]]:
    """The rows of one number of tokens: of every way that is right, in turn."""
    hidden, index, weights = _inputs(mixture, tokens, device)
    exact = _truth(ways["dense"], hidden, index[0], weights)
    theirs = (ways["dense"](hidden, index[0], weights).double() - exact).abs()
    runs = {}
    for name, forward in ways.items():
        found = "" if name == "dense" else _flaw(forward, hidden, index, weights, exact, theirs)
        if found:
            wrong.append(f"{name}, {where}: {found}")
            continue
        calls = [partial(forward, hidden, one, weights) for one in index]
        try:
            runs[name] = graphed(calls, device)
        except RuntimeError as error:
            wrong.append(f"{name}, {where}: not to be captured: {str(error).splitlines()[0]}")
    times = in_turn(runs, device)
    for name, of_it in times.items():
        low, middle, high = quartiles(of_it)
        row = {"way": name, "us": [low, middle, high], "replays": len(of_it)}
        if "dense" in times:
            row["against_dense"] = quartiles(times["dense"])[1] / middle
        yield row


@torch.no_grad()
def _truth(dense: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """In float64, one expert after the other."""
    out = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    for expert in index.unique().tolist():
        token, place = torch.where(index == expert)
        both = hidden[token].double() @ dense.gate_up_proj[expert].double().T
        gate, up = both.chunk(2, dim=1)
        y = (nn.functional.silu(gate) * up) @ dense.down_proj[expert].double().T
        out.index_add_(0, token, y * weights[token, place, None].double())
    return out


def _flaw(
    forward: Forward,
    hidden: Tensor,
    index: list[Tensor],
    weights: Tensor,
    exact: Tensor,
    theirs: Tensor,
) -> str:
    """What is wrong with a way, in a few words, or nothing."""
    with poisoned():
        y = forward(hidden, index[0], weights)
    error = (y.double() - exact).abs()
    for what, of in (("worst", torch.max), ("mean", torch.mean)):
        share = float(of(error)) / (float(of(theirs)) + 1e-30)
        if not share <= 2:  # a NaN is wrong, too
            return f"{what} error {share:.3g} times that of dense"
    if not all(torch.equal(forward(hidden, index[0], weights), y) for _ in range(10)):
        return "a repeat differs"
    if hidden.device.type == "cuda":
        routed, graph = index[1].clone(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            recorded = forward(hidden, routed, weights)
        routed.copy_(index[0])
        graph.replay()
        if not torch.equal(recorded, y):
            return "a graph replayed with another routing differs"
    return ""


def _line(row: dict[str, Any]) -> str:
    against = f"  {row['against_dense']:.2f} x dense" if "against_dense" in row else ""
    where = f"{row['mixture']:<14} {row['tokens']:>4} tokens"
    return f"{where}  {row['way']:<12} {row['us'][1]:>9.1f} us{against}"


if __name__ == "__main__":
    main()
