"""2:4 in int8 and int4 in the benchmarks: rehearsed on a CPU with the kernel in its emulator."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import INTERPRETED
from gluon_on_cpu import on_cpu

from llmprune.kernels.few_bits import expand_few
from llmprune.kernels.packed import unpack_bits

pytest.importorskip("triton", reason="triton is not installed on this platform")
CPU = torch.device("cpu")


@pytest.fixture
def bench(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives a module of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def emulated(root: Path) -> Iterator[None]:
    if not INTERPRETED:
        pytest.skip("what a GPU runs needs no emulator")
    kernels = root / "kernels"
    with on_cpu(kernels / "s24_gluon.py", kernels / "s24_bits_gluon.py"):
        yield


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_rounded_to_the_nearest(bits: int, bench: Any) -> None:
    few_tokens, rounded = bench("few_tokens"), bench("rounded")
    random = torch.Generator().manual_seed(0)
    dense = few_tokens._matrix((37, 300), CPU, random)
    few = rounded.rounded(dense, bits)
    group = 300 if bits == 8 else 128
    assert (few.bits, few.group, few.dtype) == (bits, group, dense.dtype)
    assert torch.equal(unpack_bits(few.bitmap, 300), dense != 0)
    scale = few.scales.double().repeat_interleave(group, 1)[:, :300]
    # Half a step; and what 127 steps lose where scale and product become bfloat16.
    lost = 0.5 * scale + dense.double().abs() * 2.0**-8
    assert ((expand_few(few).double() - dense.double()).abs() <= lost).all()


@pytest.mark.parametrize("name", ["s24_bits int8", "s24_bits int4"])
@pytest.mark.usefixtures("emulated")
def test_the_checks_before_timing_hold_it_against_what_it_stands_for(
    name: str, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    correct, few_tokens = bench("correct"), bench("few_tokens")
    monkeypatch.setattr(correct, "bits_unavailable", lambda device: None)
    found = correct.examine(f"{name} bfloat16", CPU, True)
    assert (found.cases, found.wrong, found.refused) == (2, [], None)

    dense = few_tokens._matrix((32, 256), CPU, torch.Generator().manual_seed(0))
    state = few_tokens.Bench(CPU, 1.0, (name,), ())
    everyone = [
        *bench("baselines").contenders(dense, (), {}),
        *few_tokens._ours(dense, None, (name,)),
    ]
    assert [c.name for c in everyone] == ["dense", name]
    x = torch.randn(3, 256).bfloat16()
    assert few_tokens._right(state, "here", everyone, x, dense) == everyone
    wrong = bench("baselines").Contender(name, 64, 1, everyone[1].products, 1.1 * dense)
    assert few_tokens._right(state, "here", [everyone[0], wrong], x, dense) == everyone[:1]
    assert [line.split(":")[0] for line in state.wrong] == [f"{name}, here"]
