"""Packing and unpacking, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from llmprune.kernels.packed import DTYPES, bitmap_shape, pack, packed_bytes, unpack

SHAPES = [(1, 1), (1, 40), (5, 1), (3, 7), (3, 8), (33, 41), (2, 5, 9), (64, 128)]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def sparse(shape: tuple[int, ...], dtype: torch.dtype, share: float = 0.5) -> Tensor:
    torch.manual_seed(len(shape) * 1000 + shape[-1])
    dense = torch.randn(shape).to(dtype)
    dense[torch.rand(shape) < share] = 0
    return dense


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_is_unpacked_is_what_was_packed(
    shape: tuple[int, ...], dtype: torch.dtype, share: float
) -> None:
    dense = sparse(shape, dtype, share)
    packed = pack(dense)
    assert torch.equal(bits(unpack(packed)), bits(dense))
    assert packed.bitmap.shape == bitmap_shape(shape)
    assert packed.bytes == packed_bytes(shape, int((dense != 0).sum()), dtype.itemsize)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_survives(dtype: torch.dtype) -> None:
    """All of bfloat16 and float16; of float32 the special ones, minus zero and NaN payloads among them."""
    if dtype.itemsize == 2:
        dense = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    else:
        special = [0, -(2**31), 0x7F800000, 0x7FC00001, 0x7F800001, -1, 1, 0x3F800000]
        dense = torch.tensor(special * 8, dtype=torch.int32).view(dtype)
    dense = dense.reshape(8, -1)
    assert torch.equal(bits(unpack(pack(dense))), bits(dense))


def test_the_bitmap_is_that_of_numpy() -> None:
    dense = sparse((33, 41), torch.float32)
    expected = np.packbits((dense != 0).numpy(), axis=-1, bitorder="little")
    assert np.array_equal(pack(dense).bitmap.numpy(), expected)


def test_a_zero_inside_the_mask_is_kept() -> None:
    dense = torch.tensor([[0.0, 1.0, 0.0]])
    packed = pack(dense, torch.tensor([[True, True, False]]))
    assert packed.values.tolist() == [0.0, 1.0]
    assert torch.equal(unpack(packed), dense)


def test_a_weight_outside_the_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="outside the mask"):
        pack(torch.ones(1, 2), torch.tensor([[True, False]]))


@pytest.mark.parametrize("dense", [torch.ones(3), torch.ones(2, 2, dtype=torch.float64)])
def test_what_cannot_be_packed_is_refused(dense: Tensor) -> None:
    with pytest.raises(ValueError, match="cannot pack"):
        pack(dense)
