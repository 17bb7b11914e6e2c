"""The kernels for n:m that layers are held in: `s24_mma`, `n8_mma` of three n:8, `nm_gemv` of each n:m."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from llmprune.kernels import gpu, n8_mma, nm_gemv, s24_mma
from llmprune.kernels.expanding import dense_of
from llmprune.kernels.gemv_layout import LANES, Chunk, GemvLayout, dense_gemv, pack_gemv
from llmprune.kernels.interface import Case
from llmprune.kernels.n8_layout import KEPT, N8Layout, dense_n8, pack_n8
from llmprune.kernels.packed import Packed
from llmprune.kernels.s24_layout import COLUMNS, S24Layout, dense_s24, pack_s24
from llmprune.kernels.words import Words

_PROGRAMS = 1056  # of a split, at most: eight on each of an H200's 132 processors; not measured


class S24(Words):
    """2:4 on sparse tensor cores."""

    name = "s24_mma"
    about = "reads 9 bits per weight straight into sparse tensor cores, up to 64 tokens"
    n, m = 2, 4
    tokens = s24_mma.TOKENS
    revision = s24_mma.REVISION

    def unavailable(self, device: torch.device) -> str | None:
        """See `Words.unavailable`."""
        return s24_mma.unavailable(device)

    def launches(self, device: torch.device) -> bool:
        """Triton's interpreter knows no Gluon."""
        return device.type == "cuda" and gpu.launches(device)

    def holds(self, n: int, m: int) -> bool:
        """1 of every 2 is 2 of every 4 as well; 1 of every 4 takes less as 1:4."""
        return (n, m) in ((2, 4), (1, 2))

    def lay(self, packed: Packed) -> Tensor:
        """See `Words.lay`."""
        return pack_s24(packed).words

    def dense(
        self, words: Tensor, shape: tuple[int, int], dtype: torch.dtype, slots: bool
    ) -> Tensor:
        """See `Words.dense`."""
        layout = S24Layout(words, shape, dtype)
        return dense_s24(layout, True)[0] if slots else dense_of(layout)

    def product(
        self,
        x: Tensor,
        words: Tensor,
        bias: Tensor | None,
        shape: tuple[int, int],
        warps: int | None = None,
        split: int | None = None,
    ) -> Tensor:
        """See `Words.product`."""
        layout = S24Layout(words, shape, x.dtype)
        return s24_mma.s24_mma(x, layout, bias, warps=warps, split=split)

    def splits(self, sides: tuple[int, int], warps: int) -> list[int]:
        """See `Words.splits`: a chunk of columns for each warp, or for each four that share them."""
        return splits(-(-sides[0] // 32), -(-sides[1] // COLUMNS) // max(1, warps // 4))


class N8(Words):
    """2:8, 3:8 and 4:8 on dense tensor cores."""

    m = 8
    tokens = n8_mma.TOKENS
    revision = n8_mma.REVISION

    def __init__(self, n: int) -> None:
        """One for each n: the layout depends on it."""
        self.n = n
        self.name = f"n8_mma {n}:8"
        self.about = (
            f"reads {1 + 2 * n} bits per weight and decodes them for tensor cores, "
            f"up to {self.tokens} tokens"
        )

    def unavailable(self, device: torch.device) -> str | None:
        """See `Words.unavailable`."""
        return n8_mma.unavailable(device, self.n)

    def launches(self, device: torch.device) -> bool:
        """Triton's interpreter knows no Gluon."""
        return device.type == "cuda" and gpu.launches(device)

    def lay(self, packed: Packed) -> Tensor:
        """See `Words.lay`."""
        return pack_n8(packed, self.n).words

    def dense(
        self, words: Tensor, shape: tuple[int, int], dtype: torch.dtype, slots: bool
    ) -> Tensor:
        """See `Words.dense`."""
        layout = N8Layout(words, shape, dtype, self.n)
        return dense_n8(layout, True) if slots else dense_of(layout)

    def product(
        self,
        x: Tensor,
        words: Tensor,
        bias: Tensor | None,
        shape: tuple[int, int],
        warps: int | None = None,
        split: int | None = None,
    ) -> Tensor:
        """See `Words.product`."""
        layout = N8Layout(words, shape, x.dtype, self.n)
        return n8_mma.n8_mma(x, layout, bias, warps=warps, split=split)

    def splits(self, sides: tuple[int, int], warps: int) -> list[int]:
        """See `Words.splits`: as those of `s24_mma`, whose programs are of the same size."""
        return S24_MMA.splits(sides, warps)


class Gemv(Words):
    """n:m in plain Triton."""

    tokens = nm_gemv.TOKENS
    revision = nm_gemv.REVISION

    def __init__(self, n: int, m: int) -> None:
        """One for each n:m: the layout depends on it."""
        self.n, self.m = n, m
        self.name = f"nm_gemv {n}:{m}"
        self.about = f"reads {self._bits:g} bits per weight, up to {self.tokens} tokens"

    @property
    def _bits(self) -> float:
        return (16 + Chunk(self.n, self.m).bits) * self.n / self.m

    def unavailable(self, device: torch.device) -> str | None:
        """See `Words.unavailable`."""
        return nm_gemv.unavailable(device, self.n, self.m)

    def _misfit(self, case: Case) -> str | None:
        """What is wrong with the pattern or the shape."""
        if self.m not in (2, 4, 8, 16) or not 0 < self.n < self.m:
            return f"needs m of 2, 4, 8 or 16, not {self.n}:{self.m}"
        if self._bits >= 16:
            return (
                f"{self.n}:{self.m} would take {self._bits:g} bits per weight, the dense matrix 16"
            )
        return super()._misfit(case)

    def lay(self, packed: Packed) -> Tensor:
        """See `Words.lay`."""
        return pack_gemv(packed, self.n, self.m).words

    def dense(
        self, words: Tensor, shape: tuple[int, int], dtype: torch.dtype, slots: bool
    ) -> Tensor:
        """See `Words.dense`."""
        layout = GemvLayout(words, shape, dtype, Chunk(self.n, self.m))
        return dense_gemv(layout, True) if slots else dense_of(layout)

    def product(
        self,
        x: Tensor,
        words: Tensor,
        bias: Tensor | None,
        shape: tuple[int, int],
        warps: int | None = None,
        split: int | None = None,
    ) -> Tensor:
        """See `Words.product`."""
        layout = GemvLayout(words, shape, x.dtype, Chunk(self.n, self.m))
        return nm_gemv.nm_gemv(x, layout, bias, warps=warps, split=split)

    def splits(self, sides: tuple[int, int], warps: int) -> list[int]:
        """See `Words.splits`: each part has a chunk of columns for each warp."""
        chunks = -(-sides[1] // Chunk(self.n, self.m).columns)
        return splits(-(-sides[0] // LANES), chunks // warps)


def splits(programs: int, most: int) -> list[int]:
    """Powers of two up to `most`, as long as the programs that they make are not too many to be worth it."""
    powers = (2**i for i in range(6))
    return [p for p in powers if p == 1 or (p <= most and p * programs <= _PROGRAMS)]


S24_MMA = S24()


@cache
def n8(n: int, m: int) -> N8 | None:
    """The one for n of m, if there is one."""
    return N8(n) if m == N8.m and n in KEPT else None


@cache
def gemv(n: int, m: int) -> Gemv:
    """The one for n of m."""
    return Gemv(n, m)
