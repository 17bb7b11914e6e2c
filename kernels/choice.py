"""The kernels for packed matrices in order of preference, and which one runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from llmprune.kernels.expand import Expand
from llmprune.kernels.interface import Case, Kernel

EXPAND: Kernel = Expand()
KERNELS: list[Kernel] = [EXPAND]
"""The preferred first; `expand`, which takes everything, is last."""


class Sparse(Protocol):
    """A layer on packed weights."""

    def case(self, tokens: int) -> Case:
        """What a kernel would be asked to do for inputs of so many tokens."""


@dataclass(frozen=True)
class Explanation:
    """Which kernel runs, and why.

    Attributes:
        kernel: name of the one that runs.
        about: how it does it.
        case: what it is asked to do.
        refused: the kernels that are preferred to it, and why each does not run.
    """

    kernel: str
    about: str
    case: Case
    refused: dict[str, str]

    def __str__(self) -> str:
        """A line on what runs, and one on each kernel that does not."""
        case = self.case
        dtype = str(case.dtype).removeprefix("torch.")
        tokens = "1 token" if case.tokens == 1 else f"{case.tokens} tokens"
        shape = " x ".join(map(str, case.shape))
        runs = f"{self.kernel}: {self.about} ({shape} {case.pattern}, {case.device}, {dtype}, {tokens})"
        return "\n".join([runs, *(f"not {name}: {why}" for name, why in self.refused.items())])


def find(name: str) -> Kernel:
    """The kernel called `name`.

    Raises:
        ValueError: when there is none.
    """
    for kernel in KERNELS:
        if kernel.name == name:
            return kernel
    raise ValueError(f"no kernel {name!r}; known: {', '.join(k.name for k in KERNELS)}")


def choose(case: Case) -> Kernel:
    """The first kernel that does not refuse."""
    return next(kernel for kernel in KERNELS if kernel.refuses(case) is None)


def explain(layer: Sparse, tokens: int) -> Explanation:
    """Which kernel a layer's forward runs for inputs of `tokens` tokens, on its device and dtype.

    Args:
        layer: an `llmprune.SparseLinear`, or a matrix of packed experts.
        tokens: product of the leading dimensions of the inputs, zero or more.

    Raises:
        ValueError: for a layer that is not packed, or fewer than no tokens.
    """
    if not hasattr(layer, "case"):
        raise ValueError(f"{type(layer).__name__} is not packed: torch multiplies it")
    if tokens < 0:
        raise ValueError(f"tokens are {tokens}; give zero or more")
    case = layer.case(tokens)
    refused = dict[str, str]()
    for kernel in KERNELS:
        if (why := kernel.refuses(case)) is None:
            return Explanation(kernel.name, kernel.about, case, refused)
        refused[kernel.name] = why
    raise AssertionError("expand takes everything")
