"""`packed` on a CPU: ranges of rows, one for each of torch's threads, through compiled loops.

Equal to `packed_torch`, function by function. Threads are Python's, as loops leave the interpreter's lock;
numba's own threading layer ends the process when two threads call into it at once.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import packed_numba as loops

_SHARE = 2**20  # fewest weights worth a thread: they take longer than handing them over
_LARGE = 2**22  # bytes from which memory is asked for in pages of 2 MiB
_HUGE_PAGES = 14  # MADV_HUGEPAGE of Linux


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory for what is about to be written, of the dtype of `like`.

    The first touch of each page of 4 KiB takes longer than filling it, so Linux is asked for large pages.
    """
    fresh = like.new_empty(shape)
    if fresh.nbytes >= _LARGE and sys.platform == "linux":
        page = os.sysconf("SC_PAGE_SIZE")
        begin = -(-fresh.data_ptr() // page) * page
        length = (fresh.data_ptr() + fresh.nbytes - begin) // page * page
        # Advice: a kernel that knows no large pages refuses, and nothing else changes.
        _libc().madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), _HUGE_PAGES)
    return fresh


def pack_bits(bits: Tensor) -> Tensor:
    """Bool [rows, columns] as uint8 [rows, ceil(columns / 8)], padded with 0."""
    return _mark(bits.view(torch.uint8))[0]


def unpack_bits(bitmap: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_bits`: bool [rows, columns]."""
    bitmap = _rows(bitmap)
    flags = empty((len(bitmap), columns), bitmap)
    shared = (_flat(bitmap), bitmap.stride(0), columns, _flat(flags))
    _run(loops.flag_rows, [(*shared, *r) for r in _ranges(len(bitmap), columns)])
    return flags.view(torch.bool)


def row_starts(bitmap: Tensor) -> Tensor:
    """Int64 [rows + 1]: the number of one bits before each row of uint8 [rows, width], and of all."""
    starts = torch.zeros(len(bitmap) + 1, dtype=torch.int64)
    _count(bitmap, starts[1:])
    starts.cumsum_(0)
    return starts


def pack(words: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Words that are kept, row by row, and their bitmap; see `packed_torch.pack`."""
    words = _rows(words)
    if keep is not None:
        keep = _rows(keep.view(torch.uint8))
        shared = (_flat(words), words.stride(0), _flat(keep), keep.stride(0), words.shape[1])
        if stray := sum(_run(loops.stray_rows, [(*shared, *r) for r in _ranges(*words.shape)])):
            raise ValueError(f"{stray} weights outside the mask are not +0.0")
    bitmap, starts = _mark(words if keep is None else keep)
    return _compress(words, bitmap, starts), bitmap


def select(words: Tensor, bitmap: Tensor) -> Tensor:
    """Words of [rows, columns] whose bit is 1, row by row.

    Raises:
        ValueError: if a bit behind the last column is 1.
    """
    return _compress(_rows(words), _rows(bitmap), row_starts(bitmap))


def expand(bitmap: Tensor, columns: int, values: Tensor, first: int, out: Tensor) -> int:
    """Write the dense rows whose first kept value is values[first]; see `packed_torch.expand`.

    Returns:
        Index of the first value that was not used.

    Raises:
        ValueError: if there are too few values, or a bit behind the last column is 1.
    """
    bitmap = _rows(bitmap)
    ranges = _ranges(len(bitmap), columns)
    firsts = [first]
    if len(ranges) > 1:
        before = torch.zeros(ranges[-1][0], dtype=torch.int64)
        _count(bitmap[: len(before)], before)
        firsts += [first + int(before[:begin].sum()) for begin, _ in ranges[1:]]
    bits, target = (_flat(bitmap), bitmap.stride(0), columns), (_flat(out), out.stride(0))
    jobs = [(*bits, values[at:].numpy(), *target, *r) for at, r in zip(firsts, ranges, strict=True)]
    ends = _run(loops.expand_rows, jobs)
    if min(ends) < 0:
        raise ValueError(
            f"the bitmap does not fit: it has more one bits than there are values ({values.numel()}), "
            "or one behind the last column"
        )
    return firsts[-1] + int(ends[-1])


def _compress(words: Tensor, bitmap: Tensor, starts: Tensor) -> Tensor:
    """Words whose bit is 1; `starts` are the `row_starts` of the bitmap."""
    values, ranges = empty((int(starts[-1]),), words), _ranges(*words.shape)
    source = (_flat(words), words.stride(0), words.shape[1], _flat(bitmap), bitmap.stride(0))
    parts = [values[int(starts[a]) : int(starts[b])].numpy() for a, b in ranges]
    jobs = [(*source, part, *r) for part, r in zip(parts, ranges, strict=True)]
    if min(_run(loops.compress_rows, jobs)) < 0:
        raise ValueError("bits behind the last column are 1")
    return values


def _mark(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Bitmap of the places of [rows, columns] that are not 0, and its `row_starts`."""
    keep = _rows(keep)
    rows, columns = keep.shape
    bitmap = empty((rows, -(-columns // 8)), keep.new_empty(0, dtype=torch.uint8))
    starts = torch.zeros(rows + 1, dtype=torch.int64)
    shared = (_flat(keep), keep.stride(0), columns, _flat(bitmap), starts[1:].numpy())
    _run(loops.mark_rows, [(*shared, *r) for r in _ranges(rows, columns)])
    starts.cumsum_(0)
    return bitmap, starts


def _count(bitmap: Tensor, counts: Tensor) -> None:
    """Write the number of one bits of each row."""
    bitmap = _rows(bitmap)
    shared = (_flat(bitmap), bitmap.stride(0), bitmap.shape[1], counts.numpy())
    # By bytes: counting eight weights takes no longer than expanding one.
    _run(loops.count_rows, [(*shared, *r) for r in _ranges(*bitmap.shape)])


def _rows(matrix: Tensor) -> Tensor:
    """The matrix with neighbours in a row next to each other in memory."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _flat(matrix: Tensor) -> Any:
    """From the first to the last word of a matrix, as a flat array; rows lie stride(0) apart in it."""
    rows, columns = matrix.shape
    span = (rows - 1) * matrix.stride(0) + columns if matrix.numel() else 0
    return matrix.as_strided((span,), (1,)).numpy()


def _ranges(rows: int, columns: int) -> list[tuple[int, int]]:
    """Ranges of rows of about equal length, no more than torch has threads."""
    parts = max(1, min(torch.get_num_threads(), rows, rows * columns // _SHARE))
    edges = [rows * i // parts for i in range(parts + 1)]
    return list(pairwise(edges))


def _run(loop: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What `loop` returns for each job: the first in this thread, the others beside it."""
    if len(jobs) == 1:
        return [_call(loop, jobs[0])]
    others = [_pool(os.getpid(), len(jobs) - 1).submit(_call, loop, job) for job in jobs[1:]]
    return [_call(loop, jobs[0]), *(other.result() for other in others)]


def _call(loop: Callable[..., Any], job: tuple[Any, ...]) -> Any:
    try:
        return loop(*job)
    except OSError:  # compiled, but not stored: loops touch no file, only numba's cache does
        return loop(*job)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads that stay; a forked process has none of its parent's, and so begins its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="llmprune-packed")
