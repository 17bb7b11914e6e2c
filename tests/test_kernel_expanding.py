"""Expanding on a GPU: the Triton kernels, bit for bit what plain torch gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_harness import MASKS, amid_poison, bits, nm_matrix
from torch import Tensor

from llmprune.kernels import expanding, gpu
from llmprune.kernels.expanding import dense_of, from_bitmap, from_gemv, from_s24
from llmprune.kernels.gemv_layout import GemvLayout, pack_gemv
from llmprune.kernels.n8_layout import pack_n8
from llmprune.kernels.packed import Packed, pack
from llmprune.kernels.s24_layout import S24Layout, pack_s24

Unwritten = Callable[[Tensor], int]
HALVES = (torch.bfloat16, torch.float16)
PATTERNS = [(2, 4), (1, 2), (1, 4), (3, 4), (4, 8), (3, 8), (8, 16), (5, 16), (12, 16)]
ids = {"ids": lambda value: str(value).removeprefix("torch.")}


def any_bits(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Words of every kind: NaN with payloads, both zeros."""
    random = torch.Generator().manual_seed(rows)
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    info = torch.iinfo(word)
    words = torch.randint(info.min, info.max, (rows, columns), generator=random, dtype=word)
    words[torch.rand(rows, columns, generator=random) < 0.1] = info.min  # -0.0
    return words.view(dtype)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], **ids)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], **ids)
@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 77), (2, 1100), (7, 1024)], **ids)
def test_from_a_bitmap(
    shape: tuple[int, int],
    share: float,
    dtype: torch.dtype,
    device: torch.device,
    poisoned: Unwritten,
) -> None:
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < share
    dense = torch.where(keep, any_bits(*shape, torch.float32).to(dtype), 0)
    packed = pack(dense.float(), keep)
    packed = Packed(packed.values.to(dtype), packed.bitmap, shape)
    if dtype in HALVES:
        dense = torch.where(keep, any_bits(*shape, dtype).view(torch.int16), 0).view(dtype)
        packed = pack(dense, keep)
    packed = packed.to(device)
    around = Packed(amid_poison(packed.values), packed.bitmap, shape)
    out = from_bitmap(around)
    assert out.dtype == dtype
    assert torch.equal(bits(out.cpu()), bits(dense))


@pytest.mark.parametrize("missing", [1, 3])
def test_a_bitmap_that_asks_for_too_much_gets_zeros(missing: int, device: torch.device) -> None:
    """As a damaged checkpoint's: nothing outside of the values is read."""
    dense = nm_matrix(4, 32, 2, 4, torch.bfloat16)
    packed = pack(dense).to(device)
    values = amid_poison(packed.values[:-missing].contiguous())
    out = from_bitmap(Packed(values, packed.bitmap, packed.shape)).cpu()
    assert not out.isnan().any()
    assert int((out != dense).sum()) == missing
    none = from_bitmap(Packed(values[:0], packed.bitmap, packed.shape))
    assert not none.any()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(1, 4), (16, 256), (37, 300), (64, 520)], **ids)
def test_from_s24(
    shape: tuple[int, int], mask: str, device: torch.device, poisoned: Unwritten
) -> None:
    dense = nm_matrix(*shape, 2, 4, HALVES[shape[0] % 2], mask).to(device)
    layout = pack_s24(pack(dense))
    layout = S24Layout(amid_poison(layout.words), layout.shape, layout.dtype)
    assert torch.equal(bits(from_s24(layout)), bits(dense))


@pytest.mark.parametrize(("n", "m"), PATTERNS, **ids)
@pytest.mark.parametrize(("shape", "mask"), [((37, 11), "random"), ((64, 33), "fewer")], **ids)
def test_from_gemv(
    shape: tuple[int, int], mask: str, n: int, m: int, device: torch.device, poisoned: Unwritten
) -> None:
    rows, groups = shape
    dense = nm_matrix(rows, groups * m, n, m, HALVES[n % 2], mask).to(device)
    layout = pack_gemv(pack(dense), n, m)
    layout = GemvLayout(amid_poison(layout.words), layout.shape, layout.dtype, layout.chunk)
    assert torch.equal(bits(from_gemv(layout)), bits(dense))


@pytest.mark.parametrize("dtype", HALVES, **ids)
def test_every_bit_pattern_survives(dtype: torch.dtype, device: torch.device) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    dense = torch.zeros(64, 1024, 2, dtype=dtype)
    dense[::2, :, 1], dense[1::2, :, 0] = every.reshape(2, 32, 1024)
    dense = dense.reshape(64, 2048).to(device)
    packed = pack(dense)
    for given in (
        from_bitmap(packed),
        from_s24(pack_s24(packed)),
        from_gemv(pack_gemv(packed, 2, 4)),
    ):
        assert torch.equal(bits(given), bits(dense))


def test_the_trial_before_use_finds_a_wrong_kernel(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert expanding._wrong(device) is None
    monkeypatch.setattr(expanding, "from_gemv", lambda layout: from_gemv(layout) + 1)
    assert expanding._wrong(device) == "the expansion for nm_gemv"


def test_what_fails_its_trial_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = nm_matrix(8, 32, 2, 4, torch.bfloat16)
    packed = pack(dense)
    monkeypatch.setattr(expanding, "unavailable", lambda device: "is old")
    for held in (packed, pack_s24(packed), pack_gemv(packed, 2, 4), pack_n8(packed, 4)):
        assert torch.equal(bits(dense_of(held)), bits(dense))
    assert expanding.how(torch.device("cpu")) == "by plain torch (is old)"
    called = list[object]()
    monkeypatch.setattr(expanding, "unavailable", lambda device: None)
    for name in ("from_bitmap", "from_s24", "from_gemv", "from_n8"):
        monkeypatch.setattr(expanding, name, called.append)
    for held in (packed, pack_s24(packed), pack_gemv(packed, 2, 4), pack_n8(packed, 4)):
        dense_of(held)
    assert len(called) == 4


def test_answers_are_kept_but_not_while_the_device_is_occupied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = list[torch.device]()

    @gpu.once
    def why(device: torch.device) -> str | None:
        asked.append(device)
        return "no"

    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    monkeypatch.setattr(gpu, "occupied", lambda device: True)
    assert why(first).startswith("not tried before")
    assert asked == []
    monkeypatch.setattr(gpu, "occupied", lambda device: False)
    assert [why(first), why(first), why(second)] == ["no"] * 3
    assert asked == [first, second]
    monkeypatch.setattr(gpu, "occupied", lambda device: True)
    assert why(first) == "no"


def test_a_trial_says_what_went_wrong() -> None:
    pytest.importorskip("triton")
    cpu = torch.device("cpu")

    def cuda(device: torch.device) -> str:
        raise RuntimeError("CUDA error: an illegal memory access\nCompile with DSA")

    def nothing(device: torch.device) -> str:
        raise RuntimeError

    assert gpu.trial(cpu, lambda device: None) is None
    assert gpu.trial(cpu, lambda device: "row 3") == "gives wrong results on this GPU: row 3"
    assert gpu.trial(cpu, cuda) == "does not run on this GPU: CUDA error: an illegal memory access"
    assert gpu.trial(cpu, nothing) == "does not run on this GPU: RuntimeError"


def test_a_trial_goes_as_it_does_alone_in_any_mode(device: torch.device) -> None:
    """As when a layer is first laid out under autocast, on another default device, or for inference."""
    pytest.importorskip("triton")

    def modes(device: torch.device) -> str | None:
        x = torch.ones(2, 2)
        assert (x @ x).dtype == torch.float32
        assert not x.is_inference()
        return expanding._wrong(device)

    with torch.autocast(device.type, torch.bfloat16), torch.device("meta"), torch.inference_mode():
        assert gpu.trial(device, modes) is None


@pytest.mark.gpu
def test_this_gpu_passes_the_trial() -> None:
    assert expanding.unavailable(torch.device("cuda", torch.cuda.current_device())) is None


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 14336), (11008, 4096), (1023, 4100)], **ids)
def test_on_a_gpu_at_the_size_of_a_layer(shape: tuple[int, int], poisoned: Unwritten) -> None:
    for n, m in ((2, 4), (4, 8), (8, 16)):
        if shape[1] % m:
            continue
        dense = nm_matrix(*shape, n, m, torch.bfloat16, "fewer", device="cuda")
        packed = pack(dense)
        assert torch.equal(bits(from_bitmap(packed)), bits(dense))
        assert torch.equal(bits(from_gemv(pack_gemv(packed, n, m))), bits(dense))
        if m == 4:
            assert torch.equal(bits(from_s24(pack_s24(packed))), bits(dense))


@pytest.mark.gpu
def test_a_cuda_graph_records_an_expansion() -> None:
    packed = pack(nm_matrix(256, 512, 2, 4, torch.bfloat16, device="cuda"))
    expected = dense_of(packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = dense_of(packed)
    given.zero_()
    graph.replay()
    assert torch.equal(given, expected)
