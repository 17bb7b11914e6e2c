"""Device code of `gram`: one tile of X^T X for each program. Importing it imports triton."""

import triton
import triton.language as tl

# Arguments stay without types: Triton looks the names in annotations up as globals of the kernel,
# and refuses every one but its own.


@triton.jit  # type: ignore[untyped-decorator]
def gram_kernel(  # type: ignore[no-untyped-def]
    x,  # bfloat16, float16 or float32 [tokens, features], `step` from token to token
    sums,  # float32 [features, features], contiguous; added to on and above its diagonal
    tokens,
    features,
    step,
    I: tl.constexpr,  # rows of a tile  # noqa: E741
    J: tl.constexpr,  # columns
    T: tl.constexpr,  # tokens at a time
    TOGETHER: tl.constexpr,  # rows of tiles that are gone through column by column, for the L2 cache
    WIDEN: tl.constexpr,  # Triton's interpreter multiplies the bits of bfloat16
):
    """A program adds what all tokens give to one tile, in their order; equals `gram.add_reference`."""
    down, across = tl.cdiv(features, I), tl.cdiv(features, J)
    program = tl.program_id(0)
    band = program // (TOGETHER * across)
    height = tl.minimum(down - band * TOGETHER, TOGETHER)
    inside = program % (TOGETHER * across)
    i = (band * TOGETHER + inside % height) * I
    j = (inside // height) * J
    if j + J > i:  # else all of it is below the diagonal
        row, column = i + tl.arange(0, I), j + tl.arange(0, J)
        token = tl.arange(0, T)
        total = tl.zeros([I, J], tl.float32)
        left = x + token[:, None].to(tl.int64) * step + row[None, :]
        right = x + token[:, None].to(tl.int64) * step + column[None, :]
        for start in range(0, tokens, T):
            there = (token < tokens - start)[:, None]
            a = tl.load(left, mask=there & (row < features)[None, :], other=0.0)
            b = tl.load(right, mask=there & (column < features)[None, :], other=0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
            left += T * step
            right += T * step
        at = sums + row[:, None].to(tl.int64) * features + column[None, :]
        own = (row[:, None] <= column[None, :]) & (column < features)[None, :]
        tl.store(at, tl.load(at, mask=own, other=0.0) + total, mask=own)
