"""Which norm a module is, found by trying: x / rms(x) or (x - mean) / std, its gain w or 1 + w, its bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmprune.transforms.cells import Cell, Site

_PRECISE = 1e-3  # many compute in float32, whatever they are given
_LARGE = 1e3  # scale of the inputs tried: whatever epsilon a family adds is nothing beside them


@dataclass(frozen=True)
class Norm:
    """A norm over the width of the model.

    Attributes:
        name: full module name.
        centred: whether it takes the mean away, as LayerNorm does.
        offset: 1 where the gain is 1 + weight, as in Gemma; else 0.
        weight: cell of the gain; None where there is none.
        bias: cell of the bias; None where there is none.
        readers: the matrices that read it, and nothing else.
    """

    name: str
    centred: bool
    offset: float
    weight: Cell | None
    bias: Cell | None
    readers: tuple[Site, ...] = ()

    def gain(self) -> Tensor | None:
        """[width] float64, or None where it is one everywhere."""
        if self.weight is None:
            return None
        gain = self.weight.get() + self.offset
        return None if bool((gain == 1).all()) else gain

    def set_gain(self, gain: Tensor) -> None:
        """Write a gain [width]."""
        assert self.weight is not None
        self.weight.put(gain - self.offset)


def recognised(
    name: str, module: nn.Module, width: int, like: Tensor, dtypes: Mapping[str, torch.dtype]
) -> Norm | None:
    """`module` as a norm over `width` features, or None where it is none.

    `like` is a tensor [..., width] that it was seen to take by itself.
    """
    held = dict(module.named_parameters(recurse=False))
    if set(held) - {"weight", "bias"} or any(p.shape != (width,) for p in held.values()):
        return None
    generator = torch.Generator().manual_seed(0)
    tried = torch.randn(8, width, generator=generator, dtype=torch.float64) * _LARGE + _LARGE
    shape = (
        *(1 for _ in like.shape[:-2]),
        *tried.shape,
    )  # some modules take no other number of axes
    x = tried.view(shape).to(like.device, like.dtype)
    with torch.no_grad():
        given = module(x)
    if not isinstance(given, Tensor) or given.shape != x.shape:
        return None
    x, given = x.double(), given.double()
    weight, bias = held.get("weight"), held.get("bias")
    plus = 0.0 if bias is None else bias.double()
    precise = max(_PRECISE, torch.finfo(like.dtype).eps ** 0.5)
    for centred in (False, True):
        y = x - x.mean(-1, keepdim=True) if centred else x
        y = y / y.square().mean(-1, keepdim=True).sqrt()
        for offset in (0.0, 1.0) if weight is not None else (0.0,):
            gain = 1.0 if weight is None else weight.double() + offset
            want = y * gain + plus
            if bool((want - given).norm() <= precise * given.norm()):
                return _norm(name, module, centred, offset, held, dtypes)
    return None


def _norm(
    name: str,
    module: nn.Module,
    centred: bool,
    offset: float,
    held: Mapping[str, nn.Parameter],
    dtypes: Mapping[str, torch.dtype],
) -> Norm:
    cells = {
        key: Cell(f"{name}.{key}", module, key, dtypes.get(f"{name}.{key}", p.dtype))
        for key, p in held.items()
    }
    return Norm(name, centred, offset, cells.get("weight"), cells.get("bias"))
