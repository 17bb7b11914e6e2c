"""Leave a user's model and process as they were: modes, hooks, gradients and random numbers.

Only the weights that are pruned change. Everything here is undone when the block ends, also by an
exception or Ctrl-C.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients while open; every module's own mode afterwards."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, mode in training:
            module.training = mode


@contextmanager
def random_state(model: nn.Module) -> Iterator[None]:
    """The random state of Python, torch and the model's GPUs is as before when the block ends."""
    gpus = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    python = random.getstate()
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(python)
