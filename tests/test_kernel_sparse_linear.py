"""The product with a packed matrix, held against the dense matrix in float64 and in its own dtype."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llmprune.kernels import choice, expand
from llmprune.kernels.interface import Case
from llmprune.kernels.packed import Packed, pack, unpack
from llmprune.kernels.sparse_linear import expanded, sparse_linear, sparse_linear_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {
    "ragged": (13, 21),
    "one row": (1, 17),
    "one column": (19, 1),
    "one weight": (1, 1),
    "whole bytes": (32, 64),
}
INPUTS = {"vector": (), "matrix": (5,), "batch": (2, 3), "one token": (1, 1), "none": (0,)}


def matrix(
    rows: int, columns: int, dtype: torch.dtype = torch.float32, share: float = 0.5
) -> Tensor:
    random = torch.Generator().manual_seed(rows * 1000 + columns)
    dense = torch.randn(rows, columns, generator=random)
    dense[torch.rand(rows, columns, generator=random) < share] = 0
    return dense.to(dtype)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)


def exact(x: Tensor, dense: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    wide = dense.double()
    bias = None if bias is None else bias.double()
    return F.linear(x.double(), wide.T if transposed else wide, bias)


def run(x: Tensor, packed: Packed, bias: Tensor | None, transposed: bool) -> Tensor:
    return sparse_linear(
        x, [packed.values, packed.bitmap], bias, "expand", packed.shape, transposed
    )


@pytest.fixture(params=[None, 40], ids=["one tile", "many tiles"])
def _tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole matrices, and tiles of a row or two with a ragged last one."""
    if request.param:
        monkeypatch.setattr(expand, "TILE", request.param)


@pytest.mark.usefixtures("_tile")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("leading", INPUTS.values(), ids=INPUTS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_as_exact_as_one_product(shape, leading, biased, transposed, dtype):
    dense = matrix(*shape, dtype=dtype)
    features, out = shape if transposed else shape[::-1]
    x = inputs(*leading, features, dtype=dtype)
    bias = inputs(out, dtype=dtype) if biased else None
    given = run(x, pack(dense), bias, transposed)
    truth = exact(x, dense, bias, transposed)
    assert given.dtype == dtype
    assert given.shape == truth.shape == (*leading, out)
    plain = sparse_linear_reference(x, pack(dense), bias, transposed)
    # the dense product's own error, and what a sum in another order may add in the last place
    room = (plain.double() - truth).abs().max() if truth.numel() else torch.zeros(())
    scale = truth.abs().max() if truth.numel() else torch.zeros(())
    torch.testing.assert_close(
        given.double(), truth, rtol=0, atol=float(room + scale * torch.finfo(dtype).eps)
    )


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["all kept", "none kept"])
@pytest.mark.parametrize("transposed", [False, True])
def test_all_kept_and_none(share, transposed):
    dense = matrix(8, 12, share=share)
    x = inputs(3, 8 if transposed else 12)
    given = run(x, pack(dense), None, transposed)
    torch.testing.assert_close(given.double(), exact(x, dense, None, transposed), atol=1e-5, rtol=0)


def gradients(layer, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    return list(torch.autograd.grad(layer(*leaves), leaves, out))


@pytest.mark.usefixtures("_tile")
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("leading", INPUTS.values(), ids=INPUTS.keys())
def test_gradients_are_the_dense_ones_at_kept_positions(leading, biased, transposed):
    dense = matrix(13, 21).double()
    packed = pack(matrix(13, 21))
    features, out = (13, 21) if transposed else (21, 13)
    x = inputs(*leading, features).double()
    bias = inputs(out).double() if biased else None
    flow = inputs(*leading, out).double()

    def sparse(x, values, bias=None):
        return run(x, Packed(values, packed.bitmap, packed.shape), bias, transposed)

    def plain(x, weight, bias=None):
        return F.linear(x, weight.T if transposed else weight, bias)

    given = gradients(sparse, x, packed.values.double(), bias, flow)
    truth = gradients(plain, x, dense, bias, flow)
    truth[1] = truth[1][dense != 0]
    for mine, theirs in zip(given, truth, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


def test_what_is_kept_for_the_backward():
    """Inputs only when values are trained, and never a dense matrix."""
    packed = pack(matrix(64, 64))
    x = inputs(4, 64).requires_grad_()
    for trains in (False, True):
        saved = []
        values = packed.values.clone().requires_grad_(trains)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t) or t, lambda t: t
        ):
            run(x, Packed(values, packed.bitmap, packed.shape), None, False)
        sizes = sorted(t.numel() for t in saved)
        assert sizes == sorted(
            [len(values), packed.bitmap.numel(), *([x.numel()] if trains else [])]
        )


@pytest.mark.parametrize("leading", [(), (4,), (2, 3)], ids=str)
def test_the_output_may_be_changed_in_place(leading):
    """As models do that add a residual to it."""
    packed = pack(matrix(9, 13))
    x = inputs(*leading, 13).requires_grad_()
    out = run(x, packed, None, False)
    out.add_(1).mul_(2)
    out.sum().backward()
    torch.testing.assert_close(x.grad, 2 * matrix(9, 13).sum(0).expand_as(x))


def test_second_derivatives_of_inputs():
    packed = pack(matrix(5, 7))
    x = inputs(3, 7).double().requires_grad_()
    values = packed.values.double()
    wide = Packed(values, packed.bitmap, packed.shape)
    assert torch.autograd.gradgradcheck(lambda x: run(x.sin(), wide, None, False), (x,))


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_opcheck(biased, trains, transposed):
    packed = pack(matrix(9, 13))
    features, out = (9, 13) if transposed else (13, 9)
    values = packed.values.clone().requires_grad_(trains)
    bias = inputs(out).requires_grad_(trains) if biased else None
    x = inputs(2, 3, features).requires_grad_(not trains)
    torch.library.opcheck(
        torch.ops.llmprune.sparse_linear.default,
        (x, [values, packed.bitmap], bias, "expand", [9, 13], transposed),
    )
    flow = inputs(2, 3, out)
    torch.library.opcheck(
        torch.ops.llmprune.sparse_values_gradient.default,
        (flow, x.detach(), [values.detach(), packed.bitmap], [9, 13], transposed),
    )


def test_opcheck_of_the_expansion():
    packed = pack(matrix(9, 13))
    values = packed.values.clone().requires_grad_()
    torch.library.opcheck(
        torch.ops.llmprune.sparse_expand.default, (values, packed.bitmap, [9, 13])
    )
    torch.library.opcheck(
        torch.ops.llmprune.sparse_gather.default,
        (matrix(9, 13), values.detach(), packed.bitmap),
    )


def test_the_expansion_passes_gradients_to_kept_values():
    dense = matrix(9, 13)
    packed = pack(dense)
    values = packed.values.clone().requires_grad_()
    out = expanded(values, packed.bitmap, packed.shape)
    assert torch.equal(out, dense)
    flow = inputs(9, 13)
    out.backward(flow)
    assert torch.equal(values.grad, flow[dense != 0])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_for_every_number_of_tokens(backend):
    packed = pack(matrix(9, 13))
    values = packed.values.clone().requires_grad_()
    bias = inputs(9).requires_grad_()
    x = inputs(2, 5, 13).requires_grad_()

    def step(x, values, bias):
        return run(x.sin(), Packed(values, packed.bitmap, packed.shape), bias, False).cos()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    given = torch.autograd.grad(compiled(x, values, bias).sum(), (x, values, bias))
    truth = torch.autograd.grad(step(x, values, bias).sum(), (x, values, bias))
    for mine, theirs in zip(given, truth, strict=True):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        for tokens in (1, 3, 7):
            x = inputs(tokens, 4, 13)
            torch.testing.assert_close(compiled(x, values, bias), step(x, values, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_autocast_is_that_of_linear(dtype, transposed):
    dense = matrix(9, 13)
    packed = pack(dense)
    x, bias = inputs(4, 9 if transposed else 13), inputs(13 if transposed else 9)
    leaves = [t.clone().requires_grad_() for t in (x, packed.values, bias)]
    with torch.autocast("cpu", dtype):
        given = run(
            leaves[0], Packed(leaves[1], packed.bitmap, packed.shape), leaves[2], transposed
        )
        truth = F.linear(x, dense.T if transposed else dense, bias)
    assert given.dtype == truth.dtype == dtype
    torch.testing.assert_close(given, truth, atol=0.05, rtol=0.05)
    given.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves)


@pytest.mark.parametrize(
    ("x", "bias", "says"),
    [
        (inputs(3, 12), None, "do not end in the 13"),
        (inputs(3, 13).bfloat16(), None, "inputs are torch.bfloat16"),
        (inputs(3, 13), inputs(9).half(), "inputs are torch.float32"),
        (inputs(3, 13), inputs(8), "does not fit 9 outputs"),
        (torch.tensor(1.0), None, "do not end in the 13"),
    ],
    ids=["width", "dtype", "dtype of the bias", "bias", "no dimension"],
)
def test_operands_that_do_not_fit(x, bias, says):
    """The kind of error that F.linear raises, for a meta tensor too."""
    packed = pack(matrix(9, 13))
    with pytest.raises(RuntimeError, match=says):
        run(x, packed, bias, False)
    away = Packed(packed.values.to("meta"), packed.bitmap.to("meta"), packed.shape)
    with pytest.raises(RuntimeError, match=says):
        run(x.to("meta"), away, None if bias is None else bias.to("meta"), False)


@pytest.mark.usefixtures("_tile")
@pytest.mark.parametrize("change", [-1, 1], ids=["one too few", "one too many"])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_that_a_bitmap_does_not_count_are_not_read(change, transposed):
    packed = pack(matrix(8, 13))
    values = torch.zeros(len(packed.values) + change)
    with pytest.raises(RuntimeError, match=f"does not count {len(values)} values"):
        run(
            inputs(2, 8 if transposed else 13),
            Packed(values, packed.bitmap, (8, 13)),
            None,
            transposed,
        )


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [
            t.untyped_storage().nbytes() // t.element_size() for t in [out] if isinstance(t, Tensor)
        ]
        self.elements = max(self.elements, *made, 0)
        return out


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_no_dense_copy_is_alive(transposed, monkeypatch):
    """Nothing that is computed is larger than a tile (its bits are looked at as eight bytes each)."""
    monkeypatch.setattr(expand, "TILE", 1 << 10)
    packed = pack(matrix(256, 64, share=0.9))
    layout = [packed.values, packed.bitmap]
    x = inputs(2, 256 if transposed else 64)
    with Largest() as largest:
        choice.EXPAND.matmul(x, layout, None, packed.shape, transposed)
    assert len(packed.values) < 1 << 11
    assert 1 << 10 <= largest.elements < 1 << 12
    flow = inputs(2, 64 if transposed else 256)
    left, right = (x, flow) if transposed else (flow, x)
    with Largest() as largest:
        expand.values_gradient(left, right, packed)
    assert 1 << 10 <= largest.elements < 1 << 12


# Choosing a kernel


class Dense:
    """A kernel of another layout: the dense matrix, of 4 rows and more."""

    name = "whole"
    about = "multiplies the dense matrix"

    def refuses(self, case: Case) -> str | None:
        if case.trains:
            return "the values are trained"
        return None if min(case.shape) >= 4 else f"needs 4 rows, not {case.shape[0]}"

    def route(self, case: Case) -> str:
        return "at once" if case.tokens < 8 else "in parts"

    def prepare(self, packed: Packed) -> list[Tensor]:
        return [unpack(packed)]

    def packed(self, layout: Sequence[Tensor], shape: Sequence[int]) -> Packed:
        return pack(layout[0])

    def matmul(self, x, layout, bias, shape, transposed):
        return F.linear(x, layout[0].T if transposed else layout[0], bias)


def case(tokens: int, trains: bool = False, rows: int = 9) -> Case:
    device = torch.device("cpu")
    return Case((rows, 13), 60, torch.float32, device, "2:4", "rows", False, tokens, trains)


def test_a_kernel_plugs_in_with_a_layout_of_its_own(monkeypatch):
    monkeypatch.setattr(choice, "KERNELS", [Dense(), *choice.KERNELS])
    dense = matrix(9, 13)
    packed = pack(dense)
    kernel = choice.choose(case(4))
    assert kernel.name == "whole"
    layout = kernel.prepare(packed)
    x = inputs(4, 13).requires_grad_()
    out = sparse_linear(x, layout, None, kernel.name, packed.shape, False)
    assert torch.equal(out, F.linear(x, dense))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, dense.sum(0).expand(4, -1))
    back = kernel.packed(layout, packed.shape)
    assert torch.equal(back.values, packed.values)
    assert torch.equal(back.bitmap, packed.bitmap)
    assert choice.choose(case(4, rows=3)).name == "expand"
    assert choice.choose(case(4, trains=True)).name == "expand"


def test_explain_says_what_runs_and_why_not_the_others(monkeypatch):
    import llmprune.kernels
    from llmprune.kernels import explain

    assert llmprune.kernels.explain is explain is choice.explain

    class Layer:
        def __init__(self, kernel=None, rows=9):
            self.case = partial(case, rows=rows)
            if kernel is not None:
                self.kernel = kernel

    alone = explain(Layer(), 1)
    assert alone.kernel == "expand"
    of_pattern = ["nm_gemv 2:4", "bitmap 50%"]  # the first does not take float32
    assert list(alone.refused) == ["cusparselt", "s24_mma", *of_pattern, "dense"]
    assert alone.refused["s24_mma"] == alone.refused["nm_gemv 2:4"] == "needs an NVIDIA GPU"
    held, tokens, *nots = str(alone).splitlines()
    assert held.startswith("expand: ")
    assert "(9 x 13 2:4, cpu, float32)" in held
    assert tokens == "1 token: expanded a tile at a time"
    assert nots[1] == "not s24_mma: needs an NVIDIA GPU"
    monkeypatch.setattr(choice, "KERNELS", [Dense(), *choice.KERNELS])
    few, many = explain(Layer(rows=3), 3), explain(Layer(), 64)
    assert (few.kernel, few.refused["whole"]) == ("expand", "needs 4 rows, not 3")
    assert (many.kernel, many.route, many.refused) == ("whole", "in parts", {})
    late = explain(Layer("expand"), 3)
    assert late.refused["whole"] == "the layer was laid out before that was known or asked for"


def test_explain_refuses_what_is_not_packed():
    with pytest.raises(ValueError, match="Linear is not packed"):
        choice.explain(torch.nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="tokens are -1"):
        choice.explain(type("Layer", (), {"case": staticmethod(case)})(), -1)
    with pytest.raises(ValueError, match="no kernel 'fast'; known: cusparselt"):
        choice.find("fast")


def test_the_kernels_folder_has_no_other_names():
    import llmprune.kernels

    with pytest.raises(AttributeError, match="no attribute 'explane'"):
        llmprune.kernels.explane  # noqa: B018
