"""The 2:4 matrices of many experts, each times the inputs that are routed to it, in one launch.

`s24_mma` for fused experts: the matrices lie one behind the other, each as `s24_layout` has it. What is
routed is sorted by expert; a program takes some rows of one expert and up to 8, 16, 32 or 64 of its inputs,
so that an expert to which few are routed is read once, and one to which nothing is, not at all. Which
expert a program has it finds in the ends of the experts, on the GPU: the host does not wait, and a CUDA
graph may record the launch.

    routed r: row `r // each` of x times the matrix of its expert -> row r of y

`order` lists what is routed, sorted by expert, and `ends` says where each expert ends in that list
(`routing`), as `offs` does for torch's `grouped_mm`; inputs are read, and outputs written, where they are.

State: as of `s24_mma`, whose device functions it uses. The source of the kernel gives the products of
float64 when an emulator of the instructions runs it on a CPU (tests/test_kernel_s24_experts.py); it
compiles for sm_80, 89, 90 and 100, with neither spills nor shared memory in the loop. **It has not run on a
GPU.** Its speed is unknown; warps, and how many inputs a program takes, are guesses.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from . import gpu, s24_mma
from .nm_gemv import on_device_of
from .packed import Packed, count, pack, select, unpack, unpack_bits
from .routing import route_reference
from .s24_layout import COLUMNS, ROWS, TILES, S24Layout, dense_s24, pack_s24
from .sharing import WARPS, across
from .slots import row_blocks

REVISION = 1  # to be raised with each change of speed: what was measured before is then void
_EIGHTS = (1, 2, 4, 8)  # of inputs that a program takes


@dataclass(frozen=True)
class ExpertsLayout:
    """The matrices of all experts.

    Attributes:
        words: int32 [experts, tiles of 16 rows, chunks of 256 columns, 9, 32, 4]; of each expert what
            `S24Layout` holds of a matrix.
        shape: (experts, rows, columns) of the dense matrices.
        dtype: bfloat16 or float16.
    """

    words: Tensor
    shape: tuple[int, int, int]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """What it takes."""
        return self.words.nbytes

    @property
    def tall(self) -> S24Layout:
        """All of them as one matrix, of each expert the rows that fill up its tiles, too."""
        experts, tiles = self.words.shape[:2]
        shape = experts * tiles * ROWS, self.shape[2]
        return S24Layout(self.words.flatten(0, 1), shape, self.dtype)


def pack_experts(packed: Packed, transposed: bool = False) -> ExpertsLayout:
    """The layout of matrices that keep at most 2 of every 4 neighbours along the inputs; on their own device.

    Args:
        packed: [experts, out, in], bfloat16 or float16.
        transposed: whether they are stored [experts, in, out] instead.

    Raises:
        ValueError: for another dtype or number of dimensions, or matrices that are not 2:4.
    """
    if len(packed.shape) != 3:
        raise ValueError(f"s24_experts takes [experts, rows, columns], got {list(packed.shape)}")
    if packed.values.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"s24_experts takes bfloat16 or float16, got {packed.values.dtype}")
    experts, *stored = packed.shape
    rows, columns = stored[::-1] if transposed else stored
    tiles = -(-rows // (ROWS * TILES)) * TILES
    shape = (experts, tiles, -(-columns // COLUMNS), 9, 32, 4)
    words = torch.empty(shape, dtype=torch.int32, device=packed.values.device)
    ends = list(accumulate((count(bits) for bits in packed.bitmap), initial=0))
    blocks = row_blocks(experts, rows * columns, 1)
    for first in blocks:
        last = min(first + blocks.step, experts)
        values, bitmap = packed.values[ends[first] : ends[last]], packed.bitmap[first:last]
        part = unpack(Packed(values, bitmap, (last - first, *stored)))
        tall = [
            _tall(each, tiles * ROWS, transposed) for each in (part, unpack_bits(bitmap, stored[1]))
        ]
        words[first:last] = pack_s24(pack(*tall)).words.view(last - first, *shape[1:])
    return ExpertsLayout(words, (experts, rows, columns), packed.values.dtype)


def unpack_experts(
    layout: ExpertsLayout, bitmap: Tensor | None = None, transposed: bool = False
) -> Packed:
    """The inverse, bit for bit.

    Args:
        layout: what `pack_experts` gave.
        bitmap: what was kept there, for matrices that keep zeros; None is all that is not +0.0.
        transposed: as it was told.
    """
    experts, rows, columns = layout.shape
    blocks, parts = row_blocks(experts, rows * columns, 1), list[Packed]()
    for first in blocks:
        words = layout.words[first : first + blocks.step]
        part = ExpertsLayout(words, (len(words), rows, columns), layout.dtype)
        dense = dense_s24(part.tall)[0].view(len(words), -1, columns)[:, :rows]
        dense = (dense.transpose(1, 2) if transposed else dense).contiguous()
        if bitmap is None:
            parts.append(pack(dense))
        else:
            bits = bitmap[first : first + blocks.step]
            parts.append(Packed(select(dense, bits), bits, tuple(dense.shape)))
    shape = (experts, columns, rows) if transposed else layout.shape
    values = torch.cat([part.values for part in parts])
    return Packed(values, torch.cat([part.bitmap for part in parts]), shape)


def _tall(part: Tensor, rows: int, transposed: bool) -> Tensor:
    """Matrices [experts, ...] as one, of each so many rows."""
    part = part.transpose(1, 2) if transposed else part
    return torch.nn.functional.pad(part, (0, 0, 0, rows - part.shape[1])).flatten(0, 1)


def s24_experts(
    x: Tensor,  # [inputs, columns], dtype of the layout
    layout: ExpertsLayout,
    order: Tensor,  # int32 [inputs * each]
    ends: Tensor,  # int32 [experts]
    each: int = 1,
    *,
    warps: int | None = None,
    eights: int | None = None,
) -> Tensor:
    """What is routed times the matrix of its expert, [inputs * each, rows]; equals `s24_experts_reference`.

    Needs CUDA tensors on a device that `unavailable` finds nothing against.

    Args:
        x: activations.
        layout: the weights.
        order: what is routed, sorted by expert; number r is row r // each of x, and row r of the product.
        ends: where in `order` each expert ends; what lies behind the last is left unwritten.
        each: to how many experts a row of x goes.
        warps: of a program, a power of two; None is the default.
        eights: how many times eight inputs a program takes, 1, 2, 4 or 8; None chooses by their number.

    Raises:
        ValueError: for tensors that do not fit each other.
    """
    _check_call(x, layout, order, ends, each)
    from .experts_gluon import experts_kernel

    experts, tiles, chunks = layout.words.shape[:3]
    routed, rows = len(order), layout.shape[1]
    y = x.new_empty((routed, rows))
    if not routed:
        return y
    warps, eights = (
        warps or (WARPS if chunks > WARPS // 2 else WARPS // 2),
        eights or _eights(routed, experts),
    )
    beside = across(eights, warps, tiles)
    left = (routed - 1) // (8 * eights)  # at most so many programs for what others leave
    with on_device_of(x):
        experts_kernel[(tiles // (TILES * beside), min(routed, experts + left))](
            layout.words,
            s24_mma.words_of(x, chunks * COLUMNS),
            order.contiguous(),
            ends.contiguous(),
            y,
            tiles,
            chunks,
            experts,
            each,
            rows,
            WARPS=warps,
            ACROSS=beside,
            TILES=TILES,
            EIGHTS=eights,
            HALF="bf16" if layout.dtype is torch.bfloat16 else "f16",
            ALL=chunks % (warps // beside) == 0,
            FEW=routed <= experts + left,
            num_warps=warps,
        )
    return y


def _eights(routed: int, experts: int) -> int:
    """Room for twice what an expert gets on average: to read it once costs less than to compute too much."""
    return next((e for e in _EIGHTS if 8 * e * experts >= 2 * routed), _EIGHTS[-1])


def s24_experts_reference(
    x: Tensor, layout: ExpertsLayout, order: Tensor, ends: Tensor, each: int = 1
) -> Tensor:
    """What `s24_experts` equals, in plain torch: one expert after the other, in float32."""
    _check_call(x, layout, order, ends, each)
    rows, begin = layout.shape[1], 0
    y = x.new_empty((len(order), rows))
    for words, end in zip(layout.words, ends.tolist(), strict=True):
        here, begin = order[begin:end].long(), end
        weight = dense_s24(S24Layout(words, layout.shape[1:], layout.dtype))[0].float()
        y[here] = (x[here // each].float() @ weight.T).to(x.dtype)
    return y


@gpu.once
def unavailable(device: torch.device) -> str | None:
    """Why `s24_experts` must not be used on `device`, in a few words, or None; tries it once there."""
    return s24_mma.unavailable(device) or gpu.trial(device, _wrong)


def _wrong(device: torch.device) -> str | None:
    """The first of a few small products that is not that of the reference."""
    random = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        for tokens, shape in _TRIALS:
            experts, rows, columns = shape
            dense = torch.randn(experts, rows, columns // 4, 4, generator=random)
            least = dense.abs().topk(2, dim=-1, largest=False).indices
            dense = dense.scatter(-1, least, 0).flatten(2).to(device, dtype)
            layout = pack_experts(pack(dense))
            x = torch.randn(tokens, columns, generator=random).to(device, dtype)
            ids = torch.rand(tokens, experts, generator=random).argsort(1)[:, :2]
            ids = torch.where(
                ids == 1, 0, ids
            )  # the first has more than others, the second nothing
            routed = route_reference(ids.to(device), experts)
            y = s24_experts(x, layout, *routed, 2).float()
            expected = s24_experts_reference(x, layout, *routed, 2).float()
            # Two roundings of the result, and a float32 sum in another order.
            allowed = expected.abs() * 2 * torch.finfo(dtype).eps + 1e-3 * expected.abs().max()
            if not bool(((y - expected).abs() <= allowed).all()):
                return f"[{tokens}, {columns}] x {list(shape)} {dtype}"
    return None


# tokens, each to two experts, and (experts, rows, columns)
_TRIALS = ((1, (4, 32, 1280)), (21, (5, 40, 300)))


def _check_call(x: Tensor, layout: ExpertsLayout, order: Tensor, ends: Tensor, each: int) -> None:
    experts, _, columns = layout.shape
    if x.ndim != 2 or x.shape[1] != columns or order.shape != (len(x) * each,):
        raise ValueError(
            f"s24_experts takes x [inputs, {columns}] and an order [inputs * {each}], got "
            f"{list(x.shape)} and {list(order.shape)}"
        )
    if ends.shape != (experts,) or {ends.dtype, order.dtype} != {torch.int32}:
        raise ValueError(
            f"{experts} experts have ends {ends.dtype} {list(ends.shape)} in an order {order.dtype}; "
            "both must be int32"
        )
    where = {t.device for t in (x, layout.words, order, ends)}
    if x.dtype != layout.dtype or len(where) > 1:
        raise ValueError(f"x is {x.dtype}, the weight {layout.dtype}; on {sorted(map(str, where))}")
