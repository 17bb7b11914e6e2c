"""A product with a packed matrix as one opaque operator, which kernels plug into.

    y = x @ S.T + bias      S stored [out, in], as nn.Linear does
    y = x @ S + bias        S stored [in, out] (`transposed`), as GPT-2's Conv1D does

S is a matrix of which memory holds the kept values and one bit per weight (packed.py). torch.compile and
autograd see a single operation, whatever kernel does it. Its gradients: of x, by the same operation the
other way around; of the values, only if they require one, and at the kept positions only; of the bias.
x is kept for the backward only if the values are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmprune.kernels.choice import EXPAND, find
from llmprune.kernels.expand import values_gradient
from llmprune.kernels.expanding import dense_of
from llmprune.kernels.packed import Packed, select, unpack

CASTING = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)
)
"""Kinds of devices that know autocast. Asked here, once: torch.compile of torch 2.11 cannot trace that."""


def sparse_linear(
    x: Tensor,
    layout: Sequence[Tensor],
    bias: Tensor | None,
    kernel: str,
    shape: Sequence[int],
    transposed: bool = False,
) -> Tensor:
    """Inputs x [..., in] times a packed matrix, plus bias: [..., out] in the dtype of x.

    Under autocast, tensors are cast as those of F.linear are.

    Args:
        x: bfloat16, float16 or float32, with no to any number of leading dimensions.
        layout: the matrix in the layout of `kernel`; for `expand`, [values, bitmap].
        bias: [out], or None.
        kernel: name of a kernel of `llmprune.kernels.choice`.
        shape: (rows, columns) of the stored matrix.
        transposed: whether it is stored [in, out].

    Raises:
        RuntimeError: for inputs of another width, or another dtype than the weights', as F.linear does.
    """
    kind = x.device.type
    if kind in CASTING and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        if kernel != EXPAND.name and layout[0].dtype != dtype:  # words of a dtype cannot be cast
            dense = expanded_layout(layout, kernel, shape)
            return torch.nn.functional.linear(x, dense.T if transposed else dense, bias)
        x, bias = _cast(x, dtype), None if bias is None else _cast(bias, dtype)
        layout = [_cast(part, dtype) for part in layout]
    out: Tensor = torch.ops.llmprune.sparse_linear(x, layout, bias, kernel, shape, transposed)
    return out


def sparse_linear_reference(
    x: Tensor, packed: Packed, bias: Tensor | None, transposed: bool = False
) -> Tensor:
    """What every kernel equals: the dense matrix, multiplied."""
    dense = unpack(packed)
    return torch.nn.functional.linear(x, dense.T if transposed else dense, bias)


def expanded(values: Tensor, bitmap: Tensor, shape: Sequence[int]) -> Tensor:
    """The dense tensor [..., rows, columns], through which the values get their gradient."""
    dense: Tensor = torch.ops.llmprune.sparse_expand(values, bitmap, shape)
    return dense


def expanded_layout(layout: Sequence[Tensor], kernel: str, shape: Sequence[int]) -> Tensor:
    """The dense matrix of any kernel's layout, in new memory; it passes no gradient on.

    Args:
        layout: what `Kernel.prepare` gave.
        kernel: name of the kernel.
        shape: (rows, columns) of the matrix that was given to `prepare`.
    """
    dense: Tensor = torch.ops.llmprune.sparse_expand_layout(layout, kernel, shape)
    return dense


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast does: floating point but float64."""
    casts = tensor.is_floating_point() and tensor.dtype is not torch.float64
    return tensor.to(dtype) if casts else tensor


@torch.library.custom_op("llmprune::sparse_linear", mutates_args=())
def _linear(
    x: Tensor,
    layout: Sequence[Tensor],
    bias: Tensor | None,
    kernel: str,
    shape: Sequence[int],
    transposed: bool,
) -> Tensor:
    out = _out_shape(x, layout, bias, kernel, shape, transposed)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    with torch.autocast(x.device.type, enabled=False):  # sums in float32 stay in float32
        product = find(kernel).matmul(flat, layout, bias, shape, transposed)
    # a plain view would forbid what models do to the output of a linear layer: `out.add_(residual)`
    given: Tensor = torch.ops.aten._unsafe_view(product, out)
    return given


@_linear.register_fake
def _(
    x: Tensor,
    layout: Sequence[Tensor],
    bias: Tensor | None,
    kernel: str,
    shape: Sequence[int],
    transposed: bool,
) -> Tensor:
    return x.new_empty(_out_shape(x, layout, bias, kernel, shape, transposed))


def _out_shape(
    x: Tensor,
    layout: Sequence[Tensor],
    bias: Tensor | None,
    kernel: str,
    shape: Sequence[int],
    transposed: bool,
) -> list[int]:
    """[..., out], once the operands are known to fit."""
    rows, columns = shape
    features, out = (rows, columns) if transposed else (columns, rows)
    if x.dim() == 0 or x.shape[-1] != features:
        raise RuntimeError(f"inputs of shape {list(x.shape)} do not end in the {features} expected")
    values = layout[0]
    for other in (values, bias):
        if other is not None and other.dtype != x.dtype:
            raise RuntimeError(f"inputs are {x.dtype}, but weights or bias {other.dtype}")
    if bias is not None and tuple(bias.shape) != (out,):
        raise RuntimeError(f"a bias of shape {list(bias.shape)} does not fit {out} outputs")
    return [*x.shape[:-1], out]


def _linear_context(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, layout, bias, ctx.kernel, ctx.shape, ctx.transposed = inputs
    ctx.trains = layout[0].requires_grad
    ctx.biased = bias is not None and bias.requires_grad
    ctx.save_for_backward(x if ctx.trains else None, *layout)


def _linear_backward(ctx: Any, gradient: Tensor) -> Any:
    x, *layout = ctx.saved_tensors
    kernel, shape, transposed = ctx.kernel, ctx.shape, ctx.transposed
    to_x = to_bias = None
    to_layout: list[Tensor | None] = [None] * len(layout)
    if ctx.needs_input_grad[0]:
        to_x = torch.ops.llmprune.sparse_linear(
            gradient, layout, None, kernel, shape, not transposed
        )
    if ctx.trains:
        to_layout[0] = torch.ops.llmprune.sparse_values_gradient(
            gradient, x, layout, shape, transposed
        )
    if ctx.biased:
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return to_x, to_layout, to_bias, None, None, None


_linear.register_autograd(_linear_backward, setup_context=_linear_context)


@torch.library.custom_op("llmprune::sparse_values_gradient", mutates_args=())
def _values_gradient(
    gradient: Tensor, x: Tensor, layout: Sequence[Tensor], shape: Sequence[int], transposed: bool
) -> Tensor:
    """[kept]: of the storage form alone, which is what layers hold whose values are trained."""
    gradient = gradient.reshape(-1, gradient.shape[-1])
    x = x.reshape(-1, x.shape[-1])
    left, right = (x, gradient) if transposed else (gradient, x)
    with torch.autocast(x.device.type, enabled=False):
        return values_gradient(left, right, EXPAND.packed(layout, shape))


@_values_gradient.register_fake
def _(
    gradient: Tensor, x: Tensor, layout: Sequence[Tensor], shape: Sequence[int], transposed: bool
) -> Tensor:
    return torch.empty_like(layout[0])


@torch.library.custom_op("llmprune::sparse_expand", mutates_args=())
def _expand(values: Tensor, bitmap: Tensor, shape: Sequence[int]) -> Tensor:
    packed = Packed(values, bitmap, tuple(shape))
    if values.device.type == "cpu" or len(shape) != 2:
        return unpack(packed)
    return dense_of(
        packed
    )  # without the host waiting, to check what was checked when it was loaded


@_expand.register_fake
def _(values: Tensor, bitmap: Tensor, shape: Sequence[int]) -> Tensor:
    return values.new_empty(shape)


@torch.library.custom_op("llmprune::sparse_expand_layout", mutates_args=())
def _expand_layout(layout: Sequence[Tensor], kernel: str, shape: Sequence[int]) -> Tensor:
    return find(kernel).expanded(layout, shape)


@_expand_layout.register_fake
def _(layout: Sequence[Tensor], kernel: str, shape: Sequence[int]) -> Tensor:
    return layout[0].new_empty(shape)


@torch.library.custom_op("llmprune::sparse_gather", mutates_args=())
def _gather(dense: Tensor, values: Tensor, bitmap: Tensor) -> Tensor:
    """The weights of `dense` at kept positions, as `values` [kept], which is read for its length."""
    return select(dense, bitmap)


@_gather.register_fake
def _(dense: Tensor, values: Tensor, bitmap: Tensor) -> Tensor:
    return values.new_empty(values.shape, dtype=dense.dtype)


def _expand_context(ctx: Any, inputs: Any, output: Tensor) -> None:
    values, bitmap, _ = inputs
    ctx.save_for_backward(values, bitmap)


def _expand_backward(ctx: Any, gradient: Tensor) -> Any:
    return torch.ops.llmprune.sparse_gather(gradient, *ctx.saved_tensors), None, None


_expand.register_autograd(_expand_backward, setup_context=_expand_context)
