"""A dense linear layer as the packed matrix of one, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmprune.checkpoint.census import Axis
from llmprune.errors import ConfigError
from llmprune.kernels.packed import Packed, pack, unpack_bits
from llmprune.runtime.patterns import check_pattern, tightest


def pack_linear(
    linear: nn.Module, keep: Tensor | None, pattern: str | None
) -> tuple[Packed, nn.Parameter | None, str, Axis, bool]:
    """What `SparseLinear.from_packed` takes of an nn.Linear or a Conv1D.

    Args:
        linear: bfloat16, float16 or float32.
        keep: bool [out, in], or None; see `SparseLinear.from_linear`.
        pattern: `n:m` or `unstructured`; None finds the tightest that holds.

    Returns:
        The matrix as it is stored, the bias, the pattern, its axis, and whether it is stored [in, out].

    Raises:
        ConfigError: as `SparseLinear.from_linear`.
    """
    transposed = type(linear).__name__ == "Conv1D"
    if not (transposed or isinstance(linear, nn.Linear)):
        raise ConfigError(f"cannot pack {type(linear).__name__}; give an nn.Linear or a Conv1D")
    weight = linear.weight
    assert isinstance(weight, Tensor)
    keep = keep.T if keep is not None and transposed else keep
    if keep is not None and (keep.dtype != torch.bool or keep.shape != weight.shape):
        raise ConfigError(
            f"a mask is {keep.dtype} {list(keep.shape)} for weights {list(weight.shape)}; give "
            "bool [out, in]"
        )
    try:
        packed = pack(weight, keep)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    bits = unpack_bits(packed.bitmap, packed.shape[-1])
    axes: tuple[Axis, ...] = ("columns", "rows") if transposed else ("rows", "columns")
    held, axis = tightest(bits, axes) if pattern is None else check_pattern(bits, pattern, axes)
    bias = linear.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    return packed, bias, held, axis, transposed


def dense_linear(dense: Tensor, bias: nn.Parameter | None, transposed: bool) -> nn.Module:
    """An nn.Linear, or of a matrix stored [in, out] a Conv1D, that holds `dense` and `bias` themselves."""
    linear: Any
    rows, columns = dense.shape
    if transposed:
        from transformers.pytorch_utils import Conv1D

        linear = Conv1D(0, 0)
        linear.nf, linear.nx = columns, rows
    else:
        linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight, linear.bias = nn.Parameter(dense), bias
    made: nn.Module = linear
    return made
