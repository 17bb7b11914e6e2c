"""Build a model without its weights, and say in which dtype each of them will be computed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

from llmprune.checkpoint import tensors
from llmprune.checkpoint.files import find
from llmprune.checkpoint.promise import check_layers
from llmprune.checkpoint.shelf import Shelf
from llmprune.checkpoint.tensors import Stored
from llmprune.errors import LLMPruneError, ModelError, short

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmprune.loading import Source


def open_shelf(
    source: Source,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    attention: str | None = None,
) -> Shelf:
    """A model on the shelf: its code and config are loaded, its weights are not.

    Args:
        source: what `llmprune.loading.check` gave.
        dtype: to compute in; None keeps what `from_pretrained` would choose.
        device: where blocks are loaded to.
        attention: transformers attention backend; None leaves the choice to transformers.

    Raises:
        ModelError: for files that do not fit the config, or a model that cannot be built without weights.
        CheckpointError: for files that cannot be read.
    """
    stored = tensors.index(find(source.path, source.revision))
    check_layers(source.config, stored)
    own = own_dtype(source.config, stored)
    try:
        model = _skeleton(source, own, attention)
        return Shelf(model, stored, device, _compute_dtypes(model, dtype, own))
    except LLMPruneError:
        raise
    except Exception as error:  # what a config asks for may be impossible in any way
        line = f"{type(error).__name__}, {short(error, 240)}"
        raise ModelError(f"{source.name} cannot be built without its weights: {line}") from error


def _skeleton(source: Source, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            deepcopy(source.config),
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=source.trust_remote_code,
        )
    model.eval()
    with suppress(
        OSError, TypeError, ValueError
    ):  # many have none: it then follows from the config
        model.generation_config = generation_config(source)
    built: PreTrainedModel = model
    return built


def generation_config(source: Source) -> Any:
    """The checkpoint's own generation config.

    Raises:
        OSError, TypeError, ValueError: when it has none, or one that cannot be read.
    """
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(source.path, revision=source.revision)


def own_dtype(config: Any, stored: Mapping[str, Stored]) -> torch.dtype:
    """The dtype that `from_pretrained(dtype="auto")` computes in: the config's, else the files'."""
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(named, str):
        named = getattr(torch, named, None)
    if isinstance(named, torch.dtype):
        return named
    floats = [s.dtype for s in stored.values() if s.dtype.is_floating_point]
    return floats[0] if floats else torch.float32


def _compute_dtypes(
    model: PreTrainedModel, wanted: torch.dtype | None, own: torch.dtype
) -> dict[str, torch.dtype]:
    """The dtype that every parameter is computed in, by name."""
    plan = model._get_dtype_plan(own)
    chosen: dict[str, torch.dtype] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        kept = next((d for p, d in plan.items() if re.search(p, name)), own)
        dtype = wanted or kept
        if parameter.is_floating_point():
            chosen[name] = dtype
            parameter.data = parameter.data.to(dtype)
    return chosen
