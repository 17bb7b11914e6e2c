"""Hold what a config asks for against what the files hold, before memory is reserved for it.

transformers makes room for every weight of a config, and fills those that no file has with random numbers:
a folder of a few bytes could ask for more memory than there is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from llmprune.checkpoint.stored import Stored
from llmprune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmprune.loading import Source

_TIMES = 8  # weights of the model to weights in files: tied ones may count several times here
_SMALL = 2**24  # weights that any config may ask for
_LAYERS = 100  # that any config may ask for; layers may share their tensors


def check_layers(config: Any, stored: Mapping[str, Stored]) -> None:
    """Refuse a config with far more layers than there are tensors: building them alone takes for ever.

    Raises:
        ModelError: for such a config.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > _LAYERS + 10 * len(stored):
        raise ModelError(
            f"the config asks for {layers:,} layers, and the files hold {len(stored):,} tensors; they do "
            "not belong together"
        )


def build_empty(source: Source, stored: Mapping[str, Stored]) -> PreTrainedModel:
    """The model that a config asks for, on the meta device.

    Raises:
        ModelError: for a model that is far larger than its files.
        Exception: whatever else transformers raises.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    check_layers(source.config, stored)
    with init_empty_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            deepcopy(source.config), trust_remote_code=source.trust_remote_code
        )
    asked = sum(p.numel() for p in model.parameters())
    there = sum(math.prod(s.shape) for s in stored.values())
    if asked > _TIMES * there + _SMALL:
        raise ModelError(
            f"the config asks for {asked:,} weights, and the files hold {there:,}; they do not belong "
            "together"
        )
    return model
