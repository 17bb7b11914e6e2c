"""A layer's weights in the layout of a kernel instead of their stored form, and the way back.

A `SparseLinear` holds its weights in one form at a time. Stored, as in a file: `weight_values` and
`weight_bitmap`, which train, save and convert. Laid out: what one kernel reads (`Kernel.prepare`). Then the
parameter and the buffer stay where they are, of their shape, dtype and device, but hold nothing. Whoever
computes with one of them, copies, moves, saves or trains it has both brought back before: the parameter stays
the same object, and its values the same bits. Only what every tensor is asked for, such as its shape, is
answered without that.

So there is nothing that has to know of layouts: optimizers, PEFT, accelerate and `state_dict` find the stored
form because they ask for it. The next forward lays it out again, unless it is one of training.

While torch.compile traces or a CUDA graph is recorded, a forward takes the form that is at hand.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llmprune.errors import CheckpointError, ModelError
from llmprune.kernels.choice import EXPAND, choose, turns
from llmprune.kernels.packed import Packed
from llmprune.kernels.table import tell
from llmprune.runtime.absent import (
    SWITCHING,
    AbsentBitmap,
    AbsentValues,
    LaidOut,
    plainly,
    turned_around,
    wait_for,
)

if TYPE_CHECKING:
    from llmprune.runtime.linear import SparseLinear


def held(layer: SparseLinear) -> LaidOut | None:
    """The layout that a layer holds, or None where it holds the stored form."""
    laid = layer._laid
    if laid is None:
        return None
    values, bitmap = _parts(layer)
    ours = isinstance(values, AbsentValues) and isinstance(bitmap, AbsentBitmap)
    if laid.layout is not None and ours:
        return laid
    bring_back(layer)  # somebody has put another tensor in the place of one of them
    return None


def _parts(layer: SparseLinear) -> tuple[Tensor | None, Tensor | None]:
    """The parameter and the buffer; a replica of nn.DataParallel has neither, but plain attributes."""
    return layer._parameters.get("weight_values"), layer._buffers.get("weight_bitmap")


def bring_back(layer: SparseLinear) -> None:
    """Have a layer hold the stored form, if it does not."""
    with SWITCHING:
        if layer._laid is not None:
            layer._laid.bring_back()
            layer._laid = None


@torch.no_grad()
def lay_out(layer: SparseLinear) -> LaidOut | None:
    """Have a layer hold its weights in the layout of the kernel that `choose` gives, if it may and should.

    For a moment both forms of this layer are there.

    Raises:
        CheckpointError: when the matrix does not hold the pattern that it is said to hold.
        ModelError: when a kernel does not give back what it was given.
    """
    with SWITCHING:
        if (laid := held(layer)) is not None or not _may_be_laid_out(layer):
            return laid
        place = layer.weight_values.dtype, layer.weight_values.device
        if layer._expands == place:
            return None  # as was chosen before: to choose takes longer than a forward has
        with plainly(place[1]):
            if (laid := _made(layer)) is None:
                layer._expands = place
                return None
            # other streams may read it from now on, and nobody reads what it replaces
            wait_for(place[1])
            bitmap = laid.stand_in(layer.weight_values, layer.weight_bitmap)
            layer._buffers["weight_bitmap"], layer._laid = bitmap, laid
            return laid


def _made(layer: SparseLinear) -> LaidOut | None:
    """The layout for the kernel of a layer, or None if that reads the stored form."""
    case = layer.case(1)
    kernel = choose(case)
    if kernel.name == EXPAND.name:
        return None
    turned = turns(kernel, case)
    own = (layer.weight_values.detach(), layer.weight_bitmap)
    # of what was loaded in inference mode, nothing but a copy may be looked at outside of it
    values, bitmap = (part.clone() if part.is_inference() else part for part in own)
    packed = Packed(values, bitmap, layer.shape)
    seen = turned_around(packed) if turned else packed
    try:
        layout = kernel.prepare(seen)
    except ValueError as error:
        raise CheckpointError(
            f"a matrix {list(layer.shape)} is said to hold {layer.pattern}, but: {error}; get the "
            "checkpoint again"
        ) from None
    if not equal(kernel.packed(layout, seen.shape), seen):
        raise ModelError(
            f"{kernel.name} does not give back a matrix {list(layer.shape)} as it was; set "
            "LLMPRUNE_KERNEL=expand to do without it"
        )
    rows, columns = seen.shape
    laid = LaidOut(kernel.name, (rows, columns), case.transposed != turned, turned, layout)
    for part in layout:  # CUDA graphs of torch.compile would copy it for every replay
        torch._dynamo.mark_static_address(part, guard=False)
    return laid


def _may_be_laid_out(layer: SparseLinear) -> bool:
    """Whether the stored form of a layer may give place to another just now."""
    return may_give_way(layer, *_parts(layer))


def may_give_way(module: nn.Module, values: Tensor | None, bitmap: Tensor | None) -> bool:
    """Whether stand-ins may take the place of a packed parameter of a module just now."""
    if type(values) is not nn.Parameter or type(bitmap) is not Tensor:
        return False  # of a library that has put something of its own there
    if values.requires_grad or values.is_meta or bitmap.is_meta:
        return False
    if values.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    if getattr(DistributedDataParallel, "_active_ddp_module", None) is not None:
        return False  # it writes to all buffers before its next forward
    hook = getattr(module, "_hf_hook", None)  # of accelerate: its weights come for one forward only
    return not any(getattr(h, "offload", False) for h in (hook, *getattr(hook, "hooks", ())))


def prepare(model: nn.Module) -> dict[str, int]:
    """Lay out all packed linear layers and fused experts for the kernels that are chosen, one by one.

    A model that comes to a GPU is laid out there, and every forward but those of training lays out what is
    not, so this is needed only where no forward runs in between: before torch.compile and before a CUDA graph
    is recorded, if since then weights were changed, saved or copied; and after `llmprune.kernels.tune` or
    `prefer`, so that layers change to what is chosen now.

    Args:
        model: any module.

    Returns:
        How many matrices are held for which kernel, those of all experts as one; `expand` reads the stored
        form.

    Raises:
        CheckpointError: when a matrix does not hold the pattern that it is said to hold.
        ModelError: when a kernel does not give back what it was given.
    """
    from llmprune.runtime import laid_experts
    from llmprune.runtime.experts import PackedModule
    from llmprune.runtime.linear import SparseLinear

    kernels = Counter[str]()
    for layer in model.modules():
        if isinstance(layer, SparseLinear):
            laid = held(layer)
            if laid is not None and choose(layer.case(1)).name != laid.kernel:
                bring_back(layer)
            layer._expands = None
            laid = lay_out(layer)
            kernels[EXPAND.name if laid is None else laid.kernel] += 1
        elif isinstance(layer, PackedModule):
            kernels.update(laid_experts.prepare(layer))
    return dict(kernels)


def tell_expanded(model: nn.Module) -> None:
    """Say of a model on a GPU how many packed matrices no kernel takes: they make it slower."""
    from llmprune.runtime import laid_experts
    from llmprune.runtime.experts import PackedModule
    from llmprune.runtime.linear import SparseLinear

    held_by_none, all_of_them = 0, 0
    for module in model.modules():
        if isinstance(module, SparseLinear) and _on_gpu(module.weight_values):
            all_of_them += 1
            held_by_none += held(module) is None
        elif isinstance(module, PackedModule):
            on_gpu = sum(_on_gpu(module.parts(name)[0]) for name in module.rooms)
            all_of_them += on_gpu
            held_by_none += 0 if laid_experts.held(module) else on_gpu
    if held_by_none:
        tell(
            f"{held_by_none} of {all_of_them} packed parameters are expanded in each forward: that saves "
            "memory and takes longer than dense; llmprune.kernels.explain(layer, 1) says why, "
            "llmprune.load(..., sparse=False) or llmprune.densify(model) is faster"
        )


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def packed(layer: SparseLinear) -> Packed:
    """The stored form of a layer: its own memory, or new memory where it holds a layout."""
    with SWITCHING:
        laid = held(layer)
        if laid is None:
            values, bitmap = stored(layer)
            return Packed(values, bitmap, layer.shape)
        with plainly(layer.weight_values.device):
            return laid.packed()


def stored(layer: SparseLinear) -> list[Tensor]:
    """Values and bitmap of a layer that holds them.

    Values that are not trained come as a tensor of their own, which stays what it is when the parameter
    gives up its memory before a backward has read them.
    """
    with SWITCHING:
        bring_back(layer)
        values = layer.weight_values
        return [values if values.requires_grad else values.detach(), layer.weight_bitmap]


def equal(one: Packed, other: Packed) -> bool:
    """Bit for bit."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[other.values.element_size()]
    return (
        one.values.dtype == other.values.dtype
        and torch.equal(one.bitmap, other.bitmap)
        and torch.equal(one.values.view(width), other.values.view(width))
    )
