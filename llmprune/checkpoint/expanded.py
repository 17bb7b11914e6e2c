"""Load a checkpoint in the sparse format into an ordinary dense model."""

from __future__ import annotations

from contextlib import suppress
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from llmprune.checkpoint import tensors
from llmprune.checkpoint.files import find
from llmprune.checkpoint.promise import build_empty
from llmprune.checkpoint.skeleton import generation_config, own_dtype
from llmprune.checkpoint.tensors import Later

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmprune.loading import Source


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
    config, stored = deepcopy(source.config), tensors.index(find(source.path, source.revision))
    kind = type(build_empty(source, stored))
    model, info = kind.from_pretrained(
        None,
        config=config,
        state_dict={key: Later(entry) for key, entry in stored.items()},
        dtype=own_dtype(config, stored),
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
