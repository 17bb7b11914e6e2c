"""Sparse matrix products for few tokens against cuBLAS: first that they are right, then how long they take.

    python benchmarks/few_tokens.py --out FILE [--seconds 170] [--correct FILE]     on a machine with CUDA
    python benchmarks/few_tokens.py --out FILE --pattern 3:8           another pattern than 2:4
    python benchmarks/few_tokens.py --out FILE --device cpu --small    a rehearsal, in Triton's interpreter

Each kernel by itself, and `dispatch`: an llmprune.SparseLinear as users get it, whatever kernel holds it.
Beside them the baselines of `baselines.py` that run here. How time is taken says `timing.py`. Bandwidth is
set against that of a copy measured in the same process. A product is compared with float64 before it is
timed; one that is wrong gets no figure, and the status is 1. `--correct` leaves out the kernels that
correct.py found wrong. Shapes are taken in turn until `--seconds` are over; the file is written after every
shape, and says what was left out. Every loss stays in the table. `tally.py` draws means, targets and the
first questions of the design from the rows. To n8_mma the 2:4 matrix of the default is one of 4:8.

This file is not called kernels.py: the folder of a script stands first in Python's path, and transformers
imports a package of that name.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

if "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

from baselines import DENSE, MANY, OTHERS, Contender, contenders, difference, refused
from rounded import NAMES, contenders_of_few
from tally import tally, told
from timing import (
    circumstances,
    copies,
    copy_speed,
    graphed,
    in_turn,
    matmul_rate,
    quartiles,
    write,
)

from llmprune import SparseLinear
from llmprune.kernels.bitmap import bitmap_gemv, pack_bitmap
from llmprune.kernels.choice import explain
from llmprune.kernels.gemv_layout import pack_gemv
from llmprune.kernels.n8_layout import KEPT, pack_n8
from llmprune.kernels.n8_mma import n8_mma
from llmprune.kernels.n8_mma import unavailable as n8_unavailable
from llmprune.kernels.nm_gemv import nm_gemv
from llmprune.kernels.packed import Packed, pack
from llmprune.kernels.s24_bits import unavailable as bits_unavailable
from llmprune.kernels.s24_layout import pack_s24
from llmprune.kernels.s24_mma import s24_mma, unavailable

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
SMALL = {"small": (64, 256), "ragged": (37, 300)}
TOKENS = (1, 8, 16, 4, 32, 64)
OURS = ("nm_gemv", "bitmap", "s24_mma", *NAMES, "n8_mma", "dispatch")
PATTERNS = {"2:4": (2, 4), **{f"{n}:8": (n, 8) for n in KEPT}}


@dataclass
class Bench:
    """What goes with every shape.

    Attributes:
        device: where all of it runs.
        copied: GB/s of a copy.
        ours: the kernels of `OURS` that run here.
        others: the baselines that run here.
        wrong: products that were not right, one line each.
        lost: what could not be measured, and why.
        nm: n and m of the matrices.
    """

    device: torch.device
    copied: float
    ours: tuple[str, ...]
    others: tuple[str, ...]
    nm: tuple[int, int] = (2, 4)
    wrong: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)


def main() -> None:
    """Measure, write the JSON file, print the table."""
    args = _arguments()
    device, begun = torch.device(args.device), time.monotonic()
    shapes = SMALL if args.small else SHAPES
    shapes = {k: s for k, s in shapes.items() if s[1] % PATTERNS[args.pattern][1] == 0}
    found = (
        json.loads(args.correct.read_text()) if args.correct and args.correct.is_file() else None
    )
    against = _against(found, device, args.pattern)
    others = refused(device)
    bench = Bench(
        device,
        copy_speed(device, args.small),
        tuple(name for name in OURS if name not in against),
        tuple(name for name in OTHERS if others[name] is None),
        PATTERNS[args.pattern],
    )
    result: dict[str, Any] = {
        **circumstances(device, args.small),
        "pattern": args.pattern,
        "copy_gb_per_s": bench.copied,
        "matmul_tflops": matmul_rate(device, args.small),
        "not_here": {**against, **{name: why for name, why in others.items() if why}},
        "correct": None if found is None else {k: found[k] for k in ("right", "parts")},
        "wrong": bench.wrong,
        "lost": bench.lost,
    }
    rows, left = list[dict[str, Any]](), list(shapes)
    write(args.out, {**result, "rows": rows, "left_out": left})
    hot = _hot(bench) if device.type == "cuda" and "s24_mma" in bench.ours else None
    for name, shape in shapes.items():
        if time.monotonic() - begun > args.seconds:
            break
        for row in _shape(bench, name, shape, (1, 3) if args.small else TOKENS):
            rows.append(row)
            print(_line(row), flush=True)
        left.remove(name)
        result |= {"hot": hot, "rows": rows, "left_out": left, **tally(rows, hot, result)}
        write(args.out, result)
    print(told(result))
    if left:
        print(f"left out after {args.seconds:.0f} s: {'; '.join(left)}")
    if bench.wrong:
        raise SystemExit(f"wrong: {'; '.join(bench.wrong)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a rehearsal with tiny shapes")
    parser.add_argument("--seconds", type=float, default=170, help="when to begin no further shape")
    parser.add_argument("--pattern", choices=list(PATTERNS), default="2:4")
    parser.add_argument("--correct", type=Path, help="what correct.py wrote")
    return parser.parse_args()


def _against(
    correct: dict[str, Any] | None, device: torch.device, pattern: str = "2:4"
) -> dict[str, str]:
    """What speaks against each kernel of ours."""
    found, (n, m) = {}, PATTERNS[pattern]
    of_2_4 = None if m == 4 else f"needs 2:4, not {pattern}"
    if why := unavailable(device) or of_2_4:
        found["s24_mma"] = why
    if why := bits_unavailable(device) or of_2_4:
        found |= dict.fromkeys(NAMES, why)
    if why := n8_unavailable(device, n if m == 8 else 4):
        found["n8_mma"] = why
    if correct is not None:
        wrong = {name for name, right in correct["right"].items() if not right}
        found |= {name: "wrong, says correct.py" for name in OURS if name.split()[0] in wrong}
    return found


def _shape(
    bench: Bench, name: str, shape: tuple[int, int], several: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """The rows of one shape."""
    random = torch.Generator(bench.device).manual_seed(0)
    dense = _matrix(shape, bench.device, random, bench.nm)
    others = bench.others if shape[1] % 128 == 0 else ()
    layer = _layer(dense) if "dispatch" in bench.ours else None
    everyone = [*contenders(dense, others, bench.lost), *_ours(dense, layer, bench.ours, bench.nm)]
    for tokens in several:
        x = torch.randn(tokens, shape[1], device=bench.device, generator=random).bfloat16()
        now = _right(bench, f"{name}, {tokens} tokens", everyone, x, dense)
        for row in _measure(bench, now, x, f"{name}, {tokens} tokens"):
            held = {}
            if row["kernel"] == "dispatch" and layer is not None:
                explanation = explain(layer, tokens)
                held = {"held": explanation.kernel, "route": explanation.route}
                if explanation.kernel == DENSE:  # what is read is not the stored form
                    row["of_copy"] *= dense.nbytes / layer.packed.bytes
            yield {"shape": name, "size": shape, "tokens": tokens, **row, **held}


def _ours(
    dense: Tensor,
    layer: SparseLinear | None,
    names: tuple[str, ...],
    nm: tuple[int, int] = (2, 4),
) -> Iterator[Contender]:
    """The kernels, each on copies of its own weight."""
    packed = pack(dense)
    if "nm_gemv" in names:
        gemv = pack_gemv(packed, *nm)
        layouts = [replace(gemv, words=words) for words in copies(gemv.words)]
        yield Contender("nm_gemv", 8, gemv.bytes, [partial(nm_gemv, layout=w) for w in layouts])
    # Interpreted, a call of it takes a second: one shape of a rehearsal is enough.
    if "bitmap" in names and (dense.is_cuda or tuple(dense.shape) == SMALL["ragged"]):
        yield _any_mask(packed)
    if "s24_mma" in names:
        s24 = pack_s24(packed)
        held = [replace(s24, words=words) for words in copies(s24.words)]
        yield Contender("s24_mma", 64, s24.bytes, [partial(s24_mma, layout=w) for w in held])
    yield from contenders_of_few(dense, names)
    if "n8_mma" in names and dense.shape[1] % 8 == 0:
        n8 = pack_n8(packed, nm[0] if nm[1] == 8 else 4)
        of_eight = [replace(n8, words=words) for words in copies(n8.words)]
        products = [partial(n8_mma, layout=w) for w in of_eight]
        yield Contender(f"n8_mma {n8.n}:8", 64, n8.bytes, products)
    if layer is not None:
        taken = sum(t.nbytes for t in chain(layer.parameters(), layer.buffers()))
        again = len(copies(dense.flatten()[: max(1, taken // dense.element_size())]))
        layers = [layer, *(deepcopy(layer) for _ in range(again - 1))]
        yield Contender("dispatch", MANY, taken, list(layers))


def _any_mask(packed: Packed) -> Contender:
    """Bitmap, whose time goes with the share that is kept, a half, whatever the mask."""
    layout = pack_bitmap(packed)
    several = [
        replace(layout, values=values, words=words)
        for values, words in zip(copies(layout.values), copies(layout.words), strict=False)
    ]
    return Contender("bitmap", 16, layout.bytes, [partial(bitmap_gemv, layout=w) for w in several])


def _layer(dense: Tensor) -> SparseLinear:
    linear = nn.Linear(*dense.shape[::-1], bias=False, device="meta")
    linear.weight = nn.Parameter(dense, requires_grad=False)
    return SparseLinear.from_linear(linear)


def _right(
    bench: Bench, where: str, everyone: list[Contender], x: Tensor, dense: Tensor
) -> list[Contender]:
    """Those for so many tokens that are right; the others are written down.

    Our error against float64 is at most twice that of the dense product, the first. A rounded weight is
    compared with what it stands for, one of the others to 2% of the norm of the product.
    """
    now = [c for c in everyone if len(x) <= c.tokens]
    good = []
    for contender in now:
        if contender.name in OTHERS:
            try:
                off = difference(contender, x, dense)
                why = "" if off < 0.02 else f"off by {off:.3g} of the norm"
            except RuntimeError as error:
                why = str(error).splitlines()[0]
            if why:
                bench.lost[f"{contender.name}, {where}"] = why
                continue
        else:
            weight, product = contender.stands_for, now[0].products[0]
            if weight is not None:
                product = partial(nn.functional.linear, weight=weight)
            exact = x.double() @ (dense if weight is None else weight).double().T
            most = 2 * float((product(x).double() - exact).abs().max())
            if x.device.type == "cpu":  # the interpreter cuts off instead of rounding
                most += float(exact.abs().max()) * 2**-7
            error = float((contender.products[0](x).double() - exact).abs().max())
            if not error <= most:  # a NaN is wrong, too
                bench.wrong.append(
                    f"{contender.name}, {where}: error {error:.3g}, at most {most:.3g}"
                )
                continue
        good.append(contender)
    return good


def _measure(
    bench: Bench, several: list[Contender], x: Tensor, where: str
) -> Iterator[dict[str, Any]]:
    """Quartiles of the microseconds of a call, all contenders in turn."""
    runs = {}
    for c in several:
        try:
            runs[c.name] = graphed([partial(product, x) for product in c.products], bench.device)
        except RuntimeError as error:
            said = f"not to be captured: {str(error).splitlines()[0]}"
            if c.name in OTHERS:
                bench.lost[f"{c.name}, {where}"] = said
            else:
                bench.wrong.append(f"{c.name}, {where}: {said}")
    times = in_turn(runs, bench.device)
    for c in several:
        if c.name not in times:
            continue
        low, middle, high = quartiles(times[c.name])
        yield {
            "kernel": c.name,
            "us": [low, middle, high],
            "replays": len(times[c.name]),
            "against_dense": median(times[DENSE]) / middle,
            "of_copy": c.bytes / middle / 1e3 / bench.copied,
        }


def _hot(bench: Bench) -> dict[str, Any]:
    """Microseconds of s24_mma on one matrix that stays in the L2 cache: what computing alone takes."""
    random = torch.Generator(bench.device).manual_seed(0)
    dense = _matrix((8192, 8192), bench.device, random)
    layout = pack_s24(pack(dense))
    found: dict[str, Any] = {"size": list(dense.shape), "bytes": layout.bytes, "us": {}}
    for tokens in TOKENS:
        x = torch.randn(tokens, 8192, device=bench.device, generator=random).bfloat16()
        run = graphed([partial(s24_mma, x, layout)], bench.device)
        found["us"][str(tokens)] = quartiles(in_turn({"hot": run}, bench.device)["hot"])
    return found


def two_of_four(weight: Tensor) -> Tensor:
    """A matrix with the two smallest of every four zero; of equal ones the first is kept."""
    parts = []
    before = torch.ones(4, 4, dtype=torch.bool, device=weight.device).tril(-1)
    for part in weight.split(2048):  # bounds the memory
        size = part.abs().unflatten(1, (-1, 4))
        mine, other = size[..., None], size[..., None, :]
        rank = ((other > mine) | ((other == mine) & before)).sum(-1)
        parts.append(part * (rank < 2).flatten(1))
    return torch.cat(parts)


def _matrix(
    shape: tuple[int, int],
    device: torch.device,
    random: torch.Generator,
    nm: tuple[int, int] = (2, 4),
) -> Tensor:
    weight = torch.randn(shape, device=device, generator=random).bfloat16()
    if nm == (2, 4):
        return two_of_four(weight)
    for part in weight.split(2048):  # bounds the memory
        groups = part.unflatten(1, (-1, nm[1]))
        least = groups.abs().topk(nm[1] - nm[0], dim=-1, largest=False).indices
        groups.scatter_(-1, least, 0)
    return weight


def _line(row: dict[str, Any]) -> str:
    held = f"  {row['held']}" if "held" in row else ""
    return (
        f"{row['shape']:<20} {row['tokens']:>3} tokens  {row['kernel']:<12} {row['us'][1]:>9.1f} us  "
        f"{row['against_dense']:.2f} x dense  {row['of_copy']:.0%} of a copy{held}"
    )


if __name__ == "__main__":
    main()
