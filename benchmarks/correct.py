"""Whether the kernels for packed matrices are right on this GPU; comes before every figure.

    python benchmarks/correct.py --out FILE                  on a machine with CUDA
    python benchmarks/correct.py --out FILE --device cpu --small    a rehearsal, in Triton's interpreter

For 1 to 64 tokens, with and without bias, in bfloat16 and float16, at the size of a layer and ragged: the
error against float64 is at most twice that of cuBLAS, in the worst element and on average; a hundred repeats
are the same bit for bit; nothing is left unwritten (fresh memory is NaN) and nothing read outside (NaN lies
around weights and inputs); another stream and a replayed CUDA graph give the same. Each part runs in a
process of its own, all at once: an error on a GPU ends its process, and compiling takes most of the time.
Writes what was found; the status is 1 unless everything is right. Needs no pytest, whose tests marked `gpu`
ask much the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import circumstances, write
from torch import Tensor

if "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["LLMPRUNE_MEASURE"] = "0"  # what other parts measure meanwhile would say nothing

from rounded import NAMES, rounded

from llmprune import SparseLinear
from llmprune.kernels.bitmap import bitmap_gemv, exact, pack_bitmap, pack_exact
from llmprune.kernels.choice import explain
from llmprune.kernels.few_bits import expand_few
from llmprune.kernels.n8_mma import n8_mma, pack_n8
from llmprune.kernels.n8_mma import unavailable as n8_unavailable
from llmprune.kernels.nm_gemv import nm_gemv, pack_gemv
from llmprune.kernels.packed import pack
from llmprune.kernels.s24_bits import pack_s24_bits, s24_bits
from llmprune.kernels.s24_bits import unavailable as bits_unavailable
from llmprune.kernels.s24_mma import pack_gate_up, pack_s24, s24_mma, unavailable

TOKENS = (1, 2, 3, 7, 8, 9, 16, 17, 33, 64)
SHAPES = ((4096, 14336), (6144, 4096), (333, 1100))  # [out, in]
PATTERNS = ((2, 4), (4, 8), (8, 16))
FOR_BITMAP = (1, 7, 16)  # tokens: what each tells the compiler is compiled apart, and takes seconds
OF_32 = (0, 16)  # kept; 0 is any number
REPEATS = 100
PARTS = (
    "s24_mma bfloat16",
    "s24_mma float16",
    "s24_mma gate and up bfloat16",
    "s24_mma gate and up float16",
    *(f"{name} {dtype}" for name in NAMES for dtype in ("bfloat16", "float16")),
    *(f"n8_mma {n}:8 {dtype}" for n in (4, 3, 2) for dtype in ("bfloat16", "float16")),
    "nm_gemv bfloat16",
    "nm_gemv float16",
    "bitmap bfloat16",
    "bitmap float16",
    "dispatch bfloat16",
    "dispatch 4:8 bfloat16",
)
KERNELS = ("s24_mma", "s24_bits", "n8_mma", "nm_gemv", "bitmap", "dispatch")
THROUGH_DISPATCH = (1, 8, 9, 64, 65, 512)  # tokens; one and more pieces, expanded
SECONDS = 95  # for all parts

Call = Callable[[Tensor, Tensor | None], Tensor]
"""(x, bias) -> product."""


@dataclass
class Found:
    """What a part found.

    Attributes:
        refused: why the kernel is not to be used on this device.
        cases: how many products were compared.
        worst: the largest error as a share of that of cuBLAS, of 2 that it may be, and where.
        wrong: what was not as it has to be, each in a line.
        ran: what the dispatch chose, by number of tokens.
        seconds: that it took.
    """

    refused: str | None = None
    cases: int = 0
    worst: tuple[float, str] = (0.0, "")
    wrong: list[str] = field(default_factory=list)
    ran: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def main() -> None:
    """Run all parts, or in a child one; write and print what they found."""
    args = _arguments()
    device = torch.device(args.device)
    if args.part:
        print(json.dumps(vars(examine(args.part, device, args.small))))
        return
    parts = _in_processes(args)
    right = {kernel: _right(parts, kernel, device) for kernel in KERNELS}
    write(args.out, {**circumstances(device, args.small), "right": right, "parts": parts})
    for name, part in parts.items():
        print(f"{name:<29} {_told(part)}")
    if not all(right.values()):
        raise SystemExit(f"not right: {', '.join(k for k, good in right.items() if not good)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a rehearsal with tiny shapes")
    parser.add_argument(
        "--part", choices=PARTS, help="this one, in this process, as a line of JSON"
    )
    return parser.parse_args()


def _in_processes(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every part, each in a process, as many at once as there are processors."""
    begun = time.monotonic()

    def one(name: str) -> dict[str, Any]:
        if args.device == "cpu" and (why := _refused(name, torch.device("cpu"))):
            return vars(Found(refused=why))  # known without a process
        command = [sys.executable, __file__, "--device", args.device, "--part", name]
        command += ["--out", str(args.out), *(["--small"] if args.small else [])]
        most = SECONDS * (100 if args.small else 1)
        left = max(1, most - (time.monotonic() - begun))
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            return vars(Found(wrong=[f"not done after {SECONDS} s"]))
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no word"])[-1][:300]
            return vars(Found(wrong=[f"ended with status {done.returncode}: {last}"]))
        return dict(json.loads(done.stdout.splitlines()[-1]))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(PARTS, pool.map(one, PARTS), strict=True))


def _refused(name: str, device: torch.device) -> str | None:
    """Why the kernel of a part must not be used; tries it there."""
    if name.startswith("s24_mma"):
        return unavailable(device)
    if name.startswith("s24_bits"):
        return bits_unavailable(device)
    if name.startswith("n8_mma"):
        return n8_unavailable(device, _nm(name)[0])
    return None


def _nm(name: str) -> tuple[int, int]:
    """The n:m of a part, 2:4 where it names none."""
    n, _, m = next((word for word in name.split() if ":" in word), "2:4").partition(":")
    return int(n), int(m)


def _right(parts: dict[str, dict[str, Any]], kernel: str, device: torch.device) -> bool:
    """Whether nothing is wrong with it; on a GPU, to be refused is wrong."""
    of = [part for name, part in parts.items() if name.startswith(kernel)]
    return not any(p["wrong"] or (p["refused"] and device.type == "cuda") for p in of)


def _told(part: dict[str, Any]) -> str:
    if part["wrong"]:
        return f"WRONG: {'; '.join(part['wrong'][:3])}"
    if part["refused"]:
        return f"refused: {part['refused']}"
    ratio, where = part["worst"]
    return f"right in {part['cases']} cases, error at most {ratio:.2f} of 2 x dense ({where})"


def examine(name: str, device: torch.device, small: bool) -> Found:
    """One part."""
    begun = time.monotonic()
    found, kernel = Found(), name.split()[0]
    if why := _refused(name, device):
        return replace(found, refused=why)
    dtype = getattr(torch, name.split()[-1])
    for shape in ((5, 76),) if small else SHAPES:
        for what, dense, call in _products(name, shape, dtype, device, small, found):
            several: tuple[int, ...] = THROUGH_DISPATCH
            if kernel == "bitmap":
                several = FOR_BITMAP
            elif kernel != "dispatch":
                several = tuple(t for t in TOKENS if t <= 8) if kernel == "nm_gemv" else TOKENS
            for tokens in (3,) if small else several:
                _compare(found, f"{what} {tokens} tokens", call, dense, tokens, small)
    return replace(found, seconds=time.monotonic() - begun)


def _products(
    name: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    small: bool,
    found: Found,
) -> Iterator[tuple[str, list[Tensor], Call]]:
    """What is multiplied, by which dense matrices (two: gate and up), and how."""
    told = f"{list(shape)} {str(dtype).removeprefix('torch.')}"
    if name.startswith("nm_gemv"):
        for n, m in PATTERNS[:1] if small else PATTERNS:
            if shape[1] % m:
                continue
            dense = _matrix(shape, n, m, dtype, device)
            gemv = pack_gemv(pack(dense), n, m)
            gemv = replace(gemv, words=_amid(gemv.words))
            yield f"{n}:{m} {told}", [dense], partial(_by, nm_gemv, gemv)
        return
    if name.startswith("bitmap"):
        for n in OF_32[:1] if small else OF_32:
            if n and shape[1] % 32:
                continue
            dense = _matrix(shape, n or 2, 32 if n else 4, dtype, device)
            packed = pack(dense)
            layout = exact(pack_exact(packed, n), shape, n, dtype) if n else pack_bitmap(packed)
            layout = replace(layout, values=_amid(layout.values), words=_amid(layout.words))
            yield f"{n or 'any'} of 32 {told}", [dense], partial(_by, bitmap_gemv, layout)
        return
    n, m = _nm(name)
    shape = (shape[0], shape[1] // m * m)
    gate, up = (_matrix(shape, n, m, dtype, device, seed) for seed in (0, 1))
    if name.startswith("n8_mma"):
        n8 = pack_n8(pack(gate), n)
        n8 = replace(n8, words=_amid(n8.words))
        yield f"{n}:{m} {told}", [gate], partial(_by, n8_mma, n8)
        return
    if name.startswith("s24_mma"):
        both = "gate and up" in name
        s24 = pack_gate_up(pack(gate), pack(up)) if both else pack_s24(pack(gate))
        apart = replace(s24, words=_amid(s24.words))
        yield told, [gate, up] if both else [gate], partial(_by, s24_mma, apart)
        return
    if name.startswith("s24_bits"):
        few = rounded(gate, NAMES[name.rpartition(" ")[0]])
        held = pack_s24_bits(few)
        held = replace(held, words=_amid(held.words), scales=_amid(held.scales))
        yield told, [expand_few(few)], partial(_by, s24_bits, held)
        return
    linear = torch.nn.Linear(shape[1], shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(gate, requires_grad=False)
    layer = SparseLinear.from_linear(linear)

    def forward(x: Tensor, bias: Tensor | None) -> Tensor:
        found.ran[f"{told} {len(x)} tokens"] = explain(layer, len(x)).kernel
        layer.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        y: Tensor = layer(x)
        return y

    yield told, [gate], forward


def _by(kernel: Callable[..., Tensor], layout: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    return kernel(x, layout, bias)


def _compare(
    found: Found, where: str, call: Call, dense: list[Tensor], tokens: int, small: bool
) -> None:
    """Hold the product of random inputs, with and without bias, against float64."""
    rows, columns = dense[0].shape
    device, dtype = dense[0].device, dense[0].dtype
    random = torch.Generator(device).manual_seed(tokens)
    x = torch.randn(tokens, columns, generator=random, device=device) / columns**0.5
    x = _amid(x.to(dtype))
    shift = torch.randn(rows * len(dense), generator=random, device=device).to(dtype)
    for bias in (None, shift):
        case = where + ("" if bias is None else " and a bias")
        exact = _truth(x.double(), [d.double() for d in dense], bias)
        theirs = (_truth(x, dense, bias).double() - exact).abs()
        with _poisoned():
            y = call(x, bias)
        error = (y.double() - exact).abs()
        # The interpreter cuts a float32 off where a GPU rounds.
        slack = float(exact.abs().max()) * 2**-7 if device.type == "cpu" else 0.0
        share = max(_share(error, theirs, of, slack) for of in (torch.max, torch.mean))
        found.cases += 1
        if not share <= 2:  # a NaN is wrong, too
            found.wrong.append(f"{case}: error {share:.3g} times that of dense")
        elif share > found.worst[0]:
            found.worst = (share, case)
        for _ in range(1 if small else REPEATS):
            if not torch.equal(call(x, bias), y):
                found.wrong.append(f"{case}: a repeat differs")
                break
        if device.type == "cuda":
            found.wrong += [f"{case}: {why}" for why in _elsewhere(call, x, bias, y)]


def _truth(x: Tensor, dense: list[Tensor], bias: Tensor | None) -> Tensor:
    """The product in the dtype of x, or silu(x @ gate.T) * (x @ up.T)."""
    shifts = [None] * len(dense) if bias is None else bias.to(x.dtype).chunk(len(dense))
    linear = torch.nn.functional.linear
    products = [linear(x, d, b) for d, b in zip(dense, shifts, strict=True)]
    return (
        products[0] if len(products) == 1 else torch.nn.functional.silu(products[0]) * products[1]
    )


def _share(error: Tensor, theirs: Tensor, of: Callable[[Tensor], Tensor], slack: float) -> float:
    """How large an error is against that of the dense product."""
    return float(of(error)) / (float(of(theirs)) + slack + 1e-30)


def _elsewhere(call: Call, x: Tensor, bias: Tensor | None, y: Tensor) -> Iterator[str]:
    """What another stream and a CUDA graph, recorded with other inputs, give otherwise."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        there = call(x, bias)
    torch.cuda.current_stream().wait_stream(side)
    if not torch.equal(there, y):
        yield "another stream differs"
    held, graph = torch.zeros_like(x), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        recorded = call(held, bias)
    held.copy_(x)
    graph.replay()
    if not torch.equal(recorded, y):
        yield "a replayed graph differs"


@contextmanager
def _poisoned() -> Iterator[None]:
    """While in use, fresh memory is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _amid(tensor: Tensor) -> Tensor:
    """A copy with NaN, or words of ones, on both sides in memory."""
    room = 4096 // tensor.element_size()
    poison = float("nan") if tensor.is_floating_point() else -1
    around = tensor.new_full((tensor.numel() + 2 * room,), poison)
    return around[room:-room].view(tensor.shape).copy_(tensor)


def _matrix(
    shape: tuple[int, int], n: int, m: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Tensor:
    """A random matrix that keeps at most n of every m neighbours, of some groups fewer."""
    random = torch.Generator(device).manual_seed(seed)
    groups = torch.randn(shape[0], shape[1] // m, m, generator=random, device=device)
    order = torch.rand(groups.shape, generator=random, device=device).argsort(-1)
    groups.masked_fill_(order >= n, 0)
    groups[:: max(1, shape[0] // 8), ::3, : m // 2] = 0
    return groups.to(dtype).flatten(1)


if __name__ == "__main__":
    main()
