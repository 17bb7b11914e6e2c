"""The forward of fused experts whose matrices are laid out: all at once, and the host waits for nothing.

What transformers' `grouped_mm_experts_forward` computes, by the module's own activation, gate, biases and
norm, with each product by `sparse_experts`; inputs are read, and outputs written, in their own order, so
that nothing is gathered or put back. Only for classes that transformers runs so when they are dense
(`fits`); and each is compared with its own loop once before (`laid_experts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from llmprune.kernels.sparse_experts import route, sparse_experts
from llmprune.runtime.absent import LaidOut

Matrices = tuple[str, tuple[int, ...], list[Tensor]]
"""The form that the matrices of a parameter are held in, (experts, out, in), and their layout."""
NAMES = ("hidden_states", "top_k_index", "top_k_weights")


def fits(module: Any, names: Sequence[str]) -> bool:
    """Whether transformers has a forward of its own for a module, and `names` are the matrices of that."""
    known = all(hasattr(module, flag) for flag in _FLAGS)
    if not known or module._is_expert_parallel:
        return False
    return set(names) == {_first(module), "down_proj"}


_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel")


def arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor] | None:
    """Hidden states, index and weights of a call, or None where it is called otherwise."""
    given = [*args, *(kwargs[name] for name in NAMES[len(args) :] if name in kwargs)]
    alike = len(given) == len(NAMES) == len(args) + len(kwargs)
    return given if alike and all(isinstance(one, Tensor) for one in given) else None


def _first(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def taken(laid: Mapping[str, LaidOut] | None) -> dict[str, Matrices] | None:
    """What `forward` reads, whatever other threads bring back meanwhile; None where they have."""
    found = {}
    for name, one in (laid or {}).items():
        layout = one.layout
        if layout is None:
            return None
        found[name] = one.kernel, one.shape, layout
    return found or None


def forward(
    module: nn.Module,
    held: Mapping[str, Matrices],
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
) -> Tensor:
    """The outputs [tokens, hidden].

    Args:
        module: fused experts of transformers.
        held: the matrices of its parameters.
        hidden: [tokens, hidden].
        index: [tokens, chosen] whole numbers, the experts of each token.
        weights: [tokens, chosen].
    """
    experts: Any = module
    chosen, number = index.shape[-1], held["down_proj"][1][0]
    order, ends = route(index, number)

    def product(name: str, x: Tensor, each: int) -> Tensor:
        form, shape, layout = held[name]
        y = sparse_experts(x, layout, order, ends, form, shape, each, chosen)
        if not experts.has_bias:
            return y
        bias: Tensor = getattr(experts, f"{name}_bias")
        return y + bias[index.reshape(-1)]

    y = product(_first(experts), hidden.reshape(-1, hidden.shape[-1]), chosen)
    y = experts._apply_gate(y) if experts.has_gate else experts.act_fn(y)
    y = product("down_proj", y, 1)
    if experts.has_post_expert_norm:
        y = experts.post_expert_norm(y)
    y = y * weights.reshape(-1, 1)
    return y.view(-1, chosen, y.shape[-1]).sum(dim=1).to(hidden.dtype).view(hidden.shape)
