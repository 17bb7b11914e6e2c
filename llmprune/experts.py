"""Fused experts: which parameters hold them, how they lie in memory, and what they are called.

Mixtures of experts keep the weights of all experts in one parameter, [experts, out, in] or [experts, in,
out].
"""

from __future__ import annotations

import inspect
import re

import torch
from torch import nn

from llmprune.errors import ConfigError, ModelError
from llmprune.preserve import evaluating, random_state
from llmprune.watch import learning


def fused(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of `module` itself that hold one matrix per expert: name and [experts, ., .].

    A convolution's weight has three dimensions, too; what tells experts is the class: transformers
    calls every such module `...Experts`.
    """
    if "expert" not in type(module).__name__.lower():
        return []
    own = module.named_parameters(recurse=False)
    return [(n, p) for n, p in own if p.dim() == 3 and p.is_floating_point() and min(p.shape) > 0]


def refuse_flat(layers: nn.ModuleList) -> None:
    """Refuse experts that lie one below the other in a matrix: they would silently stay dense.

    Raises:
        ModelError: naming the parameter.
    """
    for name, module in layers.named_modules():
        if "expert" not in type(module).__name__.lower() or isinstance(module, nn.Linear):
            continue
        for attribute, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 2 and not re.search("bias|scale", attribute):
                raise ModelError(
                    f"{type(module).__name__} holds its experts as one matrix ({name}.{attribute}), "
                    "which llmprune cannot prune; to prune the rest, name it: --targets '*_proj'"
                )


def named(module: str, attribute: str, expert: int) -> str:
    """Name of one expert's matrix in the parameter `attribute` of the module called `module`."""
    return f"{module}.{expert}" if attribute == "weight" else f"{module}.{expert}.{attribute}"


def owner(name: str, attribute: str) -> str:
    """Name of the module that holds the expert's matrix `name`: the inverse of `named`."""
    return name.removesuffix(f".{attribute}").rpartition(".")[0]


def number(name: str) -> int | None:
    """The expert that an unfused matrix belongs to, such as 3 in `mlp.experts.3.w1`, or None."""
    found = re.search(r"(?:^|\.)experts\.(\d+)\.", name)
    return int(found[1]) if found else None


def transposed(
    model: nn.Module, module: nn.Module, attribute: str, probed: dict[tuple[type, str], bool]
) -> bool:
    """Whether a fused parameter is stored [experts, in, out].

    transformers 5 declares it. Where it does not, shapes tell, those of another module of the same class
    too; where they do not, a forward of a few tokens shows it, which `probed` remembers for the class.

    Raises:
        ModelError: when nothing tells.
    """
    declared = getattr(module, "is_transposed", None)
    if isinstance(declared, bool):
        return declared
    alike = (other for other in model.modules() if type(other) is type(module))
    for one in (module, *alike):
        if (told := _by_shape(one, attribute)) is not None:
            return told
    key = type(module), attribute
    if key not in probed:
        probed[key] = _probed(model, module, attribute)
    return probed[key]


def _by_shape(module: nn.Module, attribute: str) -> bool | None:
    """Whether shapes say [experts, in, out]; None where both ways fit.

    The module may name the sizes of its outputs and inputs; what `gate_up_proj` gives, halved, is what
    `down_proj` takes.
    """
    _, rows, columns = getattr(module, attribute).shape
    sizes = getattr(module, "output_size", None), getattr(module, "input_size", None)
    if rows != columns and sizes in ((rows, columns), (columns, rows)):
        return sizes == (columns, rows)
    first, second = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if first is not None and second is not None:  # tensors, or the views of packed ones
        (_, a, b), (_, c, d) = first.shape, second.shape
        if (a, b) == (2 * d, c) or (b, a) == (2 * c, d):
            return (b, a) == (2 * c, d)
    return None


def _probed(model: nn.Module, module: nn.Module, attribute: str) -> bool:
    """Which dimension a forward of a few tokens sums over."""
    parameter, found = getattr(module, attribute), list[bool]()
    if parameter.device.type != "meta":
        ids = torch.arange(4, device=parameter.device)[None]
        with evaluating(model), random_state(model), learning(module, attribute, found):
            model(input_ids=ids, use_cache=False)
    if not found:
        raise ModelError(
            f"{type(module).__name__}.{attribute} {tuple(parameter.shape)} does not tell which side its "
            "inputs are on, and no forward showed it; give its class an attribute is_transposed: True "
            "for [experts, in, out], False for [experts, out, in]"
        )
    return found[0]


def check_signature(module: nn.Module) -> None:
    """Refuse experts whose forward does not take hidden states and the choice of experts apart.

    Raises:
        ConfigError: naming their class.
    """
    names = list(inspect.signature(module.forward).parameters)[:3]
    standard = (
        len(names) == 3 and re.search("ind(ex|ices)", names[1]) and names[2].endswith("weights")
    )
    if not standard:
        raise ConfigError(
            f"--calibrate-all-experts cannot send every token to every expert of "
            f"{type(module).__name__}, whose inputs are prepared for the experts that its router "
            "chose; leave the option out"
        )
