"""The kernels for packed matrices in order of preference: which one holds a layer, and why."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmprune.kernels import gpu, measure
from llmprune.kernels.bitmap_layout import WORD
from llmprune.kernels.cusparselt import CuSparseLt
from llmprune.kernels.dense import Dense
from llmprune.kernels.expand import Expand
from llmprune.kernels.held import S24_MMA, gemv, n8
from llmprune.kernels.held_bitmap import Bitmap, bitmap_n, bitmap_of, bitmap_percent
from llmprune.kernels.held_few import DenseFew, ExpandFew
from llmprune.kernels.held_s24_bits import s24_few, s24_for
from llmprune.kernels.interface import Case, Kernel, Mixture, Sparse
from llmprune.kernels.table import counted
from llmprune.kernels.words import Measured, Words

SETTING = "LLMPRUNE_KERNEL"  # environment variable: as `prefer`
NAMES = ("cusparselt", "s24_mma", "n8_mma", "nm_gemv", "bitmap", "dense", "expand")


def _slower(case: Case) -> bool:
    """Whether a kernel that could hold the layer was measured slower than the dense product."""
    fit = (kernel for kernel in _for_groups(case) if kernel.unfit(case) is None)
    return any(kernel.slow(case) is not None for kernel in fit)


EXPAND: Kernel = Expand()
DENSE: Kernel = Dense(_slower)
KERNELS: list[Kernel] = [CuSparseLt(), S24_MMA, DENSE, EXPAND]
"""The preferred first; `expand`, which takes everything, is last. Those of a pattern are before `dense`."""
FAMILIES: dict[str, Callable[[int, int], Words | None]] = {
    "n8_mma": n8,
    "nm_gemv": lambda n, m: None if m == WORD else gemv(n, m),
    "bitmap": lambda n, m: bitmap_n(n) if m == WORD else None,
}
"""Kernels of which there is one for each n:m that they know, or None; the preferred first."""
FEW: dict[int, list[Kernel]] = {bits: [DenseFew(bits, _slower), ExpandFew(bits)] for bits in (8, 4)}
"""Of layers of whole numbers: in the place of `dense` and `expand`, behind `s24_mma` of their own."""

_preferred: str | None = None


@dataclass(frozen=True)
class Explanation:
    """Which kernel a layer is held in, and why.

    Attributes:
        kernel: its name.
        about: how it multiplies.
        route: what it does for this number of tokens.
        case: what it is asked to do.
        refused: the kernels that are preferred to it, and why the layer is not held in each.
    """

    kernel: str
    about: str
    route: str
    case: Case
    refused: dict[str, str]

    def __str__(self) -> str:
        """A line on the kernel, one on these tokens, and one on each kernel that it is not."""
        case = self.case
        dtype = str(case.dtype).removeprefix("torch.")
        tokens = counted(case.tokens)
        shape = " x ".join(map(str, case.shape))
        held = f"{self.kernel}: {self.about} ({shape} {case.pattern}, {case.device}, {dtype})"
        nots = (f"not {name}: {why}" for name, why in self.refused.items())
        return "\n".join([held, f"{tokens}: {self.route}", *nots])


def find(name: str) -> Kernel:
    """The kernel called `name`: "s24_mma", "n8_mma 4:8".

    Raises:
        ValueError: when there is none.
    """
    every = [*KERNELS, *FEW[8], *FEW[4]]
    for kernel in every:
        if kernel.name == name:
            return kernel
    if found := re.fullmatch(r"bitmap (\d{1,3})%", name):
        return bitmap_percent(int(found[1]))
    if (found := re.fullmatch(r"(\w+) (\d{1,2}):(\d{1,2})", name)) and found[1] in FAMILIES:
        kernel_of = FAMILIES[found[1]](int(found[2]), int(found[3]))
        if kernel_of is not None:
            return kernel_of
    if found := re.fullmatch(r"s24_mma int([48])(?:/(32|64|128))?", name):
        return s24_few(int(found[1]), int(found[2] or 0))
    known = [*(kernel.name for kernel in every), "n8_mma n:8", "nm_gemv n:m"]
    known += ["bitmap n:32", "bitmap p%"]
    raise ValueError(f"no kernel {name!r}; known: {', '.join(known)}")


def prefer(kernel: str | None) -> None:
    """Hold layers that are laid out from now on in `kernel`, wherever it can hold them at all.

    Even where it was measured to be slow. "cusparselt" is used only so, "expand" takes the least memory.
    The environment variable LLMPRUNE_KERNEL does the same.

    Args:
        kernel: one of `NAMES`; None leaves the choice to what was measured.

    Raises:
        ValueError: for another name.
    """
    global _preferred
    _preferred = None if kernel is None else _known(kernel, "prefer")


def preferred() -> str | None:
    """What `prefer` was told last, else the environment variable LLMPRUNE_KERNEL, or None."""
    return _preferred or (_known(os.environ[SETTING], SETTING) if os.environ.get(SETTING) else None)


def _known(name: str, where: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{where} got {name!r}, which is no kernel; known: {', '.join(NAMES)}")
    return name


def offered(case: Case) -> list[Kernel]:
    """The kernels that come into question, the preferred first."""
    kernels = list(KERNELS)
    before = kernels.index(DENSE)
    kernels[before:before] = _of_patterns(case)
    if case.bits is not None:
        of_values = [k for k in kernels if k not in (DENSE, EXPAND)]
        kernels = [*of_values, s24_for(case), *FEW[case.bits]]
    first = preferred()
    return sorted(kernels, key=lambda kernel: kernel.name.split()[0] != first)


def _of_patterns(case: Case) -> list[Kernel]:
    """The kernels of which there is one for each n:m or share of kept weights.

    What one for n:m can hold takes no less as any mask, so `bitmap` is left out then, unless it is asked for.
    """
    rows, columns = case.shape
    any_mask = bitmap_of(case.kept, rows * columns)
    if case.nm is None:
        return [any_mask]
    groups = [kernel for of in FAMILIES.values() if (kernel := of(*case.nm)) is not None]
    fit = any(kernel.static(case) is None for kernel in groups)
    return [*groups] if fit and preferred() != any_mask.name.split()[0] else [*groups, any_mask]


def _for_groups(case: Case) -> list[Measured[Any]]:
    """Those that a table of measurements knows."""
    return [kernel for kernel in offered(case) if isinstance(kernel, Measured)]


def refusal(kernel: Kernel, case: Case) -> str | None:
    """Why `kernel` does not hold a layer; one that was asked for refuses only what it cannot do."""
    return (kernel.unfit if kernel.name.split()[0] == preferred() else kernel.refuses)(case)


def choose(case: Case) -> Kernel:
    """The kernel in whose layout a layer is to be held: the first that does not refuse.

    What a GPU has not run is tried on it, and what was not measured is, unless a CUDA graph is being recorded
    or torch traces; see docs/kernels.md.
    """
    for kernel in offered(case):
        asked = kernel.name.split()[0] == preferred()
        if isinstance(kernel, Measured) and not asked and kernel.unfit(case) is None:
            measure.first(kernel, gpu.whole(case.device), case.sides, case.dtype)
        if refusal(kernel, case) is None:
            return kernel
    raise AssertionError("expand takes everything")


def expands(kernel: Kernel) -> bool:
    """Whether a kernel reads the form in which a layer is stored, and so holds no other."""
    return kernel is EXPAND or isinstance(kernel, ExpandFew)


def turns(kernel: Kernel, case: Case) -> bool:
    """Whether `kernel` is given the transpose of what is stored, and is called with `transposed` False.

    Kernels for n:m and `bitmap` want [out, in]; Conv1D stores [in, out]. `expand` takes what is stored.
    """
    by_bits = isinstance(kernel, Bitmap)
    return case.transposed and (case.along_inputs or by_bits) and not expands(kernel)


def explain(layer: Sparse, tokens: int) -> Explanation:
    """Which kernel holds a layer, and what it does for inputs of `tokens` tokens.

    Args:
        layer: an `llmprune.SparseLinear`, a parameter of packed experts, or one of its matrices.
        tokens: product of the leading dimensions of the inputs, zero or more.

    Raises:
        ValueError: for a layer that is not packed, or fewer than no tokens.
    """
    if not hasattr(layer, "case"):
        raise ValueError(f"{type(layer).__name__} is not packed: torch multiplies it")
    if tokens < 0:
        raise ValueError(f"tokens are {tokens}; give zero or more")
    case = layer.case(tokens)
    held: str | None = getattr(layer, "kernel", None)
    if isinstance(case, Mixture):
        from llmprune.kernels import experts

        return experts.explain(case, held)
    kernel = None if held is None else find(held)
    refused = dict[str, str]()
    for other in offered(case):  # no further than need be: to ask a kernel may be to try it
        if other is kernel:
            break
        why = refusal(other, case)
        if kernel is None and why is None:
            kernel = other
            break
        refused[other.name] = why or "the layer was laid out before that was known or asked for"
    assert kernel is not None, "expand takes everything"
    return Explanation(kernel.name, kernel.about, kernel.route(case), case, refused)
