"""Kept weights as whole numbers of few bits, times scales that neighbours share (docs/format.md).

A writer is given weights and nothing else: scales are found again, and proven. That each weight is the
product of its whole number and its scale, rounded once to its dtype, holds bit for bit, or there are none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from llmprune.checkpoint.sparse import Spec
from llmprune.errors import CheckpointError
from llmprune.kernels.few_bits import in_halves, top_of
from llmprune.kernels.packed import pack, select

_SAMPLE = (
    8  # groups that are tried before all: most matrices that lie on no grid are given up after them
)
_FINITE = 0x7F80  # as int16, bfloat16 numbers from +0 up to the largest are below
_WORDS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Part:
    """Some rows of a matrix, as they are stored.

    Attributes:
        whole: [kept] int8.
        bitmap: [rows, ceil(columns / 8)] uint8.
        scales: [rows of scales, groups or columns] bfloat16, all that the rows need.
    """

    whole: Tensor
    bitmap: Tensor
    scales: Tensor


def rows_of_scales(spec: Spec, first: int, count: int) -> Tensor:
    """Which row of the scales each of `count` rows from `first` on has: [count] int64.

    Both are rows of all matrices of a tensor [..., rows, columns], one after the other.
    """
    rows = torch.arange(first, first + count)
    if spec.axis == "rows":
        return rows
    inner, each = spec.shape[-2], spec.scales_shape[-2]
    assert spec.group is not None
    return rows // inner * each + rows % inner // spec.group


def spread(scales: Tensor, spec: Spec, first: int, count: int) -> Tensor:
    """The scale of each weight of `count` rows from `first` on: [count, columns] float32.

    Args:
        scales: [rows of scales, groups or columns] bfloat16, the first of them those of row `first`.
        spec: of the whole tensor.
        first: row of all matrices, one after the other.
        count: of rows.
    """
    assert spec.group is not None
    places = rows_of_scales(spec, first, count)
    taken = scales[(places - places[:1]).to(scales.device)].float()
    if spec.axis == "columns":
        return taken
    return taken.repeat_interleave(spec.group, 1)[:, : spec.shape[-1]]


def flaw(whole: Tensor, scales: Tensor, bits: int) -> str | None:
    """What whole numbers and scales have that no writer writes, in words; None where all is well."""
    if len(whole) and int(whole.min()) < -top_of(bits):
        return f"a whole number of {bits} bits is below {-top_of(bits)}"
    words = scales.contiguous().view(torch.int16)
    if bool(((words < 0) | (words >= _FINITE)).any()):
        return "a scale is negative or not finite"
    return None


def found_in(part: Tensor, spec: Spec, first: int) -> Part | None:
    """Rows [n, columns] from row `first` on as whole numbers and scales; None where they are none.

    Args:
        part: along columns, whole groups, those of the end of a matrix aside; or whole matrices.
        spec: of the whole tensor; bits, group and axis count.
        first: row of all matrices, one after the other.
    """
    scales = _scales_of(part, spec)
    if scales is None:
        return None
    packed = pack(part)
    wide = select(spread(scales, spec, first, len(part)), packed.bitmap)
    whole = (packed.values.float() / wide).round_().to(torch.int8)
    return Part(whole, packed.bitmap, scales)


def stored_parts(
    key: str, pieces: Iterable[Tensor], spec: Spec
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What is written of a matrix, piece by piece: whole numbers, scales, bitmap.

    Args:
        key: what errors call it.
        pieces: all its rows [n, columns], cut as `found_in` needs them.
        spec: of the whole tensor.

    Raises:
        CheckpointError: for weights that are no products, although they were proven to be.
    """
    first, odd = 0, torch.empty(0, dtype=torch.int8)
    for piece in pieces:
        part = found_in(piece, spec, first)
        if part is None:
            raise CheckpointError(f"{key} changed while it was read; write it again")
        first += len(piece)
        whole = part.whole
        if spec.bits == 4:  # an odd one waits for what shares its byte
            whole = torch.cat((odd, whole))
            even = len(whole) if first == _tall(spec) else len(whole) // 2 * 2
            odd, whole = whole[even:], in_halves(whole[:even])
        yield whole, part.scales, part.bitmap


def _tall(spec: Spec) -> int:
    """Rows of all matrices of a tensor."""
    return math.prod(spec.shape[:-1])


def proven(parts: Iterator[Tensor], spec: Spec) -> bool:
    """Whether all rows of a matrix, given in parts, are such products."""
    return all(_scales_of(part, spec) is not None for part in parts)


def _scales_of(part: Tensor, spec: Spec) -> Tensor | None:
    """[rows of scales, groups or columns] bfloat16 for rows [n, columns]; None where there are none."""
    assert spec.bits is not None
    assert spec.group is not None
    if spec.axis == "rows":
        found = _each(_grouped(part, spec.group), spec.bits)
        return None if found is None else found.view(len(part), -1)
    inner = min(len(part), spec.shape[-2])
    across = part.reshape(-1, inner, part.shape[-1]).transpose(1, 2)
    found = _each(_grouped(across, spec.group), spec.bits)
    if found is None:
        return None
    return found.view(len(across), part.shape[-1], -1).transpose(1, 2).reshape(-1, part.shape[-1])


def _grouped(rows: Tensor, group: int) -> Tensor:
    """[groups, group] of [..., length], each row filled up with zeros."""
    return pad(rows, (0, -rows.shape[-1] % group)).reshape(-1, group)


def _each(grouped: Tensor, bits: int) -> Tensor | None:
    """A scale for each of [n, group] weights, [n] bfloat16; None where one has none."""
    if len(grouped) > _SAMPLE and _proven_scales(grouped[:_SAMPLE], bits) is None:
        return None
    return _proven_scales(grouped, bits)


def _proven_scales(grouped: Tensor, bits: int) -> Tensor | None:
    """For each group the first scale that gives every weight bit for bit.

    The largest weight a is the product of a scale and some k, rounded to eight bits or more: the scale is
    one of three bfloat16 numbers next to a / k.
    """
    words, largest = grouped.view(_WORDS[grouped.element_size()]), grouped.abs().amax(1).float()
    out = torch.zeros(len(grouped), dtype=torch.bfloat16)
    left = (words != 0).any(1).nonzero().flatten()
    if not bool(largest.isfinite().all()) or bool((largest[left] == 0).any()):
        return None  # -0.0 is no product
    grouped, words, largest = grouped[left], words[left], largest[left]
    for k in range(top_of(bits), 0, -1):
        for near in (0, -1, 1):
            if not len(left):
                return out
            scale = ((largest / k).bfloat16().view(torch.int16) + near).view(torch.bfloat16)
            good = _gives(grouped, words, scale, top_of(bits))
            out[left[good]] = scale[good]
            rest = ~good
            left, grouped, words, largest = left[rest], grouped[rest], words[rest], largest[rest]
    return None if len(left) else out


def _gives(grouped: Tensor, words: Tensor, scale: Tensor, top: int) -> Tensor:
    """Whether whole numbers times `scale` [n] are all of [n, group], bit for bit: [n] bool."""
    wide = scale.float()[:, None]
    steps = (grouped.float() / wide).round_().clamp_(-top, top)
    again = steps.mul_(wide).add_(0.0).to(grouped.dtype)  # -0.0 + 0.0 is 0.0, as a removed weight
    same = (again.view(words.dtype) == words).all(1)
    return same & (scale > 0) & scale.isfinite()
