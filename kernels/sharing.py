"""How a product of few tokens is shared out over programs and warps; for the kernels on tensor cores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .s24_layout import TILES

TOKENS = 64  # at most, at once
WARPS = 8  # of a program; a guess, not measured
PROGRAMS = 264  # a split aims at two programs on each of an H200's 132 processors; not measured


@dataclass(frozen=True)
class Sharing:
    """Who takes which rows and columns.

    Attributes:
        warps: of a program.
        across: warps of it that take rows of their own; the others take other columns.
        eights: times eight tokens there is room for, a power of two.
        programs: that take other rows.
        split: programs that share the columns of the same rows.
        share: chunks of columns that each of these takes.
        whole: whether every warp has a chunk each time.
    """

    warps: int
    across: int
    eights: int
    programs: int
    split: int
    share: int
    whole: bool

    def parts(self, y: Tensor, width: int) -> Tensor:
        """What programs write to: y [tokens, rows], or for a split float32 [split, tokens, width]."""
        if self.split == 1:
            return y
        return y.new_empty((self.split, len(y), width), dtype=torch.float32)


def shared_out(
    tokens: int,
    tiles: int,
    chunks: int,
    warps: int | None = None,
    split: int | None = None,
    *,
    each: int = TILES,
    together: bool = False,
) -> Sharing:
    """Share out a matrix of so many tiles of rows and chunks of columns.

    Args:
        tokens: that it is multiplied by.
        tiles: of 16 rows.
        chunks: of columns.
        warps: of a program, a power of two; None is the default.
        split: programs that share the columns of some rows; None chooses by the size of the matrix.
        each: tiles that a warp takes.
        together: whether all warps of a program take the same rows.
    """
    warps, eights = warps or WARPS, eights_of(tokens)
    beside = 1 if together else across(eights, warps, tiles, each)
    programs, along = tiles // (each * beside), warps // beside
    split = split or max(1, min(PROGRAMS // programs, chunks // along))
    share = -(-chunks // split)
    whole = share * split == chunks and share % along == 0
    return Sharing(warps, beside, eights, programs, split, share, whole)


def check_call(
    name: str,
    x: Tensor,
    words: Tensor,
    bias: Tensor | None,
    sides: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    """Refuse inputs and bias [rows] that do not fit a matrix of `sides` (rows, columns).

    Raises:
        ValueError: for another number of tokens, width, dtype or device, or another bias.
    """
    rows, columns = sides
    if x.ndim != 2 or not 0 < x.shape[0] <= TOKENS or x.shape[1] != columns:
        raise ValueError(f"{name} takes x [1 to {TOKENS}, {columns}], got {list(x.shape)}")
    if x.dtype != dtype or x.device != words.device:
        raise ValueError(f"x is {x.dtype} on {x.device}, the weight {dtype} on {words.device}")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"the bias of {rows} rows has shape {list(bias.shape)}")


def eights_of(tokens: int) -> int:
    """How many times eight tokens there must be room for, a power of two."""
    return 1 << (-(-tokens // 8) - 1).bit_length()


def across(eights: int, warps: int, tiles: int, each: int = TILES) -> int:
    """How many warps of a program take rows of their own, `each` tiles, and not columns.

    Every program reads all inputs of its columns: with 32 rows each, at 28672 x 4096 and 64 tokens, 470 MB
    from the L2 cache beside 132 MB of weights. Four warps that take the same columns at the same time read
    them once. A prediction (benchmarks/notes.md), not measured; of few tokens there is little to read.
    """
    beside = min(eights, 4, warps)
    while tiles % (each * beside):
        beside //= 2
    return beside
