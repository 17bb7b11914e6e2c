"""Statistics of what enters the matrices of one block, collected once per distinct input."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.errors import ConfigError, NumericalError, WalkError
from llmprune.experts import check_signature
from llmprune.methods.base import Method
from llmprune.model import Matrix
from llmprune.parallel import ALONE, Ranks
from llmprune.stats import InputSample, Stats
from llmprune.watch import watching


@dataclass
class Observed:
    """One distinct input of a block and the matrices that read it.

    Attributes:
        stats: what the method learns of it.
        sample: a few of its tokens.
        readers: the matrices.
        wide: float64 sums that take the place of those in `stats` until `ready`; none to sum in float32.
    """

    stats: Stats
    sample: InputSample
    readers: list[Matrix]
    wide: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """Add a batch [..., features]."""
        self.stats.add(x)
        self.sample.add(x)
        if self.wide:
            for total, part in zip(self.wide, self.stats.parts(), strict=True):
                total += part
                part.zero_()

    def sums(self) -> list[Tensor]:
        """What is to be added up over processes, in place."""
        return self.wide or self.stats.parts()

    def ready(self) -> None:
        """Round float64 sums to float32, once: in which order they were added no longer shows.

        Raises:
            NumericalError: when a NaN or Inf has reached the sums.
        """
        if self.wide:
            for total, part in zip(self.wide, self.stats.parts(), strict=True):
                part.copy_(total)
            self.wide = []
        if not self.stats.finite():
            names = ", ".join(m.name for m in self.readers)
            raise NumericalError(f"NaN or Inf in the activations that enter {names}")


class Observer:
    """Collects statistics for the matrices of one block, once per distinct input.

    An expert's are of the tokens that are routed to it, or with `all_experts` of all tokens.
    """

    def __init__(
        self,
        method: Method[Any],
        tokens: int,
        device: torch.device,
        all_experts: bool = False,
        *,
        wide: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        """`tokens` of the batches to come; `wide` to sum in float64; `ranks` see other batches each."""
        self.method = method
        self.all_experts = all_experts
        self.device = device
        self.wide = wide
        self.ranks = ranks
        seen = ranks.gather(tokens)
        self.tokens, self._first = sum(seen), sum(seen[: ranks.rank])
        self.inputs: list[Observed] = []
        self._of: dict[str, Observed] = {}  # matrix name -> its input
        self._fresh: list[tuple[weakref.ref[Tensor], int, Observed]] = []  # inputs of this forward

    @contextmanager
    def watching(self, matrices: Sequence[Matrix]) -> Iterator[Observer]:
        """While open, every forward adds to the statistics of `matrices`."""
        fused: dict[nn.Module, list[Matrix]] = {}
        with ExitStack() as handles:
            for matrix in matrices:
                if matrix.expert is not None:
                    fused.setdefault(matrix.module, []).append(matrix)
                    continue
                hook = matrix.module.register_forward_pre_hook(self._hook(matrix), with_kwargs=True)
                handles.callback(hook.remove)
            for module, held in fused.items():
                handles.enter_context(self._watching_experts(module, held))
            yield self

    def next_batch(self) -> None:
        """Forget which tensors were seen: a new forward begins."""
        self._fresh.clear()

    def handed_out(self) -> Iterator[Observed]:
        """Each input once, forgotten here at that moment, so that its sums can go with its last reader."""
        self._of.clear()
        self._fresh.clear()
        while self.inputs:
            yield self.inputs.pop(0)

    def merge(self, matrices: Sequence[Matrix]) -> None:
        """Give every rank the inputs that any of them saw of `matrices`, in one order, but not yet the sums.

        A rank may have sent no token to some expert.

        Raises:
            WalkError: when matrices share an input on one rank and not on another.
        """
        if self.ranks.world == 1:
            return
        held = {m.name: m for m in matrices}
        mine = {tuple(m.name for m in o.readers): o for o in self.inputs}
        told = self.ranks.gather({key: _told(seen) for key, seen in mine.items()})
        merged = {key: mine.get(key) for known in told for key in known}
        readers = [name for key in merged for name in key]
        if len(readers) > len(set(readers)):
            name = next(n for n in readers if readers.count(n) > 1)
            raise _unshared(name, "one process and not in another")
        self.inputs = []
        for key, known in merged.items():
            seen = known or self._new([held[name] for name in key])
            parts = [of[key] for of in told if key in of]
            seen.stats.tokens = sum(tokens for tokens, _ in parts)
            rows = [row.to(self.device) for _, some in parts for row in some]
            seen.sample.replace(rows, seen.stats.tokens)
            if known is not None:
                self.inputs.append(seen)

    def _new(self, readers: list[Matrix]) -> Observed:
        """An input that was not seen before."""
        stats = self.method.stats.empty(readers[0].shape[1], self.device)
        wide = [torch.zeros_like(p, dtype=torch.float64) for p in stats.parts() if self.wide]
        seen = Observed(stats, InputSample.of(self.tokens, self._first), readers, wide)
        self.inputs.append(seen)
        self._of.update(dict.fromkeys((m.name for m in readers), seen))
        return seen

    def unreached(self, matrices: Sequence[Matrix]) -> list[Matrix]:
        """Those of `matrices` that no token has reached: experts that no token was routed to.

        Raises:
            WalkError: for a matrix that every token should reach, and where no expert saw a token.
        """
        missing = [m for m in matrices if m.name not in self._of]
        reached = {m.siblings for m in matrices if m.name in self._of}
        for matrix in missing:
            if matrix.number is None or matrix.siblings not in reached:
                raise WalkError(
                    f"{matrix.name} takes no part in the forward; leave it out with --ignore"
                )
        return missing

    def _watching_experts(
        self, module: nn.Module, held: Sequence[Matrix]
    ) -> AbstractContextManager[None]:
        """Watch the experts `held` of one module, each with the tokens that reach it."""
        of = {(m.attribute, m.expert): m for m in held}

        def see(attribute: str, expert: int, tokens: Tensor) -> None:
            if matrix := of.get((attribute, expert)):
                self._see(matrix, tokens)

        flipped = {m.attribute: m.transposed for m in held}
        every = {m.expert for m in held if m.expert is not None} if self.all_experts else None
        return watching(module, flipped, see, every)

    def _hook(self, matrix: Matrix) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._see(matrix, args[0] if args else next(iter(kwargs.values())))

        return see

    def _see(self, matrix: Matrix, x: Tensor) -> None:
        same = next(
            (o for ref, version, o in self._fresh if ref() is x and version == _version(x)), None
        )
        mine = self._of.get(matrix.name)
        if mine is None and same is not None:  # reads what another matrix has just read
            same.readers.append(matrix)
            self._of[matrix.name] = same
            return
        if mine is not None and same is mine:
            return  # counted already in this forward
        if mine is None:
            mine = self._new([matrix])
        elif mine.readers[0] is not matrix:
            raise _unshared(
                matrix.name, f"one batch (with {mine.readers[0].name}) and not in another"
            )
        mine.add(x)
        self._fresh.append((weakref.ref(x), _version(x), mine))


def check_floodable(chosen: Sequence[Matrix]) -> None:
    """Refuse `--calibrate-all-experts` where not every token can be sent to every expert.

    Raises:
        ConfigError: naming the class of the experts.
    """
    routed = [m for m in chosen if m.number is not None]
    if not routed:
        raise ConfigError(
            "--calibrate-all-experts: no matrix to prune is an expert's; leave it out"
        )
    for matrix in routed:
        if matrix.expert is None:
            raise ConfigError(
                f"--calibrate-all-experts needs fused experts; {matrix.name} is a module of its own, "
                "whose inputs its router decides; leave the option out"
            )
        check_signature(matrix.module)


def _told(seen: Observed) -> tuple[int, list[Tensor]]:
    """What other processes must know of an input beside its sums: tokens, and the sample of them."""
    return seen.stats.tokens, [rows.cpu() for rows in seen.sample.rows]


def _unshared(name: str, where: str) -> WalkError:
    return WalkError(f"{name} shared its input in {where}; statistics cannot be shared")


def _version(x: Tensor) -> int:
    """Changes whenever `x` is written to; tensors made under `torch.inference_mode` do not count."""
    return 0 if x.is_inference() else x._version
