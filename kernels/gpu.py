"""What the choice of a kernel asks about a device, and about this moment on it."""

from __future__ import annotations

import os
from functools import cache

import torch


@cache
def identity(index: int) -> tuple[str, str]:
    """(name, compute capability) of a CUDA device: ("NVIDIA H200", "9.0")."""
    major, minor = torch.cuda.get_device_capability(index)
    return torch.cuda.get_device_name(index), f"{major}.{minor}"


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
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
