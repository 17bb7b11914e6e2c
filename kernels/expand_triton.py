"""Device code of `expanding`: dense matrices from what layers hold. Importing it imports triton.

Weights move as whole numbers, so that no NaN changes.
"""

import triton
import triton.language as tl

# Arguments stay without types: Triton looks the names in annotations up as globals of the kernel,
# and refuses every one but its own.


@triton.jit
def _ones(byte):  # type: ignore[no-untyped-def]
    """How many of the lower eight bits of an int32 are 1."""
    byte = byte - ((byte >> 1) & 0x55)
    byte = (byte & 0x33) + ((byte >> 2) & 0x33)
    return (byte + (byte >> 4)) & 0x0F


@triton.jit  # type: ignore[untyped-decorator]
def count_kernel(bitmap, counts, width, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program counts the bits of a row: bitmap uint8 [rows, width], counts int32 [rows]."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BYTES], tl.int32)
    for start in range(0, width, BYTES):
        byte = start + tl.arange(0, BYTES)
        total += _ones(
            tl.load(bitmap + row * width + byte, mask=byte < width, other=0).to(tl.int32)
        )
    tl.store(counts + row, tl.sum(total, 0))


@triton.jit  # type: ignore[untyped-decorator]
def bitmap_kernel(  # type: ignore[no-untyped-def]
    bitmap,  # uint8 [rows, width]
    values,  # int16, int32 or int64 [kept]
    counts,  # int32 [rows]: bits of each row
    ends,  # int64 [rows]: bits of it and all rows before
    out,  # as values [rows, columns]
    columns,
    width,
    kept,
    BYTES: tl.constexpr,
):
    """A program expands a row. What a damaged bitmap asks for behind the values is 0."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, 8)[None, :]
    first = tl.load(ends + row) - tl.load(counts + row)
    for start in range(0, width, BYTES):
        byte = start + tl.arange(0, BYTES)
        bits = tl.load(bitmap + row * width + byte, mask=byte < width, other=0).to(tl.int32)
        many = _ones(bits)
        before = first + tl.cumsum(many, 0) - many
        bits = bits[:, None]
        at = before[:, None] + _ones(bits & ((1 << place) - 1))
        is_kept = ((bits >> place) & 1 != 0) & (at < kept)
        column = byte[:, None] * 8 + place
        value = tl.load(values + at, mask=is_kept, other=0)
        tl.store(out + row * columns + column, value, mask=column < columns)
        first += tl.sum(many, 0)


@triton.jit
def s24_kernel(words, out, rows, quads, chunks):  # type: ignore[no-untyped-def]
    """A program expands 16 rows x 256 columns of `s24_layout`: words int32, out int64 [rows, columns / 4]."""
    tile = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    row = tl.arange(0, 16)[:, None]
    group = tl.arange(0, 64)[None, :]
    half, step = row // 8, group // 8
    # of the eight groups of a step, as s24_layout deals them out to lanes and words
    a, b, c = group // 4 % 2, group // 2 % 2, group % 2
    base = words + (tile * chunks + chunk) * 1152
    lane = row % 8 * 4
    pair = tl.load(base + (step + 1) * 128 + (lane + 2 * c + a) * 4 + 2 * b + half)
    places = tl.load(base + (lane + 2 * (step % 2) + b) * 4 + step // 2)
    places = places >> (4 * (4 * half + 2 * c + a))
    low = (pair & 65535).to(tl.int64) << ((places & 3) * 16).to(tl.int64)
    high = ((pair >> 16) & 65535).to(tl.int64) << ((places >> 2 & 3) * 16).to(tl.int64)
    quad = chunk * 64 + group
    inside = (tile * 16 + row < rows) & (quad < quads)
    tl.store(out + (tile * 16 + row) * quads + quad, low | high, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def gemv_kernel(  # type: ignore[no-untyped-def]
    words,  # int32 [row blocks, chunks, words of a chunk, 32]
    out,  # [rows, units]; a unit is int32, two weights, at m of 2, else int64, four
    rows,
    units,
    chunks,
    N: tl.constexpr,
    M: tl.constexpr,
    BITS: tl.constexpr,  # of a place
    VALUES: tl.constexpr,  # of a row in a chunk
    UNITS: tl.constexpr,
):
    """A program expands 32 rows x UNITS units of `gemv_layout`."""
    UNIT: tl.constexpr = 2 if M == 2 else 4
    PER_WORD: tl.constexpr = 32 // BITS
    META: tl.constexpr = VALUES // PER_WORD
    WORDS: tl.constexpr = META + VALUES // 2
    OF_CHUNK: tl.constexpr = VALUES // N * M // UNIT
    block = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 32)[:, None]
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)[None, :]
    group = unit % OF_CHUNK // (M // UNIT)
    part = unit % (M // UNIT)
    at = words + (block * chunks + unit // OF_CHUNK) * (WORDS * 32) + lane
    live = (unit < units) & (lane >= 0)
    word = tl.zeros([32, UNITS], out.dtype.element_ty)
    for i in tl.static_range(N):
        slot = group * N + i
        place = tl.load(at + slot // PER_WORD * 32, mask=live, other=0)
        place = (place >> (slot % PER_WORD * BITS)) & ((1 << BITS) - 1)
        value = tl.load(at + (META + slot // 2) * 32, mask=live, other=0)
        value = ((value >> (slot % 2 * 16)) & 65535).to(word.dtype)
        moved = value << (place % UNIT * 16).to(word.dtype)
        word |= tl.where(place // UNIT == part, moved, 0)
    row = block * 32 + lane
    tl.store(out + row * units + unit, word, mask=(row < rows) & live)
