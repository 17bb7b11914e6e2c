"""Several processes that do one run: `torchrun -m llmprune` starts them, here they find each other.

Each is a *rank*, and rank 0 leads: it alone keeps the journal, writes and speaks. Everything that passes
between them is torch.distributed's: NCCL for tensors on GPUs, gloo for the rest. Small messages always go
through gloo and before tensors do, so that ranks wait for each other there, where the death of one is
noticed at once by the others: its connections close.

Nothing here loads torch, and nothing happens, in a process that was started alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from llmprune.errors import ConfigError, Echoed, LLMPruneError, Lost

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = timedelta(hours=2)  # longer than any rank works while others wait, such as on a download


@dataclass(frozen=True)
class Ranks:
    """One process among those of a run; what is said of tensors holds for those of all ranks.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
        local: its number on its machine, and that of its GPU.
        beside: how many there are on its machine.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    beside: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def spans(self, count: int) -> list[slice]:
        """`count` things in shares that follow each other, one for each rank, equal to within one."""
        edges = [count * r // self.world for r in range(self.world + 1)]
        return [slice(a, b) for a, b in pairwise(edges)]

    def span(self, count: int) -> slice:
        """The own share of `count` things."""
        return self.spans(count)[self.rank]

    def tell(self, value: Any) -> Any:
        """What rank 0 calls `value`, on every rank."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box = [value if self.leads else None]
        with _together():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether some rank calls it true; no rank goes on before all have asked."""
        return any(self.gather(flag))

    def gather(self, value: Any) -> list[Any]:
        """What each rank calls `value`, on every rank."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.world
        with _together():
            dist.all_gather_object(found, value)
        return found

    def add_up(self, tensors: Sequence[Tensor], to: int | None = None) -> None:
        """Put the sum over the ranks into each tensor, on every rank or on rank `to` alone.

        Where it is for one rank, what the others then hold is of no use.
        """
        if self.world == 1:
            return
        import torch.distributed as dist

        with _together():
            for tensor in tensors:
                sent = tensor.contiguous()
                if to is None:
                    dist.all_reduce(sent)
                else:
                    dist.reduce(sent, to)
                if sent is not tensor:
                    tensor.copy_(sent)

    def hand_out(self, tensor: Tensor, source: int) -> None:
        """Put what rank `source` holds in a contiguous `tensor` of any dtype into that of every rank."""
        if self.world == 1 or tensor.numel() == 0:
            return
        import torch
        import torch.distributed as dist

        with _together():
            dist.broadcast(
                tensor.view(torch.uint8), source
            )  # bytes: gloo does not send every dtype


ALONE = Ranks()
"""A process that was started by itself."""


def started() -> Ranks:
    """What the environment says that torchrun, or accelerate launch, makes; `ALONE` without them."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if any(name not in os.environ for name in names) or os.environ["WORLD_SIZE"] == "1":
        return ALONE
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_RANK", "0"))
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE or LOCAL_RANK is no number: {error}") from None
    return Ranks(rank, world, local, beside)


@contextmanager
def joined() -> Iterator[Ranks]:
    """While open, the processes of this run can reach each other; alone, nothing happens.

    Raises:
        Echoed: when another process has said what ended the run.
        Lost: when another process has ended without a word.
    """
    ranks = started()
    if ranks.world == 1:
        yield ranks
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    gpu = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        store, rank, world = next(iter(rendezvous("env://", timeout=timedelta(minutes=5))))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            timeout=PATIENCE,
        )
    except RuntimeError as error:
        raise ConfigError(f"{ranks.world} processes cannot reach each other: {error}") from error
    try:
        yield ranks
    except (LLMPruneError, Lost) as error:
        if not _first(store):
            raise Echoed from error
        raise
    finally:
        with suppress(RuntimeError):  # where another process is gone already
            dist.destroy_process_group()


def _first(store: Any) -> bool:
    """Whether this is the first rank that has something to say of the end; asked once."""
    try:
        return int(store.add("llmprune/ended", 1)) == 1
    except RuntimeError:  # the store went with the process that kept it
        return True


@contextmanager
def _together() -> Iterator[None]:
    """Turn a collective that failed into `Lost`."""
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(
            r"^\[[^]]*\] |\. .*", "", (str(error) or type(error).__name__).splitlines()[0]
        )
        raise Lost(
            f"another process of this run has ended, and this one with it ({reason})"
        ) from error
