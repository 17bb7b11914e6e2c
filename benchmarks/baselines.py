"""What sparse products are measured against: cuBLAS, cuSPARSELt, dense int8 and int4 weights.

    python benchmarks/baselines.py --try NAME --device cuda     whether one runs here, in a process of its own

int8: a value a weight and a scale a row, by a Triton kernel up to 64 tokens (`int8_triton`), beyond as
bfloat16 for cuBLAS; on a CPU by torch._weight_int8pack_mm. int4: groups of 128 with scale and zero, by
torch._weight_int4pack_mm. With torchao installed, its `quantize_` beside both. cuSPARSELt: by torch's
operator, with the algorithm that its search finds. What does not run on a machine is left out, and the
result says why: each is tried in a process of its own, for an error on a GPU may end it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from timing import copies, graphed
from torch import Tensor, nn

DENSE = "dense"  # F.linear: cuBLAS on a GPU
MANY = 10**9  # tokens: any number
GROUP = 128  # inputs with a scale, of int4
OTHERS = ("cusparselt", "int8", "int4", "torchao int8", "torchao int4")
SECONDS = 100  # for all trials, which run at the same time

Product = Callable[[Tensor], Tensor]
"""x -> x @ weight.T, for one copy of the weight."""


@dataclass(frozen=True)
class Contender:
    """One way to multiply.

    Attributes:
        name: of the kernel.
        tokens: how many it takes at most.
        bytes: of the weight.
        products: one for each copy of the weight.
        stands_for: the dense weight that it multiplies by, where that is a rounded one.
    """

    name: str
    tokens: int
    bytes: int
    products: list[Product]
    stands_for: Tensor | None = None


def round8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 [out, in] and float32 scales [out], of which `weight` is about the product."""
    scale = weight.abs().amax(1).float().clamp(min=1e-8) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def round4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Uint8 [out, in] of 0 to 15, and scales and zeros [in / 128, out, 2] of the dtype of `weight`.

    A weight is about (number - 8) * scale + zero.
    """
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low).clamp(min=1e-6) / 15).to(weight.dtype)
    zero = (low + scale.float() * 8).to(weight.dtype)
    groups = (groups - zero.float()[..., None]) / scale.float()[..., None] + 8
    number = groups.round_().clamp_(0, 15).to(torch.uint8).flatten(1)
    return number, torch.stack([scale, zero], -1).transpose(0, 1).contiguous()


def dense4(number: Tensor, scales: Tensor) -> Tensor:
    """What `round4` made of a weight, in the dtype of the scales."""
    scale, zero = scales.transpose(0, 1).unbind(-1)
    steps = number.to(scales.dtype).unflatten(1, (-1, GROUP)) - 8
    return (steps * scale[..., None] + zero[..., None]).flatten(1)


class Int8Linear(nn.Module):
    """A linear layer without bias: int8 weights, a scale for each row."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        """Takes what `round8` gives."""
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        flat = x.reshape(-1, x.shape[-1])
        if not x.is_cuda:
            out = torch._weight_int8pack_mm(flat, self.weight, self.scale.to(x.dtype))
        elif len(flat) <= 64:
            from int8_triton import int8_mm

            out = int8_mm(flat, self.weight, self.scale)
        else:
            out = nn.functional.linear(flat, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return out.reshape(*x.shape[:-1], -1)


class Int4Linear(nn.Module):
    """A linear layer without bias: int4 weights, a scale and a zero for each group."""

    packed: Tensor
    scales: Tensor

    def __init__(self, number: Tensor, scales: Tensor) -> None:
        """Takes what `round4` gives."""
        super().__init__()
        if number.is_cuda:
            pairs = number[:, ::2] << 4 | number[:, 1::2]
            packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
        else:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(number.int(), 8)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        ops = torch.ops.aten
        multiply = ops._weight_int4pack_mm if x.is_cuda else ops._weight_int4pack_mm_for_cpu
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        out: Tensor = multiply(flat, self.packed, GROUP, self.scales)
        return out.reshape(*x.shape[:-1], -1)


def replaced(linear: nn.Linear, name: str) -> nn.Module:
    """A layer that stands in for `linear`, which has no bias: `int8`, `int4`, or torchao's of either."""
    if linear.bias is not None:
        raise ValueError("baselines are without bias")
    weight = linear.weight.detach()
    if name == "int8":
        return Int8Linear(*round8(weight))
    if name == "int4":
        return Int4Linear(*round4(weight))
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    holder = nn.Sequential(linear)
    int8 = name == "torchao int8"
    quantize_(holder, Int8WeightOnlyConfig() if int8 else Int4WeightOnlyConfig(group_size=GROUP))
    return holder[0]


class Cslt:
    """A 2:4 matrix as cuSPARSELt holds it; searches for an algorithm once for each number of tokens."""

    def __init__(self, packed: Tensor, found: dict[int, dict[str, int]]) -> None:
        """Takes what torch._cslt_compress gives, and what was found so far."""
        self.packed, self.found = packed, found

    def __call__(self, x: Tensor) -> Tensor:
        """The product x @ weight.T; tokens are filled up to a multiple of 8, as torch does."""
        tokens = len(x)
        wide = nn.functional.pad(x, (0, 0, 0, -tokens % 8)).T
        if tokens not in self.found:
            self.found[tokens] = self._search(wide)
        out = torch._cslt_sparse_mm(self.packed, wide, transpose_result=True, **self.found[tokens])
        return out[:tokens]

    def _search(self, wide: Tensor) -> dict[str, int]:
        library: Any = getattr(torch._C, "_cusparselt", None)
        if library is None:
            best = torch._cslt_sparse_mm_search(self.packed, wide, transpose_result=True)
            return {"alg_id": best}
        best, split, mode, _ = library.mm_search(self.packed, wide, None, None, None, True)
        return {"alg_id": best, "split_k": split, "split_k_mode": mode}


def contenders(dense: Tensor, names: tuple[str, ...], lost: dict[str, str]) -> Iterator[Contender]:
    """The dense product and those of `names`, each on as many copies of its own weight as are cold.

    What cannot take the matrix goes into `lost`, with the reason.
    """
    linear = nn.functional.linear
    yield Contender(DENSE, MANY, dense.nbytes, [partial(linear, weight=w) for w in copies(dense)])
    for name in names:
        try:
            yield _other(dense, name)
        except RuntimeError as error:
            lost[f"{name}, {list(dense.shape)}"] = str(error).splitlines()[0]


def _other(dense: Tensor, name: str) -> Contender:
    if name == "cusparselt":
        packed = torch._cslt_compress(dense)
        found: dict[int, dict[str, int]] = {}
        products: list[Product] = [Cslt(p, found) for p in copies(packed)]
        return Contender(name, MANY, packed.nbytes, products)
    if name == "int8":
        whole, scale = round8(dense)
        stands = (whole.float() * scale[:, None]).to(dense.dtype)
        products = [Int8Linear(w, scale) for w in copies(whole)]
        return Contender(name, MANY, whole.nbytes + scale.nbytes, products, stands)
    if name == "int4":
        number, scales = round4(dense)
        stands = dense4(number, scales)
        layer = Int4Linear(number, scales)
        products = [_with(layer, "packed", p) for p in copies(layer.packed)]
        return Contender(name, MANY, layer.packed.nbytes + scales.nbytes, products, stands)
    layer = nn.Linear(*dense.shape[::-1], bias=False, device="meta")
    layer.weight = nn.Parameter(dense.clone(), requires_grad=False)
    module = replaced(layer, name)
    taken = dense.numel() if name.endswith("8") else dense.numel() * (4 + 32 / GROUP) / 8
    again = len(copies(dense.flatten()[: int(taken) // dense.element_size()]))
    modules = [module, *(deepcopy(module) for _ in range(again - 1))]
    weight: Any = module.weight
    return Contender(name, MANY, int(taken), list(modules), weight.dequantize())


def _with(module: nn.Module, name: str, tensor: Tensor) -> nn.Module:
    """A shallow copy of `module` with another buffer."""
    made = deepcopy(module)
    setattr(made, name, tensor)
    return made


def attempt(name: str, device: torch.device) -> str | None:
    """Why a baseline does not run here, or None: small products, eager and in a graph, compared."""
    if name.startswith("torchao") and find_spec("torchao") is None:
        return "torchao is not installed"
    if name == "cusparselt" and not getattr(torch._C, "_has_cusparselt", False):
        return "this torch has no cuSPARSELt"
    random = torch.Generator().manual_seed(0)
    groups = torch.randn(512, 128, 4, generator=random)
    dense = (groups * torch.tensor([1.0, 0, 0, 1])).flatten(1).to(device, torch.bfloat16)
    contender = _other(dense, name)
    for tokens in (1, 16):
        x = torch.randn(tokens, 512, generator=random).to(device, torch.bfloat16)
        off = difference(contender, x, dense)
        if not off < 0.02:
            return f"wrong: {tokens} tokens are off by {off:.3g} of their norm"
        graphed([partial(product, x) for product in contender.products[:2]], device)()
    return None


def difference(contender: Contender, x: Tensor, dense: Tensor) -> float:
    """Norm of the error against float64, as a share of the norm of the product."""
    weight = dense if contender.stands_for is None else contender.stands_for
    exact = x.double() @ weight.double().T
    return float((contender.products[0](x).double() - exact).norm() / exact.norm())


def refused(device: torch.device) -> dict[str, str | None]:
    """What speaks against each baseline on `device`: None for those that run."""
    if device.type == "cpu":
        return {name: _quietly(name, device) for name in OTHERS}
    command = [sys.executable, __file__, "--device", str(device), "--try"]
    begun = time.monotonic()
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    children = {name: subprocess.Popen([*command, name], **pipes) for name in OTHERS}
    found: dict[str, str | None] = {}
    for name, child in children.items():
        try:
            out, _ = child.communicate(timeout=max(1, begun + SECONDS - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            found[name] = f"took more than {SECONDS} s to try"
            continue
        last = out.strip().splitlines()[-1:] or [f"status {child.returncode}"]
        found[name] = None if child.returncode == 0 else last[0][:300]
    return found


def _quietly(name: str, device: torch.device) -> str | None:
    try:
        return attempt(name, device)
    except RuntimeError as error:
        return str(error).splitlines()[0]


def main() -> None:
    """Try one baseline; the last line says why it does not run, and the status whether it does."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--try", dest="name", choices=OTHERS, required=True)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if why := attempt(args.name, torch.device(args.device)):
        raise SystemExit(why)


if __name__ == "__main__":
    main()
