"""2:4 matrices in int8 and int4 for correct.py and few_tokens.py: rounded to nearest, held for `s24_bits`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from baselines import GROUP, Contender
from timing import copies
from torch import Tensor

from llmprune.kernels.few_bits import FewBits, expand_few, in_halves, top_of
from llmprune.kernels.packed import pack_bits
from llmprune.kernels.s24_bits import TOKENS, s24_bits
from llmprune.kernels.s24_bits_layout import pack_s24_bits

NAMES = {"s24_bits int8": 8, "s24_bits int4": 4}


def rounded(dense: Tensor, bits: int) -> FewBits:
    """The nearest products: a scale of each row with 8 bits, of each 128 columns with 4.

    Args:
        dense: [rows, columns] bfloat16 or float16; what is not zero is kept.
        bits: 8 or 4.
    """
    rows, columns = dense.shape
    group = columns if bits == 8 else min(GROUP, columns)
    padded = torch.nn.functional.pad(dense.float().abs(), (0, -columns % group))
    scales = (padded.unflatten(1, (-1, group)).amax(-1) / top_of(bits)).clamp(min=2.0**-14)
    scales = scales.bfloat16()
    keep = dense != 0
    numbers = []
    for part, of, kept in zip(dense.split(2048), scales.split(2048), keep.split(2048), strict=True):
        wide = of.float().repeat_interleave(group, 1)[:, :columns]  # bounds the memory
        whole = (part.float() / wide).round_().clamp_(-top_of(bits), top_of(bits))
        numbers.append(whole.to(torch.int8)[kept])
    whole = torch.cat(numbers)
    whole = whole if bits == 8 else in_halves(whole)
    return FewBits(whole, scales, pack_bits(keep), (rows, columns), bits, group, dense.dtype)


def contenders_of_few(dense: Tensor, names: tuple[str, ...]) -> Iterator[Contender]:
    """The kernel on copies of the rounded weights, for each of `names` that is among `NAMES`."""
    for name in names:
        if name not in NAMES:
            continue
        few = rounded(dense, NAMES[name])
        layout = pack_s24_bits(few)
        held = [replace(layout, words=words) for words in copies(layout.words)]
        products = [partial(s24_bits, layout=one) for one in held]
        yield Contender(name, TOKENS, layout.bytes, products, expand_few(few))
