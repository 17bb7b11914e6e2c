# ruff: noqa: RUF005 (Triton knows no star in a tuple)
"""Device code of `bitmap.bitmap_gemv`. A file of its own: importing it imports triton."""

import triton
import triton.language as tl

# Arguments stay without types: Triton looks the names in annotations up as globals of the kernel,
# and refuses every one but its own.


@triton.jit
def _ones(word):  # type: ignore[no-untyped-def]
    """How many bits of an int32 are 1. Unsigned, so that compilers see a POPC in it."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def bitmap_kernel(  # type: ignore[no-untyped-def]
    words,  # int32 [rows, 8 * turns]: a bit for each column
    values,  # [kept] and a few more, row by row
    offsets,  # int32 or int64 [rows, turns]: where the values of a turn begin; anything with N
    x,  # [256 * turns, TILES * TOKENS]
    bias,  # [rows], or anything without BIAS
    y,  # [tokens, rows]; with a split float32 [split, tokens, rows]
    rows,
    turns,  # of 256 columns
    tokens,
    of_row,  # values of a row, with N
    split,  # programs for the same rows; no constant, for each would be compiled apart
    N: tl.constexpr,  # values of every 32 columns; 0: any number
    ROWS: tl.constexpr,  # that a lane goes through at once, with the same inputs
    TOKENS: tl.constexpr,  # 1, 2 or 4: what a lane reads of x at once
    TILES: tl.constexpr,  # 1, 2 or 4 of that
    WORDS: tl.constexpr,  # 1, 2, 4 or 8: of a row that a lane goes through at once
    WARPS: tl.constexpr,
    EVEN: tl.constexpr,  # every warp has a turn each time
    BIAS: tl.constexpr,
):
    """One program multiplies 4 * ROWS rows; its warps take turns of 256 columns of them.

    Eight lanes share a word, four of its bits each; a warp has words of four rows at once, ROWS times.
    """
    # One dimension for warps and lanes, and rows apart, leave the compiler one layout to choose.
    thread = tl.arange(0, WARPS * 32)
    lane = thread % 8
    block = tl.program_id(0).to(tl.int64) * (4 * ROWS)
    row = block + thread // 8 % 4
    lower = (1 << (4 * lane)) - 1  # the bits before those of a lane
    token = tl.arange(0, TOKENS)[None, :]
    sums = (tl.zeros([WARPS * 32, TOKENS], tl.float32),) * (ROWS * TILES)
    before = (tl.zeros([WARPS * 32], tl.int32 if N else offsets.dtype.element_ty),) * ROWS
    begin = tl.program_id(1) * WARPS
    most = tl.cdiv(turns - begin, WARPS * split)  # turns that a warp takes
    # One loop over parts of turns, not one loop in another; all of a turn at once compiles for half a minute.
    for step in range(most * (8 // WORDS)):
        turn = begin + step // (8 // WORDS) * (WARPS * split) + thread // 32
        first = step % (8 // WORDS) * WORDS
        live = turn < turns
        if not EVEN:
            turn = tl.minimum(turn, turns - 1)
        column = (turn * 256 + first * 32 + lane * 4).to(tl.int64)
        at_x = (x + column * (TILES * TOKENS))[:, None] + token
        for r in tl.static_range(ROWS):
            of = tl.minimum(row + 4 * r, rows - 1)  # rows behind the last are that once more
            if N:
                now = (turn * 8 + first) * N
            else:
                now = tl.where(first == 0, tl.load(offsets + of * turns + turn), before[r])
            before = before[:r] + (now,) + before[r + 1 :]
        for i in tl.static_range(WORDS):
            inputs = sums[:0]
            for j in tl.static_range(4):
                for tile in tl.static_range(TILES):
                    at = at_x + ((32 * i + j) * TILES + tile) * TOKENS
                    inputs = inputs + (tl.load(at).to(tl.float32),)
            for r in tl.static_range(ROWS):
                of = tl.minimum(row + 4 * r, rows - 1)
                word = tl.load(words + of * (turns * 8) + turn * 8 + first + i)
                if not EVEN:
                    word = tl.where(live, word, 0)
                at_value = values + of * of_row if N else values
                at_value += before[r] + _ones(word & lower)
                # The values of four bits are among the next four: each bit that is 1 uses one up.
                v0 = tl.load(at_value).to(tl.float32)
                v1 = tl.load(at_value + 1).to(tl.float32)
                v2 = tl.load(at_value + 2).to(tl.float32)
                v3 = tl.load(at_value + 3).to(tl.float32)
                four = word >> (4 * lane)
                for j in tl.static_range(4):
                    keep = (four & (1 << j)) != 0
                    for tile in tl.static_range(TILES):
                        more = sums[r * TILES + tile] + v0[:, None] * inputs[j * TILES + tile]
                        # Not times 0 where no weight is kept: v0 is then of another column, and may be NaN.
                        more = tl.where(keep[:, None], more, sums[r * TILES + tile])
                        sums = sums[: r * TILES + tile] + (more,) + sums[r * TILES + tile + 1 :]
                    v0 = tl.where(keep, v1, v0)
                    v1 = tl.where(keep, v2, v1)
                    v2 = tl.where(keep, v3, v2)
                after = before[r] + (N if N else _ones(word))
                before = before[:r] + (after,) + before[r + 1 :]
    y += tl.program_id(1).to(tl.int64) * tokens * rows
    for k in tl.static_range(ROWS * TILES):
        # Over the eight lanes of a word, and over the warps.
        whole = tl.sum(tl.sum(tl.reshape(sums[k], [WARPS, 4, 8, TOKENS]), 2), 0)
        of = block + 4 * (k // TILES) + tl.arange(0, 4)[:, None]
        if BIAS:
            whole += tl.load(bias + of, mask=of < rows, other=0).to(tl.float32)
        t = k % TILES * TOKENS + token
        inside = (of < rows) & (t < tokens)
        tl.store(y + t.to(tl.int64) * rows + of, whole.to(y.dtype.element_ty), mask=inside)
