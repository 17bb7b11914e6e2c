"""Device code of `s24_mma.s24_mma`, in Gluon. A file of its own: importing it imports triton.

Gluon, because it lets a kernel say which lane holds what: each of the 32 lanes holds 4 neighbours of the last
dimension in 4 registers, the order that the inline assembly counts on (`pack=4`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Arguments stay without types: Triton looks the names in annotations up as globals of the kernel,
# and refuses every one but its own.


@gluon.constexpr_function
def _mma(step, half):  # type: ignore[no-untyped-def]
    """Operands: sums 0-3 <- values 4-7, inputs 8-11, places 12-15, sums 16-19."""
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{half}.{half}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9, $10, $11}, {$16, $17, $18, $19}, "
        + f"${12 + step // 2}, {step % 2};"
    )


@gluon.constexpr_function
def _trade():  # type: ignore[no-untyped-def]
    """Two groups of inputs in natural order 4-7 -> halves of four groups 0-3.

    An even lane keeps the lower half of its groups and gives the upper half to its neighbour, which gives the
    lower.
    """
    return """{
        .reg .pred even;
        .reg .b32 lane, give0, give1, take0, take1;
        mov.u32 lane, %laneid;
        and.b32 lane, lane, 1;
        setp.eq.u32 even, lane, 0;
        selp.b32 give0, $5, $4, even;
        selp.b32 give1, $7, $6, even;
        shfl.sync.bfly.b32 take0, give0, 1, 0x1f, 0xffffffff;
        shfl.sync.bfly.b32 take1, give1, 1, 0x1f, 0xffffffff;
        selp.b32 $0, $4, take0, even;
        selp.b32 $1, $6, take1, even;
        selp.b32 $2, take0, $5, even;
        selp.b32 $3, take1, $7, even;
    }"""


@gluon.constexpr_function
def _only(layout, dim):  # type: ignore[no-untyped-def]
    """`layout` of five dimensions without all but `dim`."""
    for other in (4, 3, 2, 1, 0):
        if other != dim:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit  # type: ignore[untyped-decorator]
def _index(size: gl.constexpr, dim: gl.constexpr, layout: gl.constexpr):  # type: ignore[no-untyped-def]
    """0 to size - 1 along `dim`, and 1 along the other four dimensions."""
    index = gl.arange(0, size, layout=_only(layout, dim))
    for other in gl.static_range(5):
        if other != dim:
            index = gl.expand_dims(index, other)
    return index


@gluon.jit  # type: ignore[untyped-decorator]
def _load(at, live, ALL: gl.constexpr, other: gl.constexpr):  # type: ignore[no-untyped-def]
    """What lies at `at`; `other` where nothing does, unless all is live."""
    if ALL:
        return gl.load(at)
    else:
        return gl.load(at, mask=live, other=other)


@gluon.jit  # type: ignore[untyped-decorator]
def s24_kernel(  # type: ignore[no-untyped-def]
    words,  # int32 [tiles, chunks, 9, 32, 4]
    x,  # int32 [tokens, chunks * 128]: pairs of inputs
    bias,  # [rows], or anything without BIAS
    y,  # [tokens, out]; with PARTS float32 [split, tokens, rows]
    chunks,
    share,  # chunks that a program takes
    tokens,
    out,  # rows of the product; the matrix has twice as many with GATED: gate, then up
    WARPS: gl.constexpr,
    ACROSS: gl.constexpr,  # warps that take rows of their own, and the same columns; 1 with GATED
    TILES: gl.constexpr,  # of 16 rows for each warp: 2 with GATED
    EIGHTS: gl.constexpr,  # of tokens
    HALF: gl.constexpr,  # bf16 or f16
    ALL: gl.constexpr,  # every warp has a chunk each time
    BIAS: gl.constexpr,
    GATED: gl.constexpr,
    PARTS: gl.constexpr,
):
    """One program multiplies ACROSS * TILES * 16 rows by a share of the columns.

    Its warps take chunks in turn. Those with other rows take the same, and find the inputs in the L1 cache.
    """
    ALONG: gl.constexpr = WARPS // ACROSS
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
    at = words + (tile.to(gl.int64) * chunks + begin + warp) * 1152 + lane * 4 + word
    at_x = x + (token.to(gl.int64) * chunks + begin + warp) * 128 + lane % 4 * 4 + word
    sums = gl.zeros([ALONG, ACROSS * TILES, EIGHTS, 32, 4], gl.float32, L)
    for chunk in range(begin, end, ALONG):
        live = chunk + warp < end
        places = _load(at, live, ALL, 0x44444444)
        for step in gl.static_range(8):
            values = _load(at + (step + 1) * 128, live, ALL, 0)
            natural = _load(at_x + step * 16, live, ALL, 0)
            inputs = gl.inline_asm_elementwise(
                _trade(), "=&r,=&r,=&r,=&r,r,r,r,r", [natural], gl.int32, is_pure=True, pack=4
            )
            sums = gl.inline_asm_elementwise(
                _mma(step, HALF),
                "=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f",
                [values, inputs, places, sums],
                gl.float32,
                is_pure=True,
                pack=4,
            )
        at += ALONG * 1152
        at_x += ALONG * 128
    total = gl.expand_dims(gl.sum(sums, 0), 0)
    which = tile % 2 if GATED else tile * 0
    row = (tile // 2 if GATED else tile) * 16 + lane // 4 + 8 * (word // 2)
    column = eight * 8 + lane % 4 * 2 + word % 2  # a token
    inside = (row < out) & (column < tokens)
    if BIAS:
        total += gl.load(bias + which * out + row, mask=row < out, other=0).to(gl.float32)
    if PARTS:
        rows = out * 2 if GATED else out
        y += (gl.program_id(1).to(gl.int64) * tokens + column) * rows + which * out + row
    else:
        y += column.to(gl.int64) * out + row
        if GATED:
            gate = gl.expand_dims(gl.sum(gl.where(which == 0, total, 0.0), 1), 1)
            up = gl.expand_dims(gl.sum(gl.where(which == 1, total, 0.0), 1), 1)
            total = gate / (1 + gl.exp(-gate)) * up
            inside = inside & (which == 0)
    gl.store(y, total.to(y.dtype.element_ty), mask=inside)
