"""The kernel for int8 and int4 in 2:4 that layers are held in: `s24_mma int8`, `s24_mma int4/128`.

One for each number of bits and of columns that share a scale, which its name and so the table of measurements
tell apart. A layout is [marker, words] or [marker, words, bitmap]: the words of places and numbers, and
behind them, in the same memory, the scales. The marker's shape says (0, group as it is stored, whether all
slots are kept); the bitmap tells which are where a number is 0 and some groups keep fewer than two.

State: tested on a CPU, in plain torch and with made-up times. **On a GPU it has not run.**
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from llmprune.kernels import gpu, s24_bits, s24_mma
from llmprune.kernels.few_bits import FewBits, numbers_of, top_of
from llmprune.kernels.few_expand import dense_of_few, how
from llmprune.kernels.held import S24_MMA
from llmprune.kernels.held_few import other_bits, other_dtype
from llmprune.kernels.interface import Case, Unheld
from llmprune.kernels.packed import count, pack_bits
from llmprune.kernels.s24_bits_layout import (
    SPANS,
    S24Bits,
    pack_s24_bits,
    span_of,
    unpack_s24_bits,
    whole_s24_bits,
)
from llmprune.kernels.s24_layout import COLUMNS, ROWS, TILES
from llmprune.kernels.words import HALVES, Words

_BLOCK = 2**22  # random weights, repeated to the size of the matrix


class S24Few(Words):
    """2:4 of whole numbers on sparse tensor cores."""

    n, m = 2, 4
    tokens = s24_mma.TOKENS
    revision = s24_bits.REVISION

    def __init__(self, bits: int, span: int) -> None:
        """Of 8 or 4 bits; `span` columns share a scale, 0 where a row has one."""
        self.bits, self.span = bits, span
        self.name = f"s24_mma int{bits}" + (f"/{span}" if span else "")
        size = bits / 2 + 1 + (16 / span if span else 0)
        self.about = (
            f"reads {size:g} bits per weight into sparse tensor cores, up to {self.tokens} tokens"
        )

    def unavailable(self, device: torch.device) -> str | None:
        """See `Words.unavailable`."""
        return s24_bits.unavailable(device)

    def launches(self, device: torch.device) -> bool:
        """Triton's interpreter knows no Gluon."""
        return device.type == "cuda" and gpu.launches(device)

    def how(self, device: torch.device) -> str:
        """See `Words.how`."""
        return how(device)

    def holds(self, n: int, m: int) -> bool:
        """As `s24_mma`."""
        return (n, m) in ((2, 4), (1, 2))

    def static(self, case: Case) -> str | None:
        """See `Words.static`."""
        if (why := other_bits(case, self.bits)) is not None:
            return why
        if case.device.type != "cuda":
            return "needs an NVIDIA GPU"
        if case.dtype not in HALVES:
            return f"needs bfloat16 or float16, not {str(case.dtype).removeprefix('torch.')}"
        if (why := other_dtype(case) or self._misfit(case) or case.unheld) is not None:
            return why
        return None if fitting(case) == self.span else _groups(case)

    def lay(self, packed: FewBits) -> Tensor:  # type: ignore[override]
        """See `Words.lay`."""
        return _joined(pack_s24_bits(packed))

    def dense(
        self, words: Tensor, shape: tuple[int, int], dtype: torch.dtype, slots: bool
    ) -> Tensor:
        """See `Words.dense`."""
        layout = self._layout(words, shape, dtype)
        return whole_s24_bits(layout, True) if slots else dense_of_few(layout)

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
        layout = self._layout(words, shape, x.dtype)
        return s24_bits.s24_bits(x, layout, bias, warps=warps, split=split)

    def splits(self, sides: tuple[int, int], warps: int) -> list[int]:
        """See `Words.splits`."""
        return S24_MMA.splits(sides, warps)

    def prepare(self, packed: FewBits) -> list[Tensor]:  # type: ignore[override]
        """See `Kernel.prepare`.

        Raises:
            ValueError: where a group keeps more than two.
            Unheld: for groups or scales that the kernel does not take.
        """
        full = self._all_full(packed.bitmap, packed.shape)
        try:
            words = self.lay(packed)
        except ValueError as error:
            raise Unheld(str(error)) from None
        numbers = numbers_of(packed)[: count(packed.bitmap)]
        some_zero = not bool((numbers != 0).all())
        about = (0, packed.group, int(some_zero and full))
        layout = [words.new_empty(about, dtype=packed.dtype), words]
        return [*layout, packed.bitmap] if some_zero and not full else layout

    def packed(self, layout: Sequence[Tensor], shape: Sequence[int]) -> FewBits:  # type: ignore[override]
        """See `Kernel.packed`."""
        marker, words, *bitmaps = layout
        _, group, all_kept = marker.shape
        held = self._layout(words, (shape[0], shape[1]), marker.dtype, group)
        bitmap = bitmaps[0] if bitmaps else None
        if all_kept:
            bitmap = pack_bits(whole_s24_bits(held, True) != 0)
        return unpack_s24_bits(held, bitmap)

    def sample(
        self, device: torch.device, sides: tuple[int, int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """See `Words.sample`."""
        rows, columns = sides
        both = ROWS * TILES  # rows of a layout come in these
        step = both * max(1, min(-(-rows // both), _BLOCK // columns // both))
        random = torch.Generator(device).manual_seed(0)
        few = _random(step, columns, self.bits, self.span or columns, dtype, random)
        held, repeats = pack_s24_bits(few), -(-rows // step)
        tiles = -(-rows // both) * TILES
        words = held.words.repeat(repeats, 1, 1, 1, 1)[:tiles]
        scales = held.scales.repeat(repeats, 1, 1, 1)[:tiles]
        whole = S24Bits(words, scales, sides, self.bits, few.group)
        return dense_of_few(few).repeat(repeats, 1)[:rows], _joined(whole)

    def _layout(
        self, words: Tensor, shape: tuple[int, int], dtype: torch.dtype, group: int | None = None
    ) -> S24Bits:
        """Words and scales, where they lie."""
        rows, columns = shape
        tiles, chunks = -(-rows // (ROWS * TILES)) * TILES, -(-columns // COLUMNS)
        form = (tiles, chunks, 1 + self.bits // 2, 32, 4)
        pairs = chunks * (COLUMNS // self.span) // 2 if self.span else 1
        size = tiles * chunks * form[2] * 128
        scales = words[size:].view(dtype).view(tiles, pairs, 8, 4)
        return S24Bits(
            words[:size].view(form), scales, shape, self.bits, group or self.span or columns
        )


def _joined(layout: S24Bits) -> Tensor:
    """Words, then scales, in one memory: int32."""
    return torch.cat((layout.words.flatten(), layout.scales.flatten().view(torch.int32)))


def _random(
    rows: int, columns: int, bits: int, group: int, dtype: torch.dtype, random: torch.Generator
) -> FewBits:
    """A 2:4 matrix of random numbers and scales, on the device of `random`."""
    device = random.device
    keep = torch.rand(rows, columns // 4, 4, generator=random, device=device).argsort(-1) < 2
    top = top_of(bits)
    kept = rows * columns // 2
    whole = torch.randint(-top, top + 1, (kept,), generator=random, device=device, dtype=torch.int8)
    shape = (rows, -(-columns // group))
    scales = (1 + torch.rand(shape, generator=random, device=device)).bfloat16() / 64
    numbers = whole if bits == 8 else (whole[::2] & 15 | whole[1::2] << 4).view(torch.uint8)
    bitmap = pack_bits(keep.flatten(1))
    return FewBits(numbers, scales, bitmap, (rows, columns), bits, group, dtype)


def fitting(case: Case) -> int | None:
    """How many columns share a scale in the layout of a layer, 0 if all of a row; None where it has none."""
    assert case.group is not None
    try:
        return span_of(case.group, case.sides[1])
    except ValueError:
        return None


def _groups(case: Case) -> str:
    return f"needs groups of whole rows or multiples of {SPANS[-1]}, not of {case.group}"


@cache
def s24_few(bits: int, span: int) -> S24Few:
    """The one of 8 or 4 bits for scales of `span` columns, 0 for those of rows."""
    return S24Few(bits, span)


def s24_for(case: Case) -> S24Few:
    """The one that comes into question for a layer in few bits."""
    assert case.bits is not None
    span = fitting(case)
    return s24_few(case.bits, SPANS[0] if span is None else span)
