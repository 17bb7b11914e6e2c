"""What the tests of the sparse matrix products share: awkward matrices, and the truth in float64."""

from __future__ import annotations

import torch
from conftest import INTERPRETED
from torch import Tensor

TOKENS_ON_GPU = (1, 2, 3, 7, 8, 9, 16, 17, 33, 64)
MASKS = ("random", "fewer", "none", "first places", "last places")


def bits(tensor: Tensor) -> Tensor:
    """The bytes, for comparing NaN and minus zero exactly."""
    return tensor.contiguous().view(torch.uint8)


def nm_matrix(
    rows: int,
    columns: int,
    n: int,
    m: int,
    dtype: torch.dtype,
    mask: str = "random",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """[rows, columns] with at most n of every m neighbours not zero, where `mask` says."""
    random = torch.Generator(device).manual_seed(seed)
    shape = (rows, columns // m, m)
    groups = torch.randn(shape, generator=random, device=device)
    order = torch.rand(shape, generator=random, device=device)
    if mask == "first places":
        order = torch.arange(m, 0, -1, device=device).expand(shape)
    if mask == "last places":
        order = torch.arange(m, device=device).expand(shape)
    keep = torch.zeros(shape, dtype=torch.bool, device=device)
    keep.scatter_(2, order.topk(n, dim=2).indices, True)
    if mask == "fewer":  # some groups keep none, some rows too
        keep &= torch.rand(shape, generator=random, device=device) < 0.6
        keep[rows // 2] = False
    if mask == "none":
        keep[:] = False
    return torch.where(keep, groups, 0.0).to(dtype).reshape(rows, columns)


def amid_poison(tensor: Tensor) -> Tensor:
    """A copy with NaN (or a word of ones) on both sides in memory: whoever reads outside shows it."""
    room = 4096 // tensor.element_size()
    around = torch.full(
        (tensor.numel() + 2 * room,),
        float("nan") if tensor.dtype.is_floating_point else -1,
        dtype=tensor.dtype,
        device=tensor.device,
    )
    inside = around[room : room + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor)


def truth(
    x: Tensor,  # [tokens, columns]
    dense: Tensor,  # [rows, columns]
    bias: Tensor | None = None,  # [rows]
) -> tuple[Tensor, Tensor]:
    """The product x @ dense.T + bias in float64, and what a float32 sum in any order may be off by."""
    exact = x.double() @ dense.double().T
    # The error of a float32 sum is below its length times half a unit of the sum of magnitudes.
    lost = (x.double().abs() @ dense.double().abs().T) * ((dense.shape[1] + 4) * 2.0**-24)
    if bias is not None:
        exact += bias.double()
        lost += bias.double().abs() * 2.0**-23
    return exact, lost


def gated_truth(
    x: Tensor, gate: Tensor, up: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `truth`, of silu(x @ gate.T + bias) * (x @ up.T + bias); bias of gate, then of up."""
    of_gate, of_up = (None, None) if bias is None else bias.chunk(2)
    (g, lost_g), (u, lost_u) = truth(x, gate, of_gate), truth(x, up, of_up)
    exact = torch.nn.functional.silu(g) * u
    lost = 1.1 * lost_g * (u.abs() + lost_u) + torch.nn.functional.silu(g).abs() * lost_u
    return exact, lost + exact.abs() * 2.0**-20  # the slope of silu is below 1.1


def assert_within(y: Tensor, exact: Tensor, lost: Tensor) -> None:
    """`y` is `exact` to `lost` and the rounding to its own dtype."""
    # Triton's interpreter cuts a float32 off where a GPU rounds it to bfloat16: a whole unit.
    half = 1.0 if INTERPRETED and y.dtype is torch.bfloat16 else 0.5
    unit = torch.finfo(y.dtype).eps * half * exact.abs() + torch.finfo(y.dtype).tiny
    assert y.shape == exact.shape
    error = (y.double() - exact).abs()
    share = (error / (unit * 1.001 + 1.01 * lost)).max()
    assert share <= 1, f"off by {error.max():.3g}, {share:.3g} times what it may be"


def assert_as_good_as_dense(
    y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None = None, twice: float = 2
) -> None:
    """On a GPU: the error against float64 is at most twice that of the dense product of torch."""
    exact = torch.nn.functional.linear(
        x.double(), dense.double(), None if bias is None else bias.double()
    )
    theirs = (torch.nn.functional.linear(x, dense, bias).double() - exact).abs()
    ours = (y.double() - exact).abs()
    assert float(ours.max()) <= twice * float(theirs.max())
    assert float(ours.mean()) <= twice * float(theirs.mean())
