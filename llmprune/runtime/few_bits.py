"""A linear layer that holds its weights as whole numbers of few bits, scales, and one bit per weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from llmprune.checkpoint.census import Axis
from llmprune.checkpoint.sparse import VALUES, WHOLE
from llmprune.errors import CheckpointError, ConfigError
from llmprune.kernels.few_bits import FewBits, packed_few
from llmprune.kernels.held_few import layout_of
from llmprune.kernels.interface import Case
from llmprune.kernels.packed import Packed, count, select
from llmprune.kernels.sparse_linear import expanded_layout
from llmprune.runtime import laid_out
from llmprune.runtime.fit import check_few_bits
from llmprune.runtime.linear import SparseLinear
from llmprune.runtime.patterns import UNSTRUCTURED

INSTEAD = (
    "load the model with few_bits=False, which holds values instead (of a model in memory: "
    "llmprune.densify, then llmprune.sparsify), or train adapters beside it"
)


class WholeNumbers(nn.Parameter):
    """Whole numbers in the place of weights: they have no gradient, and say so to who asks for one."""

    @property
    def requires_grad(self) -> bool:
        """False."""
        return False

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        self.requires_grad_(wanted)

    def requires_grad_(self, requires_grad: bool = True) -> WholeNumbers:
        """Nothing to be done, or what cannot be.

        Raises:
            ConfigError: when a gradient is asked for.
        """
        if requires_grad:
            raise ConfigError(f"whole numbers of few bits cannot be trained: {INSTEAD}")
        return self


class FewBitsLinear(SparseLinear):
    """A `SparseLinear` of which each kept weight is a whole number times a scale that neighbours share.

    What docs/format.md stores as version 2, held as it is: int8 in 5.0 bits per weight of a 2:4 matrix, int4
    in groups of 128 in 3.1. A weight is the product, rounded to `rounded`, the dtype of the file, and then
    to `dtype`, so that it is that of the dense model, bit for bit, whatever dtype that is brought to.

    Whole numbers cannot be trained or written to: `weight_values` and `write` say what can be done instead.

    Attributes:
        weight_whole: int8 [kept], or of 4 bits uint8 [ceil(kept / 2)]; a parameter that takes no gradient.
        weight_scales: bfloat16 buffer [rows, groups], of axis `columns` [groups, columns], in any model.
        bits: 8 or 4.
        group: neighbours along `axis` that share a scale.
        kept: number of kept weights.
        rounded: the dtype of the stored matrix.
        dtype: that the layer computes in.
    """

    PARTS: ClassVar[tuple[str, ...]] = ("weight_whole", "weight_scales", "weight_bitmap")

    weight_whole: nn.Parameter
    weight_scales: Tensor

    def __init__(
        self,
        few: FewBits,
        kept: int,
        bias: nn.Parameter | None = None,
        pattern: str = UNSTRUCTURED,
        transposed: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A layer that holds the tensors of `few` and `bias` themselves, no copies.

        Args:
            few: [rows, columns].
            kept: number of its kept weights.
            bias: [out], or None.
            pattern: `n:m`, along the axis of `few`, or `unstructured`.
            transposed: whether it is stored [in, out].
            dtype: to compute in; None for that of `few`.

        Raises:
            CheckpointError: when its parts do not fit each other.
        """
        nn.Module.__init__(self)
        rows, columns = few.shape
        self.in_features, self.out_features = (rows, columns) if transposed else (columns, rows)
        axis: Axis = "rows" if few.axis == "rows" else "columns"
        self.pattern, self.axis, self.transposed = pattern, axis, transposed
        self.bits, self.group, self.kept, self.rounded = few.bits, few.group, kept, few.dtype
        self.dtype = dtype or few.dtype
        self._laid = self._expands = None
        self.weight_whole = WholeNumbers(few.whole.detach(), requires_grad=False)
        self.register_buffer("weight_scales", few.scales)
        self.register_buffer("weight_bitmap", few.bitmap)
        self.register_parameter("bias", bias)
        self.check()

    @property
    def weight_values(self) -> NoReturn:  # type: ignore[override]
        """There are none.

        Raises:
            ConfigError: saying what can be done instead.
        """
        raise ConfigError(f"this layer holds int{self.bits} and scales, no values: {INSTEAD}")

    @property
    def few(self) -> FewBits:
        """Whole numbers, scales and bitmap: the layer's own, or new ones where a kernel's layout is held."""
        form = laid_out.form(self)
        assert isinstance(form, FewBits)
        return form

    @property
    def packed(self) -> Packed:
        """Values, as they are rounded to `dtype`, and bitmap; the values are in new memory."""
        found = packed_few(self.few)
        return Packed(found.values.to(self.dtype), found.bitmap, found.shape)

    @property
    def bytes(self) -> int:
        """What the weights take in their stored form."""
        parts = (getattr(self, name) for name in self.PARTS)
        return sum(part.numel() * part.element_size() for part in parts)

    @property
    def expander(self) -> str:
        """The kernel that reads the stored form."""
        return f"expand int{self.bits}"

    @property
    def place(self) -> tuple[torch.dtype, torch.device]:
        """The dtype that it computes in, and the device where it is."""
        return self.dtype, self.weight_whole.device

    def formed(self, parts: list[Tensor]) -> FewBits:
        """The matrix that these parts are."""
        whole, scales, bitmap = parts
        return FewBits(
            whole, scales, bitmap, self.shape, self.bits, self.group, self.rounded, self.axis
        )

    @torch.no_grad()
    def write(self, dense: Tensor) -> None:
        """Take, where weights are kept, what is there already.

        Raises:
            ConfigError: for any others [out, in].
        """
        given = dense.as_subclass(Tensor)
        given = given.T if self.transposed else given
        own = self.expanded()
        if given.shape != own.shape or not _agree(given.to(own), own, self.few.bitmap):
            raise ConfigError(
                f"a layer of int{self.bits} takes no other weights, such as those that an adapter is merged "
                f"into: {INSTEAD}"
            )

    def case(self, tokens: int) -> Case:
        """What a kernel is asked to do for inputs of so many tokens."""
        return Case(
            self.shape,
            self.kept,
            *self.place,
            self.pattern,
            self.axis,
            self.transposed,
            tokens,
            False,
            bits=self.bits,
            group=self.group,
            rounded=self.rounded,
            unheld=self.unheld,
        )

    def expanded_stored(self) -> Tensor:
        """See `SparseLinear.expanded_stored`."""
        return expanded_layout(self._stored(), self.expander, self.shape)

    def _stored(self) -> list[Tensor]:
        """What `expander` reads of a layer that holds no layout."""
        if torch.compiler.is_compiling():
            parts = [self.weight_whole, self.weight_scales, self.weight_bitmap]
        else:
            parts = laid_out.stored(self)
        return layout_of(self.formed(parts), self.dtype)

    def settle(self) -> None:
        """To be called when weights were loaded: hold them as whole numbers, which say that they are."""
        self.unheld = self._expands = None
        if type(self.weight_whole) is nn.Parameter:
            self.weight_whole = WholeNumbers(self.weight_whole.detach(), requires_grad=False)

    def check(self) -> None:
        """Refuse parts that do not fit each other; to be called when they are loaded.

        Raises:
            CheckpointError: saying what does not fit.
        """
        check_few_bits(self.few, self.kept)

    def extra_repr(self) -> str:
        """Sizes, pattern and bytes."""
        weights = max(1, self.in_features * self.out_features)
        stored = ", stored [in, out]" if self.transposed else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.pattern}{stored}, {100 * self.kept / weights:.1f}% kept, "
            f"int{self.bits} in groups of {self.group}, {self.bytes:,} bytes, "
            f"{8 * self.bytes / weights:.3f} bits per weight"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.settle()  # an unpickled parameter is one of torch's own

    def move(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
        """As any module, but scales stay bfloat16, in whatever dtype the layer then computes."""
        dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight_whole.device)).dtype
        scales = self.weight_scales
        self._buffers["weight_scales"] = words = scales.view(torch.int16)  # which is never cast
        try:
            super().move(fn, recurse)
        finally:
            moved = self._buffers["weight_scales"]
            assert moved is not None
            self._buffers["weight_scales"] = scales if moved is words else moved.view(scales.dtype)
        self.dtype = dtype
        self.settle()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take whole numbers of any number with their scales and bitmap."""
        laid_out.bring_back(self)
        key = f"{prefix}weight"
        if key + WHOLE not in state_dict and {key, key + VALUES} & state_dict.keys():
            raise CheckpointError(
                f"{key} has values, and the layer holds int{self.bits}: load the model with few_bits=False, "
                "or call llmprune.densify(model) first"
            )
        if all(prefix + part in state_dict for part in self.PARTS):
            few = self.formed([state_dict[prefix + part] for part in self.PARTS])
            kept = count(few.bitmap) if few.bitmap.dtype == torch.uint8 else 0
            check_few_bits(few, kept)
            if few.whole.shape != self.weight_whole.shape:
                self.weight_whole = WholeNumbers(
                    self.weight_whole.new_empty(few.whole.shape), requires_grad=False
                )
            self.kept = kept
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)
        self.settle()


def _agree(one: Tensor, other: Tensor, bitmap: Tensor) -> bool:
    """Whether two matrices are the same, bit for bit, where weights are kept."""
    return torch.equal(*(select(m.contiguous(), bitmap).view(torch.uint8) for m in (one, other)))
