"""The kernels that layers with any mask are held in: `bitmap`, and `bitmap n:32` for groups of 32 neighbours.

How long a product with any mask takes depends on how many weights are kept, so there is one `bitmap` for each
twentieth of them, measured apart: `bitmap 50%` holds what keeps 48 to 52 of a hundred.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from llmprune.kernels import bitmap
from llmprune.kernels.bitmap_layout import (
    TURN,
    WORD,
    BitmapLayout,
    bits_per_weight,
    exact,
    pack_bitmap,
    pack_exact,
    unpack_bitmap,
)
from llmprune.kernels.expanding import dense_of
from llmprune.kernels.held import splits
from llmprune.kernels.interface import Case
from llmprune.kernels.packed import DTYPES, Packed, pack, unpack_bits
from llmprune.kernels.words import Measured, Words

STEP = 5  # percent, from one `bitmap` to the next; a guess: time goes with bytes, 9% of them a step at half
_BLOCK = 2**22  # random weights, repeated to the size of the matrix


class Bitmap(Measured[list[Tensor]]):
    """Any mask. Its layout is [values, words, offsets] of `BitmapLayout`."""

    tokens = bitmap.TOKENS
    revision = bitmap.REVISION
    dtypes = DTYPES

    def __init__(self, percent: int) -> None:
        """One for each share of kept weights, in percent."""
        self._kept = percent / 100
        self.pattern = f"{percent}%"
        self.name = f"bitmap {percent}%"
        bits = bits_per_weight(self._kept)
        self.about = (
            f"reads {bits:.1f} bits per weight at 16 of a value, up to {self.tokens} tokens"
        )

    def unavailable(self, device: torch.device) -> str | None:
        """See `Measured.unavailable`."""
        return bitmap.unavailable(device, 0)

    def _misfit(self, case: Case) -> str | None:
        """What is wrong with the shape or the number of kept weights."""
        if not min(case.sides):
            return "there are no weights"
        bits, dense = bits_per_weight(self._kept, case.dtype.itemsize), 8 * case.dtype.itemsize
        if bits >= dense:
            return f"would take {bits:.1f} bits per weight, the dense matrix {dense}"
        return None

    def read(self, layout: Sequence[Tensor]) -> list[Tensor]:
        """See `Measured.read`."""
        return list(layout)

    def sample(
        self, device: torch.device, sides: tuple[int, int], dtype: torch.dtype
    ) -> tuple[Tensor, list[Tensor]]:
        """See `Measured.sample`."""
        random = torch.Generator(device).manual_seed(0)
        shape = min(sides[0], max(1, _BLOCK // sides[1])), sides[1]
        block = torch.randn(shape, generator=random, device=device)
        keep = torch.rand(shape, generator=random, device=device) < self._kept
        dense, packed = _repeated(block.masked_fill_(~keep, 0).to(dtype), sides[0])
        return dense, self.prepare(packed)

    def dense(
        self, words: list[Tensor], shape: tuple[int, int], dtype: torch.dtype, slots: bool
    ) -> Tensor:
        """See `Measured.dense`."""
        packed = _layout(words, shape).packed
        return unpack_bits(packed.bitmap, shape[1]).to(dtype) if slots else dense_of(packed)

    def product(
        self,
        x: Tensor,
        words: list[Tensor],
        bias: Tensor | None,
        shape: tuple[int, int],
        warps: int | None = None,
        split: int | None = None,
    ) -> Tensor:
        """See `Measured.product`."""
        layout = _layout(words, shape)
        return bitmap.bitmap_gemv(x, layout, bias, warps=warps, split=split)

    def splits(self, sides: tuple[int, int], warps: int) -> list[int]:
        """See `Measured.splits`."""
        return _splits(sides, warps)

    def prepare(self, packed: Packed) -> list[Tensor]:
        """See `Kernel.prepare`."""
        layout = pack_bitmap(packed)
        assert layout.offsets is not None
        return [layout.values, layout.words, layout.offsets]

    def packed(self, layout: Sequence[Tensor], shape: Sequence[int]) -> Packed:
        """See `Kernel.packed`."""
        rows, columns = shape
        return unpack_bitmap(_layout(layout, (rows, columns)))


class BitmapN(Words):
    """At most n of every 32 neighbours; fewer are filled up with zeros. Words are as of `pack_exact`."""

    m = WORD
    tokens = bitmap.TOKENS
    revision = bitmap.REVISION

    def __init__(self, n: int) -> None:
        """One for each n."""
        self.n = n
        self.name = f"bitmap {n}:32"
        self.about = f"reads {self._bits:g} bits per weight, up to {self.tokens} tokens"

    @property
    def _bits(self) -> float:
        return bits_per_weight(0, n=self.n)

    def unavailable(self, device: torch.device) -> str | None:
        """See `Measured.unavailable`."""
        return bitmap.unavailable(device, self.n)

    def _misfit(self, case: Case) -> str | None:
        """What is wrong with the pattern or the shape."""
        if not 0 < self.n < WORD or self._bits >= 16:
            return f"{self.n}:32 would take {self._bits:g} bits per weight, the dense matrix 16"
        return super()._misfit(case)

    def lay(self, packed: Packed) -> Tensor:
        """See `Words.lay`."""
        return pack_exact(packed, self.n)

    def sample(
        self, device: torch.device, sides: tuple[int, int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """See `Measured.sample`."""
        random = torch.Generator(device).manual_seed(0)
        step = min(sides[0], max(1, _BLOCK // sides[1]))
        groups = torch.randn(step, sides[1] // WORD, WORD, generator=random, device=device)
        least = groups.abs().topk(WORD - self.n, dim=-1, largest=False).indices
        block = groups.scatter_(-1, least, 0).flatten(1).to(dtype)
        dense, packed = _repeated(block, sides[0])
        return dense, self.lay(packed)

    def dense(
        self, words: Tensor, shape: tuple[int, int], dtype: torch.dtype, slots: bool
    ) -> Tensor:
        """See `Measured.dense`."""
        packed = exact(words, shape, self.n, dtype).packed
        return unpack_bits(packed.bitmap, shape[1]).to(dtype) if slots else dense_of(packed)

    def product(
        self,
        x: Tensor,
        words: Tensor,
        bias: Tensor | None,
        shape: tuple[int, int],
        warps: int | None = None,
        split: int | None = None,
    ) -> Tensor:
        """See `Measured.product`."""
        layout = exact(words, shape, self.n, x.dtype)
        return bitmap.bitmap_gemv(x, layout, bias, warps=warps, split=split)

    def splits(self, sides: tuple[int, int], warps: int) -> list[int]:
        """See `Measured.splits`."""
        return _splits(sides, warps)


def _layout(parts: Sequence[Tensor], shape: tuple[int, int]) -> BitmapLayout:
    values, words, offsets = parts
    return BitmapLayout(values, words, offsets, shape)


def _splits(sides: tuple[int, int], warps: int) -> list[int]:
    """A turn of columns for each warp of a part."""
    return splits(-(-sides[0] // bitmap.launch_of(1).program), -(-sides[1] // TURN) // warps)


def _repeated(block: Tensor, rows: int) -> tuple[Tensor, Packed]:
    """So many rows of a block over and over, dense and packed."""
    whole, left = divmod(rows, len(block))
    parts = [pack(block)] * whole + ([pack(block[:left].contiguous())] if left else [])
    packed = Packed(
        torch.cat([part.values for part in parts]),
        torch.cat([part.bitmap for part in parts]),
        (rows, block.shape[1]),
    )
    return block.repeat(whole + 1, 1)[:rows].contiguous(), packed


def bitmap_of(kept: int, weights: int) -> Bitmap:
    """The one for matrices that keep so many of so many weights."""
    return bitmap_percent(max(STEP, round(100 * kept / max(1, weights) / STEP) * STEP))


@cache
def bitmap_percent(percent: int) -> Bitmap:
    """The one for matrices that keep about so many of a hundred weights."""
    return Bitmap(percent)


@cache
def bitmap_n(n: int) -> BitmapN:
    """The one for n of 32."""
    return BitmapN(n)
