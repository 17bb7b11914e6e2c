"""A linear layer that holds its weights packed: kept values and one bit per weight."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmprune.checkpoint.census import Axis
from llmprune.errors import CheckpointError, ConfigError
from llmprune.kernels.choice import EXPAND
from llmprune.kernels.few_bits import FewBits
from llmprune.kernels.interface import Case
from llmprune.kernels.packed import Packed, bitmap_shape, packed_bytes, unpack_bits
from llmprune.kernels.sparse_linear import expanded, expanded_layout, sparse_linear
from llmprune.runtime import laid_out
from llmprune.runtime.absent import LaidOut
from llmprune.runtime.expanded import Expanded
from llmprune.runtime.fit import check_packed, take_packed
from llmprune.runtime.packing import dense_linear, pack_linear
from llmprune.runtime.patterns import UNSTRUCTURED


class SparseLinear(nn.Linear):
    """nn.Linear, or transformers' Conv1D, whose zeros take a bit each.

    It is an nn.Linear to `isinstance`, so PEFT, transformers and llmprune find it where they look for
    linear layers; but no dense weight is held. `weight` [out, in] is expanded when it is asked for, and
    what is written to it reaches the kept weights alone (see `Expanded`).

    Training `weight_values` keeps the mask by construction:

        layer.weight_values.requires_grad_()

    On a GPU the weights lie as a kernel reads them, and take the stored form when somebody asks for it
    (see `laid_out`).

    Attributes:
        in_features: as of nn.Linear.
        out_features: as of nn.Linear.
        weight_values: [kept] parameter, float, row-major; requires no gradient until asked to.
        weight_bitmap: [rows, ceil(columns / 8)] uint8 buffer; see docs/format.md.
        bias: [out] parameter, or None.
        pattern: `n:m`, which every group of m neighbours holds, or `unstructured`.
        axis: whether the groups lie along the `rows` of the stored matrix or its `columns`.
        transposed: whether the matrix is stored [in, out], as Conv1D does.
    """

    # transformers initialises what a checkpoint lacks, unless it is marked; here nothing is random
    _is_hf_initialized: ClassVar[bool] = True
    PARTS: ClassVar[tuple[str, ...]] = ("weight_values", "weight_bitmap")

    weight_values: nn.Parameter
    weight_bitmap: Tensor
    unheld: str | None = None  # why a kernel for it was found not to hold what is in it
    _laid: LaidOut | None
    _expands: tuple[torch.dtype, torch.device] | None  # where `expand` was chosen for it

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        kept: int = 0,
        pattern: str = UNSTRUCTURED,
        axis: Axis = "rows",
        transposed: bool = False,
    ) -> None:
        """All zero; with `kept` there is room for the values that are to be loaded."""
        nn.Module.__init__(self)  # nn.Linear's would reserve a dense weight
        self.in_features, self.out_features = in_features, out_features
        self.pattern, self.axis, self.transposed = pattern, axis, transposed
        self._laid = self._expands = None
        values = torch.zeros(kept, device=device, dtype=dtype)
        bitmap = torch.zeros(bitmap_shape(self.shape), device=device, dtype=torch.uint8)
        self.weight_values = nn.Parameter(values, requires_grad=False)
        self.register_buffer("weight_bitmap", bitmap)
        room = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if room is None else nn.Parameter(room))

    @classmethod
    def from_packed(
        cls,
        packed: Packed,
        bias: nn.Parameter | None = None,
        pattern: str = UNSTRUCTURED,
        axis: Axis = "rows",
        transposed: bool = False,
    ) -> SparseLinear:
        """A layer that holds `packed` [rows, columns] and `bias` themselves, no copies.

        Raises:
            CheckpointError: when values and bitmap do not fit each other.
        """
        rows, columns = packed.shape
        features, out = (rows, columns) if transposed else (columns, rows)
        layer = cls(features, out, False, "meta", pattern=pattern, axis=axis, transposed=transposed)
        layer.weight_values = nn.Parameter(packed.values.detach(), requires_grad=False)
        layer.weight_bitmap = packed.bitmap
        layer.register_parameter("bias", bias)
        layer.check()
        return layer

    @classmethod
    def from_linear(
        cls, linear: nn.Module, keep: Tensor | None = None, pattern: str | None = None
    ) -> SparseLinear:
        """Pack an nn.Linear or a Conv1D; the bias is shared with it.

        Args:
            linear: bfloat16, float16 or float32.
            keep: bool [out, in], what to keep, zeros among it too; None keeps all that is not +0.0.
            pattern: `n:m` or `unstructured`; None finds the tightest that holds.

        Raises:
            ConfigError: for another module or dtype, a weight outside `keep` that is not zero, or a
                pattern that does not hold.
        """
        if isinstance(linear, cls):
            raise ConfigError(f"cannot pack {type(linear).__name__}; give an nn.Linear or a Conv1D")
        packed, bias, held, axis, transposed = pack_linear(linear, keep, pattern)
        layer = cls.from_packed(packed, bias, held, axis, transposed)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Module:
        """The nn.Linear or Conv1D with the same weights, bit for bit, that shares the bias."""
        with torch.no_grad():
            dense = self.expanded()
        return dense_linear(dense, self.bias, self.transposed).train(self.training)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix as it is stored."""
        sides = self.out_features, self.in_features
        return sides[::-1] if self.transposed else sides

    @property
    def packed(self) -> Packed:
        """Values and bitmap: the layer's own, or in new memory where it holds them in a kernel's layout."""
        form = laid_out.form(self)
        assert isinstance(form, Packed)
        return form

    @property
    def bytes(self) -> int:
        """What the weights take in their stored form."""
        values = self.weight_values
        return packed_bytes(self.shape, values.numel(), values.element_size())

    @property
    def expander(self) -> str:
        """The kernel that reads the stored form."""
        return EXPAND.name

    @property
    def place(self) -> tuple[torch.dtype, torch.device]:
        """The dtype that it computes in, and the device where it is."""
        return self.weight_values.dtype, self.weight_values.device

    def formed(self, parts: list[Tensor]) -> Packed | FewBits:
        """The matrix that these parts are, in the order of `PARTS`."""
        values, bitmap = parts
        return Packed(values, bitmap, self.shape)

    @property
    def kernel(self) -> str | None:
        """Whose layout the weights are held in; None where they are stored as in a file."""
        laid = laid_out.held(self)
        return None if laid is None else laid.kernel

    @property
    def weight(self) -> Tensor:
        """[out, in], expanded anew at each access; values that are trained get its gradient."""
        dense = self.expanded()
        dense = dense.T if self.transposed else dense
        return dense if torch.compiler.is_compiling() else Expanded.of(self, dense)

    @weight.setter
    def weight(self, dense: Tensor) -> None:
        self.write(dense)

    def expanded(self) -> Tensor:
        """The dense matrix as it is stored, in new memory."""
        laid = self._laid if torch.compiler.is_compiling() else laid_out.held(self)
        if laid is not None and (layout := laid.layout) is not None:
            dense = expanded_layout(layout, laid.kernel, laid.shape)
            return dense.T.contiguous() if laid.turned else dense
        return self.expanded_stored()

    def expanded_stored(self) -> Tensor:
        """The same of a layer that holds no layout."""
        values, bitmap = self._stored()
        return expanded(values, bitmap, self.shape)

    @torch.no_grad()
    def write(self, dense: Tensor) -> None:
        """Give kept weights the values that `dense` [out, in] has in their places.

        Raises:
            ConfigError: for another shape.
        """
        if tuple(dense.shape) != (self.out_features, self.in_features):
            wanted = [self.out_features, self.in_features]
            raise ConfigError(f"weights {list(dense.shape)} do not fit a layer of {wanted}")
        laid_out.bring_back(self)
        bits = unpack_bits(self.weight_bitmap, self.shape[1]).to(dense.device)
        self.weight_values.copy_((dense.T if self.transposed else dense)[bits])

    def case(self, tokens: int) -> Case:
        """What a kernel is asked to do for inputs of so many tokens."""
        values = self.weight_values
        return Case(
            self.shape,
            values.shape[0],
            values.dtype,
            values.device,
            self.pattern,
            self.axis,
            self.transposed,
            tokens,
            values.requires_grad,
        )

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        laid = self._laid if torch.compiler.is_compiling() else self._at_hand()
        if laid is not None and (layout := laid.layout) is not None:
            return sparse_linear(input, layout, self.bias, laid.kernel, laid.shape, laid.transposed)
        kernel = self.expander
        return sparse_linear(input, self._stored(), self.bias, kernel, self.shape, self.transposed)

    def _at_hand(self) -> LaidOut | None:
        """The layout for an eager forward, if any."""
        laid = laid_out.held(self)
        # nothing is laid out in training: optimizers and gradients would have it back for each step
        if laid is None and not (self.training and torch.is_grad_enabled()):
            laid = laid_out.lay_out(self)
        return laid

    def _stored(self) -> list[Tensor]:
        """Values and bitmap of a layer that holds no layout."""
        if torch.compiler.is_compiling():
            return [self.weight_values, self.weight_bitmap]
        return laid_out.stored(self)

    def reset_parameters(self) -> None:
        """Nothing is random here, and nothing is to be reset."""

    def check(self) -> None:
        """Refuse values and a bitmap that do not fit each other; to be called when they are loaded.

        Raises:
            CheckpointError: saying what does not fit.
        """
        check_packed(self.packed)

    def extra_repr(self) -> str:
        """Sizes, pattern and bytes."""
        weights = self.in_features * self.out_features
        kept = 100 * self.weight_values.numel() / max(1, weights)
        stored = ", stored [in, out]" if self.transposed else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.pattern}{stored}, {kept:.1f}% kept, "
            f"{self.bytes:,} bytes"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        """As any module; then the weights lie as a kernel of their new device reads them."""
        laid_out.bring_back(self)
        self.move(fn, recurse)
        self._expands = None
        with suppress(CheckpointError):  # `to_empty` makes room for what is still to come
            laid_out.lay_out(self)  # and a forward would raise it
        return self

    def move(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
        """What `fn` makes of all tensors, in the stored form."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        laid_out.bring_back(self)
        return dict(self.__dict__)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take values of any number with their bitmap, or a dense `weight` for the mask that is here."""
        laid_out.bring_back(self)
        take_packed(self, "weight", self.shape, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
