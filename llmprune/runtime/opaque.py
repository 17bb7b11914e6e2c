"""The experts of a block as one operator, which torch.compile need not look into.

Which experts run depends on the tokens, so a graph cannot hold their loop. It holds this operator instead,
which runs the module's own. For inference: where a gradient is wanted, the module is left out of the graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

_numbers = count()
_modules: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


def number(module: nn.Module) -> int:
    """What `run` finds a module by, in this process and for as long as it lives."""
    given = next(_numbers)
    _modules[given] = module
    return given


def fits(inputs: Sequence[Any]) -> bool:
    """Whether `run` takes these inputs here: tensors alone, and nobody asks for gradients or autocasts.

    The first is what the experts give their outputs in the form of.
    """
    if not all(isinstance(one, Tensor) for one in inputs):
        return False
    wanted = torch.is_grad_enabled() and any(one.requires_grad for one in inputs)
    return not wanted and not torch.is_autocast_enabled(inputs[0].device.type)


def run(given: int, inputs: Sequence[Tensor]) -> Tensor:
    """The outputs of the module with this number, of the shape and dtype of the first input.

    Raises:
        RuntimeError: where its outputs are of another shape or dtype.
    """
    out: Tensor = torch.ops.llmprune.experts(given, inputs)
    return out


# which experts are hit is looked at on the host: no CUDA graph can hold that
@torch.library.custom_op("llmprune::experts", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _run(given: int, inputs: Sequence[Tensor]) -> Tensor:
    module: Any = _modules[given]
    first = inputs[0]
    out: Tensor = module.run_own(*inputs)
    if out.shape != first.shape or out.dtype != first.dtype:
        raise RuntimeError(
            f"{type(module).__name__} gives {out.dtype} {list(out.shape)} for inputs {first.dtype} "
            f"{list(first.shape)}, which a graph of torch.compile does not expect: do not compile it"
        )
    return out


@_run.register_fake
def _(given: int, inputs: Sequence[Tensor]) -> Tensor:
    return torch.empty_like(inputs[0])
