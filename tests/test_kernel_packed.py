"""Packing and unpacking, bit for bit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from llmprune.kernels import packed_cpu, packed_torch
from llmprune.kernels.packed import (
    DTYPES,
    Packed,
    bitmap_shape,
    check,
    count,
    pack,
    pack_bits,
    packed_bytes,
    row_starts,
    select,
    unpack,
    unpack_bits,
    unpack_rows,
)

SHAPES = [(1, 1), (1, 40), (5, 1), (3, 7), (3, 8), (33, 41), (2, 5, 9), (64, 128), (7, 31), (7, 33),
          (9, 64), (4, 103), (3, 2, 70), (1, 4099), (2, 3, 0), (0, 5)]  # fmt: skip


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """With three, even the smallest matrix is shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(packed_cpu, "_SHARE", 1)
    yield request.param
    torch.set_num_threads(before)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def sparse(shape: tuple[int, ...], dtype: torch.dtype, share: float = 0.5) -> Tensor:
    torch.manual_seed(len(shape) * 1000 + shape[-1])
    dense = torch.randn(shape).to(dtype)
    dense[torch.rand(shape) < share] = 0
    return dense


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_is_unpacked_is_what_was_packed(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    share: float,
    threads: int,
    poisoned: Callable[[Tensor], int],
) -> None:
    dense = sparse(shape, dtype, share)
    packed = pack(dense)
    assert torch.equal(bits(unpack(packed)), bits(dense))
    check(packed)
    assert packed.bitmap.shape == bitmap_shape(shape)
    assert packed.bytes == packed_bytes(shape, int((dense != 0).sum()), dtype.itemsize)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_survives(dtype: torch.dtype) -> None:
    """All of bfloat16 and float16; of float32 the special ones, minus zero and NaN payloads among them."""
    if dtype.itemsize == 2:
        dense = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    else:
        special = [0, -(2**31), 0x7F800000, 0x7FC00001, 0x7F800001, -1, 1, 0x3F800000]
        dense = torch.tensor(special * 8, dtype=torch.int32).view(dtype)
    dense = dense.reshape(8, -1)
    assert torch.equal(bits(unpack(pack(dense))), bits(dense))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_lone_nan_keeps_its_payload(dtype: torch.dtype) -> None:
    """Torch assigns a tensor of one element as a number."""
    kind, payload = (torch.int16, 0x7FC3) if dtype.itemsize == 2 else (torch.int32, 0x7FC00003)
    dense = torch.tensor([[payload, 0, 0]], dtype=kind).view(dtype)
    assert torch.equal(bits(unpack(pack(dense))), bits(dense))


def test_the_bitmap_is_that_of_numpy() -> None:
    dense = sparse((33, 41), torch.float32)
    expected = np.packbits((dense != 0).numpy(), axis=-1, bitorder="little")
    assert np.array_equal(pack(dense).bitmap.numpy(), expected)


def test_a_zero_inside_the_mask_is_kept() -> None:
    dense = torch.tensor([[0.0, 1.0, 0.0]])
    packed = pack(dense, torch.tensor([[True, True, False]]))
    assert packed.values.tolist() == [0.0, 1.0]
    assert torch.equal(unpack(packed), dense)


def test_a_weight_outside_the_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="outside the mask"):
        pack(torch.ones(1, 2), torch.tensor([[True, False]]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_loops_equal_plain_torch(
    shape: tuple[int, ...], dtype: torch.dtype, threads: int
) -> None:
    dense = sparse(shape, dtype).flatten(0, -2)
    words = dense.view(torch.int16 if dtype.itemsize == 2 else torch.int32)
    keep = (dense != 0) | (torch.rand(dense.shape) < 0.1)
    for mask in (None, keep):
        values, bitmap = packed_cpu.pack(words, mask)
        other_values, other_bitmap = packed_torch.pack(words, mask)
        assert torch.equal(values, other_values)
        assert torch.equal(bitmap, other_bitmap)
        assert torch.equal(packed_cpu.row_starts(bitmap), packed_torch.row_starts(bitmap))
        mine, other = torch.full_like(words, 7), torch.full_like(words, 7)
        packed_cpu.expand(bitmap, words.shape[1], values, 0, mine)
        packed_torch.expand(bitmap, words.shape[1], values, 0, other)
        assert torch.equal(mine, words)
        assert torch.equal(other, words)
        assert torch.equal(packed_cpu.select(words, bitmap), packed_torch.select(words, bitmap))
    assert torch.equal(pack_bits(keep), packed_torch.pack_bits(keep))
    bitmap = pack_bits(keep)
    assert torch.equal(
        unpack_bits(bitmap, keep.shape[1]), packed_torch.unpack_bits(bitmap, keep.shape[1])
    )
    assert torch.equal(unpack_bits(pack_bits(keep), words.shape[1]), keep)


def test_plain_torch_expands_a_tile_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_torch, "_TILE", 100)
    dense = sparse((33, 41), torch.float32)
    packed, out = pack(dense), torch.full((33, 41), 7, dtype=torch.int32)
    packed_torch.expand(packed.bitmap, 41, packed.values.view(torch.int32), 0, out)
    assert torch.equal(out.view(torch.float32), dense)


VIEWS = {
    "transposed": lambda wide: wide.T,
    "columns of a wider one": lambda wide: wide[:, 3:60],
    "every second row": lambda wide: wide[::2],
    "every second column": lambda wide: wide[:, ::2],
    "one row for all": lambda wide: wide[:1].expand(9, -1),
    "one column for all": lambda wide: wide[:, :1].expand(-1, 40),
    "three dimensions, permuted": lambda wide: wide.view(4, 8, 104).permute(1, 0, 2),
    "rows of experts": lambda wide: wide.view(4, 8, 104)[:, 2:5],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_views_are_packed_like_their_copies(
    view: Callable[[Tensor], Tensor], dtype: torch.dtype, threads: int
) -> None:
    dense = view(sparse((32, 104), dtype))
    keep = view(sparse((32, 104), dtype) != 0) | (dense != 0)
    for mask in (None, keep):
        mine = pack(dense, mask)
        copied = pack(dense.clone().contiguous(), None if mask is None else mask.clone())
        assert torch.equal(mine.values, copied.values)
        assert torch.equal(mine.bitmap, copied.bitmap)
        assert torch.equal(unpack(mine), dense)


def test_a_bitmap_and_values_may_lie_anywhere(threads: int) -> None:
    """In a larger tensor, at an odd address (as in a file that is mapped), behind a parameter."""
    dense = sparse((12, 43), torch.bfloat16)
    packed = pack(dense)
    wide = torch.full((12, 20), 0xFF, dtype=torch.uint8)
    wide[:, 5:11] = packed.bitmap
    raw = bytearray(b"x" + bytes(packed.values.view(torch.uint8).numpy()))
    odd = torch.frombuffer(raw, dtype=torch.bfloat16, offset=1)
    assert odd.data_ptr() % 2 == 1
    for values in (odd, torch.nn.Parameter(packed.values), packed.values.repeat(2, 1).T[:, 1]):
        assert torch.equal(unpack(Packed(values, wide[:, 5:11], (12, 43))), dense)
    assert count(wide[:, 5:11]) == packed.values.numel()


@pytest.mark.parametrize("shape", [(33, 41), (4, 8, 64), (5, 1), (1, 40)], ids=str)
@pytest.mark.parametrize("tile", [1, 4, 100])
def test_tiles_of_rows_are_those_of_the_whole(
    shape: tuple[int, ...], tile: int, threads: int
) -> None:
    dense = sparse(shape, torch.float16)
    packed, rows = pack(dense), dense.flatten(0, -2)
    starts, bitmap = row_starts(packed.bitmap), packed.bitmap.flatten(0, -2)
    room = torch.full((tile, shape[-1] + 2), 7.0, dtype=torch.float16)
    first = 0
    for start in range(0, len(rows), tile):
        stop = min(len(rows), start + tile)
        assert first == starts[start]
        assert torch.equal(unpack_rows(packed, start, stop, first), rows[start:stop])
        unpack_rows(packed, start, stop, first, room[: stop - start, 1:-1])
        assert torch.equal(room[: stop - start, 1:-1], rows[start:stop])
        first += count(bitmap[start:stop])
    assert first == starts[-1] == packed.values.numel()
    assert (room[:, [0, -1]] == 7).all()
    assert unpack_rows(packed, 2, 2, 0).shape == (0, shape[-1]) if len(rows) > 2 else True


def test_unpacking_writes_where_it_is_told(threads: int) -> None:
    dense = sparse((2, 5, 9), torch.float32)
    out = torch.full((2, 5, 9), 7.0)
    assert unpack(pack(dense), out) is out
    assert torch.equal(out, dense)
    room = torch.full((2, 5, 12), 7.0)
    unpack(pack(dense), room[..., 1:10])
    assert torch.equal(room[..., 1:10], dense)
    assert (room[..., [0, 10, 11]] == 7).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_is_expanded(shape: tuple[int, ...], threads: int) -> None:
    """For layers that were cast in memory, to check gradients with."""
    dense = sparse(shape, torch.float32)
    packed = pack(dense)
    cast = Packed(packed.values.double(), packed.bitmap, shape)
    assert torch.equal(unpack(cast), dense.double())


def lies() -> dict[str, Packed]:
    """Packed tensors that contradict themselves."""
    packed = pack(sparse((33, 41), torch.bfloat16))
    values, bitmap, shape = packed.values, packed.bitmap, packed.shape
    behind, more = bitmap.clone(), bitmap.clone()
    behind[7, -1] |= 0x80
    more[0] = torch.tensor([255] * 5 + [1])
    return {
        "too few values": Packed(values[:-1], bitmap, shape),
        "no values": Packed(values[:0], bitmap, shape),
        "too many values": Packed(torch.cat([values, values[:1]]), bitmap, shape),
        "a bit behind the last column": Packed(values, behind, shape),
        "more one bits": Packed(values, more, shape),
        "all one bits": Packed(values, torch.full_like(bitmap, 255), shape),
        "no one bits": Packed(values, torch.zeros_like(bitmap), shape),
        "another shape": Packed(values, bitmap, (41, 33)),
        "one dimension": Packed(values, bitmap, (33 * 41,)),
        "a bitmap of another dtype": Packed(values, bitmap.to(torch.int8), shape),
        "values of another dtype": Packed(values.view(torch.int16), bitmap, shape),
        "values of two dimensions": Packed(values[None], bitmap, shape),
        "a bitmap on another device": Packed(values, bitmap.to("meta"), shape),
        "on the device meta": packed.to("meta"),
    }


@pytest.mark.parametrize("lie", lies())
def test_what_contradicts_itself_is_refused(lie: str, threads: int) -> None:
    for use in (check, unpack):
        with pytest.raises(ValueError, match=r"bit|values|meta"):
            use(lies()[lie])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_no_bitmap_leads_outside(dtype: torch.dtype, threads: int) -> None:
    """Whatever the bits and wherever the values begin: nothing beside `out` is written."""
    torch.manual_seed(0)
    refused = 0
    for trial in range(300):
        rows, columns = int(torch.randint(1, 9, ())), int(torch.randint(1, 140, ()))
        bitmap = torch.randint(0, 256, bitmap_shape((rows, columns)), dtype=torch.uint8)
        if trial % 2:
            bitmap[:, -1] &= 255 >> (-columns % 8)
        kept = int(torch.randint(0, rows * columns + 9, ()))
        first = int(torch.randint(0, kept + 1, ()))
        room = torch.full((rows + 2, columns + 64), 7.0, dtype=dtype)
        packed = Packed(torch.full((kept,), 3.0, dtype=dtype), bitmap, (rows, columns))
        inside = room[1:-1, 32 : 32 + columns]
        try:
            unpack_rows(packed, 0, rows, first, inside)
        except ValueError:
            refused += 1
        else:
            assert count(bitmap) <= kept - first
            assert torch.equal(inside == 3, unpack_bits(bitmap, columns))
            assert ((inside == 3) | (inside == 0)).all()
        inside.fill_(7)
        assert (room == 7).all()
    assert 100 < refused < 290


def test_what_the_bitmap_points_at_is_selected(threads: int) -> None:
    for shape in ((33, 41), (4, 8, 64), (2, 5, 3)):
        dense, mask = sparse(shape, torch.float32), sparse(shape, torch.float32) != 0
        wide = torch.full((*shape[:-1], 30), 0xFF, dtype=torch.uint8)
        bitmap = wide[..., 3 : 3 + bitmap_shape(shape)[-1]]
        bitmap.copy_(pack_bits(mask))
        assert torch.equal(select(dense, bitmap), dense[mask])
        assert torch.equal(unpack_bits(bitmap, shape[-1]), mask)
        assert select(dense.double(), bitmap).dtype == torch.float64
        turned = dense.movedim(0, -1).contiguous().movedim(-1, 0)
        assert torch.equal(select(turned, bitmap), dense[mask])


def test_no_bitmap_selects_outside(threads: int) -> None:
    bitmap = torch.full((3, 6), 0xFF, dtype=torch.uint8)
    for columns in (41, 47):
        with pytest.raises(ValueError, match="behind the last column"):
            select(torch.zeros(3, columns), bitmap)
    with pytest.raises(ValueError, match="is none of"):
        select(torch.zeros(3, 49), bitmap)
    with pytest.raises(ValueError, match="the bitmap is on"):
        select(torch.zeros(3, 48), bitmap.to("meta"))
    with pytest.raises(ValueError, match="no bitmap of 49"):
        unpack_bits(bitmap, 49)
    assert select(torch.ones(3, 48), bitmap).shape == (144,)


def test_rows_and_memory_that_do_not_fit_are_refused() -> None:
    packed = pack(sparse((5, 9), torch.float32))
    kept = packed.values.numel()
    for start, stop, first in ((-1, 2, 0), (3, 2, 0), (0, 6, 0), (0, 1, -1), (0, 1, kept + 1)):
        with pytest.raises(ValueError, match="not among"):
            unpack_rows(packed, start, stop, first)
    for out in (torch.empty(5, 8), torch.empty(5, 9, dtype=torch.float16), torch.empty(9, 5).T):
        with pytest.raises(ValueError, match="out"):
            unpack(packed, out)
        with pytest.raises(ValueError, match="out"):
            unpack_rows(packed, 0, 5, 0, out)
    with pytest.raises(ValueError, match="no bitmap"):
        row_starts(torch.zeros(3, dtype=torch.uint8))


def test_a_mask_that_does_not_fit_is_refused() -> None:
    for mask in (torch.ones(2, 3), torch.ones(3, 2, dtype=torch.bool)):
        with pytest.raises(ValueError, match="the mask is"):
            pack(torch.ones(2, 3), mask)


def test_a_tensor_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="meta"):
        pack(torch.empty(2, 3, device="meta"))


def test_gradients_are_left_alone() -> None:
    dense = torch.nn.Parameter(sparse((5, 9), torch.float32))
    packed = pack(dense)
    assert not packed.values.requires_grad
    assert torch.equal(unpack(Packed(packed.values.requires_grad_(), *_rest(packed))), dense)


def _rest(packed: Packed) -> tuple[Tensor, tuple[int, ...]]:
    return packed.bitmap, packed.shape


def test_offsets_beyond_32_bits_are_counted() -> None:
    """2^32 weights and a little: every row reads the same eighth of a mebibyte."""
    rows, width = 4097, 2**17
    bitmap = torch.full((1, width), 0b01010111, dtype=torch.uint8).expand(rows, -1)
    starts = row_starts(bitmap)
    expected = torch.arange(rows + 1) * (5 * width)
    assert rows * width * 8 > 2**32
    assert expected[-1] > 2**31
    assert torch.equal(starts, expected)
    assert count(bitmap) == 5 * width * rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_values_and_rows_beyond_32_bits_are_reached(tmp_path: Path, dtype: torch.dtype) -> None:
    """Files full of holes stand for memory that no test can have."""
    kept, columns = 2**32 + 100, 2**20
    rows = kept // columns + 3
    values = mapped(tmp_path / "values", kept, dtype)
    values[-70:] = torch.arange(1, 71).to(dtype)
    bitmap = torch.zeros(1, columns // 8, dtype=torch.uint8).expand(rows, -1)
    last = bitmap[-1:].clone()
    last[0, 1:9] = torch.tensor([255, 255, 255, 255, 15, 255, 255, 255], dtype=torch.uint8)
    last[0, -2:] = torch.tensor([0b11, 0b11110000], dtype=torch.uint8)
    out = mapped(tmp_path / "out", rows * columns, dtype).view(rows, columns)
    packed_cpu.expand(last, columns, words(values), kept - 66, words(out[-1:]))
    assert torch.equal(out[-1].nonzero().flatten()[-4:], columns - torch.arange(4, 0, -1))
    assert torch.equal(out[-1][out[-1] != 0], torch.arange(5, 71).to(dtype))

    starts = row_starts(bitmap)
    assert starts.tolist() == [0] * (rows + 1)
    packed_cpu.expand(bitmap[-2:], columns, words(values), kept, words(out[-2:]))
    assert not out[-2:].any()

    out[-1, -5:] = 3  # and back: the dense matrix is 2^32 weights before this row
    again = pack(out[-1:])
    assert again.values.tolist() == [3] * 5
    spread = out.as_strided((2, 10), ((rows - 1) * columns + columns - 10, 1))
    assert spread[1].data_ptr() - spread[0].data_ptr() > 2**32 * dtype.itemsize
    assert pack(spread).values.tolist() == [3] * 5


def mapped(path: Path, length: int, dtype: torch.dtype) -> Tensor:
    """Zeros of which only what is touched takes memory and disk."""
    with path.open("wb") as file:
        file.truncate(length * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=length, dtype=dtype)


def words(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def test_callers_on_many_threads_do_not_meet(threads: int) -> None:
    dense = [sparse((64, 100 + i), torch.bfloat16) for i in range(16)]

    def there_and_back(matrix: Tensor) -> bool:
        return all(torch.equal(unpack(pack(matrix)), matrix) for _ in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(there_and_back, dense))


def run_python(root: Path, code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_and_checking_import_no_numba(root: Path) -> None:
    code = """
import sys, torch
from llmprune.kernels.packed import Packed, check
check(Packed(torch.ones(11), torch.tensor([[255, 1], [3, 0]], dtype=torch.uint8), (2, 9)))
print("numba" in sys.modules, "llvmlite" in sys.modules)
"""
    assert run_python(root, code).split() == ["False", "False"]


def test_bits_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_torch, "_TILE", 50)
    bitmap = torch.arange(256).to(torch.uint8).view(16, 16)
    assert count(bitmap) == 8 * 128
    assert count(bitmap.T[3:, ::2]) == sum(int(b).bit_count() for b in bitmap.T[3:, ::2].flatten())
    assert count(bitmap[:0]) == 0


ROUND = """
import torch
from llmprune.kernels.packed import pack, unpack
dense = torch.randn(40, 70).bfloat16() * (torch.rand(40, 70) < 0.5)
assert torch.equal(unpack(pack(dense)), dense)
print("equal")
"""


@pytest.mark.parametrize("fault", ["folder", "disk"])
def test_it_works_where_no_cache_can_be_written(root: Path, fault: str) -> None:
    """No folder can be made, or the disk is full when the first result is stored."""
    code = f"""
import errno
from numba.core import caching
def fail(*args, **kwargs):
    raise OSError(errno.ENOSPC, "no space left")
if {fault!r} == "folder":
    caching._CacheLocator.ensure_cache_path = fail
else:
    caching.Cache._save_overload = fail
    caching.Cache._load_overload = lambda *args: None
{ROUND}
"""
    assert run_python(root, code).strip() == "equal"


def test_a_forked_process_has_threads_of_its_own(root: Path) -> None:
    code = f"""
import os
from llmprune.kernels import packed_cpu
packed_cpu._SHARE = 1
import torch
torch.set_num_threads(3)
{ROUND}
child = os.fork()
if not child:
    assert torch.equal(unpack(pack(dense)), dense)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    assert run_python(root, code).strip() == "equal"


@pytest.mark.skipif("NUMBA_CPU_NAME" in os.environ, reason="this is that run")
def test_processors_without_wide_instructions_give_the_same(root: Path) -> None:
    """This file again, compiled for the least that x86 or ARM has."""
    code = (
        "import pytest, sys; from llmprune.kernels import packed_numba; assert not packed_numba.WIDE; "
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests/test_kernel_packed.py', '-k', "
        "'plain_torch or outside or 32_bits or pattern']))"
    )
    passed = re.search(r"(\d+) passed", run_python(root, code, NUMBA_CPU_NAME="generic"))
    assert passed
    assert int(passed[1]) > 100


@pytest.mark.parametrize("dense", [torch.ones(3), torch.ones(2, 2, dtype=torch.float64)])
def test_what_cannot_be_packed_is_refused(dense: Tensor) -> None:
    with pytest.raises(ValueError, match="cannot pack"):
        pack(dense)
