"""Fused experts whose matrices lie in the layout of a kernel instead of their stored form, and the way back.

As `laid_out` for linear layers, by the same stand-ins: a module holds all its packed parameters in one form
or all in the other, and whoever asks for one of them has them brought back before.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import nn

from llmprune.errors import CheckpointError, ModelError
from llmprune.kernels import gpu
from llmprune.kernels.choice import EXPAND
from llmprune.kernels.experts import Form, choose, find
from llmprune.kernels.interface import Mixture
from llmprune.kernels.packed import Packed
from llmprune.kernels.table import tell
from llmprune.runtime import fused
from llmprune.runtime.absent import (
    SWITCHING,
    AbsentBitmap,
    AbsentValues,
    LaidOut,
    plainly,
    wait_for,
)
from llmprune.runtime.laid_out import equal, may_give_way

if TYPE_CHECKING:
    from llmprune.runtime.experts import PackedModule

Laid = dict[str, LaidOut]


class LaidExperts(LaidOut):
    """The matrices of a parameter; `shape` is (experts, out, in), `turned` whether each is stored [in,
    out].
    """

    def packed(self) -> Packed:
        """See `LaidOut.packed`."""
        assert self.layout is not None
        experts, rows, columns = self.shape
        return find(self.kernel).packed(self.layout, (experts, rows, columns), self.turned)


def held(module: PackedModule) -> Laid | None:
    """The layouts that a module holds, or None where it holds the stored form."""
    laid = module._laid
    if not laid:
        return None
    for name, one in laid.items():
        values, bitmap = module.parts(name)
        ours = isinstance(values, AbsentValues) and isinstance(bitmap, AbsentBitmap)
        if one.layout is None or not ours:
            bring_back(module)
            return None
    return laid


def at_hand(module: PackedModule) -> Laid | None:
    """The layouts for a forward, if any; lays them out where that may and should be."""
    if torch.compiler.is_compiling():
        return module._laid
    laid = held(module)
    # nothing is laid out in training: optimizers and gradients would have it back for each step
    if laid is None and not (module.training and torch.is_grad_enabled()):
        laid = lay_out(module)
    return laid


def bring_back(module: PackedModule) -> None:
    """Have a module hold the stored form, if it does not."""
    with SWITCHING:
        laid, module._laid = module._laid, {}
        for one in laid.values():
            one.bring_back()


@torch.no_grad()
def lay_out(module: PackedModule) -> Laid | None:
    """Have a module hold its matrices in the forms that `choose` gives, if it may and should.

    For a moment both forms of this module are there.

    Raises:
        CheckpointError: when a matrix does not hold the pattern that it is said to hold.
        ModelError: when a form does not give back what it was given.
    """
    with SWITCHING:
        if (laid := held(module)) is not None or not _may_be_laid_out(module):
            return laid
        values = module.parts("down_proj")[0]
        assert values is not None
        place = values.dtype, values.device
        if module._expands == place:
            return None
        with plainly(place[1]):
            if (laid := _made(module)) is None:
                module._expands = place
                return None
            wait_for(place[1])  # other streams may read them from now on
            for name, one in laid.items():
                kept, bitmap = (
                    module._parameters[f"{name}_values"],
                    module._buffers[f"{name}_bitmap"],
                )
                assert kept is not None
                assert bitmap is not None
                module._buffers[f"{name}_bitmap"] = one.stand_in(kept, bitmap)
            module._laid = laid
            return laid


def _may_be_laid_out(module: PackedModule) -> bool:
    """Whether a module is one of those that `fused` runs, and its stored form may give place just now."""
    if not fused.fits(module, list(module.rooms)) or not module.decorated:
        return False
    if any(len(room.shape) != 3 for room in module.rooms.values()):
        return False
    return all(may_give_way(module, *module.parts(name)) for name in module.rooms)


def _made(module: PackedModule) -> Laid | None:
    """The layouts of all parameters, once they give what the family's own forward gives, or None."""
    forms = dict[str, Form]()
    for name in module.rooms:
        form = choose(case(module, name, 1))
        if form is None:
            return None
        forms[name] = form
    laid: Laid = {name: _one(module, name, form) for name, form in forms.items()}
    if (why := _differs(module, laid)) is not None:
        tell(f"{type(module).__name__} runs expert by expert: {why}")
        return None
    for one in laid.values():
        assert one.layout is not None
        for part in one.layout:  # CUDA graphs of torch.compile would copy it for every replay
            torch._dynamo.mark_static_address(part, guard=False)
    return laid


def _one(module: PackedModule, name: str, form: Form) -> LaidExperts:
    """The layout of a parameter."""
    turned = _transposed(module)
    stored = module.packed(name)
    # of what was loaded in inference mode, nothing but a copy may be looked at outside of it
    own = (stored.values.detach(), stored.bitmap)
    values, bitmap = (part.clone() if part.is_inference() else part for part in own)
    seen = Packed(values, bitmap, stored.shape)
    try:
        layout = form.prepare(seen, turned)
    except ValueError as error:
        raise CheckpointError(
            f"experts {list(seen.shape)} are said to hold {module.rooms[name].pattern}, but: {error}; get "
            "the checkpoint again"
        ) from None
    experts, *sides = seen.shape
    rows, columns = sides[::-1] if turned else sides
    if not equal(form.packed(layout, (experts, rows, columns), turned), seen):
        raise ModelError(
            f"{form.name} does not give back experts {list(seen.shape)} as they were; set "
            "LLMPRUNE_KERNEL=expand to do without it"
        )
    return LaidExperts(form.name, (experts, rows, columns), False, turned, layout)


def _transposed(module: nn.Module) -> bool:
    return bool(module.is_transposed)


def case(module: PackedModule, name: str, tokens: int) -> Mixture:
    """What the form of a parameter is asked to do for so many tokens."""
    room, values = module.rooms[name], module.parts(name)[0]
    assert values is not None
    experts, rows, columns = room.shape
    transposed = bool(getattr(module, "is_transposed", room.transposed))
    return Mixture(
        (rows, columns),
        values.shape[0],
        values.dtype,
        values.device,
        room.pattern,
        room.axis,
        transposed,
        tokens,
        values.requires_grad,
        experts,
        min(experts, chosen(module)),
    )


def chosen(module: nn.Module) -> int:
    """To how many experts the config says that a token is routed; 1 if it says nothing."""
    config = getattr(module, "config", None)
    for name in ("num_experts_per_tok", "moe_top_k", "top_k_experts"):
        said = getattr(config, name, None)
        if isinstance(said, int) and said > 0:
            return said
    return 1


def prepare(module: PackedModule) -> Counter[str]:
    """Lay a module out anew if other forms are chosen now; counts the forms of its parameters."""
    laid = held(module)
    if laid is not None:
        now = {name: choose(case(module, name, 1)) for name in laid}
        if any(form is None or form.name != laid[name].kernel for name, form in now.items()):
            bring_back(module)
    module._expands = None
    laid = lay_out(module)
    stacked = [name for name, room in module.rooms.items() if len(room.shape) == 3]
    return Counter(EXPAND.name if laid is None else laid[name].kernel for name in stacked)


_COMPARED: dict[tuple[object, ...], str | None] = {}


def _differs(module: PackedModule, laid: Laid) -> str | None:
    """Whether `fused` gives something else than the family's own forward, in a few words, or None.

    Looked at once for each class, device and dtype, on four random tokens.
    """
    first = next(iter(laid.values()))
    values = module.parts("down_proj")[0]
    assert values is not None
    device = gpu.whole(values.device)
    key = module._dense_class, device, values.dtype, tuple(one.kernel for one in laid.values())
    if key not in _COMPARED:
        random = torch.Generator().manual_seed(0)
        experts, _, columns = first.shape
        few = min(experts, chosen(module))
        hidden = torch.randn(4, columns, generator=random).to(device, values.dtype)
        index = torch.rand(4, experts, generator=random).argsort(1)[:, :few].to(device)
        weights = torch.rand(4, few, generator=random).to(device, values.dtype)
        own = module.run_own(hidden, index, weights).float()
        matrices = fused.taken(laid)
        assert matrices is not None
        ours = fused.forward(module, matrices, hidden, index, weights).float()
        most = 0.03 * float(own.abs().max())  # rounded to bfloat16 on the way, in another order
        alike = ours.shape == own.shape and bool(((ours - own).abs() <= most).all())
        _COMPARED[key] = None if alike else "its experts computed at once give something else"
    return _COMPARED[key]
