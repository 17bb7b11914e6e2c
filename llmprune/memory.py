"""How much memory a run may use, and how much of it one block needs."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmprune.errors import ConfigError
from llmprune.methods.base import Method
from llmprune.model import Matrix
from llmprune.rounds import least_statistics

TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 8192}
"""Default batch. On two CPU cores 1024 tokens take a fifth less time than 4096 (a block's intermediate
results stay in the cache); the number for CUDA is not measured yet."""
STATE = (
    17  # bytes for a weight under repair: its float32 value, gradient and two means, and its mask
)
SAVED = 300  # bytes that a backward pass takes per token and unit of width: an estimate, on the safe side
SLACK = 2**30  # python, torch, the libraries and one matrix's working copies


@dataclass(frozen=True)
class Budget:
    """Bytes that a run may use.

    Attributes:
        memory: main memory.
        device: the accelerator's memory; equal to `memory` on a CPU.
    """

    memory: int
    device: int


def budget(text: str | None, device: torch.device, processes: int = 1) -> Budget:
    """What `--max-memory` allows: `20GB` of main memory, or `0=40GB,cpu=100GB`; None is what is free.

    Main memory is shared by the `processes` of a run on this machine; of a GPU's, each has its own.

    Raises:
        ConfigError: for a text that is no such thing.
    """
    from accelerate.utils import get_max_memory

    free = get_max_memory()
    memory = int(free.get("cpu", 2**62)) // processes
    own = int(free.get(device.index or 0, 2**62)) if device.type == "cuda" else memory
    for part in (text or "").split(","):
        if not part.strip():
            continue
        name, equals, amount = part.rpartition("=")
        size = parse_size(amount, "--max-memory")
        if not equals or name.strip() == "cpu":
            size //= processes
            memory = size
            own = size if device.type != "cuda" else own
        elif name.strip() == str(device.index or 0) and device.type == "cuda":
            own = size
        else:
            raise ConfigError(
                f"--max-memory names {name.strip()!r}, and the run uses cpu"
                f"{f' and {device.index or 0}' if device.type == 'cuda' else ''}"
            )
    return Budget(memory, own)


def parse_size(text: str | int, option: str) -> int:
    """`5GB`, `512MiB` or a number of bytes, as a number.

    Raises:
        ConfigError: naming `option`.
    """
    from accelerate.utils import convert_file_size_to_int

    plain = str(text).strip()
    if not re.fullmatch(r"\d+", plain):
        try:
            size = int(convert_file_size_to_int(plain))
        except ValueError:
            raise ConfigError(
                f"{option} takes a size such as 5GB or 800MiB, got {text!r}"
            ) from None
    else:
        size = int(plain)
    if size <= 0:
        raise ConfigError(f"{option} takes a size such as 5GB or 800MiB, got {text!r}")
    return size


def trim() -> None:
    """Hand free memory back to the system.

    glibc keeps pieces below 32 MB for itself, in a heap that each block would leave larger: measured, by two
    thirds of a block for every block of 4.7M weights.
    """
    with suppress(OSError, AttributeError):  # another C library has another heap
        ctypes.CDLL(None).malloc_trim(0)


def of_model(model: nn.Module) -> int:
    """Bytes of all parameters in the dtypes they are computed in; they may be on the meta device."""
    return of_parameters(model.parameters())


def of_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of `parameters`, each counted once."""
    unique = {id(p): p for p in parameters}
    return sum(p.numel() * p.element_size() for p in unique.values())


def of_repair(block: nn.Module, tokens: int) -> int:
    """Bytes that the repair of `block` takes beside its weights, on `tokens` at once."""
    unique = {id(p): p for p in block.parameters()}.values()
    state = sum(p.numel() * (STATE + 2 * p.element_size()) for p in unique)
    return state + tokens * _width(block) * SAVED


def of_gradients(block: nn.Module, here: Sequence[Matrix], tokens: int) -> int:
    """Bytes that Fisher information of the matrices `here` of `block` takes beside its weights.

    Their gradient on `tokens` at once, what autograd keeps for it, the squares of the largest in float32, and
    the metric, once as a sum and once as a part of it.
    """
    gradient = of_parameters(m.parameter for m in here)
    squares = 8 * max((m.shape[0] * m.shape[1] for m in here), default=0)
    width = _width(block)
    return gradient + squares + 8 * width**2 + tokens * width * SAVED


def _width(block: nn.Module) -> int:
    """Of the hidden states that pass through `block`, as its matrices show it."""
    return max((min(p.shape[-2:]) for p in block.parameters() if p.dim() > 1), default=0)


def room_for_statistics(budget: Budget, block: nn.Module) -> int:
    """Bytes that the statistics of `block` may take while it is in memory."""
    return max(0, budget.device - of_model(block) - SLACK)


def least(
    blocks: Sequence[nn.Module],
    chosen: Sequence[Matrix],
    method: Method[Any],
    tokens: int | None = None,
    measured: int | None = None,
) -> int:
    """Bytes that the largest block needs while it is pruned: weights, statistics and `SLACK`.

    Where blocks are repaired, on so many `tokens` at once, there is that instead of statistics, and before
    both, where Fisher information is `measured` on so many tokens at once, there is that.
    """
    needs = []
    for i, block in enumerate(blocks):
        here = [m for m in chosen if m.block == i]
        extra = least_statistics(here, method)
        if tokens is not None and here:
            extra = max(extra, of_repair(block, tokens))
        if measured is not None:
            extra = max(extra, of_gradients(block, here, measured))
        needs.append(of_model(block) + extra)
    return SLACK + max(needs)


def fits(model: nn.Module, budget: Budget) -> bool:
    """Whether the whole model may be in memory, with a little to work in."""
    return of_model(model) * 1.1 + 2**28 <= budget.device


def default_batch(device: torch.device, seqlen: int) -> int:
    """Windows at once on `device` when the user does not say."""
    return max(1, TOKENS_AT_ONCE.get(device.type, 1024) // seqlen)
