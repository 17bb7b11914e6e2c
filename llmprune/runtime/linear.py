"""A linear layer that holds its weights packed: kept values and one bit per weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmprune.checkpoint.census import Axis
from llmprune.errors import CheckpointError, ConfigError
from llmprune.kernels.choice import choose
from llmprune.kernels.interface import Case
from llmprune.kernels.packed import Packed, bitmap_shape, count, pack, unpack_bits
from llmprune.kernels.sparse_linear import expanded, sparse_linear
from llmprune.runtime.expanded import Expanded
from llmprune.runtime.patterns import UNSTRUCTURED, check_pattern, tightest


class SparseLinear(nn.Linear):
    """nn.Linear, or transformers' Conv1D, whose zeros take a bit each.

    It is an nn.Linear to `isinstance`, so PEFT, transformers and llmprune find it where they look for
    linear layers; but no dense weight is held. `weight` [out, in] is expanded when it is asked for, and
    what is written to it reaches the kept weights alone (see `Expanded`).

    Training `weight_values` keeps the mask by construction:

        layer.weight_values.requires_grad_()

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

    weight_values: nn.Parameter
    weight_bitmap: Tensor

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
        transposed = type(linear).__name__ == "Conv1D"
        if not (transposed or isinstance(linear, nn.Linear)) or isinstance(linear, cls):
            raise ConfigError(f"cannot pack {type(linear).__name__}; give an nn.Linear or a Conv1D")
        weight = linear.weight
        assert isinstance(weight, Tensor)
        keep = keep.T if keep is not None and transposed else keep
        if keep is not None and (keep.dtype != torch.bool or keep.shape != weight.shape):
            raise ConfigError(
                f"a mask is {keep.dtype} {list(keep.shape)} for weights {list(weight.shape)}; give "
                "bool [out, in]"
            )
        try:
            packed = pack(weight, keep)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        bits = unpack_bits(packed.bitmap, packed.shape[-1])
        axes: tuple[Axis, ...] = ("columns", "rows") if transposed else ("rows", "columns")
        held, axis = tightest(bits, axes) if pattern is None else check_pattern(bits, pattern, axes)
        bias = linear.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        layer = cls.from_packed(packed, bias, held, axis, transposed)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Module:
        """The nn.Linear or Conv1D with the same weights, bit for bit, that shares the bias."""
        with torch.no_grad():
            dense = self.expanded()
        linear: Any
        if self.transposed:
            from transformers.pytorch_utils import Conv1D

            linear = Conv1D(0, 0)
            linear.nf, linear.nx = self.out_features, self.in_features
        else:
            features = self.in_features, self.out_features
            linear = nn.Linear(*features, bias=False, device="meta")
        linear.weight = nn.Parameter(dense)
        linear.bias = self.bias
        made: nn.Module = linear.train(self.training)
        return made

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix as it is stored."""
        sides = self.out_features, self.in_features
        return sides[::-1] if self.transposed else sides

    @property
    def packed(self) -> Packed:
        """Values and bitmap, not copied."""
        return Packed(self.weight_values, self.weight_bitmap, self.shape)

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
        return expanded(self.weight_values, self.weight_bitmap, self.shape)

    @torch.no_grad()
    def write(self, dense: Tensor) -> None:
        """Give kept weights the values that `dense` [out, in] has in their places.

        Raises:
            ConfigError: for another shape.
        """
        if tuple(dense.shape) != (self.out_features, self.in_features):
            wanted = [self.out_features, self.in_features]
            raise ConfigError(f"weights {list(dense.shape)} do not fit a layer of {wanted}")
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
        kernel = choose(self.case(input.numel() // max(1, self.in_features)))
        layout = kernel.prepare(self.packed)
        return sparse_linear(input, layout, self.bias, kernel.name, self.shape, self.transposed)

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
            f"{self.packed.bytes:,} bytes"
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take values of any number with their bitmap, or a dense `weight` for the mask that is here."""
        take_packed(self, "weight", self.shape, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def take_packed(
    module: nn.Module, name: str, shape: Sequence[int], state_dict: dict[str, Any], prefix: str
) -> None:
    """Before a module loads its own: check a packed parameter and make room for as many values.

    Args:
        module: holds `<name>_values` and `<name>_bitmap`.
        name: of the parameter when it is dense.
        shape: of the parameter when it is dense.
        state_dict: what is loaded; a dense parameter in it gives place to its packed form.
        prefix: of the module's keys.

    Raises:
        CheckpointError: for what does not fit, or a dense weight that is not zero outside the mask.
    """
    key, bitmap = prefix + name, module.get_buffer(f"{name}_bitmap")
    if key in state_dict and f"{key}_values" not in state_dict:
        dense = state_dict.pop(key)
        if tuple(dense.shape) != tuple(shape):
            raise CheckpointError(f"{key} is {list(dense.shape)}, the layer {list(shape)}")
        bits = unpack_bits(bitmap, shape[-1]).to(dense.device)
        if outside := int(((dense != 0) & ~bits).sum()):
            raise CheckpointError(
                f"{key} has {outside} weights that are zero here; call llmprune.densify(model) first"
            )
        state_dict |= {f"{key}_values": dense[bits], f"{key}_bitmap": bitmap}
    values, given = state_dict.get(f"{key}_values"), state_dict.get(f"{key}_bitmap")
    if values is None or given is None:
        return  # torch says what is missing
    check_packed(Packed(values, given, tuple(shape)))
    mine = module.get_parameter(f"{name}_values")
    if values.shape != mine.shape:
        room = nn.Parameter(mine.new_empty(values.shape), mine.requires_grad)
        setattr(module, f"{name}_values", room)


def check_packed(packed: Packed) -> None:
    """Refuse values and a bitmap that do not fit each other or the shape.

    Raises:
        CheckpointError: saying what does not fit.
    """
    values, bitmap, wanted = packed.values, packed.bitmap, bitmap_shape(packed.shape)
    if bitmap.dtype != torch.uint8 or tuple(bitmap.shape) != wanted:
        raise CheckpointError(
            f"a bitmap is {bitmap.dtype} {list(bitmap.shape)}, not uint8 {list(wanted)}"
        )
    if values.dim() != 1 or not values.is_floating_point():
        raise CheckpointError(f"packed values are {values.dtype} {list(values.shape)}, not [kept]")
    if bitmap.is_meta or values.is_meta:
        return
    if (kept := count(bitmap)) != len(values):
        raise CheckpointError(f"a bitmap keeps {kept} weights of {len(values)} values")
    left = packed.shape[-1] % 8
    if left and bool((bitmap[..., -1] >> left).any()):
        raise CheckpointError("a bitmap has bits behind the last column")
