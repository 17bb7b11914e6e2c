"""Device code of `expanding.from_n8`: the dense matrix of an `n8_layout`. Importing it imports triton.

Weights move as whole numbers, so that no NaN changes.
"""

import triton
import triton.language as tl

# Arguments stay without types: Triton looks the names in annotations up as globals of the kernel,
# and refuses every one but its own.


@triton.jit  # type: ignore[untyped-decorator]
def n8_kernel(words, out, rows, quads, chunks, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program expands 16 rows x 256 columns: words int32, out int64 [rows, columns / 4]."""
    tile = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    row = tl.arange(0, 16)[:, None]
    quad = tl.arange(0, 64)[None, :]  # four columns: a half of a group
    upper, step, half = row // 8, quad // 8, quad % 2
    base = words + (tile * chunks + chunk) * (128 * (1 + 2 * N))
    base += (row % 8 * 4 + quad // 2 % 4) * 4
    bits = tl.load(base + step // 2) >> (4 * (step % 2) + 2 * upper + half)
    number = tl.zeros([16, 64], tl.int64)
    before = tl.zeros([16, 64], tl.int32)
    for i in tl.static_range(4):
        kept = (bits >> (8 * i)) & 1
        # a damaged matrix may ask for a slot that no group has
        slot = tl.minimum(before, N - 1)
        slot = tl.where(half == 0, slot, N - 1 - slot)
        place = upper * N + slot
        if (
            N == 3
        ):  # slot 0 of both rows shares the middle word, the upper half is that of the lower row
            place = tl.where(slot == 0, 3 - upper, upper * 4 + slot - 1)
        place += step * (2 * N)
        at = (1 + place // 8) * 128 + place // 2 % 4
        value = tl.load(base + at, mask=kept != 0, other=0) >> (place % 2 * 16)
        number |= (value & 65535).to(tl.int64) << (16 * i)
        before += kept
    of_row = tile * 16 + row
    of_quad = chunk * 64 + quad
    tl.store(out + of_row * quads + of_quad, number, mask=(of_row < rows) & (of_quad < quads))
