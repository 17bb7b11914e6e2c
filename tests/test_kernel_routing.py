"""What is routed to experts, sorted in one launch: by Triton's interpreter, and the code for GPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from codegen import Job, can_compile, found
from conftest import INTERPRETED
from torch import Tensor

from llmprune.kernels import routing
from llmprune.kernels.routing import by_triton, route, route_reference

pytest.importorskip("triton", reason="triton is not installed on this platform")


def test_what_is_routed_is_sorted(device: torch.device) -> None:
    chosen = torch.tensor([[3, 0], [0, 5], [3, 1]], device=device)
    for way in (route, by_triton, route_reference):
        order, ends = way(chosen, 5)  # there is no expert 5
        assert order.tolist() == [1, 2, 5, 0, 4, 3]
        assert ends.tolist() == [2, 3, 3, 5, 5]
        assert (order.dtype, ends.dtype) == (torch.int32, torch.int32)
    none, nowhere = route(chosen[:0], 5)
    assert none.shape == (0,)
    assert nowhere.tolist() == [0] * 5


def chosen_of(tokens: int, each: int, experts: int) -> Tensor:
    random = torch.Generator().manual_seed(tokens)
    return torch.rand(tokens, experts, generator=random).argsort(1)[:, :each]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(
    ("tokens", "each", "experts"), [(1, 1, 1), (1, 8, 128), (33, 4, 60), (65, 2, 8), (40, 8, 257)]
)
def test_it_equals_plain_torch(
    tokens: int, each: int, experts: int, dtype: torch.dtype, device: torch.device
) -> None:
    chosen = chosen_of(tokens, each, experts).to(device, dtype)
    for ids in (chosen, torch.full_like(chosen, experts - 1), chosen + experts // 2, chosen.T):
        for one, other in zip(by_triton(ids, experts), route_reference(ids, experts), strict=True):
            assert torch.equal(one, other)


def test_it_is_tried_before_use(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    assert routing._wrong(device) is None
    if INTERPRETED:
        assert routing.unavailable(device) == "needs an NVIDIA GPU"
    right = routing.by_triton
    monkeypatch.setattr(routing, "by_triton", lambda ids, experts: right(ids + 1, experts))
    assert routing._wrong(device) == "1 tokens to 8 of 128"


@pytest.mark.parametrize("arch", [80, 90])
def test_it_compiles(arch: int, root: Path) -> None:
    if not can_compile():
        pytest.skip("the ptxas and cuobjdump that triton ships do not run here")
    types = {"ids": "*i64", "order": "*i32", "ends": "*i32", "routed": "i32", "experts": "i32"}
    constants: dict[str, int | bool | str] = {"BLOCK": routing._BLOCK, "WIDE": routing._WIDE}
    job = Job(
        "routing_triton", "route_kernel", types, constants, 4, arch, False, ["routed", "experts"]
    )
    one = {name: of for name, of in types.items() if name != "routed"}
    jobs = [
        job,
        replace(job, types=one, constants=constants | {"routed": 1}, unaligned=["experts"]),
    ]
    assert all(code.stack <= 16 for code in found(jobs, root))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 512, 2048])
def test_on_a_gpu_it_equals_plain_torch(tokens: int) -> None:
    chosen = chosen_of(tokens, 8, 128).cuda()
    assert routing.unavailable(chosen.device) is None
    for one, other in zip(route(chosen, 128), route_reference(chosen, 128), strict=True):
        assert torch.equal(one, other)
