"""2:4 in int8 and int4 on sparse tensor cores: packing bit for bit, the kernel's source in an emulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import INTERPRETED
from gluon_on_cpu import on_cpu
from kernel_harness import (
    MASKS,
    TOKENS_ON_GPU,
    amid_poison,
    assert_as_good_as_dense,
    assert_within,
    bits,
    nm_matrix,
    truth,
)
from ptx import fma, lop3, prmt
from torch import Tensor

from llmprune.kernels import s24_bits as module
from llmprune.kernels import slots as slots_module
from llmprune.kernels.few_bits import (
    FewBits,
    expand_few,
    in_halves,
    packed_few,
    top_of,
)
from llmprune.kernels.packed import pack_bits
from llmprune.kernels.s24_bits import s24_bits, s24_bits_reference
from llmprune.kernels.s24_bits_layout import (
    S24Bits,
    dense_s24_bits,
    pack_s24_bits,
    unpack_s24_bits,
    whole_s24_bits,
)
from llmprune.kernels.s24_layout import pack_s24

Unwritten = Callable[[Tensor], int]
HALVES = (torch.bfloat16, torch.float16)
ids = {"ids": lambda value: str(value).removeprefix("torch.")}


@pytest.fixture
def emulated(root: Path) -> Iterator[ModuleType]:
    if not INTERPRETED:
        pytest.skip("the kernel that adds the parts of a split is compiled here, not interpreted")
    kernels = root / "kernels"
    with on_cpu(kernels / "s24_gluon.py", kernels / "s24_bits_gluon.py") as found:
        yield found


def few_bits(
    shape: tuple[int, int],
    number: int,
    group: int,
    dtype: torch.dtype,
    mask: str = "random",
    seed: int = 0,
    device: str = "cpu",
) -> FewBits:
    """A 2:4 matrix of random whole numbers that are not 0, and scales of many sizes."""
    random = torch.Generator().manual_seed(seed)
    keep = nm_matrix(*shape, 2, 4, torch.float32, mask, seed) != 0
    top = top_of(number)
    whole = torch.randint(1, top + 1, shape, generator=random, dtype=torch.int8)
    whole = torch.where(torch.rand(shape, generator=random) < 0.5, whole, -whole)[keep]
    many = (shape[0], -(-shape[1] // group))
    scales = 1 + torch.rand(many, generator=random)
    scales *= 2.0 ** -torch.randint(5, 11, many, generator=random)
    numbers = whole if number == 8 else in_halves(whole)
    few = FewBits(numbers, scales.bfloat16(), pack_bits(keep), shape, number, group, dtype, "rows")
    return few.to(device)


def assert_same(found: FewBits, few: FewBits) -> None:
    assert replace(found, whole=few.whole, scales=few.scales, bitmap=few.bitmap) == few
    for name in ("whole", "scales", "bitmap"):
        assert torch.equal(bits(getattr(found, name)), bits(getattr(few, name))), name


SHAPES = [
    ((1, 4), 8, 4),
    ((16, 256), 4, 128),
    ((37, 300), 8, 300),
    ((37, 300), 4, 128),
    ((64, 520), 8, 64),
    ((33, 900), 4, 96),
    ((48, 1284), 4, 256),
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("shape", "number", "group"), SHAPES, **ids)
def test_what_is_packed_comes_back(
    shape: tuple[int, int], number: int, group: int, mask: str
) -> None:
    few = few_bits(shape, number, group, HALVES[shape[0] % 2], mask)
    layout = pack_s24_bits(few)
    assert layout.dtype is few.dtype
    assert_same(unpack_s24_bits(layout), few)
    assert torch.equal(bits(dense_s24_bits(layout)), bits(expand_few(few)))


@pytest.mark.parametrize("number", [8, 4])
def test_every_whole_number_and_kept_zeros_come_back(number: int) -> None:
    """Zeros that a bitmap keeps are told by it, or by all slots being kept."""
    top = top_of(number)
    whole = torch.arange(-top, top + 1, dtype=torch.int8).repeat(20)[: 8 * 32]
    keep = torch.tensor([False, True, False, True]).repeat(8, 16)
    numbers = whole if number == 8 else in_halves(whole)
    scales = torch.linspace(0, 60, 8)[:, None].bfloat16()
    few = FewBits(numbers, scales, pack_bits(keep), (8, 64), number, 64, torch.bfloat16)
    layout = pack_s24_bits(few)
    assert_same(unpack_s24_bits(layout, few.bitmap), few)
    assert torch.equal(whole_s24_bits(layout, ones=True) != 0, keep)
    assert torch.equal(bits(dense_s24_bits(layout)), bits(expand_few(few)))


def test_zeros_give_way_where_a_group_keeps_too_many() -> None:
    keep = torch.ones(2, 8, dtype=torch.bool)
    whole = torch.tensor([[3, 0, -4, 0, 0, 0, 0, 7]] * 2, dtype=torch.int8)
    few = FewBits(
        whole.flatten(), torch.ones(2, 1).bfloat16(), pack_bits(keep), (2, 8), 8, 8, torch.float16
    )
    assert torch.equal(whole_s24_bits(pack_s24_bits(few)), whole.to(torch.int16))


def test_in_blocks_of_rows_as_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    few = few_bits((150, 512), 4, 128, torch.float16)
    whole = pack_s24_bits(few)
    monkeypatch.setattr(slots_module, "BLOCK", 32 * 512)
    assert torch.equal(pack_s24_bits(few).words, whole.words)
    assert_same(unpack_s24_bits(whole), few)
    assert torch.equal(dense_s24_bits(whole), expand_few(few))


def test_places_are_those_of_the_values_of_16_bits() -> None:
    few = few_bits((32, 300), 8, 300, torch.bfloat16, "fewer")
    by_value = pack_s24(packed_few(few)).words
    assert torch.equal(pack_s24_bits(few).words[:, :, 0], by_value[:, :, 0])


@pytest.mark.parametrize(("number", "group", "most"), [(8, 4096, 5.004), (4, 128, 3.125)])
def test_bits_per_weight(number: int, group: int, most: float) -> None:
    layout = pack_s24_bits(few_bits((32, 4096), number, group, torch.bfloat16))
    assert layout.bytes * 8 <= (most + 0.004) * 32 * 4096  # of a row's scale two are kept


@pytest.mark.parametrize("dtype", HALVES, **ids)
@pytest.mark.parametrize("number", [8, 4])
@pytest.mark.usefixtures("emulated")
def test_each_number_and_scale_is_the_rounded_product(number: int, dtype: torch.dtype) -> None:
    """What goes into the tensor cores, taken out by unit inputs: bit for bit what the file stands for."""
    top = top_of(number)
    whole = torch.arange(-top, top + 1, dtype=torch.int8)
    whole = whole[whole != 0].repeat(64 * 128 // (2 * top) + 1)[: 64 * 128].reshape(64, 128)
    keep = torch.tensor([True, False, False, True]).repeat(64, 64)
    # mantissas of eight bits, exponents as far as the dtype goes
    low, high = (-17, 6) if dtype is torch.float16 else (-110, 100)
    scales = (1 + torch.arange(128) / 128.0) * 2.0 ** torch.linspace(low, high - 1, 128).round()
    scales = scales.bfloat16().reshape(64, 2)
    numbers = whole.flatten() if number == 8 else in_halves(whole.flatten())
    few = FewBits(numbers, scales, pack_bits(keep), (64, 256), number, 128, dtype)
    layout, expected = pack_s24_bits(few), expand_few(few)
    assert torch.equal(bits(dense_s24_bits(layout)), bits(expected))
    for column in range(0, 256, 64):
        x = torch.zeros(64, 256, dtype=dtype)
        x[:, column : column + 64].fill_diagonal_(1)
        y = s24_bits(x, layout, warps=1)
        assert torch.equal(y.T, expected[:, column : column + 64])


CASES = {
    "one token": (1, 32, 256, 8, 256, 1, 1),
    "one row, one group": (1, 1, 4, 4, 4, 2, 1),
    "two tokens, two chunks, groups": (2, 32, 512, 4, 128, 2, 1),
    "seven tokens, ragged, groups": (7, 37, 300, 4, 128, 2, 1),
    "nine tokens, chunks left over, groups": (9, 48, 1280, 4, 64, 4, 1),
    "17 tokens": (17, 16, 256, 8, 256, 1, 1),
    "64 tokens, groups of a step": (64, 33, 260, 8, 32, 2, 1),
    "16 tokens, two warps on the same columns": (16, 64, 512, 8, 512, 4, 1),
    "33 tokens, four warps on the same columns, ragged": (33, 250, 1100, 4, 128, 8, 2),
    "32 tokens, four tiles for a warp": (32, 64, 512, 4, 128, 2, 1),
    "25 tokens, four tiles for each of two warps, ragged": (25, 120, 1100, 4, 256, 4, 1),
    "20 tokens, an odd pair of tiles": (20, 96, 300, 4, 300, 8, 1),
    "split": (3, 40, 1024, 8, 1024, 2, 2),
    "split, ragged, a part without columns, groups": (8, 40, 1300, 4, 96, 2, 5),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("emulated")
def test_the_product_is_that_of_float64(case: str, poisoned: Unwritten) -> None:
    tokens, rows, columns, number, group, warps, split = CASES[case]
    dtype = HALVES[list(CASES).index(case) % 2]
    torch.manual_seed(0)
    few = few_bits((rows, columns), number, group, dtype, "fewer")
    layout = in_poison(pack_s24_bits(few))
    x = amid_poison(torch.randn(tokens, columns).to(dtype) / columns**0.5)
    bias = torch.randn(rows).to(dtype) if tokens % 2 else None
    exact = truth(x, expand_few(few), bias)
    y = s24_bits(x, layout, bias, warps=warps, split=split)
    assert poisoned(y) == 0
    assert_within(y, *exact)
    assert_within(s24_bits_reference(x, layout, bias), *exact)


def in_poison(layout: S24Bits) -> S24Bits:
    return replace(layout, words=amid_poison(layout.words), scales=amid_poison(layout.scales))


def test_what_it_does_not_take_is_refused() -> None:
    few = few_bits((3, 64), 8, 64, torch.bfloat16)
    layout = pack_s24_bits(few)
    for x, bias, message in [
        (torch.zeros(65, 64).bfloat16(), None, r"\[65, 64\]"),
        (torch.zeros(0, 64).bfloat16(), None, r"\[0, 64\]"),
        (torch.zeros(1, 4).bfloat16(), None, r"\[1, 4\]"),
        (torch.zeros(1, 64).half(), None, "float16"),
        (torch.zeros(1, 64, device="meta").bfloat16(), None, "on meta"),
        (torch.zeros(1, 64).bfloat16(), torch.zeros(4), r"3 rows has shape \[4\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            s24_bits(x, layout, bias)
    ones = pack_bits(torch.ones(3, 64, dtype=torch.bool))
    numbers, tall = torch.ones(192, dtype=torch.int8), torch.ones(1, 64).bfloat16()
    half = replace(few, dtype=torch.float16)
    for change, message in [
        (replace(few, dtype=torch.float32), "float32"),
        (replace(few, whole=numbers, bitmap=ones), "not 2:4"),
        (replace(few, scales=tall, group=3, axis="columns"), "along columns"),
        (replace(few, scales=few.scales.expand(3, 2), group=48), "not of 48"),
        (replace(few, whole=torch.full_like(few.whole, -128)), "below -127"),
        (replace(half, scales=torch.full_like(few.scales, 2.0**-20)), None),
        (replace(half, scales=torch.full_like(few.scales, 129 * 2.0**-27)), "not hold the scales"),
        (replace(half, scales=torch.full_like(few.scales, 64)), "1024 times them"),
        (replace(few, scales=torch.full_like(few.scales, 2.0**121)), "128 times them"),
    ]:
        if message is None:
            pack_s24_bits(change)  # a power of two that float16 holds
            continue
        with pytest.raises(ValueError, match=message):
            pack_s24_bits(change)


def test_instructions_are_those_of_the_isa() -> None:
    """By hand: the tables of lop3, a permutation with a sign, sums that round."""
    a, b, c = 0b11110000, 0b11001100, 0b10101010
    for table in (0xEA, 0x6A, 0x80, 0x01):
        assert lop3(a, b, c, table) & 0xFF == table
    assert prmt(0x33221100, 0x77665544, 0x7120) == 0x77112200
    assert int(prmt(0x00008000, 0, 0x9110)) & 0xFFFFFFFF == 0xFF808000
    word = torch.tensor([1.0, -3.0]).bfloat16().view(torch.int32)
    found = fma(word, word, 0x3F80BF80, torch.bfloat16)  # halves -1 and 1
    assert found.view(torch.bfloat16).tolist() == [0.0, 10.0]
    word = torch.tensor([257 / 256, 1.0]).half().view(torch.int32)
    found = fma(word, word, 0, torch.float16)
    assert found.view(torch.float16).tolist() == [1 + 2 / 256, 1.0]  # and 1 / 65536 is rounded off


def test_without_a_gpu_it_says_so() -> None:
    assert module.unavailable(torch.device("cpu")) == "needs an NVIDIA GPU"


def test_the_trial_before_use_finds_a_wrong_kernel(
    emulated: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    assert module._wrong(cpu) is None
    right = emulated._of_nibbles
    wrongly = lambda part, span, half: right(part, 1 - span, half)  # noqa: E731
    monkeypatch.setattr(emulated, "_of_nibbles", wrongly)
    assert module._wrong(cpu) == "[9, 1100] x [40, 1100] int4 torch.bfloat16"


@pytest.mark.gpu
def test_this_gpu_passes_the_trial() -> None:
    assert module.unavailable(torch.device("cuda", torch.cuda.current_device())) is None


@cache
def layer_on_gpu(shape: tuple[int, int], number: int, dtype: torch.dtype) -> tuple[Tensor, S24Bits]:
    """Once for all numbers of tokens."""
    few = few_bits(shape, number, shape[1] if number == 8 else 128, dtype, device="cuda")
    layout = pack_s24_bits(few)
    assert_same(unpack_s24_bits(layout), few)
    return expand_few(few), layout


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", TOKENS_ON_GPU)
@pytest.mark.parametrize("number", [8, 4])
@pytest.mark.parametrize("shape", [(4096, 14336), (1024, 4096), (333, 1100)], **ids)
@pytest.mark.parametrize("dtype", HALVES, **ids)
def test_on_a_gpu_at_the_size_of_a_layer(
    dtype: torch.dtype, shape: tuple[int, int], number: int, tokens: int, poisoned: Unwritten
) -> None:
    """The twin of the emulated test, a hundred times the same."""
    dense, layout = layer_on_gpu(shape, number, dtype)
    x = torch.randn(tokens, shape[1], device="cuda").to(dtype)
    bias = torch.randn(shape[0], device="cuda").to(dtype)
    for shift in (None, bias):
        y = s24_bits(x, layout, shift)
        assert poisoned(y) == 0
        assert_as_good_as_dense(y, x, dense, shift)
        for _ in range(100):
            assert torch.equal(s24_bits(x, layout, shift), y)
