"""Load a checkpoint in the sparse format into an ordinary dense model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from llmprune.checkpoint import tensors
from llmprune.checkpoint.files import find
from llmprune.checkpoint.promise import build_empty
from llmprune.checkpoint.skeleton import generation_config, own_dtype
from llmprune.checkpoint.tensors import Later, Stored

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from llmprune.loading import Source


_READ_AHEAD = "HF_DEACTIVATE_ASYNC_LOAD"


def load_expanded(
    source: Source, device_map: dict[str, str] | None, attention: str | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """What `from_pretrained` gives of the same checkpoint stored dense, with its loading info.

    transformers gets every tensor under its dense name and unpacks one when it takes it, so that its own
    renaming, fusing and placing applies.

    Raises:
        CheckpointError: for files that cannot be read or do not hold what they promise.
        ValueError, RuntimeError, OSError, ImportError: as `from_pretrained`.
    """
    stored = tensors.index(find(source.path, source.revision))
    state = {key: Later(entry) for key, entry in stored.items()}
    return assemble(source, stored, state, None, device_map, attention)


def assemble(
    source: Source,
    stored: Mapping[str, Stored],
    state: Mapping[str, Later],
    dtype: torch.dtype | None,
    device_map: dict[str, str] | None,
    attention: str | None,
    quantization: Any = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model of tensors that are read when transformers takes them, with its loading info.

    Args:
        source: what `llmprune.loading.check` gave.
        stored: every tensor of the checkpoint under its dense name.
        state: what transformers is given, by keys in the files.
        dtype: to load them in; None for the checkpoint's own.
        device_map: as of `from_pretrained`.
        attention: transformers attention backend; None leaves the choice to transformers.
        quantization: goes into the config.

    Raises:
        CheckpointError: for files that cannot be read or do not hold what they promise.
        ValueError, RuntimeError, OSError, ImportError: as `from_pretrained`.
    """
    config, kind = deepcopy(source.config), type(build_empty(source, stored))
    if quantization is not None:
        config.quantization_config = quantization
    with _one_at_a_time():
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            dtype=dtype or own_dtype(config, stored),
            output_loading_info=True,
            attn_implementation=attention,
            device_map=device_map,
        )
    with suppress(
        OSError, TypeError, ValueError
    ):  # many have none: it then follows from the config
        model.generation_config = generation_config(source)
    model.config._name_or_path = model.name_or_path = source.path
    return model, info


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """While open, transformers reads a tensor when it needs it, and not all that it will ever need."""
    before = os.environ.get(_READ_AHEAD)
    os.environ[_READ_AHEAD] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_READ_AHEAD]
        else:
            os.environ[_READ_AHEAD] = before
