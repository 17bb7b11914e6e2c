"""cuSPARSELt for many tokens, by torch: only when asked for, as it holds the weights a second time.

9 bits per weight for the kernel that takes few tokens, and 9 for cuSPARSELt's own compressed form. State:
**it has not run on a GPU**; `unavailable` compares it with the dense product once on each before use.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmprune.kernels import gpu
from llmprune.kernels.held import S24_MMA, gemv
from llmprune.kernels.interface import Case
from llmprune.kernels.packed import Packed, unpack
from llmprune.kernels.words import Words

EVEN = 16  # torch.sparse.semi_structured: rows and columns of half types are multiples of it
TOKENS = 8  # and tokens of this


class CuSparseLt:
    """Its layout is that of a kernel for few tokens, and behind it the compressed form."""

    name = "cusparselt"
    about = "cuSPARSELt for many tokens, beside a kernel for few: 18 bits per weight"

    def unfit(self, case: Case) -> str | None:
        """Why it cannot be used at all, or None; may try it on the device."""
        if (why := self._static(case)) is not None:
            return why
        device = gpu.whole(case.device)
        if _few(device) is None:
            return f"has no kernel for few tokens: s24_mma {S24_MMA.unavailable(device)}"
        return unavailable(device)

    def refuses(self, case: Case) -> str | None:
        """See `Kernel.refuses`; tries nothing."""
        return self._static(case) or 'only when asked for: llmprune.kernels.prefer("cusparselt")'

    def _static(self, case: Case) -> str | None:
        """Why it cannot be used whatever the GPU, or None."""
        if (why := S24_MMA.static(case)) is not None:
            return why
        if any(side % EVEN for side in case.sides):
            return f"needs both sides in multiples of {EVEN}, these are {list(case.sides)}"
        return None

    def route(self, case: Case) -> str:
        """See `Kernel.route`."""
        few = _few(case.device) or S24_MMA
        if case.tokens <= few.tokens:
            return f"as {few.name}: {few.route(case)}"
        return "by cuSPARSELt"

    def prepare(self, packed: Packed) -> list[Tensor]:
        """See `Kernel.prepare`."""
        few = _few(packed.values.device) or S24_MMA
        return [torch._cslt_compress(unpack(packed).detach()), *few.prepare(packed)]

    def packed(self, layout: Sequence[Tensor], shape: Sequence[int]) -> Packed:
        """See `Kernel.packed`."""
        return _of(layout).packed(layout[1:], shape)

    def expanded(self, layout: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """See `Kernel.expanded`."""
        return _of(layout).expanded(layout[1:], shape)

    def matmul(
        self,
        x: Tensor,
        layout: Sequence[Tensor],
        bias: Tensor | None,
        shape: Sequence[int],
        transposed: bool,
    ) -> Tensor:
        """See `Kernel.matmul`."""
        few = _of(layout)
        if transposed or len(x) <= few.tokens:
            return few.matmul(x, layout[1:], bias, shape, transposed)
        return multiplied(x, layout[0], bias)


def multiplied(
    x: Tensor,  # [tokens, columns]
    compressed: Tensor,
    bias: Tensor | None,  # [rows]
) -> Tensor:
    """Give x @ weight.T + bias, [tokens, rows], by cuSPARSELt."""
    tokens = len(x)
    x = torch.nn.functional.pad(x, (0, 0, 0, -tokens % TOKENS)).contiguous()
    y = torch._cslt_sparse_mm(compressed, x.T, bias=bias, transpose_result=True)
    return y[:tokens].contiguous()


@gpu.once
def unavailable(device: torch.device) -> str | None:
    """Why cuSPARSELt must not be used on `device`, or None. Tries it once there."""
    if (why := gpu.missing(device)) is not None:
        return why
    if not torch.backends.cusparselt.is_available():
        return "this torch was built without cuSPARSELt"
    return gpu.trial(device, _wrong)


def _wrong(device: torch.device) -> str | None:
    """The first of a few small products that is not the dense one."""
    random = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        dense = torch.randn(64, 32, 4, generator=random)
        dense = dense.scatter(-1, dense.abs().topk(2, dim=-1, largest=False).indices, 0)
        dense = dense.reshape(64, 128).to(device, dtype)
        x = torch.randn(77, 128, generator=random).to(device, dtype)
        bias = torch.randn(64, generator=random).to(device, dtype)
        y = multiplied(x, torch._cslt_compress(dense), bias).float()
        expected = torch.nn.functional.linear(x.float(), dense.float(), bias.float())
        allowed = expected.abs() * 2 * torch.finfo(dtype).eps + 1e-3 * expected.abs().max()
        if y.shape != expected.shape or not bool(((y - expected).abs() <= allowed).all()):
            return f"77 tokens of [64, 128] {dtype}"
    return None


def _few(device: torch.device) -> Words | None:
    """The kernel for few tokens on `device`, if there is one."""
    device = gpu.whole(device)
    return next((k for k in (S24_MMA, gemv(2, 4)) if k.unavailable(device) is None), None)


def _of(layout: Sequence[Tensor]) -> Words:
    """The kernel whose words a layout holds: s24_mma has five dimensions of them, nm_gemv four."""
    return S24_MMA if layout[2].dim() == 5 else gemv(2, 4)
