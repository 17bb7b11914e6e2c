"""Statistics of what enters the matrices of one block, collected once per distinct input."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.errors import ConfigError, WalkError
from llmprune.experts import check_signature
from llmprune.methods.base import Method
from llmprune.model import Matrix
from llmprune.stats import InputSample, Stats
from llmprune.watch import watching


@dataclass
class Observed:
    """One distinct input of a block and the matrices that read it."""

    stats: Stats
    sample: InputSample
    readers: list[Matrix]


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
    ) -> None:
        self.method = method
        self.all_experts = all_experts
        self.tokens = tokens
        self.device = device
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
            features = matrix.shape[1]
            stats = self.method.stats.empty(features, self.device)
            mine = Observed(stats, InputSample.of(self.tokens), [matrix])
            self.inputs.append(mine)
            self._of[matrix.name] = mine
        elif mine.readers[0] is not matrix:
            raise WalkError(
                f"{matrix.name} shared its input with {mine.readers[0].name} in one batch and not in "
                "another; statistics cannot be shared"
            )
        mine.stats.add(x)
        mine.sample.add(x)
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


def _version(x: Tensor) -> int:
    """Changes whenever `x` is written to; tensors made under `torch.inference_mode` do not count."""
    return 0 if x.is_inference() else x._version
