"""Device code of `nm_gemv.nm_gemv`. A file of its own: importing it imports triton."""

import triton
import triton.language as tl

# Arguments stay without types: Triton looks the names in annotations up as globals of the kernel,
# and refuses every one but its own.


@triton.jit  # type: ignore[untyped-decorator]
def _pair(word, BFLOAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The lower and the upper 16 bits of an int32 as float32."""
    if BFLOAT:  # bfloat16 is the upper half of a float32
        low = (word << 16).to(tl.float32, bitcast=True)
        high = (word & -65536).to(tl.float32, bitcast=True)
    else:
        low = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit  # type: ignore[untyped-decorator]
def _load(at, inside, ALL: tl.constexpr):  # type: ignore[no-untyped-def]
    """What lies at `at`; 0 outside, unless all is inside."""
    if ALL:
        return tl.load(at)
    else:
        return tl.load(at, mask=inside, other=0)


@triton.jit  # type: ignore[untyped-decorator]
def gemv_kernel(  # type: ignore[no-untyped-def]
    words,  # int32 [row blocks, chunks, words of a chunk, 32]
    x,  # [columns, TILES * TOKENS]
    bias,  # [rows], or anything without BIAS
    y,  # [tokens, rows]; with SPLIT > 1 float32 [SPLIT, tokens, rows]
    rows,
    columns,
    chunks,
    tokens,
    N: tl.constexpr,
    M: tl.constexpr,
    BITS: tl.constexpr,  # of a place
    VALUES: tl.constexpr,  # of a row in a chunk
    TOKENS: tl.constexpr,  # 1, 2 or 4: what a lane reads of x at once
    TILES: tl.constexpr,  # 1 or 2 of that
    WARPS: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,  # every warp has a chunk each time, and the last chunk no padding
    BFLOAT: tl.constexpr,
    BIAS: tl.constexpr,
):
    """One program multiplies 32 rows, a lane each; its warps take chunks of columns in turn."""
    PER_WORD: tl.constexpr = 32 // BITS
    META: tl.constexpr = VALUES // PER_WORD
    WORDS: tl.constexpr = META + VALUES // 2
    COLUMNS: tl.constexpr = VALUES // N * M
    block = tl.program_id(0).to(tl.int64)
    # One dimension for warps and lanes leaves the compiler one layout to choose. Triton 3.6 lays two of them
    # across each other, and takes every value through shared memory.
    thread = tl.arange(0, WARPS * 32)
    token = tl.arange(0, TOKENS)[None, :]
    first = words + block * chunks * (WORDS * 32) + thread % 32
    acc = tl.zeros([WARPS * 32, TOKENS], tl.float32)
    more = tl.zeros([WARPS * 32, TOKENS], tl.float32)
    for start in range(tl.program_id(1) * WARPS, chunks, WARPS * SPLIT):
        chunk = start + thread // 32
        live = chunk < chunks
        at = first + chunk.to(tl.int64) * (WORDS * 32)
        base = chunk * COLUMNS
        at_base = x + base.to(tl.int64) * (TILES * TOKENS)
        for i in tl.static_range(META):
            places = _load(at + i * 32, live, EVEN)
            for j in tl.static_range(PER_WORD // 2):
                pair = _load(at + (META + i * (PER_WORD // 2) + j) * 32, live, EVEN)
                low, high = _pair(pair, BFLOAT)
                for half in tl.static_range(2):
                    group = (i * PER_WORD + 2 * j + half) // N
                    place = (places >> (BITS * (2 * j + half))) & ((1 << BITS) - 1)
                    # What is known when compiling comes last: it goes into the load itself.
                    at_x = (at_base + place * (TILES * TOKENS))[:, None] + token
                    at_x += group * M * (TILES * TOKENS)
                    value = (low if half == 0 else high)[:, None]
                    # A group is inside the matrix or outside: its first column tells for all.
                    inside = (base + group * M < columns)[:, None]
                    acc += value * _load(at_x, inside, EVEN).to(tl.float32)
                    if TILES == 2:
                        more += value * _load(at_x + TOKENS, inside, EVEN).to(tl.float32)
    row = block * 32 + tl.arange(0, 32)[:, None]
    shift = tl.zeros([32, 1], tl.float32)
    if BIAS:
        shift += tl.load(bias + row, mask=row < rows, other=0).to(tl.float32)
    y += tl.program_id(1).to(tl.int64) * tokens * rows
    for tile in tl.static_range(TILES):
        of_warps = tl.reshape(acc if tile == 0 else more, [WARPS, 32, TOKENS])
        total = tl.sum(of_warps, 0) + shift
        t = tile * TOKENS + tl.arange(0, TOKENS)[None, :]
        inside = (row < rows) & (t < tokens)
        tl.store(y + t.to(tl.int64) * rows + row, total.to(y.dtype.element_ty), mask=inside)
