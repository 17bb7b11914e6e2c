"""What every test relies on: Triton's interpreter without a GPU, few threads, poisoned memory."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    # Triton reads this while it is imported; any later, and kernels look for a GPU.
    assert "triton" not in sys.modules, (
        "triton was imported before conftest could choose its interpreter"
    )
    os.environ["TRITON_INTERPRET"] = "1"
# Nothing is measured on the way, and no test reads or writes what this user has measured.
os.environ["LLMPRUNE_MEASURE"] = "0"
os.environ["LLMPRUNE_CACHE"] = tempfile.mkdtemp(prefix="llmprune-tests-")
atexit.register(shutil.rmtree, os.environ["LLMPRUNE_CACHE"], ignore_errors=True)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Test tensors are small: more threads only wait for each other, and tests share their machine.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(4, os.cpu_count() or 1))))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is none, or where Triton only interprets."""
    if HAS_CUDA and not INTERPRETED:
        return
    reason = "TRITON_INTERPRET=1 is set: nothing is compiled" if HAS_CUDA else "needs a CUDA device"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data, models and oracles beside (or in) the checkout; skips without it."""
    for folder in (ROOT.parent / "shared", ROOT / "shared"):
        if (folder / "oracles").is_dir():
            return folder
    pytest.skip("the folder shared/ with models and oracles is not here")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernel tests run: the GPU when kernels are compiled, the CPU when interpreted."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For a file of tensors so small that a second thread only costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill `tensor` with what no kernel writes: NaN, the highest integer, a bool of 0xA5."""
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return tensor.fill_(float("nan"))
    if tensor.dtype is torch.bool:
        tensor.view(torch.uint8).fill_(0xA5)  # neither 0 nor 1: `unwritten` can tell
        return tensor
    return tensor.fill_(torch.iinfo(tensor.dtype).max)


def unwritten(tensor: torch.Tensor) -> int:
    """How many elements of a bool or floating tensor still hold `poison`."""
    if tensor.dtype is torch.bool:
        return int((tensor.view(torch.uint8) > 1).sum())
    return int(tensor.isnan().sum())


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.Tensor], int]:
    """While in use, fresh memory is poisoned; gives `unwritten`, which counts what was left out."""

    def poisoning(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            return poison(make(*args, **kwargs))

        return made

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoning(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoning(torch.Tensor.new_empty))
    return unwritten
