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


@triton.jit
def _added(total, keep, weight, at):  # type: ignore[no-untyped-def]
    """The sums [rows, threads, tokens], and weight * x where a weight is kept.

    Not times 0 elsewhere: what is there is the weight of another column, which may be NaN.
    """
    x = tl.load(at).to(tl.float32)
    return tl.where(keep[:, :, None], total + weight[:, :, None] * x, total)


@triton.jit  # type: ignore[untyped-decorator]
def _store(  # type: ignore[no-untyped-def]
    total, y, bias, block, rows, tokens, TILE: tl.constexpr, WARPS: tl.constexpr, BIAS: tl.constexpr
):
    """Add up what the threads of a row have, over the eight lanes of a word and the warps."""
    ROWS: tl.constexpr = total.shape[0]
    TOKENS: tl.constexpr = total.shape[2]
    whole = tl.sum(tl.sum(tl.reshape(total, [ROWS, WARPS, 4, 8, TOKENS]), 3), 1)
    row = block + tl.arange(0, ROWS)[:, None, None] * 4 + tl.arange(0, 4)[None, :, None]
    if BIAS:
        whole += tl.load(bias + row, mask=row < rows, other=0).to(tl.float32)
    token = TILE * TOKENS + tl.arange(0, TOKENS)[None, None, :]
    at = y + token.to(tl.int64) * rows + row
    tl.store(at, whole.to(y.dtype.element_ty), mask=(row < rows) & (token < tokens))


@triton.jit  # type: ignore[untyped-decorator]
def bitmap_kernel(  # type: ignore[no-untyped-def]
    words,  # int32 [rows, 8 * turns]: a bit for each column
    values,  # [kept] and a few more, row by row
    offsets,  # int32 or int64 [rows, turns]: where the values of a turn begin; anything with N
    x,  # [256 * turns, TILES * TOKENS]
    bias,  # [rows], or anything without BIAS
    y,  # [tokens, rows]; with SPLIT > 1 float32 [SPLIT, tokens, rows]
    rows,
    turns,  # of 256 columns
    tokens,
    of_row,  # values of a row, with N
    N: tl.constexpr,  # values of every 32 columns; 0: any number
    ROWS: tl.constexpr,  # that a lane goes through at once, with the same inputs
    TOKENS: tl.constexpr,  # 1, 2 or 4: what a lane reads of x at once
    TILES: tl.constexpr,  # 1, 2 or 4 of that
    WARPS: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,  # every warp has a turn each time
    BIAS: tl.constexpr,
):
    """One program multiplies 4 * ROWS rows; its warps take turns of 256 columns of them.

    Eight lanes share a word, four of its bits each, and the warp has such words of four rows, ROWS times.
    """
    thread = tl.arange(0, WARPS * 32)[None, :]
    lane = thread % 8
    block = tl.program_id(0).to(tl.int64) * (4 * ROWS)
    # Rows behind the last are that once more.
    row = tl.minimum(block + tl.arange(0, ROWS)[:, None] * 4 + thread // 8 % 4, rows - 1)
    lower = (1 << (4 * lane)) - 1  # the bits before those of a lane
    token = tl.arange(0, TOKENS)[None, None, :]
    a = tl.zeros([ROWS, WARPS * 32, TOKENS], tl.float32)
    b = tl.zeros([ROWS, WARPS * 32, TOKENS], tl.float32)
    c = tl.zeros([ROWS, WARPS * 32, TOKENS], tl.float32)
    d = tl.zeros([ROWS, WARPS * 32, TOKENS], tl.float32)
    for start in range(tl.program_id(1) * WARPS, turns, WARPS * SPLIT):
        turn = start + thread // 32
        live = turn < turns
        if not EVEN:
            turn = tl.minimum(turn, turns - 1)
        at_word = words + row * (turns * 8) + turn * 8
        if N:
            before = turn * (8 * N)
            at_value = values + row * of_row
        else:
            before = tl.load(offsets + row * turns + turn)
            at_value = values
        column = (turn * 256 + lane * 4).to(tl.int64)
        at_x = (x + column * (TILES * TOKENS))[:, :, None] + token
        for i in tl.static_range(8):
            word = tl.load(at_word + i)
            if not EVEN:
                word = tl.where(live, word, 0)
            four = word >> (4 * lane)
            at = at_value + (before + _ones(word & lower))
            # The values of four bits are among the next four: each bit that is 1 uses one up.
            v0 = tl.load(at).to(tl.float32)
            v1 = tl.load(at + 1).to(tl.float32)
            v2 = tl.load(at + 2).to(tl.float32)
            v3 = tl.load(at + 3).to(tl.float32)
            for j in tl.static_range(4):
                keep = (four & (1 << j)) != 0
                here = at_x + (32 * i + j) * (TILES * TOKENS)
                a = _added(a, keep, v0, here)
                if TILES > 1:
                    b = _added(b, keep, v0, here + TOKENS)
                if TILES > 2:
                    c = _added(c, keep, v0, here + 2 * TOKENS)
                    d = _added(d, keep, v0, here + 3 * TOKENS)
                v0 = tl.where(keep, v1, v0)
                v1 = tl.where(keep, v2, v1)
                v2 = tl.where(keep, v3, v2)
            if N:
                before += N
            else:
                before += _ones(word)
    y += tl.program_id(1).to(tl.int64) * tokens * rows
    _store(a, y, bias, block, rows, tokens, 0, WARPS, BIAS)
    if TILES > 1:
        _store(b, y, bias, block, rows, tokens, 1, WARPS, BIAS)
    if TILES > 2:
        _store(c, y, bias, block, rows, tokens, 2, WARPS, BIAS)
        _store(d, y, bias, block, rows, tokens, 3, WARPS, BIAS)
