"""Device code of `n8_mma.n8_mma`, in Gluon. A file of its own: importing it imports triton.

Each of the 32 lanes holds 4 neighbours of the last dimension in 4 registers, as in `s24_gluon`. How words
become weights: `_decode`; where they come from: `n8_layout`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from llmprune.kernels.s24_gluon import _index, _load

# Arguments stay without types: Triton looks the names in annotations up as globals of the kernel,
# and refuses every one but its own.


@gluon.constexpr_function
def _decode(step, n):  # type: ignore[no-untyped-def]
    """Operands: fragments 0-3 and 4-7 <- slabs of values 8-11 and 12-15, bits 16-19.

    Of four columns, bit j of each byte of a word says whether they are kept. Times 0x22222200 >> j the bits
    add up, for each column, how many are kept before it; two numbers of 4 bits for each column, which select
    the two bytes of its value. What is not kept selects a zero at 2:8 and 3:8, whose values leave room for
    one; at 4:8 it is masked.
    """
    word = [f"${8 + n * step % 4 + i}" for i in range(n)]
    lines = ["mov.b32 zero, 0"]
    for row in range(2):
        a, b = "zero", word[row]
        if n == 3:
            a, b = "a", word[2 * row]
            lines.append(
                f"shl.b32 a, {word[1]}, 16" if row else f"and.b32 a, {word[1]}, 0xffff0000"
            )
        if n == 4:
            a, b = word[2 * row], word[2 * row + 1]
        for half in range(2):
            bit = 4 * (step % 2) + 2 * row + half
            bits = f"${16 + step // 2}"
            factor, first = 0x22222200 >> bit, 0x10101010 + (4 - n) * 0x22222222  # from slot 0
            if half:  # from slot n - 1 downwards
                factor, first = 2**32 - factor, 0x76767676
            low, high = (f"${4 * half + row + 2 * i}" for i in range(2))
            lines += [
                f"shl.b32 top, {bits}, {7 - bit}",
                f"and.b32 take, {bits}, {0x01010101 << bit:#x}",
                f"mad.lo.u32 take, take, {factor:#x}, {first:#x}",
            ]
            if n == 4:
                lines += [
                    f"prmt.b32 {low}, {a}, {b}, take",
                    "shr.u32 take, take, 16",
                    f"prmt.b32 {high}, {a}, {b}, take",
                    "prmt.b32 take, top, zero, 0x9988",
                    f"and.b32 {low}, {low}, take",
                    "prmt.b32 take, top, zero, 0xbbaa",
                    f"and.b32 {high}, {high}, take",
                ]
            else:
                lines += [
                    "prmt.b32 top, top, zero, 0xba98",
                    "and.b32 take, take, top",
                    f"prmt.b32 {low}, {a}, {b}, take",
                    "shr.u32 take, take, 16",
                    f"prmt.b32 {high}, {a}, {b}, take",
                ]
    return "{ .reg .b32 zero, a, top, take; " + "; ".join(lines) + "; }"


@gluon.constexpr_function
def _mma(which, half):  # type: ignore[no-untyped-def]
    """Operands: sums 0-3 <- fragment 4-7, inputs 8-11, sums 12-15; `which` of the two of a step."""
    inputs = f"${8 + 2 * which}, ${9 + 2 * which}"
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{half}.{half}.f32 "
        f"{{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{{inputs}}}, {{$12, $13, $14, $15}};"
    )


@gluon.jit  # type: ignore[untyped-decorator]
def _multiply(weights, inputs, sums, WHICH: gl.constexpr, HALF: gl.constexpr):  # type: ignore[no-untyped-def]
    """The sums and one product of 16 rows, 16 columns and 8 tokens."""
    return gl.inline_asm_elementwise(
        _mma(WHICH, HALF),
        "=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f",
        [weights, inputs, sums],
        gl.float32,
        is_pure=True,
        pack=4,
    )


@gluon.jit  # type: ignore[untyped-decorator]
def n8_kernel(  # type: ignore[no-untyped-def]
    words,  # int32 [tiles, chunks, 1 + 2n, 32, 4]
    x,  # int32 [tokens, chunks * 128]: pairs of inputs
    bias,  # [rows], or anything without BIAS
    y,  # [tokens, rows]; with PARTS float32 [split, tokens, rows]
    chunks,
    share,  # chunks that a program takes
    tokens,
    rows,
    N: gl.constexpr,
    WARPS: gl.constexpr,
    ACROSS: gl.constexpr,  # warps that take rows of their own, and the same columns
    TILES: gl.constexpr,  # of 16 rows for each warp
    EIGHTS: gl.constexpr,  # of tokens
    HALF: gl.constexpr,  # bf16 or f16
    ALL: gl.constexpr,  # every warp has a chunk each time
    BIAS: gl.constexpr,
    PARTS: gl.constexpr,
):
    """One program multiplies ACROSS * TILES * 16 rows by a share of the columns.

    Its warps take chunks in turn. Those with other rows take the same, and find the inputs in the L1 cache.
    """
    ALONG: gl.constexpr = WARPS // ACROSS
    CHUNK: gl.constexpr = 128 * (1 + 2 * N)  # words
    L: gl.constexpr = gl.BlockedLayout(
        [1, TILES, EIGHTS, 1, 4], [1, 1, 1, 32, 1], [ALONG, ACROSS, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    warp = _index(ALONG, 0, L)
    tile = gl.program_id(0) * (ACROSS * TILES) + _index(ACROSS * TILES, 1, L)
    eight = _index(EIGHTS, 2, L)
    lane = _index(32, 3, L)
    word = _index(4, 4, L)
    # Behind the last token its inputs are read once more: that needs no mask, and the sums go nowhere.
    token = gl.minimum(eight * 8 + lane // 4, tokens - 1)
    begin = gl.program_id(1) * share
    end = gl.minimum(begin + share, chunks)
    at = words + (tile.to(gl.int64) * chunks + begin + warp) * CHUNK + lane * 4 + word
    at_x = x + (token.to(gl.int64) * chunks + begin + warp) * 128 + lane % 4 * 4 + word
    sums = gl.zeros([ALONG, ACROSS * TILES, EIGHTS, 32, 4], gl.float32, L)
    for chunk in range(begin, end, ALONG):
        live = chunk + warp < end
        bits = _load(at, live, ALL, 0)
        last = bits  # of no step yet
        for step in gl.static_range(8):
            # The n words of a step begin in one slab and may end in the next.
            slab = at + (step * N // 4 + 1) * 128
            first = _load(slab, live, ALL, 0) if step * N % 4 == 0 else last
            last = _load(slab + 128, live, ALL, 0) if step * N % 4 + N > 4 else first
            inputs = _load(at_x + step * 16, live, ALL, 0)
            left, right = gl.inline_asm_elementwise(
                _decode(step, N),
                "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r",
                [first, last, bits],
                (gl.int32, gl.int32),
                is_pure=True,
                pack=4,
            )
            sums = _multiply(left, inputs, sums, 0, HALF)
            sums = _multiply(right, inputs, sums, 1, HALF)
        at += ALONG * CHUNK
        at_x += ALONG * 128
    total = gl.expand_dims(gl.sum(sums, 0), 0)
    row = tile * 16 + lane // 4 + 8 * (word // 2)
    column = eight * 8 + lane % 4 * 2 + word % 2  # a token
    if BIAS:
        total += gl.load(bias + row, mask=row < rows, other=0).to(gl.float32)
    if PARTS:
        y += gl.program_id(1).to(gl.int64) * tokens * rows
    y += column.to(gl.int64) * rows + row
    gl.store(y, total.to(y.dtype.element_ty), mask=(row < rows) & (column < tokens))
