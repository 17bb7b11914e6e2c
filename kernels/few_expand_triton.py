"""Device code of `few_expand`: dense matrices from whole numbers of few bits. Importing it imports triton."""

import triton
import triton.language as tl

from .expand_triton import _ones

# Arguments stay without types: Triton looks the names in annotations up as globals of the kernel,
# and refuses every one but its own.


@triton.jit  # type: ignore[untyped-decorator]
def _bits_of(product, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A finite float32, rounded once to `DTYPE` to the nearest, ties to even, as a whole number of its bits.

    To bfloat16 by arithmetic: Triton's interpreter would cut off.
    """
    word = product.to(tl.int32, bitcast=True)
    if DTYPE == "bf16":
        word = ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).to(tl.int16)
    elif DTYPE == "f16":
        word = product.to(tl.float16).to(tl.int16, bitcast=True)
    return word


@triton.jit  # type: ignore[untyped-decorator]
def few_kernel(  # type: ignore[no-untyped-def]
    bitmap,  # uint8 [rows, width]
    whole,  # int8 [kept], or uint8 [ceil(kept / 2)]
    scales,  # bfloat16 [rows, groups], or [groups, columns] with ALONG
    counts,  # int32 [rows]: bits of each row
    ends,  # int64 [rows]: bits of it and all rows before
    out,  # int16 or int32 [rows, columns]
    columns,
    width,
    kept,  # at least so many numbers are there
    groups,
    group,
    BITS: tl.constexpr,
    ALONG: tl.constexpr,  # groups lie along columns
    DTYPE: tl.constexpr,
    BYTES: tl.constexpr,
):
    """A program expands a row. What a damaged bitmap asks for behind the numbers is 0."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, 8)[None, :]
    first = tl.load(ends + row) - tl.load(counts + row)
    for start in range(0, width, BYTES):
        byte = start + tl.arange(0, BYTES)
        marks = tl.load(bitmap + row * width + byte, mask=byte < width, other=0).to(tl.int32)
        many = _ones(marks)
        before = first + tl.cumsum(many, 0) - many
        marks = marks[:, None]
        at = before[:, None] + _ones(marks & ((1 << place) - 1))
        is_kept = ((marks >> place) & 1 != 0) & (at < kept)
        column = byte[:, None] * 8 + place
        if BITS == 8:
            number = tl.load(whole + at, mask=is_kept, other=0).to(tl.int32)
        else:
            number = tl.load(whole + at // 2, mask=is_kept, other=0).to(tl.int32)
            number = (number >> (at % 2 * 4).to(tl.int32)) & 15
            number = (number ^ 8) - 8
        if ALONG:
            at_scale = scales + row // group * columns + column
        else:
            at_scale = scales + row * groups + column // group
        scale = tl.load(at_scale, mask=is_kept, other=0).to(tl.float32)
        word = _bits_of(number.to(tl.float32) * scale, DTYPE)
        tl.store(out + row * columns + column, word, mask=column < columns)
        first += tl.sum(many, 0)


@triton.jit  # type: ignore[untyped-decorator]
def bits_kernel(  # type: ignore[no-untyped-def]
    words,  # int32 [tiles, chunks, 1 + BITS / 2, 32, 4]
    scales,  # bfloat16 or float16 [tiles, pairs of spans, 8, 4]
    out,  # int64 [rows, columns / 4]
    rows,
    quads,
    chunks,
    BITS: tl.constexpr,
    SPAN: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """A program expands 16 rows x 256 columns of `s24_bits_layout`."""
    tile = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    row = tl.arange(0, 16)[:, None]
    group = tl.arange(0, 64)[None, :]
    half, step = row // 8, group // 8
    # of the eight groups of a step, as s24_layout deals them out to lanes and words
    a, b, c = group // 4 % 2, group // 2 % 2, group % 2
    base = words + (tile * chunks + chunk) * (128 * (1 + BITS // 2))
    lane = row % 8 * 4
    own = lane + 2 * c + a
    places = tl.load(base + (lane + 2 * (step % 2) + b) * 4 + step // 2)
    places = places >> (4 * (4 * half + 2 * c + a))
    if BITS == 8:
        pair = tl.load(base + (1 + step // 2) * 128 + own * 4 + step % 2 * 2 + b)
        size, sign = pair >> (8 * half), pair >> (15 - 8 * half)
        low = (size & 127) * (1 - 2 * (sign & 1))
        high = (size >> 16 & 127) * (1 - 2 * (sign >> 16 & 1))
    else:
        pair = tl.load(base + (1 + step // 4) * 128 + own * 4 + step % 4) >> (4 * (2 * b + half))
        low, high = (pair & 15) - 8, (pair >> 16 & 15) - 8
    if SPAN:
        span = group * 4 // SPAN
        at_scale = (tile * chunks + chunk) * (4096 // SPAN) + span // 2 * 32 + span % 2 * 2
    else:
        at_scale = tile * 32 + group * 0
    scale = tl.load(scales + at_scale + row % 8 * 4 + half).to(tl.float32)
    first = _bits_of(low.to(tl.float32) * scale, DTYPE).to(tl.int64) & 65535
    second = _bits_of(high.to(tl.float32) * scale, DTYPE).to(tl.int64) & 65535
    first = first << ((places & 3) * 16).to(tl.int64)
    second = second << ((places >> 2 & 3) * 16).to(tl.int64)
    quad = chunk * 64 + group
    inside = (tile * 16 + row < rows) & (quad < quads)
    tl.store(out + (tile * 16 + row) * quads + quad, first | second, mask=inside)
