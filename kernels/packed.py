"""A matrix as its kept values and one bit per weight: what docs/format.md stores, in memory.

Plain torch, on any device; the truth that faster code is held against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Packed:
    """A packed tensor.

    Attributes:
        values: [kept] bfloat16, float16 or float32, row-major.
        bitmap: [..., rows, ceil(columns / 8)] uint8, least significant bit first; 1 is kept.
        shape: (..., rows, columns) of the dense tensor.
    """

    values: Tensor
    bitmap: Tensor
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What both tensors take."""
        return self.values.nbytes + self.bitmap.nbytes

    def to(self, device: torch.device | str) -> Packed:
        """The same on `device`."""
        return Packed(self.values.to(device), self.bitmap.to(device), self.shape)


def bitmap_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the bitmap of a dense tensor of shape [..., rows, columns]."""
    return (*shape[:-1], -(-shape[-1] // 8))


def packed_bytes(shape: Sequence[int], kept: int, itemsize: int) -> int:
    """Bytes of a packed tensor of which `kept` weights of `itemsize` bytes stay."""
    return kept * itemsize + math.prod(bitmap_shape(shape))


def nonzero_bits(dense: Tensor) -> Tensor:
    """Bool, True where a weight is anything but +0.0: minus zero and NaN are kept."""
    return dense.view(_BITS[dense.element_size()]) != 0


def pack(dense: Tensor, keep: Tensor | None = None) -> Packed:
    """Pack `dense` [..., rows, columns].

    Args:
        dense: bfloat16, float16 or float32, two dimensions or more.
        keep: bool, as `dense`: what to keep, zeros among it too; None keeps all that is not +0.0.

    Raises:
        ValueError: for another dtype or shape, or a weight outside `keep` that is not +0.0.
    """
    if dense.dtype not in DTYPES or dense.ndim < 2:
        raise ValueError(f"cannot pack {dense.dtype} of shape {list(dense.shape)}")
    dense = dense.detach().contiguous()
    bits = nonzero_bits(dense)
    if keep is not None:
        if bool((bits & ~keep).any()):
            raise ValueError("a weight outside the mask is not zero")
        bits = keep
    return Packed(dense[bits], pack_bits(bits), tuple(dense.shape))


def pack_bits(bits: Tensor) -> Tensor:
    """Bool [..., columns] as uint8 [..., ceil(columns / 8)], least significant bit first."""
    width = -(-bits.shape[-1] // 8)
    padded = torch.nn.functional.pad(bits, (0, 8 * width - bits.shape[-1]))
    place = torch.arange(8, dtype=torch.uint8, device=bits.device)
    eights = padded.to(torch.uint8).reshape(*bits.shape[:-1], width, 8) << place
    return eights.sum(dim=-1, dtype=torch.uint8)


def unpack_bits(bitmap: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_bits`: bool [..., columns]."""
    place = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    bits = (bitmap.unsqueeze(-1) >> place) & 1
    return bits.flatten(-2)[..., :columns].bool()


def unpack(packed: Packed) -> Tensor:
    """The dense tensor, bit for bit."""
    bits = unpack_bits(packed.bitmap, packed.shape[-1])
    dense = packed.values.new_zeros(packed.shape)
    dense[bits] = packed.values
    return dense
