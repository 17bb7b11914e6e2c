"""What stands in a layer for weights that lie in the layout of a kernel, and becomes them when needed."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.kernels.choice import find
from llmprune.kernels.packed import Packed, pack, unpack, unpack_bits

SWITCHING = threading.RLock()  # one form gives place to the other, whichever thread asks


class LaidOut:
    """A matrix in the layout of a kernel.

    Attributes:
        kernel: its name.
        shape: (rows, columns) of the matrix that the kernel was given.
        transposed: whether its rows are the inputs.
        turned: whether it is the transpose of the stored matrix.
        layout: what the kernel reads; None once the stored form has been brought back.
    """

    def __init__(
        self,
        kernel: str,
        shape: tuple[int, ...],
        transposed: bool,
        turned: bool,
        layout: list[Tensor],
    ) -> None:
        self.kernel, self.shape = kernel, shape
        self.transposed, self.turned = transposed, turned
        self.layout: list[Tensor] | None = layout
        self._parts: list[Callable[[], Tensor | None]] = []

    def packed(self) -> Packed:
        """The stored form, in new memory."""
        assert self.layout is not None
        found = find(self.kernel).packed(self.layout, self.shape)
        return turned_around(found) if self.turned else found

    def stand_in(self, values: nn.Parameter, bitmap: Tensor) -> Tensor:
        """Have `values` hold nothing, and give a bitmap like `bitmap` that holds nothing."""
        absent = bitmap.new_zeros(()).expand_as(bitmap).as_subclass(AbsentBitmap)
        with torch.inference_mode(values.is_inference()):
            empty = torch.full((), torch.nan, dtype=values.dtype, device=values.device)
            values.data = empty.expand_as(values)  # and not zeros: should it ever be read, it shows
        values.__class__ = AbsentValues
        stand_ins: tuple[Any, ...] = values, absent
        for part in stand_ins:
            part.laid = self
            self._parts.append(weakref.ref(part))
        return absent

    def bring_back(self, asked: Tensor | None = None) -> None:
        """Put the stored form where it was; `asked` is a part of it that somebody holds."""
        with SWITCHING:
            if self.layout is None:
                return
            with plainly(self.layout[0].device):
                packed = self.packed()
                wait_for(packed.values.device)
                for part in (asked, *(found() for found in self._parts)):
                    if isinstance(part, Absent):
                        part.become(packed)
            self.layout = None


class Absent:
    """What stands for a part of a matrix that is laid out, and becomes it when it is needed."""

    laid: LaidOut

    def become(self, packed: Packed) -> None:
        """Hold what is to be held; an ordinary tensor again."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer what needs no values; for all else bring them back first."""
        kwargs = kwargs or {}
        if _needs_no_values(func, args):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        with SWITCHING:  # or a forward of another thread could take them away again
            for absent in _absent((args, kwargs)):
                absent.laid.bring_back(absent)  # type: ignore[arg-type]
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        self.laid.bring_back(self)  # type: ignore[arg-type]
        return self.__deepcopy__(memo)  # of the class that it has now

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.laid.bring_back(self)  # type: ignore[arg-type]
        return self.__reduce_ex__(protocol)


class AbsentValues(Absent, nn.Parameter):
    """The values of a matrix that is laid out."""

    def become(self, packed: Packed) -> None:
        """See `Absent.become`."""
        del self.laid
        self.__class__ = nn.Parameter  # type: ignore[assignment]
        inference = self.is_inference()
        with torch.inference_mode(inference):  # a tensor made there can hold no other
            self.data = packed.values.clone() if inference else packed.values


class AbsentBitmap(Absent, Tensor):
    """The bitmap of a matrix that is laid out."""

    def become(self, packed: Packed) -> None:
        """See `Absent.become`."""
        del self.laid
        self.__class__ = Tensor  # type: ignore[assignment]
        self.data = packed.bitmap


# What is answered without values, by name of the property or function: it follows from dtype, shape, device.
# Not `is_complex` and `_version`: these are all that DataParallel and DistributedDataParallel ask in Python
# before they read the memory.
_PROPERTIES = {
    *("shape", "dtype", "device", "layout", "ndim", "nbytes", "itemsize"),
    *("is_meta", "is_cpu", "is_cuda", "is_sparse", "is_quantized", "is_nested"),
    *("requires_grad", "is_leaf", "grad", "grad_fn", "retains_grad", "_backward_hooks"),
}
_FUNCTIONS = {
    *("size", "dim", "ndimension", "numel", "nelement", "element_size", "get_device"),
    *("is_floating_point", "is_signed", "is_inference", "__hash__", "__len__"),
}


def _needs_no_values(func: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Whether a function of tensors can be answered by one that holds none."""
    name = getattr(func, "__name__", "")
    of = getattr(getattr(func, "__self__", None), "__name__", "")
    if name == "__get__":
        return of in _PROPERTIES
    if name == "__set__":  # to freeze what is frozen, and to forget a gradient that there is not
        return (of == "requires_grad" and not args[1]) or (of == "grad" and args[1] is None)
    if name == "requires_grad_":
        return args[1:2] == (False,)
    return name in _FUNCTIONS


def _absent(found: Any) -> Iterator[Absent]:
    """The absent tensors among the arguments of a function."""
    if isinstance(found, Absent):
        yield found
    elif isinstance(found, Mapping):
        yield from _absent(list(found.values()))
    elif isinstance(found, list | tuple):
        for one in found:
            yield from _absent(one)


def turned_around(packed: Packed) -> Packed:
    """The transpose."""
    bits = unpack_bits(packed.bitmap, packed.shape[-1])
    return pack(unpack(packed).T.contiguous(), bits.T.contiguous())


def wait_for(device: torch.device) -> None:
    """Until what was asked of a GPU is done, on whatever stream."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def plainly(device: torch.device) -> Iterator[None]:
    """Tensors made here are as good as any, whatever mode the caller is in."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.device("cpu"),
    ):
        yield
