"""What the choice of a kernel asks about a device, and about this moment on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import ParamSpec

import torch

P = ParamSpec("P")


@cache
def identity(device: torch.device) -> tuple[str, str]:
    """(name, compute capability) of a device: ("NVIDIA H200", "9.0"); ("cpu", "none")."""
    if device.type != "cuda":
        return device.type, "none"
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), f"{major}.{minor}"


def free(device: torch.device) -> tuple[int, int]:
    """Bytes of a CUDA device that torch can still get, its own cache among them, and all."""
    left, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return left + cached, total


def whole(device: torch.device) -> torch.device:
    """The same with its index: `cuda` is the current device."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def missing(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on `device`, in a few words, or None. Runs none of them."""
    if device.type != "cuda" or torch.version.hip:
        return "needs an NVIDIA GPU"
    return _without_triton()


def without_gluon(device: torch.device) -> str | None:
    """Why kernels in Gluon for tensor cores cannot run on `device`, or None. Runs none of them."""
    if (why := missing(device)) is not None:
        return why
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"needs compute capability 8.0 for its tensor cores, this GPU has {major}.{minor}"
    try:
        from triton.experimental import gluon  # noqa: F401
    except ImportError as error:
        return f"needs a triton with Gluon ({error})"
    return None


@cache
def _without_triton() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"needs triton ({error})"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter runs kernels on CPU tensors, as it does in tests."""
    return os.environ.get("TRITON_INTERPRET") == "1" and _without_triton() is None


def launches(device: torch.device) -> bool:
    """Whether a Triton kernel can be launched on tensors of `device`, whatever it then gives."""
    if device.type == "cuda":
        return missing(device) is None
    return device.type == "cpu" and interpreted()


def occupied(device: torch.device) -> bool:
    """Whether nothing may be measured or tried on `device` now: a CUDA graph is recorded, or torch traces."""
    if torch.compiler.is_compiling():
        return True
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    return on_gpu and torch.cuda.is_current_stream_capturing()


def once(why: Callable[P, str | None]) -> Callable[P, str | None]:
    """Keep the answer of `why(device, ...)`, which tries something on the device, unless that is occupied."""
    answers = dict[tuple[object, ...], str | None]()

    @wraps(why)
    def answer(*args: P.args, **kwargs: P.kwargs) -> str | None:
        key = (*args, *kwargs.items())
        if key not in answers:
            device = args[0]
            assert isinstance(device, torch.device)
            if occupied(device):
                return "not tried before a CUDA graph was recorded or torch traced"
            answers[key] = why(*args, **kwargs)
        return answers[key]

    return answer


@contextmanager
def plainly(device: torch.device) -> Iterator[None]:
    """On `device` with no gradients and no casts, new tensors on a CPU, whatever modes the caller is in."""
    with (
        torch.cuda.device(device.index if device.type == "cuda" else -1),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.device("cpu"),
    ):
        yield


def trial(device: torch.device, wrong: Callable[[torch.device], str | None]) -> str | None:
    """What `wrong` finds wrong on `device`, in a few words; only where triton can be imported."""
    from triton import TritonError

    try:
        with plainly(device):
            found = wrong(device)
    except (RuntimeError, TritonError) as error:
        return f"does not run on this GPU: {said(error)}"
    return f"gives wrong results on this GPU: {found}" if found else None


def said(error: Exception) -> str:
    """The line of an error that tells most: torch begins with it, triton ends with it, behind source code."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0 if isinstance(error, RuntimeError) else -1].strip()[:200]
