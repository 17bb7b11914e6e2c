"""What a result depends on: the model, the packages, the machine and the device."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn


def describe(model: nn.Module) -> dict[str, Any]:
    """What was pruned, as plain JSON types."""
    config: Any = model.config
    return {
        "name": getattr(config, "_name_or_path", "") or type(model).__name__,
        "class": type(model).__name__,
        "model_type": config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "attention": getattr(config, "_attn_implementation", None),
    }


def versions(device: torch.device) -> dict[str, str]:
    """Everything that a number depends on: packages, interpreter, machine and device."""
    packages = ("llmprune", "torch", "transformers", "safetensors", "datasets", "accelerate")
    found = {"python": sys.version.split()[0], "platform": platform.platform()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    gpu = device.type == "cuda"
    found["device"] = torch.cuda.get_device_name(device) if gpu else f"cpu ({_processor()})"
    found["threads"] = str(torch.get_num_threads())
    return found


def _processor() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
