"""Device code of `routing.route`. A file of its own: importing it imports triton."""

import triton
import triton.language as tl

# Arguments stay without types: Triton looks the names in annotations up as globals of the kernel,
# and refuses every one but its own.


@triton.jit  # type: ignore[untyped-decorator]
def route_kernel(  # type: ignore[no-untyped-def]
    ids,  # int32 or int64 [routed]
    order,  # int32 [routed]
    ends,  # int32 [experts]
    routed,
    experts,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A program counts what comes before BLOCK that are routed, or before the ends of BLOCK experts."""
    sorting = tl.cdiv(routed, BLOCK)
    program = tl.program_id(0)
    mine = program * BLOCK + tl.arange(0, BLOCK)
    expert = (program - sorting) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(ids + mine, mask=mine < routed, other=0).to(tl.int64)
    if program >= sorting:
        own = expert.to(tl.int64)
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, routed, WIDE):
        other = start + tl.arange(0, WIDE)
        inside = other < routed
        their = tl.load(ids + other, mask=inside, other=0).to(tl.int64)
        first = their[None, :] < own[:, None]
        # of one expert, those before; of an expert's end, all of its own
        ahead = (other[None, :] < mine[:, None]) | (program >= sorting)
        first = first | ((their[None, :] == own[:, None]) & ahead)
        before += tl.sum((first & inside[None, :]).to(tl.int32), 1)
    if program < sorting:
        tl.store(order + before, mine, mask=mine < routed)
    else:
        tl.store(ends + expert, before, mask=expert < experts)
