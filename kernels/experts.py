"""The forms that the matrices of fused experts are held in on a GPU, and which one for which.

As for linear layers (`choice`, `words`), one form at a time: `s24_experts`, which reads the experts that
are hit, where it is not slower than dense by what was measured; else dense, by torch's `grouped_mm`, if
there is memory for that. What neither can hold stays stored, and its module runs the family's own loop over
experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from llmprune.kernels import choice, gpu, measure, s24_experts, table
from llmprune.kernels.expanding import dense_of, how
from llmprune.kernels.experts_table import NAME, Shape, known_as, matrix_of, timing_of
from llmprune.kernels.held import S24_MMA
from llmprune.kernels.interface import Mixture
from llmprune.kernels.packed import Packed, select, unpack
from llmprune.kernels.product import grouped
from llmprune.kernels.s24_experts import ExpertsLayout, pack_experts, unpack_experts

_MOST = 64  # inputs of an expert on average up to which the kernel is used unmeasured; a guess
_LARGEST = 2**21  # that are routed at once: bounds a dimension of the kernel's grid
_EVEN = 8  # weights: torch's grouped_mm takes matrices whose rows begin at multiples of 16 bytes


class Form(Protocol):
    """One way to hold the matrices [experts, out, in] of a parameter."""

    @property
    def name(self) -> str:
        """What the operator and `explain` call it."""

    @property
    def about(self) -> str:
        """How it multiplies, in one line."""

    def route(self, case: Mixture) -> str:
        """What it does for so many tokens, in a few words."""

    def prepare(self, packed: Packed, transposed: bool) -> list[Tensor]:
        """The matrices in the layout that `product` reads; the first tensor is of their dtype.

        Args:
            packed: [experts, rows, columns].
            transposed: whether each is stored [in, out].

        Raises:
            ValueError: for matrices that it cannot hold.
        """

    def packed(self, layout: Sequence[Tensor], shape: Shape, transposed: bool) -> Packed:
        """The inverse, bit for bit. The host may wait for it."""

    def expanded(self, layout: Sequence[Tensor], shape: Shape) -> Tensor:
        """The dense matrices [experts, out, in]."""

    def product(
        self,
        x: Tensor,
        layout: Sequence[Tensor],
        order: Tensor,
        ends: Tensor,
        shape: Shape,
        each: int,
        chosen: int,
    ) -> Tensor:
        """What is routed times the matrix of its expert: `s24_experts.s24_experts`.

        Any number of inputs, zero among them. On a GPU the host does not wait, but where torch's grouped_mm
        does.

        Args:
            x: [inputs, in], of the dtype and on the device of the layout.
            layout: what `prepare` gave.
            order: int32 [inputs * each], see there.
            ends: int32 [experts], see there.
            shape: (experts, out, in).
            each: how many experts a row of x goes to.
            chosen: how many experts a token was routed to.
        """


class S24Experts:
    """2:4 on sparse tensor cores. A layout is [marker, words], or with kept zeros [marker, words, bitmap]."""

    name = NAME
    about = "reads 9 bits per weight of the experts that are hit, in one launch"

    def unfit(self, case: Mixture) -> str | None:
        """Why it cannot be used at all, or None; may try it on the device."""
        return self.static(case) or self.unavailable(gpu.whole(case.device))

    def static(self, case: Mixture) -> str | None:
        """Why it cannot be used whatever the GPU, or None."""
        if (why := S24_MMA.static(case)) is not None:
            return why
        if any(side % _EVEN for side in case.sides):
            return f"needs sides in multiples of {_EVEN}, these are {list(case.sides)}"
        return None

    def unavailable(self, device: torch.device) -> str | None:
        """Why the kernel must not be used on `device`, or None. Tries it once there."""
        return s24_experts.unavailable(device)

    def launches(self, device: torch.device) -> bool:
        """Whether the kernel can run on tensors that lie there."""
        return S24_MMA.launches(device)

    def slow(self, case: Mixture) -> str | None:
        """Why dense is better by what was measured, or None; only of a case that is not unfit."""
        matrix = matrix_of(case)
        if (why := measure.FAILED.get(matrix)) is not None:
            return why
        slow = table.current().slow(matrix)
        if slow is None:
            return None
        return f"measured slower than dense at {table.counted(slow.tokens)} ({slow.gain:.2f}x)"

    def launch(self, matrix: table.Matrix, tokens: int, routed: int) -> tuple[int | None] | None:
        """Warps by which the kernel takes so many; None where they are expanded."""
        experts = int(matrix.kernel.split()[1])
        timing = timing_of(matrix, tokens)
        if routed > _LARGEST:
            return None
        if timing is None:
            return (None,) if routed <= _MOST * experts else None
        return (timing.warps,) if timing.by_kernel else None

    def route(self, case: Mixture) -> str:
        """See `Form.route`."""
        matrix = matrix_of(case)
        if self.launch(matrix, case.tokens, case.tokens * case.each) is None:
            by = f"all expanded into scratch memory {how(case.device)}, then by grouped_mm"
        else:
            by = "by the kernel"
        timing = timing_of(matrix, case.tokens)
        if timing is None:
            return f"{by}; not measured{measure.left_out(matrix)}"
        dense = f"dense {timing.dense_us:.1f} us at {table.counted(timing.tokens)}"
        return f"{by}; measured: {timing.best:.1f} us, {dense}"

    def prepare(self, packed: Packed, transposed: bool) -> list[Tensor]:
        """See `Form.prepare`."""
        marker, words = packed.values.new_empty(0), pack_experts(packed, transposed).words
        if bool((packed.values.detach().view(torch.int16) != 0).all()):
            return [marker, words]
        return [marker, words, packed.bitmap]

    def packed(self, layout: Sequence[Tensor], shape: Shape, transposed: bool) -> Packed:
        """See `Form.packed`."""
        marker, words, *bitmap = layout
        kept = bitmap[0] if bitmap else None
        return unpack_experts(ExpertsLayout(words, shape, marker.dtype), kept, transposed)

    def expanded(self, layout: Sequence[Tensor], shape: Shape) -> Tensor:
        """See `Form.expanded`; rows of the tiles behind the last are in memory, too."""
        experts, rows, columns = shape
        tall = ExpertsLayout(layout[1], shape, layout[0].dtype).tall
        return dense_of(tall).view(experts, -1, columns)[:, :rows]

    def product(
        self,
        x: Tensor,
        layout: Sequence[Tensor],
        order: Tensor,
        ends: Tensor,
        shape: Shape,
        each: int,
        chosen: int,
    ) -> Tensor:
        """See `Form.product`."""
        if len(order) and self.launches(x.device):
            matrix = known_as(gpu.whole(x.device), shape, x.dtype, chosen)
            if (found := self.launch(matrix, len(order) // chosen, len(order))) is not None:
                held = ExpertsLayout(layout[1], shape, layout[0].dtype)
                return s24_experts.s24_experts(x, held, order, ends, each, warps=found[0])
        return grouped(x, self.expanded(layout, shape), order, ends, each)


class DenseExperts:
    """The dense matrices themselves, beside their bitmap."""

    name = "dense_experts"
    about = "multiplies the dense matrices by grouped_mm; saves neither memory nor time"

    def unfit(self, case: Mixture) -> str | None:
        """Why they cannot be held dense, or None."""
        return S24_EXPERTS.static(case)

    def route(self, case: Mixture) -> str:
        """See `Form.route`."""
        return "dense, by grouped_mm"

    def prepare(self, packed: Packed, transposed: bool) -> list[Tensor]:
        """See `Form.prepare`; a view of the stored order where that is transposed."""
        dense = unpack(packed).detach()
        return [dense.transpose(1, 2) if transposed else dense, packed.bitmap]

    def packed(self, layout: Sequence[Tensor], shape: Shape, transposed: bool) -> Packed:
        """See `Form.packed`."""
        dense, bitmap = layout
        stored = dense.transpose(1, 2) if transposed else dense
        return Packed(select(stored, bitmap), bitmap, tuple(stored.shape))

    def expanded(self, layout: Sequence[Tensor], shape: Shape) -> Tensor:
        """See `Form.expanded`."""
        return layout[0]

    def product(
        self,
        x: Tensor,
        layout: Sequence[Tensor],
        order: Tensor,
        ends: Tensor,
        shape: Shape,
        each: int,
        chosen: int,
    ) -> Tensor:
        """See `Form.product`."""
        return grouped(x, layout[0], order, ends, each)


S24_EXPERTS = S24Experts()
DENSE_EXPERTS = DenseExperts()
FORMS: dict[str, Form] = {form.name: form for form in (S24_EXPERTS, DENSE_EXPERTS)}


def find(name: str) -> Form:
    """The form called `name`.

    Raises:
        ValueError: when there is none.
    """
    if name not in FORMS:
        raise ValueError(f"no form of experts {name!r}; known: {', '.join(FORMS)}")
    return FORMS[name]


def choose(case: Mixture) -> Form | None:
    """The form that the matrices are to be held in, or None where they stay as they are stored.

    Where the kernel is slower than dense, and there is no memory for that, it is still the quickest of all.
    """
    asked = choice.preferred()
    if asked == "expand" or (asked == "dense" and DENSE_EXPERTS.unfit(case)):
        return None
    if asked == "dense":
        return DENSE_EXPERTS
    if S24_EXPERTS.unfit(case) is not None:
        return None
    if asked != S24_MMA.name:
        from llmprune.kernels import experts_measure

        experts_measure.first(case)
        if S24_EXPERTS.slow(case) is not None and _fits(case):
            return DENSE_EXPERTS
    return S24_EXPERTS


def explain(case: Mixture, held: str | None) -> choice.Explanation:
    """What `llmprune.kernels.explain` says of a parameter of packed experts; `held` is its form, if any."""
    refused = dict[str, str]()
    if held != S24_EXPERTS.name:
        why = S24_EXPERTS.unfit(case) or S24_EXPERTS.slow(case)
        refused[S24_EXPERTS.name] = why or "they were not laid out since that was possible"
    if held is None:
        why = DENSE_EXPERTS.unfit(case)
        refused[DENSE_EXPERTS.name] = why or "no kernel for them was measured slower"
        name, about = "expand", "expands one expert after the other"
        return choice.Explanation(name, about, choice.EXPAND.route(case), case, refused)
    form = find(held)
    about = f"{form.about}; {case.experts} experts, {case.each} for a token"
    return choice.Explanation(form.name, about, form.route(case), case, refused)


def _fits(case: Mixture) -> bool:
    """Whether there is memory for the dense matrices, and a tenth of all for what else there is."""
    if case.device.type != "cuda":
        return True
    free, total = gpu.free(gpu.whole(case.device))
    rows, columns = case.shape
    return free - case.experts * rows * columns * (case.dtype.itemsize + 1 / 8) >= total / 10
