"""Which tensors of a file are matrices of decoder blocks, told from their names and shapes."""

from __future__ import annotations

import re

from llmprune.checkpoint.census import Axis

_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # stored [in, out]
_TOWERS = {"vision", "visual", "vision_tower", "vision_model", "audio", "audio_tower"}
_ROUTERS = {"gate", "router", "shared_expert_gate"}


def axes(model_type: str | None, decoder: bool) -> tuple[Axis, ...]:
    """Where the inputs lie; a family that stores its blocks [in, out] has them down the columns."""
    return ("columns", "rows") if decoder and model_type in _CONV1D else ("rows", "columns")


def is_decoder(name: str, shape: tuple[int, ...], floating: bool) -> bool:
    """Whether a tensor multiplies hidden states inside a decoder block."""
    parts = name.split(".")
    module = parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]
    if not floating or not re.search(r"\.\d+\.", f".{name}") or _TOWERS.intersection(parts):
        return False
    if module in _ROUTERS or "router" in parts or "scale" in parts[-1] or "embed" in module:
        return False
    if len(shape) == 3:  # fused experts, input_linear in some files; a convolution is no matrix
        return "conv" not in module and min(shape) > 1
    return len(shape) == 2 and parts[-1] == "weight"
