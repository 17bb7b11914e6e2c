"""The 2:4 product on sparse tensor cores: its packing bit for bit, its own source run by an emulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import INTERPRETED
from gluon_on_cpu import LANES, mma_sp, on_cpu
from kernel_harness import (
    MASKS,
    TOKENS_ON_GPU,
    amid_poison,
    assert_as_good_as_dense,
    assert_within,
    bits,
    gated_truth,
    nm_matrix,
    truth,
)
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from llmprune.kernels import s24_mma as s24
from llmprune.kernels import slots as slots_module
from llmprune.kernels.packed import pack, unpack
from llmprune.kernels.s24_layout import S24Layout, pack_gate_up, pack_s24, unpack_s24

Unwritten = Callable[[Tensor], int]
HALVES = (torch.bfloat16, torch.float16)
ids = {"ids": lambda value: str(value).removeprefix("torch.")}


@pytest.fixture
def emulated(root: Path) -> Iterator[ModuleType]:
    if not INTERPRETED:
        pytest.skip("the kernel that adds the parts of a split is compiled here, not interpreted")
    with on_cpu(root / "kernels" / "s24_gluon.py") as module:
        yield module


def matrix(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    mask: str = "random",
    seed: int = 0,
    device: str = "cpu",
) -> Tensor:
    return nm_matrix(rows, columns, 2, 4, dtype, mask, seed, device)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(1, 4), (16, 256), (37, 300), (64, 520)], **ids)
def test_what_is_packed_comes_back(shape: tuple[int, int], mask: str) -> None:
    dtype = HALVES[shape[0] % 2]
    gate, up = (matrix(*shape, dtype, mask, seed) for seed in (0, 1))
    (back,) = unpack_s24(pack_s24(pack(gate)))
    assert torch.equal(bits(unpack(back)), bits(gate))
    assert torch.equal(back.bitmap, pack(gate).bitmap)
    both = unpack_s24(pack_gate_up(pack(gate), pack(up)))
    for dense, packed in zip((gate, up), both, strict=True):
        assert torch.equal(bits(unpack(packed)), bits(dense))


def test_in_blocks_of_rows_as_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up = (pack(matrix(150, 512, torch.float16, seed=seed)) for seed in (0, 1))
    whole = pack_gate_up(gate, up)
    monkeypatch.setattr(slots_module, "BLOCK", 32 * 512)
    assert torch.equal(pack_gate_up(gate, up).words, whole.words)
    assert torch.equal(unpack(unpack_s24(whole)[1]), unpack(up))


@pytest.mark.parametrize("dtype", HALVES, **ids)
def test_every_bit_pattern_survives(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    dense = torch.zeros(256, 256, 2, dtype=dtype)
    dense[..., 1] = every.reshape(256, 256)
    dense = dense.reshape(256, 512)
    assert torch.equal(bits(unpack(unpack_s24(pack_s24(pack(dense)))[0])), bits(dense))


def test_nine_bits_per_weight() -> None:
    assert pack_s24(pack(matrix(64, 1024, torch.bfloat16))).bytes * 8 == 9 * 64 * 1024


def test_places_are_those_of_cutlass() -> None:
    """Independent of us: how torch orders places for CUTLASS, whose kernels run on GPUs.

    There a word serves two instructions, rows 0-15 by selector 0 and 16-31 by selector 1; here two steps.
    """
    dense = matrix(32, 256, torch.float16)
    words = pack_s24(pack(dense)).words[:, 0, 0]  # [tile, lane, word]
    order = [
        4 * (q % 2) + q // 2 for q in range(8)
    ]  # which group of the matrix the instruction's q is
    in_order = dense.reshape(32, 8, 8, 4)[:, :, order].reshape(32, 256)
    _, meta = sparse_semi_structured_from_dense_cutlass(in_order)
    theirs = meta.flatten().view(torch.int32).reshape(8, 32)  # [step, lane]
    g, t = LANES // 4, LANES % 4
    for tile in range(2):
        for word in range(4):
            expected = theirs[2 * word + t // 2, 4 * g + 2 * tile + t % 2]
            assert torch.equal(words[tile, :, word], expected)


def test_the_emulated_instruction_multiplies() -> None:
    """`mma_sp` on fragments written down by hand: row 9, columns 21 and 23, token 6."""
    a, b = torch.zeros(32, 8), torch.zeros(32, 8)
    places = torch.full((32,), 0x44444444, dtype=torch.int32)
    # Columns 20-23 are group 5, kept values 10 and 11: lane g = 1, t = 1, word 2, and 2 + 1 for row g + 8.
    a[4 * 1 + 1, 6:8] = torch.tensor([2.0, 3.0])
    # Group 5 is told by the second lane of the selector: its group 1, upper half of the word; places 1 and 3.
    places[4 * 1 + 1] = 0x44D44444
    # Column 21 of token 6 is lane g = 6, t = 2, second of word 2; column 23 lane t = 3.
    b[4 * 6 + 2, 5], b[4 * 6 + 3, 5] = 10.0, 100.0
    a, b = (m.half().view(torch.int32) for m in (a, b))
    d = mma_sp(a, b, torch.zeros(32, 4), places, 0, torch.float16)
    # Row 9, token 6: lane g = 1, t = 3, third sum.
    assert d.nonzero().tolist() == [[4 * 1 + 3, 2]]
    assert d[4 * 1 + 3, 2] == 2 * 10 + 3 * 100


CASES = {
    "one token": (1, 32, 256, 1, 1, False),
    "one row, one group": (1, 1, 4, 2, 1, False),
    "two tokens, two chunks": (2, 32, 512, 2, 1, False),
    "seven tokens, ragged": (7, 37, 300, 2, 1, False),
    "nine tokens, chunks left over": (9, 48, 1280, 4, 1, False),
    "17 tokens": (17, 16, 256, 1, 1, False),
    "64 tokens": (64, 33, 260, 2, 1, False),
    "16 tokens, two warps on the same columns": (16, 64, 512, 4, 1, False),
    "33 tokens, four warps on the same columns, ragged": (33, 250, 1100, 8, 2, False),
    "20 tokens, no warps but on the same columns": (20, 128, 512, 4, 1, False),
    "17 tokens, rows for two warps only": (17, 192, 300, 8, 1, False),
    "split": (3, 40, 1024, 2, 2, False),
    "split, ragged, a part without columns": (8, 40, 1300, 2, 5, False),
    "gate and up": (1, 32, 512, 2, 1, True),
    "gate and up, ragged": (16, 37, 300, 2, 1, True),
    "gate and up, split": (5, 24, 772, 2, 2, True),
}


@pytest.mark.parametrize("dtype", HALVES, **ids)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("emulated")
def test_the_product_is_that_of_float64(case: str, dtype: torch.dtype, poisoned: Unwritten) -> None:
    tokens, rows, columns, warps, split, gated = CASES[case]
    torch.manual_seed(0)
    gate, up = matrix(rows, columns, dtype, "fewer"), matrix(rows, columns, dtype, seed=1)
    layout = pack_gate_up(pack(gate), pack(up)) if gated else pack_s24(pack(gate))
    layout = S24Layout(amid_poison(layout.words), layout.shape, layout.dtype, layout.gated)
    x = amid_poison(torch.randn(tokens, columns).to(dtype) / columns**0.5)
    bias = torch.randn(rows * (2 if gated else 1)).to(dtype) if tokens % 2 else None
    exact = gated_truth(x, gate, up, bias) if gated else truth(x, gate, bias)
    y = s24.s24_mma(x, layout, bias, warps=warps, split=split)
    assert poisoned(y) == 0
    assert_within(y, *exact)
    assert_within(s24.s24_mma_reference(x, layout, bias), *exact)


@pytest.mark.usefixtures("emulated")
def test_inputs_and_bias_on_any_address() -> None:
    layout = pack_s24(pack(matrix(16, 256, torch.bfloat16)))
    x = torch.randn(3 * 256 + 1).bfloat16()[1:].reshape(3, 256)
    assert x.data_ptr() % 16
    plain = s24.s24_mma(x.clone(), layout, warps=1)
    assert torch.equal(s24.s24_mma(x, layout, warps=1), plain)
    assert torch.equal(s24.s24_mma(x.T.contiguous().T, layout, warps=1), plain)
    bias = torch.randn(2, 16).T  # neighbours lie two apart
    shifted = [s24.s24_mma(x, layout, b, warps=1) for b in (bias[:, 0], bias[:, 0].clone())]
    assert torch.equal(*shifted)
    assert not torch.equal(shifted[0], plain)


def test_what_it_does_not_take_is_refused() -> None:
    layout = pack_s24(pack(torch.zeros(3, 8).bfloat16()))
    for x, bias, message in [
        (torch.zeros(65, 8).bfloat16(), None, r"\[65, 8\]"),
        (torch.zeros(0, 8).bfloat16(), None, r"\[0, 8\]"),
        (torch.zeros(1, 4).bfloat16(), None, r"\[1, 4\]"),
        (torch.zeros(1, 8).half(), None, "float16"),
        (torch.zeros(1, 8, device="meta").bfloat16(), None, "on meta"),
        (torch.zeros(1, 8).bfloat16(), torch.zeros(4), r"3 rows has shape \[4\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            s24.s24_mma(x, layout, bias)
    for dense, message in [
        (torch.ones(2, 8).bfloat16(), "not 2:4: 4 of 4 groups"),
        (torch.zeros(2, 8), "float32"),
        (torch.zeros(2, 2, 8).bfloat16(), r"\[2, 2, 8\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            pack_s24(pack(dense))
    with pytest.raises(ValueError, match=r"differ in shape: \(2, 8\) and \(2, 4\)"):
        pack_gate_up(pack(torch.zeros(2, 8).half()), pack(torch.zeros(2, 4).half()))


def test_without_a_gpu_it_says_so() -> None:
    assert s24.unavailable(torch.device("cpu")) == "needs an NVIDIA GPU"


def test_the_trial_before_use_finds_a_wrong_kernel(
    emulated: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    assert s24._wrong(cpu) is None
    right = emulated._mma
    monkeypatch.setattr(emulated, "_mma", lambda step, half: right(step ^ 1, half))
    wrong = s24._wrong(cpu)
    assert wrong is not None
    assert wrong.startswith("[1, 2048] x [32, 2048] torch.bfloat16")


@pytest.mark.gpu
def test_this_gpu_passes_the_trial() -> None:
    assert s24.unavailable(torch.device("cuda", torch.cuda.current_device())) is None


@cache
def layer_on_gpu(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, S24Layout]:
    """Once for all numbers of tokens."""
    dense = matrix(*shape, dtype, device="cuda")
    layout = pack_s24(pack(dense))
    assert torch.equal(unpack(unpack_s24(layout)[0]), dense)
    return dense, layout


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", TOKENS_ON_GPU)
@pytest.mark.parametrize("shape", [(4096, 14336), (1024, 4096), (11008, 4096)], **ids)
@pytest.mark.parametrize("dtype", HALVES, **ids)
def test_on_a_gpu_at_the_size_of_a_layer(
    dtype: torch.dtype, shape: tuple[int, int], tokens: int, poisoned: Unwritten
) -> None:
    """The twin of the emulated test, a hundred times the same."""
    dense, layout = layer_on_gpu(shape, dtype)
    x = torch.randn(tokens, shape[1], device="cuda").to(dtype)
    bias = torch.randn(shape[0], device="cuda").to(dtype)
    for shift in (None, bias):
        y = s24.s24_mma(x, layout, shift)
        assert poisoned(y) == 0
        assert_as_good_as_dense(y, x, dense, shift)
        for _ in range(100):
            assert torch.equal(s24.s24_mma(x, layout, shift), y)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", TOKENS_ON_GPU)
def test_gate_and_up_on_a_gpu(tokens: int, poisoned: Unwritten) -> None:
    gate, up = (matrix(14336, 4096, torch.bfloat16, seed=seed, device="cuda") for seed in (0, 1))
    layout = pack_gate_up(pack(gate), pack(up))
    x = torch.randn(tokens, 4096, device="cuda").bfloat16() / 64
    bias = torch.randn(2 * 14336, device="cuda").bfloat16()
    for shift in (None, bias):
        y = s24.s24_mma(x, layout, shift)
        assert poisoned(y) == 0
        assert_within(y, *gated_truth(x, gate, up, shift))
        for _ in range(100):
            assert torch.equal(s24.s24_mma(x, layout, shift), y)
