"""Device code of `s24_experts.s24_experts`, in Gluon: `s24_gluon` for the matrices of many experts."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .s24_gluon import _index, _load, _mma, _trade

# Arguments stay without types: Triton looks the names in annotations up as globals of the kernel,
# and refuses every one but its own.


@gluon.jit  # type: ignore[untyped-decorator]
def _before(ends, experts, place, L: gl.constexpr):  # type: ignore[no-untyped-def]
    """How many of `ends` [experts], which do not decrease, are at most `place`."""
    many = 0
    which = _index(32, 3, L) * 4 + _index(4, 4, L)
    for start in range(0, experts, 128):
        end = gl.load(ends + start + which, mask=start + which < experts, other=2147483647)
        over = gl.where(end <= place, 1, 0)
        many += gl.sum(gl.sum(gl.sum(gl.sum(gl.sum(over, 4), 3), 2), 1), 0)
    return many


@gluon.jit  # type: ignore[untyped-decorator]
def experts_kernel(  # type: ignore[no-untyped-def]
    words,  # int32 [experts, tiles, chunks, 9, 32, 4]
    x,  # int32 [inputs, chunks * 128]: pairs of inputs
    order,  # int32 [routed]: what is routed, sorted by expert; number r is row r // each of x, row r of y
    ends,  # int32 [experts]: where in `order` each expert ends
    y,  # [routed, out]
    tiles,
    chunks,
    experts,
    each,
    out,  # rows of a matrix
    WARPS: gl.constexpr,
    ACROSS: gl.constexpr,  # warps that take rows of their own, and the same columns
    TILES: gl.constexpr,  # of 16 rows for each warp
    EIGHTS: gl.constexpr,  # of what is routed to an expert, at most
    HALF: gl.constexpr,  # bf16 or f16
    ALL: gl.constexpr,  # every warp has a chunk each time
    FEW: gl.constexpr,  # a program for each that is routed; else for each expert, and for what it leaves
):
    """One program multiplies ACROSS * TILES * 16 rows of an expert by up to EIGHTS * 8 of its inputs."""
    ALONG: gl.constexpr = WARPS // ACROSS
    AT_ONCE: gl.constexpr = EIGHTS * 8
    L: gl.constexpr = gl.BlockedLayout(
        [1, TILES, EIGHTS, 1, 4], [1, 1, 1, 32, 1], [ALONG, ACROSS, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    # From the first input of an expert on, each AT_ONCE are for one program. With FEW the first of them
    # names it. Else there is a program for each expert, which takes its first, and one for each multiple of
    # AT_ONCE: in the AT_ONCE places from there on, others can begin once, in the expert that is there.
    slot = gl.program_id(1)
    if FEW:
        place = slot
        expert = _before(ends, experts, place, L)
    else:
        place = (slot - experts + 1) * AT_ONCE
        expert = slot
        if slot >= experts:
            expert = _before(ends, experts, place, L)
    if expert < experts:
        begin = gl.load(ends + (expert - 1), mask=expert > 0, other=0)
        end = gl.load(ends + expert)
        first = begin + (place - begin + AT_ONCE - 1) // AT_ONCE * AT_ONCE
        if FEW:
            live = first == place
        else:
            live = (first < end) & (first > begin)
            if slot < experts:
                first = begin
                live = begin < end
        if live:
            here = words + expert.to(gl.int64) * tiles * chunks * 1152
            _multiply(
                here, x, order, y, chunks, each, out, first, end, L,
                ALONG, ACROSS, TILES, EIGHTS, HALF, ALL,
            )  # fmt: skip


@gluon.jit  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    words,  # of the expert
    x,
    order,
    y,
    chunks,
    each,
    out,
    first,  # in `order`
    end,
    L: gl.constexpr,
    ALONG: gl.constexpr,
    ACROSS: gl.constexpr,
    TILES: gl.constexpr,
    EIGHTS: gl.constexpr,
    HALF: gl.constexpr,
    ALL: gl.constexpr,
):
    """As `s24_kernel`, of inputs that `order` names."""
    warp = _index(ALONG, 0, L)
    tile = gl.program_id(0) * (ACROSS * TILES) + _index(ACROSS * TILES, 1, L)
    eight = _index(EIGHTS, 2, L)
    lane = _index(32, 3, L)
    word = _index(4, 4, L)
    # Behind the last its input is read once more: that needs no mask, and the sums go nowhere.
    token = gl.load(order + gl.minimum(first + eight * 8 + lane // 4, end - 1)) // each
    at = words + (tile.to(gl.int64) * chunks + warp) * 1152 + lane * 4 + word
    at_x = x + (token.to(gl.int64) * chunks + warp) * 128 + lane % 4 * 4 + word
    sums = gl.zeros([ALONG, ACROSS * TILES, EIGHTS, 32, 4], gl.float32, L)
    for chunk in range(0, chunks, ALONG):
        live = chunk + warp < chunks
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
    row = tile * 16 + lane // 4 + 8 * (word // 2)
    column = first + eight * 8 + lane % 4 * 2 + word % 2  # a place in `order`
    to = gl.load(order + column, mask=column < end, other=0)
    inside = (row < out) & (column < end)
    gl.store(y + to.to(gl.int64) * out + row, total.to(y.dtype.element_ty), mask=inside)
