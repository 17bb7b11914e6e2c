"""Device code of `nm_mask.nm_keep`. A file of its own: importing it imports triton."""

import triton
import triton.language as tl

# Arguments stay without types: Triton looks the names in annotations up as globals of the kernel,
# and refuses every one but its own.


@triton.jit  # type: ignore[untyped-decorator]
def keep_kernel(score, keep, groups, N: tl.constexpr, M: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program masks GROUPS groups of M neighbours; equals `nm_mask.nm_keep_reference`."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    column = tl.arange(0, M)[None, :]
    live = group < groups
    mine = tl.load(score + group * M + column, mask=live, other=0.0).to(tl.float32)
    before = tl.zeros([GROUPS, M], dtype=tl.int32)  # how many neighbours go before this weight
    for other in tl.static_range(M):
        # A group reads one address here, from a line that is in the cache; a reduction over the
        # tile would have to move values between lanes instead.
        theirs = tl.load(score + group * M + other, mask=live, other=0.0).to(tl.float32)
        before += ((theirs < mine) | ((theirs == mine) & (other < column))).to(tl.int32)
    tl.store(keep + group * M + column, before >= M - N, mask=live)
