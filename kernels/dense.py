"""The dense matrix itself, beside its bitmap: for layers of which no kernel is faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from llmprune.kernels import gpu
from llmprune.kernels.interface import Case, holds_values
from llmprune.kernels.packed import Packed, select, unpack
from llmprune.kernels.product import times


class Dense:
    """Multiplies the dense matrix by cuBLAS. Its layout is [weight, bitmap]: 17 bits per weight at 16."""

    name = "dense"
    about = "multiplies the dense matrix; saves neither memory nor time"

    def __init__(self, slower: Callable[[Case], bool]) -> None:
        """Chosen where `slower` says of a case that its kernel was measured slower than this."""
        self._slower = slower

    def unfit(self, case: Case) -> str | None:
        """Why a layer cannot be held dense, or None."""
        return holds_values(case) or ("the weights are trained" if case.trains else None)

    def refuses(self, case: Case) -> str | None:
        """See `Kernel.refuses`."""
        if (why := self.unfit(case)) is not None:
            return why
        if not self._slower(case):
            return "no kernel for it was measured slower"
        return None if room_for(case) else "would leave less than a tenth of the GPU's memory"

    def route(self, case: Case) -> str:
        """See `Kernel.route`."""
        return "dense, by cuBLAS"

    def prepare(self, packed: Packed) -> list[Tensor]:
        """See `Kernel.prepare`."""
        return [unpack(packed).detach(), packed.bitmap]

    def packed(self, layout: Sequence[Tensor], shape: Sequence[int]) -> Packed:
        """See `Kernel.packed`."""
        weight, bitmap = layout
        return Packed(select(weight, bitmap), bitmap, tuple(shape))

    def expanded(self, layout: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """See `Kernel.expanded`."""
        return layout[0].clone()

    def matmul(
        self,
        x: Tensor,
        layout: Sequence[Tensor],
        bias: Tensor | None,
        shape: Sequence[int],
        transposed: bool,
    ) -> Tensor:
        """See `Kernel.matmul`."""
        return times(x, lambda: layout[0], bias, shape, transposed)


def room_for(case: Case) -> bool:
    """Whether there is memory for the dense matrix, its bitmap, and a tenth of all for what else there is."""
    if case.device.type != "cuda":
        return True
    free, total = gpu.free(gpu.whole(case.device))
    rows, columns = case.shape
    return free - rows * columns * (case.dtype.itemsize + 1 / 8) >= total / 10
