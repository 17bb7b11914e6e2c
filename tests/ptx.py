"""Instructions of PTX that work on each lane by itself, by their definitions in the PTX ISA.

A register is an int32 tensor, a constant a whole number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def lop3(a: Any, b: Any, c: Any, table: int) -> Any:
    """`lop3.b32`: bit by bit, of `table` the bit whose number a, b and c are, a first."""
    found = 0
    for which in range(8):
        if table >> which & 1:
            bits = zip((a, b, c), (4, 2, 1), strict=True)
            one, two, three = (word if which & place else ~word for word, place in bits)
            found |= one & two & three
    return found


def prmt(a: Any, b: Any, selector: int) -> Any:
    """`prmt.b32` in its default mode: bytes of the eight of b and a, or their signs eight times over."""
    found = 0
    for i in range(4):
        which = selector >> 4 * i & 15
        byte = (a, b)[which >> 2 & 1] >> 8 * (which & 3) & 0xFF
        found |= ((byte >> 7) * 0xFF if which & 8 else byte) << 8 * i
    return found


def fma(a: Any, b: Any, c: Any, dtype: torch.dtype) -> Tensor:
    """`fma.rn.bf16x2` and `.f16x2`: of both halves a * b + c, rounded once; subnormal numbers count."""
    one, two, three = (_pair(word, dtype) for word in (a, b, c))
    exact = one * two + three
    finite = exact.isfinite()
    assert torch.equal(exact.float().double()[finite], exact[finite]), "not rounded once here"
    return exact.float().to(dtype).view(torch.int32)[..., 0]


def _pair(word: Any, dtype: torch.dtype) -> Tensor:
    """An int32 [..., 32], or a number, as float64 [..., 32, 2]."""
    return _word(torch.as_tensor(word)).unsqueeze(-1).view(dtype).double()


def _word(number: Any) -> Any:
    """The lower 32 bits of whole numbers of 64, as int32."""
    if not isinstance(number, Tensor):
        return number
    number = number.long() & 0xFFFFFFFF
    return (number - (number >> 31 << 32)).to(torch.int32)


def _long(word: Any) -> Any:
    """As 64 bits, the upper half of which is 0."""
    return word.long() & 0xFFFFFFFF if isinstance(word, Tensor) else word


BITWISE: dict[str, Callable[..., Any]] = {
    "lop3.b32": lambda *words: _word(lop3(*map(_long, words))),
    "prmt.b32": lambda *words: _word(prmt(*map(_long, words))),
    "shr.b32": lambda word, by: _word(_long(word) >> by),
}
