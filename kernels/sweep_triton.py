"""Device code of `sweep`: the columns of a block one after the other. Importing it imports triton.

A program has a few rows of the matrix to itself, all columns of the block on chip: a tile [BLOCK, ROWS], for
columns of the matrix lie in rows of memory. Each step takes one column out of the tile by a sum of it and
zeros, which is exact, and takes its error from the columns on its right.
"""

import triton
import triton.language as tl

# Arguments stay without types: Triton looks the names in annotations up as globals of the kernel,
# and refuses every one but its own.


@triton.jit
def _taken(tile, column, j):  # type: ignore[no-untyped-def]
    """Column `j` of a tile [BLOCK, ROWS]: [ROWS]."""
    return tl.sum(tl.where(column == j, tile, 0.0), axis=0)


@triton.jit
def _over(values, upper, width, j):  # type: ignore[no-untyped-def]
    """`values` [ROWS] over U_jj."""
    return tl.div_rn(values, tl.broadcast_to(tl.load(upper + j * (width + 1)), values.shape))


@triton.jit  # type: ignore[untyped-decorator]
def _lowest(  # type: ignore[no-untyped-def]
    tile,
    upper,
    width,
    first,
    DROP: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Which of the M weights from column `first` on are the DROP lowest, on a tie the left one: bool tile."""
    groups = tl.reshape(tile, [BLOCK // M, M, ROWS])
    mine = tl.arange(0, BLOCK // M)[:, None, None] == first // M
    own = tl.sum(tl.where(mine, groups, 0.0), axis=0)  # [M, ROWS]
    place = tl.arange(0, M)[:, None]
    diagonal = tl.load(upper + (first + place) * (width + 1))
    score = tl.div_rn(own, tl.broadcast_to(diagonal, own.shape))
    score = score * score
    before = tl.zeros([M, ROWS], tl.int32)
    for j in range(M):
        theirs = _taken(score, place, j)[None, :]
        before += ((theirs < score) | ((theirs == score) & (place > j))).to(tl.int32)
    return tl.reshape(mine & (before < DROP)[None, :, :], [BLOCK, ROWS])


@triton.jit  # type: ignore[untyped-decorator]
def prune_kernel(  # type: ignore[no-untyped-def]
    weights,  # float32 [width, rows], `step` from column to column; changed
    keep,  # uint8 [width, rows], likewise; written for n:m, read otherwise
    errors,  # float32 [width, rows], contiguous; written
    upper,  # float32 [width, width], contiguous
    width,
    rows,
    step,
    keep_step,
    DROP: tl.constexpr,  # of M neighbours; 0 where the mask stands
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Remove weights and update those to their right; equals `sweep.prune_reference`."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[None, :]
    column = tl.arange(0, BLOCK)[:, None]
    live = (column < width) & (row < rows)
    at = weights + column * step + row
    tile = tl.load(at, mask=live, other=0.0)
    if DROP:
        gone = tl.zeros([BLOCK, ROWS], tl.int1)
    else:
        gone = tl.load(keep + column * keep_step + row, mask=live, other=1) == 0
    for j in range(width):
        if DROP:  # noqa: SIM102 - one is decided when compiled, the other when run
            if j % M == 0:
                gone |= _lowest(tile, upper, width, j, DROP, M, BLOCK, ROWS)
        error = _taken(tl.where(gone, tile, 0.0), column, j)
        error *= tl.div_rn(1.0, tl.load(upper + j * (width + 1)))
        tl.store(errors + j * rows + row, error[None, :], mask=row < rows)
        right = (column > j) & (column < width)
        tile -= error[None, :] * tl.load(upper + j * width + column, mask=right, other=0.0)
    tl.store(at, tile, mask=live)
    if DROP:
        tl.store(keep + column * keep_step + row, (~gone).to(tl.uint8), mask=live)


@triton.jit  # type: ignore[untyped-decorator]
def round_kernel(  # type: ignore[no-untyped-def]
    weights,  # float32 [width, rows], `step` from column to column; changed
    keep,  # uint8 [width, rows], likewise
    scales,  # float32 [width, rows], contiguous
    errors,  # float32 [width, rows], contiguous; written
    upper,  # float32 [width, width], contiguous
    width,
    rows,
    step,
    keep_step,
    TOP: tl.constexpr,  # steps of the grid on either side of zero
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Round what is kept, and make up for it and for what is not; equals `sweep.round_reference`."""
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = own[None, :]
    column = tl.arange(0, BLOCK)[:, None]
    live = (column < width) & (row < rows)
    tile = tl.load(weights + column * step + row, mask=live, other=0.0)
    for j in range(width):
        value = _taken(tile, column, j)
        scale = tl.load(scales + j * rows + own, mask=own < rows, other=1.0)
        stays = tl.load(keep + j * keep_step + own, mask=own < rows, other=0) != 0
        steps = tl.div_rn(value, tl.maximum(scale, 1.1754943508222875e-38))
        steps = tl.minimum(tl.maximum(steps, -1.0 * TOP), 1.0 * TOP)
        steps = (
            steps + 12582912.0
        ) - 12582912.0  # 1.5 * 2^23: to the nearest, of two to the even one
        point = tl.where(stays, steps * scale + 0.0, 0.0)
        error = _over(value - point, upper, width, j)
        tl.store(weights + j * step + own, point, mask=own < rows)
        tl.store(errors + j * rows + own, error, mask=own < rows)
        right = (column > j) & (column < width)
        tile -= error[None, :] * tl.load(upper + j * width + column, mask=right, other=0.0)
