"""Compiled loops of `packed_cpu`. A file of its own: importing it imports numba.

Equal to the functions of `packed_torch` (tests/test_kernel_packed.py). Arguments of all:

    bitmap, dense, keep, out    a matrix as a flat array; row r begins at r times the stride that follows it
    columns                     weights in a row
    values                      kept weights, flat; the first belongs to the first row gone through
    counts                      int64 [rows]
    begin, end                  the rows to go through

Weights are int16 or int32 words, keep may also be uint8 flags; bitmaps are uint8. Counting is in 64 bits, and
unsigned: for a signed index numba compiles a branch that counts negative ones from the end.

No bitmap is trusted: each read of values and each write of them is within bounds whatever the bitmap says,
and what does not fit is reported by a return value of -1. That rows, columns and arrays agree is the duty of
the caller.

On an x86 with AVX-512 VBMI2, one instruction expands or compresses 16 or 32 weights. Other processors take
one weight at a time without a branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numba
from llvmlite import ir
from numba import int64, types, uint8, uint32, uint64
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

# As numba sees the processor: NUMBA_CPU_NAME=generic takes the narrow way on every machine.
WIDE = "+avx512vbmi2" in (
    get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
).split(",")
_F = TypeVar("_F", bound=Callable[..., Any])


def compiled(function: _F) -> _F:
    """`function`, compiled for the types of its first call, without the interpreter's lock.

    The result is kept beside this file or in the user's cache folder, where either can be written; else each
    process compiles anew.
    """
    try:
        kept: _F = numba.njit(nogil=True, cache=True)(function)
        return kept
    except RuntimeError:  # numba found no folder that it can write
        fresh: _F = numba.njit(nogil=True)(function)
        return fresh


@intrinsic  # type: ignore[untyped-decorator]
def _ones(context: Any, word: Any) -> Any:
    """Number of one bits of `word`."""
    return word(word), lambda cx, build, sig, args: build.ctpop(args[0])


@intrinsic  # type: ignore[untyped-decorator]
def _expand(context: Any, values: Any, first: Any, word: Any, out: Any, to: Any) -> Any:
    """out[to:to + 32] = the next of values[first:] where bit j of `word` is 1, else 0.

    No more values are read than `word` has one bits.
    """

    def emit(cx: Any, build: Any, sig: Any, args: Any) -> Any:
        lanes, kind = _register(sig.args[0])
        zeros = ir.Constant(lanes, [0] * lanes.count)
        for begin, mask, before in _parts(build, lanes, args[2]):
            source = _address(cx, build, sig.args[0], args[0], build.add(args[1], before))
            target = _address(cx, build, sig.args[3], args[3], build.add(args[4], begin))
            takes = ir.FunctionType(lanes, [source.type, mask.type, lanes])
            name = f"llvm.masked.expandload.{kind}"
            call = cgutils.get_or_insert_function(build.module, takes, name)
            found = build.call(call, [source, mask, zeros])
            build.store(found, build.bitcast(target, lanes.as_pointer()), align=1)
        return cx.get_dummy_value()

    return types.void(values, types.uint64, types.uint32, out, types.uint64), emit


@intrinsic  # type: ignore[untyped-decorator]
def _compress(context: Any, dense: Any, at: Any, word: Any, values: Any, first: Any) -> Any:
    """values[first:] = those of dense[at:at + 32] whose bit in `word` is 1.

    Up to values[first + 32] all is overwritten: behind the chosen with anything.
    """

    def emit(cx: Any, build: Any, sig: Any, args: Any) -> Any:
        lanes, kind = _register(sig.args[0])
        for begin, mask, before in _parts(build, lanes, args[2]):
            source = _address(cx, build, sig.args[0], args[0], build.add(args[1], begin))
            target = _address(cx, build, sig.args[3], args[3], build.add(args[4], before))
            found = build.load(build.bitcast(source, lanes.as_pointer()), align=1)
            takes = ir.FunctionType(lanes, [lanes, mask.type, lanes])
            name = f"llvm.experimental.vector.compress.{kind}"
            call = cgutils.get_or_insert_function(build.module, takes, name)
            found = build.call(call, [found, mask, ir.Constant(lanes, ir.Undefined)])
            build.store(found, build.bitcast(target, lanes.as_pointer()), align=1)
        return cx.get_dummy_value()

    return types.void(dense, types.uint64, types.uint32, values, types.uint64), emit


def _register(array: Any) -> tuple[Any, str]:
    """LLVM type of 512 bits of its elements, and how intrinsics name it.

    Never wider: LLVM splits a wider compress into code that crashes.
    """
    element = ir.IntType(array.dtype.bitwidth)
    lanes = ir.VectorType(element, 512 // element.width)
    return lanes, f"v{lanes.count}i{element.width}"


def _parts(build: Any, lanes: Any, word: Any) -> Iterator[tuple[Any, Any, Any]]:
    """For each register that 32 weights fill: first lane, its bits of `word`, one bits before them."""
    narrow, long = ir.IntType(lanes.count), ir.IntType(64)
    before = ir.Constant(long, 0)
    for begin in range(0, 32, lanes.count):
        bits = build.trunc(build.lshr(word, ir.Constant(word.type, begin)), narrow)
        mask = build.bitcast(bits, ir.VectorType(ir.IntType(1), lanes.count))
        yield ir.Constant(long, begin), mask, before
        before = build.add(before, build.zext(build.ctpop(bits), long))


def _address(cx: Any, build: Any, array: Any, value: Any, index: Any) -> Any:
    """Of one element of a flat array."""
    return build.gep(cgutils.create_struct_proxy(array)(cx, build, value=value).data, [index])


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _word(bitmap: Any, at: Any) -> Any:
    """Bytes at to at + 3 of `bitmap`, as one number; the first byte is the lowest."""
    low = uint32(bitmap[at]) | uint32(bitmap[at + uint64(1)]) << uint32(8)
    high = uint32(bitmap[at + uint64(2)]) | uint32(bitmap[at + uint64(3)]) << uint32(8)
    return uint32(low | high << uint32(16))


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _mark(keep: Any, at: Any, most: Any) -> Any:
    """A byte whose bit j is 1 where keep[at + j] is not 0, for j < most <= 8."""
    byte = uint8(0)
    for j in range(most):
        byte |= uint8(uint8(keep[at + j] != 0) << uint8(j))
    return byte


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _compress_few(dense: Any, at: Any, word: Any, most: Any, values: Any, first: Any) -> None:
    """values[first:] = those of dense[at:] whose bit in `word` is 1; touches nothing else."""
    k = first
    for j in range(most):
        if (word >> uint32(j)) & uint32(1):
            values[k] = dense[at + j]
            k += uint64(1)


@numba.njit(nogil=True)  # type: ignore[untyped-decorator]
def _expand_few(values: Any, first: Any, byte: Any, most: Any, out: Any, at: Any) -> None:
    """out[at:at + most] = the next of values[first:] where bit j of `byte` is 1, else 0."""
    k = first
    for j in range(most):
        out[at + j] = 0
        if (byte >> uint8(j)) & uint8(1):
            out[at + j] = values[k]
            k += uint64(1)


@compiled
def count_rows(bitmap: Any, stride: int, width: int, counts: Any, begin: int, end: int) -> None:
    """counts[r] = number of one bits of row r, of `width` bytes."""
    for r in range(begin, end):
        row = uint64(r) * uint64(stride)
        found = uint64(0)
        for b in range(uint64(width)):
            found += uint64(_ones(bitmap[row + b]))
        counts[uint64(r)] = found


@compiled
def mark_rows(
    keep: Any, stride: int, columns: int, bitmap: Any, counts: Any, begin: int, end: int
) -> None:
    """Write a bitmap without gaps, 1 where `keep` is not 0, and the number of ones of each row."""
    whole, left = uint64(columns) >> uint64(3), uint64(columns) & uint64(7)
    width = uint64(columns + 7) >> uint64(3)
    for r in range(begin, end):
        row, to = uint64(r) * uint64(stride), uint64(r) * width
        found = uint64(0)
        for b in range(whole):
            byte = _mark(keep, row + (b << uint64(3)), uint64(8))
            bitmap[to + b] = byte
            found += uint64(_ones(byte))
        if left:
            byte = _mark(keep, row + (whole << uint64(3)), left)
            bitmap[to + whole] = byte
            found += uint64(_ones(byte))
        counts[uint64(r)] = found


@compiled
def flag_rows(bitmap: Any, stride: int, columns: int, flags: Any, begin: int, end: int) -> None:
    """Write uint8 flags [rows, columns] without gaps: 1 where the bit is 1, else 0."""
    whole, left = uint64(columns) >> uint64(3), uint64(columns) & uint64(7)
    for r in range(begin, end):
        bits, to = uint64(r) * uint64(stride), uint64(r) * uint64(columns)
        for b in range(whole):
            for j in range(uint64(8)):
                flags[to + (b << uint64(3)) + j] = (bitmap[bits + b] >> uint8(j)) & uint8(1)
        for j in range(left):
            at = to + (whole << uint64(3)) + j
            flags[at] = (bitmap[bits + whole] >> uint8(j)) & uint8(1)


@compiled
def stray_rows(
    dense: Any, stride: int, keep: Any, keep_stride: int, columns: int, begin: int, end: int
) -> Any:
    """Number of weights that are not +0.0 and not in `keep`."""
    found = uint64(0)
    for r in range(begin, end):
        row, flags = uint64(r) * uint64(stride), uint64(r) * uint64(keep_stride)
        for c in range(uint64(columns)):
            found += uint64((dense[row + c] != 0) & (keep[flags + c] == 0))
    return found


@compiled
def compress_rows(
    dense: Any, stride: int, columns: int, bitmap: Any, by: int, values: Any, begin: int, end: int
) -> Any:
    """Write the weights whose bit is 1 into `values`; row r of the bitmap begins at r times `by`.

    Returns:
        How many they are; -1 if they do not fit, or a bit behind the last column is 1.
    """
    whole, left = uint64(columns) >> uint64(3), uint64(columns) & uint64(7)
    words = uint64(columns) >> uint64(5) if WIDE else uint64(0)
    k, limit = uint64(0), uint64(values.size)
    for r in range(begin, end):
        row, bits = uint64(r) * uint64(stride), uint64(r) * uint64(by)
        for w in range(words):
            at = row + (w << uint64(5))
            word = _word(bitmap, bits + (w << uint64(2)))
            found = uint64(_ones(word))
            if k + found > limit:
                return -1
            if k + uint64(32) <= limit:
                _compress(dense, at, word, values, k)
            else:
                _compress_few(dense, at, word, uint64(32), values, k)
            k += found
        for b in range(words << uint64(2), whole):
            at, byte = row + (b << uint64(3)), bitmap[bits + b]
            found = uint64(_ones(byte))
            if k + found > limit:
                return -1
            if k + uint64(8) <= limit:
                here = k
                for j in range(uint64(8)):
                    values[here] = dense[at + j]  # overwritten by the next, unless it is chosen
                    here += uint64(byte >> uint8(j)) & uint64(1)
            else:
                _compress_few(dense, at, uint32(byte), uint64(8), values, k)
            k += found
        if left:
            byte = bitmap[bits + whole]
            found = uint64(_ones(byte))
            if byte >> uint8(left) or k + found > limit:
                return -1
            _compress_few(dense, row + (whole << uint64(3)), uint32(byte), left, values, k)
            k += found
    return int64(k)


@compiled
def expand_rows(
    bitmap: Any, stride: int, columns: int, values: Any, out: Any, to: int, begin: int, end: int
) -> Any:
    """Write dense rows, zeros too; row r to r times `to`.

    Returns:
        How many values they took; -1 if there are too few, or a bit behind the last column is 1.
    """
    whole, left = uint64(columns) >> uint64(3), uint64(columns) & uint64(7)
    words = uint64(columns) >> uint64(5) if WIDE else uint64(0)
    k, limit = uint64(0), uint64(values.size)
    for r in range(begin, end):
        bits, row = uint64(r) * uint64(stride), uint64(r) * uint64(to)
        for w in range(words):
            word = _word(bitmap, bits + (w << uint64(2)))
            found = uint64(_ones(word))
            if k + found > limit:
                return -1
            _expand(values, k, word, out, row + (w << uint64(5)))
            k += found
        for b in range(words << uint64(2), whole):
            at, byte = row + (b << uint64(3)), bitmap[bits + b]
            found = uint64(_ones(byte))
            if k + found > limit:
                return -1
            if k + uint64(8) <= limit:
                here = k
                for j in range(uint64(8)):
                    bit = (byte >> uint8(j)) & uint8(1)
                    # A product, because of a choice LLVM makes a branch, which is 5 times as slow.
                    out[at + j] = values[here] * bit
                    here += uint64(bit)
            else:
                _expand_few(values, k, byte, uint64(8), out, at)
            k += found
        if left:
            byte = bitmap[bits + whole]
            found = uint64(_ones(byte))
            if byte >> uint8(left) or k + found > limit:
                return -1
            _expand_few(values, k, byte, left, out, row + (whole << uint64(3)))
            k += found
    return int64(k)
