"""Device code of `s24_bits.s24_bits`, in Gluon: as `s24_gluon`, but values come as whole numbers of few bits.

A step of the loop makes the four registers of values of `mma.sp` out of two words (8 bits) or one (4 bits): a
mask and a magic number give halves from 128 (bfloat16) or 1024 (float16) on, where numbers are 1 apart, and
fused multiplications take that offset away again and bring the scale in. So what is multiplied is exactly the
weight that whole number and scale stand for, their product rounded once.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .s24_gluon import _index, _load, _mma, _trade

# Arguments stay without types: Triton looks the names in annotations up as globals of the kernel,
# and refuses every one but its own.


@gluon.constexpr_function
def _offsets(half):  # type: ignore[no-untyped-def]
    """Scales 4-7, each in both halves of a word -> minus the offset of `_of_bytes` times them 0-3."""
    offset = "0xC300C300" if half == "bf16" else "0xE400E400"  # -128, -1024
    one = f"fma.rn.{half}x2 ${{}}, ${{}}, offset, zero;"  # sm_80 multiplies no bfloat16 otherwise
    return (
        "{ .reg .b32 offset, zero; "
        + f"mov.b32 offset, {offset}; mov.b32 zero, 0x80008000; "
        + " ".join(one.format(i, 4 + i) for i in range(4))
        + " }"
    )


@gluon.constexpr_function
def _of_bytes(part, span, half):  # type: ignore[no-untyped-def]
    """Words 4-7, scales 8-11, their offsets 12-15 -> the values of step `part` of the words 0-3.

    The sign goes to both: +-(128 + m) * scale -+ 128 * scale is +-m * scale, rounded once.
    """
    magic = "0x43004300" if half == "bf16" else "0x64006400"  # 128, 1024
    lines = ["{ .reg .b32 word, size, offset;"]
    for i in range(4):
        word = f"${4 + 2 * part + i // 2}"
        if i % 2:
            lines.append(f"prmt.b32 word, {word}, 0, 0x2301;")
        else:
            lines.append(f"mov.b32 word, {word};")
        scale = 2 * span + i % 2
        lines += [
            f"lop3.b32 size, word, 0x807f807f, {magic}, 0xea;",  # a & b | c
            f"lop3.b32 offset, word, 0x80008000, ${12 + scale}, 0x6a;",  # (a & b) ^ c
            f"fma.rn.{half}x2 ${i}, size, ${8 + scale}, offset;",
        ]
    return " ".join([*lines, "}"])


@gluon.constexpr_function
def _of_nibbles(part, span, half):  # type: ignore[no-untyped-def]
    """Words 4-7, scales 8-11 -> the values of step `part` of the words 0-3.

    The number is 8 more in the words: 136 off the half that has it, exactly, then times the scale.
    """
    magic, less, one = ("0x43004300", "0xC308C308", "0x3F803F80")
    if half == "f16":
        magic, less, one = ("0x64006400", "0xE408E408", "0x3C003C00")  # 1024, -1032, 1
    lines = ["{ .reg .b32 word, whole, less, one, zero;"]
    lines += [f"mov.b32 less, {less}; mov.b32 one, {one}; mov.b32 zero, 0x80008000;"]
    for i in range(4):
        lines += [
            f"shr.u32 word, ${4 + part}, {4 * i};",
            f"lop3.b32 whole, word, 0x000f000f, {magic}, 0xea;",  # a & b | c
            f"fma.rn.{half}x2 whole, whole, one, less;",
            f"fma.rn.{half}x2 ${i}, whole, ${8 + 2 * span + i % 2}, zero;",
        ]
    return " ".join([*lines, "}"])


@gluon.jit
def _twice(scales):  # type: ignore[no-untyped-def]
    """Words that hold a half of 16 bits twice."""
    low = scales.to(gl.int32) & 0xFFFF
    return low | (low << 16)


@gluon.jit  # type: ignore[untyped-decorator]
def _values(  # type: ignore[no-untyped-def]
    words,
    scales,
    offsets,
    BITS: gl.constexpr,
    part: gl.constexpr,
    span: gl.constexpr,
    HALF: gl.constexpr,
):
    """What `mma` takes: the values of one step."""
    if BITS == 8:
        return gl.inline_asm_elementwise(
            _of_bytes(part, span, HALF),
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r",
            [words, scales, offsets],
            gl.int32,
            is_pure=True,
            pack=4,
        )
    else:
        return gl.inline_asm_elementwise(
            _of_nibbles(part, span, HALF),
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r",
            [words, scales],
            gl.int32,
            is_pure=True,
            pack=4,
        )


@gluon.jit  # type: ignore[untyped-decorator]
def _offset(scales, HALF: gl.constexpr):  # type: ignore[no-untyped-def]
    """What takes the offset of numbers of 8 bits away."""
    return gl.inline_asm_elementwise(
        _offsets(HALF), "=&r,=&r,=&r,=&r,r,r,r,r", [scales], gl.int32, is_pure=True, pack=4
    )


@gluon.jit  # type: ignore[untyped-decorator]
def bits_kernel(  # type: ignore[no-untyped-def]
    words,  # int32 [tiles, chunks, 1 + BITS / 2, 32, 4]
    scales,  # int16 [tiles, pairs of spans, 8, 4]
    x,  # int32 [tokens, chunks * 128]: pairs of inputs
    bias,  # [rows], or anything without BIAS
    y,  # [tokens, rows]; with PARTS float32 [split, tokens, rows]
    chunks,
    share,  # chunks that a program takes
    tokens,
    rows,
    WARPS: gl.constexpr,
    ACROSS: gl.constexpr,  # warps that take rows of their own, and the same columns
    TILES: gl.constexpr,  # of 16 rows for each warp
    EIGHTS: gl.constexpr,  # of tokens
    BITS: gl.constexpr,  # 8 or 4
    SPAN: gl.constexpr,  # columns of a scale: 32, 64 or 128; 0 where a row has one
    HALF: gl.constexpr,  # bf16 or f16
    ALL: gl.constexpr,  # every warp has a chunk each time
    BIAS: gl.constexpr,
    PARTS: gl.constexpr,
):
    """One program multiplies ACROSS * TILES * 16 rows by a share of the columns."""
    ALONG: gl.constexpr = WARPS // ACROSS
    SLAB: gl.constexpr = 16 // BITS  # steps of a slab
    CHUNK: gl.constexpr = 128 * (1 + BITS // 2)  # words
    PAIR: gl.constexpr = SPAN // 16 if SPAN else 16  # steps of a pair of spans
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
    first = tile.to(gl.int64) * chunks + begin + warp
    at = words + first * CHUNK + lane * 4 + word
    at_x = x + (token.to(gl.int64) * chunks + begin + warp) * 128 + lane % 4 * 4 + word
    if SPAN:
        at_scale = scales + first * (4096 // SPAN) + lane // 4 * 4 + word
    else:
        scale = _twice(gl.load(scales + tile * 32 + lane // 4 * 4 + word))
        offset = _offset(scale, HALF)
    sums = gl.zeros([ALONG, ACROSS * TILES, EIGHTS, 32, 4], gl.float32, L)
    for chunk in range(begin, end, ALONG):
        live = chunk + warp < end
        places = _load(at, live, ALL, 0x44444444)
        for step in gl.static_range(8):
            if step % SLAB == 0:
                some = _load(at + (step // SLAB + 1) * 128, live, ALL, 0)
            if SPAN and step % PAIR == 0:
                scale = _twice(_load(at_scale + step // PAIR * 32, live, ALL, 0))
                offset = _offset(scale, HALF)
            values = _values(some, scale, offset, BITS, step % SLAB, step // (PAIR // 2) % 2, HALF)
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
        at += ALONG * CHUNK
        at_x += ALONG * 128
        if SPAN:
            at_scale += ALONG * (4096 // SPAN)
    total = gl.expand_dims(gl.sum(sums, 0), 0)
    row = tile * 16 + lane // 4 + 8 * (word // 2)
    column = eight * 8 + lane % 4 * 2 + word % 2  # a token
    if BIAS:
        total += gl.load(bias + row, mask=row < rows, other=0).to(gl.float32)
    if PARTS:
        y += (gl.program_id(1).to(gl.int64) * tokens + column) * rows + row
    else:
        y += column.to(gl.int64) * rows + row
    gl.store(y, total.to(y.dtype.element_ty), mask=(row < rows) & (column < tokens))
