"""Instructions of PTX on tensors whose last dimension is lanes, or lanes and their registers.

Each from its definition in the PTX ISA. Registers are int32; `gluon_on_cpu` reads inline assembly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Word = Tensor | int


def unsigned(word: Word) -> Tensor:
    """32 bits as a whole number from 0 on, in int64."""
    return torch.as_tensor(word).long() & 0xFFFFFFFF


def signed(number: Tensor) -> Tensor:
    """The lower 32 bits of an int64 as an int32."""
    number = number & 0xFFFFFFFF
    return torch.where(number >= 2**31, number - 2**32, number).to(torch.int32)


def shl(a: Word, count: Word) -> Tensor:
    """`shl.b32`: shifts by more than 32 are shifts by 32."""
    return signed(unsigned(a) << unsigned(count).clamp(max=32))


def shr(a: Word, count: Word) -> Tensor:
    """`shr.u32`: zeros come from above."""
    return signed(unsigned(a) >> unsigned(count).clamp(max=32))


def mad_lo(a: Word, b: Word, c: Word) -> Tensor:
    """`mad.lo.u32`: the lower half of the product, plus c. 16 bits at a time: int64 has no room for all."""
    a, b = unsigned(a), unsigned(b)
    product = a * (b & 0xFFFF) + ((a * (b >> 16) & 0xFFFF) << 16)
    return signed(product + unsigned(c))


def prmt(a: Word, b: Word, selectors: Word) -> Tensor:
    """`prmt.b32` without a mode: four bytes, each chosen out of eight by three bits of a selector of four.

    Bytes 0-3 are those of a, 4-7 those of b. The fourth bit puts the sign of the byte into all its bits.
    """
    of_both = unsigned(a) | unsigned(b) << 32  # the highest byte makes it negative: masked below
    result = torch.zeros((), dtype=torch.int64)
    for i in range(4):
        selector = unsigned(selectors) >> (4 * i) & 15
        byte = of_both >> (8 * (selector & 7)) & 255
        sign = torch.where(byte >= 128, 255, 0)
        result = result | torch.where(selector >= 8, sign, byte) << (8 * i)
    return signed(result)


def lop3(a: Word, b: Word, c: Word, table: Word) -> Tensor:
    """`lop3.b32`: each bit is that of `table` whose number the bits of a, b and c are, a the highest."""
    one, two, three = (signed(unsigned(word)) for word in (a, b, c))
    result = torch.zeros((), dtype=torch.int32)
    for i in range(8):
        if int(table) >> i & 1:
            some = (one if i & 4 else ~one) & (two if i & 2 else ~two)
            result = result | some & (three if i & 1 else ~three)
    return result


def fma(a: Word, b: Word, c: Word, dtype: torch.dtype) -> Tensor:
    """`fma.rn.bf16x2` and `.f16x2`: of both halves a * b + c, rounded once; subnormal numbers count."""
    one, two, three = (signed(unsigned(w))[..., None].view(dtype).double() for w in (a, b, c))
    exact = one * two + three
    told = exact.isfinite()
    assert torch.equal(exact.float().double()[told], exact[told]), "would be rounded twice here"
    return exact.float().to(dtype).view(torch.int32)[..., 0]


ARITHMETIC: dict[str, Callable[..., Tensor]] = {
    "shl.b32": shl,
    "shr.u32": shr,
    "mad.lo.u32": mad_lo,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "fma.rn.bf16x2": partial(fma, dtype=torch.bfloat16),
    "fma.rn.f16x2": partial(fma, dtype=torch.float16),
}
"""By name: (operands that are read) -> result."""


def mma_m16n8k16(
    a: Tensor,  # int32 [..., 32, 4]: two values each
    b: Tensor,  # int32 [..., 32, 2]: two inputs each
    c: Tensor,  # float32 [..., 32, 4]
    dtype: torch.dtype,
) -> Tensor:
    """`mma.m16n8k16`: by PTX ISA, matrix fragments for mma.m16n8k16 with .f16 and .bf16."""
    lanes = torch.arange(32)
    g, t = lanes[:, None] // 4, lanes[:, None] % 4
    batch = a.shape[:-2]
    i = torch.arange(8)
    left = torch.zeros(*batch, 16, 16, dtype=torch.float64)
    left[..., g + 8 * (i // 2 % 2), 2 * t + i % 2 + 8 * (i // 4)] = _numbers(a, dtype)
    i = torch.arange(4)
    right = torch.zeros(*b.shape[:-2], 16, 8, dtype=torch.float64)
    right[..., 2 * t + i % 2 + 8 * (i // 2), g.expand(32, 4)] = _numbers(b, dtype)
    return (c.double() + (left @ right)[..., g + 8 * (i // 2), 2 * t + i % 2]).float()


def _numbers(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Int32 [..., 32, n] as float64 [..., 32, 2n]."""
    return words.contiguous().view(dtype).double()
