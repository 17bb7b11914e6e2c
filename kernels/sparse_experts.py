"""The products of fused experts as one opaque operator, and what it is routed by.

torch.compile and autograd see a single operation, whatever form the matrices are held in. The gradient of the
inputs goes through the dense matrices, all experts at once; packed matrices in such a form are not trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmprune.kernels import routing
from llmprune.kernels.experts import find
from llmprune.kernels.product import grouped


def route(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """`routing.route`, opaque: (order, ends) of what is routed to `ids` [tokens, chosen]."""
    order, ends = torch.ops.llmprune.route_experts(ids, experts)
    return order, ends


def sparse_experts(
    x: Tensor,
    layout: Sequence[Tensor],
    order: Tensor,
    ends: Tensor,
    form: str,
    shape: Sequence[int],
    each: int,
    chosen: int,
) -> Tensor:
    """What is routed times the matrix of its expert: [inputs * each, out], in the dtype of the layout.

    Args:
        x: [inputs, in]; of another dtype it is cast, as transformers does before grouped_mm.
        layout: the matrices in the layout of `form`.
        order: int32 [inputs * each], of `route`.
        ends: int32 [experts], of `route`.
        form: name of a form of `llmprune.kernels.experts`.
        shape: (experts, out, in).
        each: how many experts a row of x goes to.
        chosen: how many experts a token was routed to.

    Raises:
        RuntimeError: for inputs that do not fit.
    """
    x = x.to(layout[0].dtype)
    out: Tensor = torch.ops.llmprune.sparse_experts(
        x, layout, order, ends, form, shape, each, chosen
    )
    return out


@torch.library.custom_op("llmprune::route_experts", mutates_args=())
def _route(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    return routing.route(ids, experts)


@_route.register_fake
def _(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    return ids.new_empty(ids.numel(), dtype=torch.int32), ids.new_empty(experts, dtype=torch.int32)


@torch.library.custom_op("llmprune::sparse_experts", mutates_args=())
def _experts(
    x: Tensor,
    layout: Sequence[Tensor],
    order: Tensor,
    ends: Tensor,
    form: str,
    shape: Sequence[int],
    each: int,
    chosen: int,
) -> Tensor:
    _check(x, order, shape, each)
    with torch.autocast(x.device.type, enabled=False):  # sums in float32 stay in float32
        return find(form).product(x.contiguous(), layout, order, ends, _three(shape), each, chosen)


@_experts.register_fake
def _(
    x: Tensor,
    layout: Sequence[Tensor],
    order: Tensor,
    ends: Tensor,
    form: str,
    shape: Sequence[int],
    each: int,
    chosen: int,
) -> Tensor:
    _check(x, order, shape, each)
    return x.new_empty(order.shape[0], shape[1])


def _check(x: Tensor, order: Tensor, shape: Sequence[int], each: int) -> None:
    if x.dim() != 2 or x.shape[1] != shape[2] or order.shape[0] != x.shape[0] * each:
        raise RuntimeError(
            f"inputs {list(x.shape)}, {each} times each, do not fit experts {list(shape)} and "
            f"{order.shape[0]} that are routed"
        )


def _three(shape: Sequence[int]) -> tuple[int, int, int]:
    experts, rows, columns = shape
    return experts, rows, columns


def _context(ctx: Any, inputs: Any, output: Tensor) -> None:
    _, layout, order, ends, ctx.form, ctx.shape, ctx.each, _ = inputs
    ctx.save_for_backward(order, ends, *layout)


def _backward(ctx: Any, gradient: Tensor) -> Any:
    order, ends, *layout = ctx.saved_tensors
    to_x = torch.ops.llmprune.sparse_experts_gradient(
        gradient, layout, order, ends, ctx.form, ctx.shape, ctx.each
    )
    return to_x, [None] * len(layout), None, None, None, None, None, None


_experts.register_autograd(_backward, setup_context=_context)


@torch.library.custom_op("llmprune::sparse_experts_gradient", mutates_args=())
def _gradient(
    gradient: Tensor,
    layout: Sequence[Tensor],
    order: Tensor,
    ends: Tensor,
    form: str,
    shape: Sequence[int],
    each: int,
) -> Tensor:
    """[inputs, in]: of all experts that an input went to."""
    with torch.autocast(gradient.device.type, enabled=False):
        dense = find(form).expanded(layout, _three(shape))
        every = grouped(gradient.contiguous(), dense.transpose(1, 2), order, ends, 1)
        return every.view(-1, each, shape[2]).sum(1)


@_gradient.register_fake
def _(
    gradient: Tensor,
    layout: Sequence[Tensor],
    order: Tensor,
    ends: Tensor,
    form: str,
    shape: Sequence[int],
    each: int,
) -> Tensor:
    return gradient.new_empty(gradient.shape[0] // each, shape[2])
