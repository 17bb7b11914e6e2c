"""What a repair may change in a block, and how it is kept while it changes.

Everything is float32 while it is tuned, whatever the model computes in: a step of a hundredth would vanish
in the rounding of bfloat16. A weight that was pruned is zero before, and has no gradient, so it stays zero.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.errors import ConfigError
from llmprune.model import blocks, is_router
from llmprune.parallel import Ranks
from llmprune.prune_matrix import Done

BETAS = (0.9, 0.95)  # of Adam; a repair has too few steps for the usual 0.999
VECTOR = 0.1  # of the rate, for gains and biases: all tokens push them the same way
TINY = 1e-8  # of Adam; gradients are of size one


@dataclass
class Tuned:
    """One parameter of a block while it is tuned.

    Attributes:
        parameter: in the model, of any floating dtype.
        keep: bool in the shape of the parameter, True for what is left; None where all is.
        master: float32 values; the parameter's own memory where that is float32.
        size: root mean square of what is left, before it was tuned.
        gradient: float32, of the step in hand.
        mean: float32, of gradients, as Adam weighs them.
        square: float32, of their squares.
        best: what it was when the held-out windows liked it most, in its own dtype.
    """

    parameter: nn.Parameter
    keep: Tensor | None
    master: Tensor
    size: float
    gradient: Tensor
    mean: Tensor
    square: Tensor
    best: Tensor

    @classmethod
    def of(cls, parameter: nn.Parameter, keep: Tensor | None) -> Tuned:
        """`parameter` as it is, with nothing learnt."""
        master = parameter.data.float()
        count = master.numel() if keep is None else int(keep.sum())
        size = math.sqrt(float(master.square().sum()) / max(1, count))
        gradient, mean, square = (torch.zeros_like(master) for _ in range(3))
        best = parameter.data.clone()
        return cls(parameter, keep, master, size, gradient, mean, square, best)

    def step(self, rate: float, number: int) -> None:
        """Step `number`, from 1, of Adam, of length `rate`, along the gradient, which is then zero."""
        if self.keep is not None:
            self.gradient.mul_(self.keep)
        self.mean.lerp_(self.gradient, 1 - BETAS[0])
        self.square.lerp_(self.gradient.square(), 1 - BETAS[1])
        root = (self.square / (1 - BETAS[1] ** number)).sqrt_().add_(TINY)
        rate *= VECTOR if self.keep is None else 1
        self.master.addcdiv_(self.mean, root, value=-rate / (1 - BETAS[0] ** number))
        self.gradient.zero_()
        self.show()

    def show(self) -> None:
        """Bring the float32 values into the model."""
        if self.master.data_ptr() != self.parameter.data_ptr():
            self.parameter.data.copy_(self.master)

    def remember(self) -> None:
        """What it is now is the best so far."""
        self.best.copy_(self.parameter.data)

    def back(self) -> None:
        """Let the model have the best."""
        self.parameter.data.copy_(self.best)


def tuned(
    model: nn.Module, index: int, done: Sequence[Done], tune: str, ranks: Ranks
) -> list[Tuned]:
    """What is tuned of block `index`, whose matrices `done` are pruned, on every rank the same."""
    keeps = _keeps(done, ranks)
    return [Tuned.of(p, keeps.get(id(p))) for _, p in tunable(model, index, set(keeps), tune)]


def tunable(
    model: nn.Module, index: int, pruned: Collection[int], tune: str
) -> list[tuple[str, nn.Parameter]]:
    """Name in the model and parameter of what is tuned in block `index`, each once.

    Those whose id is in `pruned`, and what `tune` adds; no router, and nothing that the model uses outside
    of the block too.
    """
    prefix = f"{blocks(model)[0]}.{index}."
    outside: set[int] = set()
    inside: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not name.startswith(prefix):
            outside.add(id(parameter))
            continue
        vector = parameter.dim() == 1 or name.endswith("bias")
        more = tune == "vectors" and vector and parameter.is_floating_point()
        if id(parameter) in pruned or (more and not is_router(name.rpartition(".")[0])):
            inside.setdefault(id(parameter), (name, parameter))
    return [entry for key, entry in inside.items() if key not in outside]


def _keeps(done: Sequence[Done], ranks: Ranks) -> dict[int, Tensor]:
    """What is left of each pruned parameter, bool in its own shape, by the parameter's id."""
    found: dict[int, Tensor] = {}
    for each in done:
        matrix = each.matrix
        whole = matrix.parameter
        mask = found.setdefault(
            id(whole), torch.ones(whole.shape, dtype=torch.bool, device=whole.device)
        )
        own = each.keep if each.keep.numel() else matrix.weight != 0  # pruned by another rank
        matrix.part(mask).copy_(own)
    if ranks.world > 1:  # the rank that pruned a matrix knows which of its zeros stay
        for mask in found.values():
            votes = mask.to(torch.int32)
            ranks.add_up([votes])
            mask.copy_(votes > 0)
    return found


def check_learnable(model: nn.Module, way_out: str) -> None:
    """Refuse weights that autograd does not take; `way_out` is what the user may leave out.

    Raises:
        ConfigError: naming the class of the model.
    """
    if any(p.is_inference() for p in model.parameters()):
        raise ConfigError(
            f"{type(model).__name__} was made under torch.inference_mode, so it gives no gradients; make or "
            f"load it outside of that, or {way_out}"
        )


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """While open, a GPU gives the same bits in every run, as far as torch knows how; a CPU does anyway."""
    if device.type != "cuda":
        yield
        return
    flag = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = (
        torch.utils.deterministic
    )  # it fills memory that nothing here reads, which is slow
    fill = memory.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = False
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(flag, warn_only=warned)
        memory.fill_uninitialized_memory = fill


@contextmanager
def learning(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """While open, autograd follows `parameters`."""
    before = [p.requires_grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)
