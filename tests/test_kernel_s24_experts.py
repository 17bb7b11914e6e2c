"""The 2:4 product over experts: packing bit for bit, its own source run by an emulator, the code for GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from codegen import Job, can_compile, found
from gluon_on_cpu import on_cpu
from kernel_harness import MASKS, amid_poison, assert_within, bits, nm_matrix, truth
from torch import Tensor

from llmprune.kernels import s24_experts as experts_module
from llmprune.kernels import slots as slots_module
from llmprune.kernels.packed import pack, unpack
from llmprune.kernels.routing import route
from llmprune.kernels.s24_experts import (
    ExpertsLayout,
    pack_experts,
    s24_experts,
    s24_experts_reference,
    unpack_experts,
)
from llmprune.kernels.s24_layout import COLUMNS, ROWS, TILES

Unwritten = Callable[[Tensor], int]
HALVES = (torch.bfloat16, torch.float16)
ids = {"ids": lambda value: str(value).removeprefix("torch.")}


@pytest.fixture
def emulated(root: Path) -> Iterator[ModuleType]:
    kernels = root / "kernels"
    with on_cpu(kernels / "s24_gluon.py", kernels / "experts_gluon.py") as module:
        yield module


def stack(
    experts: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    mask: str = "random",
    device: str = "cpu",
) -> Tensor:
    """[experts, rows, columns], each expert another."""
    each = (nm_matrix(rows, columns, 2, 4, dtype, mask, e, device) for e in range(experts))
    return torch.stack(list(each))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(1, 1, 4), (3, 37, 300), (2, 64, 256)], **ids)
def test_what_is_packed_comes_back(
    shape: tuple[int, int, int], mask: str, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = HALVES[shape[0] % 2]
    dense = stack(*shape, dtype, mask)
    if mask == "random":
        dense.view(-1, 4)[0] = torch.tensor([torch.nan, 0, -0.0, 0]).to(dtype)
        dense.view(-1, 4)[-1] = torch.tensor([0, -torch.inf, 0, 0]).to(dtype)
    monkeypatch.setattr(slots_module, "BLOCK", 2 * shape[1] * shape[2])  # two experts at a time
    stored = dense.transpose(1, 2).contiguous() if transposed else dense
    packed = pack(stored)
    layout = pack_experts(packed, transposed)
    assert layout.shape == shape
    back = unpack_experts(layout, None, transposed)
    assert torch.equal(back.bitmap, packed.bitmap)
    assert torch.equal(bits(back.values), bits(packed.values))
    assert torch.equal(unpack(back).view(torch.int16), stored.view(torch.int16))


def test_zeros_that_are_kept_come_back_by_their_bitmap() -> None:
    dense = stack(3, 33, 12, torch.float16)
    keep = dense != 0
    dense[:, ::2] = 0
    dense[1, 1] = torch.where(keep[1, 1], -0.0, 0.0)
    packed = pack(dense, keep)
    back = unpack_experts(pack_experts(packed), packed.bitmap)
    assert torch.equal(bits(back.values), bits(packed.values))


# tokens, each to so many of (experts, rows, columns); warps, eights; how they are spread
CASES = {
    "one token": (1, 2, (4, 32, 256), 1, 1, "evenly"),
    "one expert, one row, one group": (1, 1, (1, 1, 4), 2, 1, "evenly"),
    "three tokens, ragged": (3, 2, (5, 37, 300), 4, 1, "evenly"),
    "as many as there are experts": (4, 2, (8, 16, 256), 2, 1, "evenly"),
    "all to the last": (19, 1, (3, 40, 260), 2, 1, "last"),
    "all to the last, 16 at once": (37, 1, (3, 40, 260), 2, 2, "last"),
    "more than experts, ragged, two rows of warps": (21, 3, (4, 70, 1100), 4, 2, "first"),
    "32 at once": (50, 2, (3, 130, 300), 4, 4, "first"),
    "64 at once, more than that to one": (75, 1, (2, 33, 260), 2, 8, "first"),
    "chunks left over": (9, 1, (2, 32, 1280), 2, 1, "evenly"),
    "of more experts than a load takes": (12, 4, (131, 16, 8), 1, 1, "evenly"),
    "some to an expert that there is not": (5, 2, (4, 32, 64), 1, 1, "beyond"),
}


def spread(tokens: int, each: int, experts: int, how: str) -> Tensor:
    random = torch.Generator().manual_seed(tokens)
    found = torch.rand(tokens, experts, generator=random).argsort(1)[:, :each]
    if how == "last":
        return torch.full_like(found, experts - 1)
    if how == "first":  # twice as likely as others, and the second gets nothing
        return torch.where(found == 1, 0, found)
    return found + 1 if how == "beyond" else found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("emulated")
def test_the_product_is_that_of_float64(case: str, poisoned: Unwritten) -> None:
    tokens, each, shape, warps, eights, how = CASES[case]
    dtype = HALVES[tokens % 2]
    torch.manual_seed(0)
    dense = stack(*shape, dtype, "fewer")
    layout = pack_experts(pack(dense))
    layout = ExpertsLayout(amid_poison(layout.words), layout.shape, layout.dtype)
    x = amid_poison(torch.randn(tokens, shape[2]).to(dtype) / shape[2] ** 0.5)
    chosen = spread(tokens, each, shape[0], how)
    order, ends = (amid_poison(part) for part in route(chosen, shape[0]))
    y = s24_experts(x, layout, order, ends, each, warps=warps, eights=eights)
    known = s24_experts_reference(x, layout, order, ends, each)
    beyond = chosen.flatten() >= shape[0]
    assert poisoned(y) == int(beyond.sum()) * shape[1]
    for product in (y, known):
        for e in chosen[chosen < shape[0]].unique().tolist():
            here = chosen.flatten() == e
            inputs = x.repeat_interleave(each, 0)[here]
            assert_within(product[here], *truth(inputs, dense[e]))


@pytest.mark.usefixtures("emulated")
def test_by_its_own_choice_and_from_any_address() -> None:
    layout = pack_experts(pack(stack(6, 64, 512, torch.bfloat16)))
    x = torch.randn(9 * 512 + 1).bfloat16()[1:].reshape(9, 512)
    assert x.data_ptr() % 16
    routed = route(spread(9, 2, 6, "evenly"), 6)
    plain = s24_experts(x.clone(), layout, *routed, 2)
    known = s24_experts_reference(x, layout, *routed, 2)
    torch.testing.assert_close(plain, known, atol=0.02, rtol=0.02)
    assert torch.equal(s24_experts(x, layout, *routed, 2), plain)
    assert s24_experts(x[:0], layout, *route(torch.zeros(0, 2, dtype=torch.long), 6), 2).shape == (
        0,
        64,
    )


def test_what_it_does_not_take_is_refused() -> None:
    layout = pack_experts(pack(torch.zeros(2, 3, 8).half()))
    x, (order, ends) = torch.zeros(2, 8).half(), route(torch.zeros(2, 2, dtype=torch.long), 2)
    for given, message in [
        ((x[:, :4], layout, order, ends, 2), r"\[2, 4\] and \[4\]"),
        ((x, layout, order, ends, 1), r"order \[inputs \* 1\]"),
        ((x, layout, order, ends[:1], 2), "2 experts have ends"),
        ((x, layout, order.long(), ends, 2), "int64"),
        ((x.bfloat16(), layout, order, ends, 2), "x is torch.bfloat16"),
        ((x.to("meta"), layout, order, ends, 2), "'cpu', 'meta'"),
    ]:
        with pytest.raises(ValueError, match=message):
            s24_experts(*given)
    for dense, message in [
        (torch.ones(2, 2, 8).bfloat16(), "not 2:4"),
        (torch.zeros(2, 2, 8), "float32"),
        (torch.zeros(2, 8).half(), r"\[2, 8\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            pack_experts(pack(dense))


def test_the_trial_before_use_finds_a_wrong_kernel(
    emulated: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    assert experts_module.unavailable(cpu) == "needs an NVIDIA GPU"
    assert experts_module._wrong(cpu) is None
    right = emulated._before
    monkeypatch.setattr(
        emulated, "_before", lambda ends, experts, place, L: right(ends, experts, place + 1, L)
    )
    assert experts_module._wrong(cpu) == "[1, 1280] x [4, 32, 1280] torch.bfloat16"


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 16, 64, 300])
@pytest.mark.parametrize("shape", [(128, 1536, 2048), (8, 4096, 14336), (32, 2880, 2880)], **ids)
def test_on_a_gpu_at_the_size_of_a_mixture(
    shape: tuple[int, int, int], tokens: int, poisoned: Unwritten
) -> None:
    """The twin of the emulated test, a hundred times the same."""
    assert experts_module.unavailable(torch.device("cuda", torch.cuda.current_device())) is None
    dense = stack(*shape, torch.bfloat16, device="cuda")
    layout = pack_experts(pack(dense))
    assert torch.equal(unpack(unpack_experts(layout)), dense)
    x = torch.randn(tokens, shape[2], device="cuda").bfloat16()
    for how in ("evenly", "first", "last"):
        chosen = spread(tokens, 2, shape[0], how).cuda()
        routed = route(chosen, shape[0])
        y = s24_experts(x, layout, *routed, 2)
        assert poisoned(y) == 0
        for e in chosen.unique().tolist()[:4]:
            here = chosen.flatten() == e
            assert_within(y[here], *truth(x.repeat_interleave(2, 0)[here], dense[e]))
        for _ in range(100):
            assert torch.equal(s24_experts(x, layout, *routed, 2), y)


# Slots per dense weight in the loop, by eights of inputs: those of s24_mma.
SLOTS = {1: 0.54, 4: 1.7, 8: 3.3}


def job(arch: int, eights: int, half: str = "bf16", every: bool = True, few: bool = False) -> Job:
    types = {"words": "*i32", "x": "*i32", "order": "*i32", "ends": "*i32"}
    types["y"] = "*bf16" if half == "bf16" else "*fp16"
    sizes = ["tiles", "chunks", "experts", "each", "out"]
    types |= dict.fromkeys(sizes, "i32")
    constants: dict[str, int | bool | str] = {"WARPS": 8, "ACROSS": min(eights, 4), "TILES": TILES}
    constants |= {"EIGHTS": eights, "HALF": half, "ALL": every, "FEW": few}
    return Job("experts_gluon", "experts_kernel", types, constants, 8, arch, True, sizes)


def with_ones(one: Job, *names: str) -> Job:
    types = {name: of for name, of in one.types.items() if name not in names}
    sizes = [name for name in one.unaligned if name not in names]
    constants = one.constants | dict.fromkeys(names, 1)
    return replace(one, types=types, constants=constants, unaligned=sizes)


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_it_compiles_to_sparse_tensor_cores(arch: int, root: Path) -> None:
    if not can_compile():
        pytest.skip("the ptxas and cuobjdump that triton ships do not run here")
    jobs = [job(arch, 1, few=True) if arch in (80, 90) else job(arch, 2, "f16", every=False)]
    jobs += [job(arch, eights) for eights in (4, 8)] if arch == 90 else []
    # what is 1 becomes a constant: of a down projection, and of one expert of few columns
    jobs += [with_ones(job(arch, 1, few=True), "each")] if arch == 89 else []
    jobs += [with_ones(job(arch, 2), "chunks", "experts", "each")] if arch == 80 else []
    for one, what in zip(found(jobs, root), jobs, strict=True):
        eights = int(what.constants["EIGHTS"])
        assert one.stack <= 16, "registers are spilled"
        if "chunks" not in what.types:
            continue  # there is no loop
        assert not {"LDS", "STS", "BAR", "LDL", "STL"} & one.loop.keys(), one.loop
        half = ".BF16" if what.constants["HALF"] == "bf16" else ""
        assert one.names == [f"HMMA.SP.16832.F32{half}"]
        assert one.loop["HMMA"] == 8 * TILES * eights
        assert one.loop["SHFL"] == 8 * 2 * eights
        took = one.per_weight(TILES * ROWS * COLUMNS)
        if what.constants["ALL"]:
            assert took <= SLOTS[eights], f"{eights}: {took:.2f} slots per weight, {one.loop}"
