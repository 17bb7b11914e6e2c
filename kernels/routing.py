"""What is routed to experts, sorted by expert: the order in which a product over experts goes through it.

    ids [tokens, chosen] -> order int32 [routed], ends int32 [experts]

`order` lists what is routed (number r is choice r % chosen of token r // chosen) by its expert, and of one
expert as it came; `ends` says where each expert ends in it. What is routed to an expert that there is not
comes last. Sorting and counting by torch takes five launches, at one token about as long as the products
do; a kernel in plain Triton does it in one, each place found by counting all others.

State: equal to plain torch in Triton's interpreter, and compiles offline (tests/test_kernel_routing.py).
**It has not run on a GPU**; block sizes, and from how many on it sorts by torch, are guesses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import gpu
from .nm_gemv import on_device_of

MOST = 4096  # that are routed: counting takes their square; not measured
_BLOCK, _WIDE = 32, 128


def route(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """(order, ends), the quickest way that works where `ids` are. The host does not wait.

    Args:
        ids: int32 or int64 [...], the expert that each is routed to, from 0 on.
        experts: how many there are.
    """
    if 0 < ids.numel() <= MOST and unavailable(gpu.whole(ids.device)) is None:
        return by_triton(ids, experts)
    return route_reference(ids, experts)


def route_reference(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """What `route` equals, in plain torch."""
    found, order = ids.flatten().sort(stable=True)
    numbers = torch.arange(experts, dtype=found.dtype, device=ids.device)
    return order.int(), torch.searchsorted(found, numbers, right=True, out_int32=True)


def by_triton(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The same, in one launch."""
    from .routing_triton import route_kernel

    flat = ids.contiguous().view(-1)
    order = flat.new_empty(len(flat), dtype=torch.int32)
    ends = flat.new_empty(experts, dtype=torch.int32)
    programs = -(-len(flat) // _BLOCK) + -(-experts // _BLOCK)
    with on_device_of(flat):
        route_kernel[(programs,)](flat, order, ends, len(flat), experts, BLOCK=_BLOCK, WIDE=_WIDE)
    return order, ends


@gpu.once
def unavailable(device: torch.device) -> str | None:
    """Why Triton must not sort on `device`, in a few words, or None. Tries it once there."""
    if (why := gpu.missing(device)) is not None:
        return why
    return gpu.trial(device, _wrong)


def _wrong(device: torch.device) -> str | None:
    """The first of a few routings that is not that of plain torch."""
    random = torch.Generator().manual_seed(0)
    for tokens, chosen, experts in ((1, 8, 128), (70, 4, 33)):
        ids = torch.rand(tokens, experts, generator=random).argsort(1)[:, :chosen].to(device)
        pairs = zip(by_triton(ids, experts), route_reference(ids, experts), strict=True)
        if not all(torch.equal(one, other) for one, other in pairs):
            return f"{tokens} tokens to {chosen} of {experts}"
    return None
