"""Modules with a forward of their own that hold their parameters packed: fused experts above all.

The module stays what it is, of a class made from its own, so that the family's forward, activations and
biases are those of transformers. Where it reads `gate_up_proj`, it finds a view: `gate_up_proj[e]` is
multiplied packed, one expert at a time. transformers has faster ways to run dense experts (grouped_mm),
which need them all dense at once; packed ones run the family's own loop. On a GPU, where a kernel holds
them, `fused` runs them all at once (`laid_experts`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmprune.checkpoint.census import Axis
from llmprune.errors import CheckpointError
from llmprune.kernels.interface import Mixture
from llmprune.kernels.packed import Packed, count
from llmprune.kernels.sparse_linear import expanded
from llmprune.runtime import fused, laid_experts, opaque
from llmprune.runtime.absent import LaidOut
from llmprune.runtime.fit import check_packed, take_packed
from llmprune.runtime.view import PackedMatrix, PackedStack


@dataclass(frozen=True)
class Room:
    """What is known of a packed parameter but for its tensors.

    Attributes:
        shape: of the dense parameter, [experts, rows, columns] or [rows, columns].
        pattern: `n:m`, which every group holds, or `unstructured`.
        axis: whether the groups lie along `rows` or `columns`.
        transposed: whether it is stored [experts, in, out]; None where nobody has said.
    """

    shape: tuple[int, ...]
    pattern: str
    axis: Axis
    transposed: bool | None = None


_PASSING = ("_counted", "_shares", "_number", "_laid", "_expands")  # not of its copies


class PackedModule(nn.Module):
    """What is added to a module's class; made by `hold`, undone by `release`.

    Attributes:
        rooms: its packed parameters; of each, `<name>_values` [kept] is a parameter that requires no
            gradient until asked to, and `<name>_bitmap` a uint8 buffer, as in docs/format.md.
    """

    _is_hf_initialized: ClassVar[bool] = True
    _dense_class: ClassVar[type[nn.Module]]
    _own_forward: ClassVar[Callable[..., Any]]

    rooms: dict[str, Room]
    _number: int
    _laid: dict[str, LaidOut]
    _expands: tuple[torch.dtype, torch.device] | None  # where it was chosen to leave it stored

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("rooms", ()):
            return self._view(name)
        return super().__getattr__(name)

    def packed(self, name: str) -> Packed:
        """Values and bitmap of a packed parameter, not copied; the stored form is brought back for that."""
        if not torch.compiler.is_compiling():
            laid_experts.bring_back(self)
        return Packed(*self.parts(name), self.rooms[name].shape)

    def parts(self, name: str) -> tuple[nn.Parameter, Tensor]:
        """Values and bitmap of a packed parameter, or what stands for them."""
        values, bitmap = self._parameters[f"{name}_values"], self._buffers[f"{name}_bitmap"]
        assert values is not None
        assert bitmap is not None
        return values, bitmap

    @property
    def decorated(self) -> bool:
        """Whether transformers has wrapped other ways to run experts around the family's own."""
        return self._dense_class.forward is not type(self)._own_forward

    def cases(self, tokens: int) -> list[Mixture]:
        """What kernels for all experts at once are asked to do for so many tokens, by parameter."""
        stacked = (name for name, room in self.rooms.items() if len(room.shape) == 3)
        return [laid_experts.case(self, name, tokens) for name in stacked]

    def check(self) -> None:
        """Refuse values and bitmaps that do not fit each other; to be called when they are loaded.

        Raises:
            CheckpointError: saying what does not fit.
        """
        for name in self.rooms:
            check_packed(self.packed(name))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The family's own, or what it computes, all experts at once, where they are laid out for that."""
        if all(len(room.shape) == 2 for room in self.rooms.values()):  # nothing is shared out
            return self._own_forward(self, *args, **kwargs)
        given = fused.arguments(args, kwargs)
        if given is not None and (laid := fused.taken(laid_experts.at_hand(self))):
            return fused.forward(self, laid, *given)
        if torch.compiler.is_compiling():
            return self._compiled(*args, **kwargs)
        return self.run_own(*args, **kwargs)

    def _compiled(self, *args: Any, **kwargs: Any) -> Any:
        """Which experts run depends on the data: torch.compile cannot look into it."""
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if len(self.rooms) > 1 and not kwargs and not trained and opaque.fits(args):
            return opaque.run(self._number, args)
        return self._apart(*args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _apart(self, *args: Any, **kwargs: Any) -> Any:
        """Outside of the graph."""
        return self.run_own(*args, **kwargs)

    def run_own(self, *args: Any, **kwargs: Any) -> Any:
        """The family's own forward, eager."""
        self.__dict__["_shares"] = {}
        try:
            return self._own_forward(self, *args, **kwargs)
        finally:
            del self.__dict__["_shares"]

    def _view(self, name: str) -> Any:
        room = self.rooms[name]
        if len(room.shape) == 2:
            view = PackedMatrix(self.packed(name), room.pattern, room.axis)
            return view.expanded() if torch.compiler.is_compiling() else view
        asked = list[tuple[Packed, Callable[[int], Tensor]]]()

        def matrix(expert: int) -> PackedMatrix:
            if not asked:  # not before: it takes the stored form
                packed = self.packed(name)
                asked.append((packed, self._shared_out(name, packed)))
            packed, values_of = asked[0]
            one = Packed(values_of(expert), packed.bitmap[expert], packed.shape[1:])
            return PackedMatrix(one, room.pattern, room.axis)

        laid = laid_experts.held(self)
        kernel = None if laid is None else laid[name].kernel
        return PackedStack(
            matrix, room.shape[0], False, partial(laid_experts.case, self, name), kernel
        )

    def _shared_out(self, name: str, packed: Packed) -> Callable[[int], Tensor]:
        """Gives the values of an expert.

        Those that are trained are cut apart once for a forward: a slice for each expert would have a
        gradient as long as all of them.
        """
        starts = self._starts(name, packed.bitmap)
        if not (packed.values.requires_grad and torch.is_grad_enabled()):
            return lambda expert: packed.values[starts[expert] : starts[expert + 1]]
        shares = self.__dict__.get("_shares", {})
        if name not in shares:
            lengths = [end - start for start, end in pairwise(starts)]
            shares[name] = torch.split(packed.values, lengths)
        parts: tuple[Tensor, ...] = shares[name]
        return parts.__getitem__

    def _starts(self, name: str, bitmap: Tensor) -> list[int]:
        """Where the values of each expert begin; counted once for a bitmap as it stands."""
        counted = self.__dict__.setdefault("_counted", {})
        known = counted.get(name)
        if known is None or known[0] is not bitmap or known[1] != bitmap._version:
            bits = [count(one) for one in bitmap]
            starts = list(accumulate(bits, initial=0))
            known = counted[name] = bitmap, bitmap._version, starts
        found: list[int] = known[2]
        return found

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """As any module; then the matrices lie as a kernel of their new device reads them."""
        laid_experts.bring_back(self)
        self.__dict__.pop("_counted", None)  # it holds on to the bitmaps that are replaced
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._expands = None
        with suppress(CheckpointError):  # `to_empty` makes room for what is still to come
            laid_experts.lay_out(self)  # and a forward would raise it
        return self

    def __getstate__(self) -> dict[str, Any]:
        laid_experts.bring_back(self)
        return {k: v for k, v in self.__dict__.items() if k not in _PASSING}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled by the family's class: the one made from it has no place to be imported from."""
        return _blank, (self._dense_class,), self.__getstate__()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take values of any number with their bitmap, or a dense parameter for the mask that is here."""
        laid_experts.bring_back(self)
        for name, room in self.rooms.items():
            take_packed(self, name, room.shape, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """What is packed."""
        told = [super().extra_repr()] if super().extra_repr() else []
        for name, room in self.rooms.items():
            taken = sum(part.nbytes for part in self.parts(name))
            told.append(f"{name}: {room.pattern}, {taken:,} bytes")
        return ", ".join(told)


def hold(
    module: nn.Module,
    name: str,
    packed: Packed,
    pattern: str,
    axis: Axis,
    transposed: bool | None = None,
) -> None:
    """Replace a module's parameter `name` by its packed form, in place; the module gets another class.

    Args:
        module: any; others keep their reference to it, and its hooks stay.
        name: of a parameter of its own, [experts, rows, columns] or [rows, columns].
        packed: what to hold, not copied; on the meta device to make room for what is to be loaded.
        pattern: `n:m`, which every group holds, or `unstructured`.
        axis: along which the groups lie.
        transposed: whether it is stored [experts, in, out], if that is known.

    Raises:
        CheckpointError: when values and bitmap do not fit each other.
    """
    check_packed(packed)
    del module._parameters[name]
    values = nn.Parameter(packed.values.detach(), requires_grad=False)
    module.register_parameter(f"{name}_values", values)
    module.register_buffer(f"{name}_bitmap", packed.bitmap)
    if not isinstance(module, PackedModule):
        kind: Any = type(module)
        module.__dict__["rooms"] = {}
        module.__dict__ |= {"_number": opaque.number(module), "_laid": {}, "_expands": None}
        module.__class__ = _packed_class(kind)
    module.__dict__["rooms"][name] = Room(tuple(packed.shape), pattern, axis, transposed)


@torch.no_grad()
def release(module: PackedModule, name: str) -> None:
    """Undo `hold`: the parameter is dense again, bit for bit, and requires gradients as any other."""
    packed = module.packed(name)
    dense = expanded(packed.values, packed.bitmap, packed.shape)
    del module._parameters[f"{name}_values"], module._buffers[f"{name}_bitmap"], module.rooms[name]
    module.__dict__.pop("_counted", None)
    module.register_parameter(name, nn.Parameter(dense))
    if not module.rooms:
        for added in ("rooms", "_number", "_laid", "_expands"):
            del module.__dict__[added]
        module.__class__ = module._dense_class  # type: ignore[assignment]


@functools.cache
def _packed_class(dense: Any) -> type[PackedModule]:
    """A class like `dense`, of the same name, by which families and PEFT are told apart."""
    body = {"_dense_class": dense, "_own_forward": staticmethod(_own_forward(dense))}
    body |= {"__module__": dense.__module__, "__doc__": dense.__doc__}
    made: type[PackedModule] = type(dense.__name__, (PackedModule, dense), body)
    return made


def _blank(dense: Any) -> nn.Module:
    """What unpickling fills."""
    made = _packed_class(dense)
    module = made.__new__(made)
    module.__dict__ |= {"_number": opaque.number(module), "_laid": {}, "_expands": None}
    return module


def _own_forward(dense: Any) -> Callable[..., Any]:
    """The family's own loop over experts, below what transformers wraps around it."""
    forward: Any = dense.forward
    while "use_experts_implementation" in forward.__code__.co_qualname:
        forward = forward.__wrapped__
    own: Callable[..., Any] = forward
    return own
