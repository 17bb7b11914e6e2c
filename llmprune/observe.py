"""Statistics of what enters the matrices of one block, collected once per distinct input."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.errors import WalkError
from llmprune.methods.base import Method
from llmprune.model import Matrix
from llmprune.stats import InputSample, Stats


@dataclass
class Observed:
    """One distinct input of a block and the matrices that read it."""

    stats: Stats
    sample: InputSample
    readers: list[Matrix]


class Observer:
    """Collects statistics for the matrices of one block, once per distinct input."""

    def __init__(self, method: Method[Any], tokens: int, device: torch.device) -> None:
        self.method = method
        self.tokens = tokens
        self.device = device
        self.inputs: list[Observed] = []
        self._of: dict[str, Observed] = {}  # matrix name -> its input
        self._fresh: list[tuple[weakref.ref[Tensor], int, Observed]] = []  # inputs of this forward

    @contextmanager
    def watching(self, matrices: Sequence[Matrix]) -> Iterator[Observer]:
        """While open, every forward adds to the statistics of `matrices`."""
        with ExitStack() as handles:
            for matrix in matrices:
                hook = matrix.module.register_forward_pre_hook(self._hook(matrix), with_kwargs=True)
                handles.callback(hook.remove)
            yield self

    def next_batch(self) -> None:
        """Forget which tensors were seen: a new forward begins."""
        self._fresh.clear()

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


def _version(x: Tensor) -> int:
    """Changes whenever `x` is written to; tensors made under `torch.inference_mode` do not count."""
    return 0 if x.is_inference() else x._version
