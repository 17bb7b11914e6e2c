"""Kernels that run anywhere, so that tests can hold layers in their layouts on a CPU, too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from llmprune.kernels import choice
from llmprune.kernels.held import Gemv
from llmprune.kernels.interface import Case
from llmprune.kernels.packed import Packed, pack, unpack, unpack_bits
from llmprune.kernels.product import times
from llmprune.runtime.laid_out import held
from llmprune.runtime.linear import SparseLinear

WIDTHS = {2: torch.int16, 4: torch.int32}


class Scrambled:
    """Holds any matrix as the bits of its weights in whole numbers, back to front, beside its bitmap."""

    name = "scrambled"
    about = "of the tests"

    def unfit(self, case: Case) -> str | None:
        if case.trains:
            return "the weights are trained"
        return None if case.dtype.itemsize in WIDTHS else "of another width"

    refuses = unfit

    def route(self, case: Case) -> str:
        return "as ever"

    def prepare(self, packed: Packed) -> list[Tensor]:
        dense = unpack(packed).detach()
        return [dense.new_empty(0), dense.view(WIDTHS[dense.element_size()]).flip(0), packed.bitmap]

    def packed(self, layout: Sequence[Tensor], shape: Sequence[int]) -> Packed:
        keep = unpack_bits(layout[2], shape[-1])
        return pack(self.expanded(layout, shape), keep)

    def expanded(self, layout: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        return layout[1].flip(0).view(layout[0].dtype)

    def matmul(self, x, layout, bias, shape, transposed):
        return times(x, lambda: self.expanded(layout, shape), bias, shape, transposed)


class Interpreted(Gemv):
    """The kernel in Triton's interpreter, or compiled where there is a GPU."""

    def unfit(self, case: Case) -> str | None:
        if case.trains or case.dtype not in (torch.bfloat16, torch.float16):
            return "trained, or of another dtype"
        return self._misfit(case)

    def refuses(self, case: Case) -> str | None:
        return self.unfit(case)


@contextmanager
def only(*kernels: object) -> Iterator[None]:
    """While open, these kernels are preferred to all others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "KERNELS", [*kernels, *choice.KERNELS])
        yield


def layers(model: nn.Module) -> list[SparseLinear]:
    return [m for m in model.modules() if isinstance(m, SparseLinear)]


def laid(model: nn.Module) -> bool:
    """Whether each packed layer is laid out; they never are in part."""
    found = {held(layer) is not None for layer in layers(model)}
    assert len(found) == 1
    return found.pop()
