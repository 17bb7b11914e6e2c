"""Device code that adds up what the parts of a split matrix product left."""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def add_kernel(  # type: ignore[no-untyped-def]
    parts,  # float32 [SPLIT, tokens, rows]; rows are 2 * out with GATED
    bias,  # [rows], or anything without BIAS
    y,  # [tokens, out]
    out,
    step,  # tokens * rows
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of the parts, always in the same order, plus bias; GATED: silu(first half) * second."""
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < out
    rows = out * 2 if GATED else out
    at = parts + token * rows + column
    total = tl.zeros([BLOCK], tl.float32)
    for _ in tl.static_range(SPLIT):
        total += tl.load(at, mask=inside, other=0)
        at += step
    if BIAS:
        total += tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    if GATED:
        up = tl.zeros([BLOCK], tl.float32)
        at = parts + token * rows + out + column
        for _ in tl.static_range(SPLIT):
            up += tl.load(at, mask=inside, other=0)
            at += step
        if BIAS:
            up += tl.load(bias + out + column, mask=inside, other=0).to(tl.float32)
        total = total / (1 + tl.exp(-total)) * up
    tl.store(y + token * out + column, total.to(y.dtype.element_ty), mask=inside)
