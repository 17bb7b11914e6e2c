"""The calibration windows of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from llmprune import calibration as calibrations
from llmprune.calibration import Calibration
from llmprune.config import PruneConfig
from llmprune.errors import ConfigError
from llmprune.model import check_vocabulary, max_seqlen


def windows_of(
    config: PruneConfig,
    model: nn.Module,
    tokenizer: Any,
    progress: bool,
    say: Callable[[str], None],
) -> Calibration | None:
    """What `model` is calibrated on, where anything is."""
    if not config.needs_data:
        say(told(config, None))
        return None
    data = calibrate(config, max_seqlen(model.config), tokenizer, progress=progress)
    check_vocabulary(data.ids, data.source, model)
    say(told(config, data))
    return data


def told(config: PruneConfig, data: Calibration | None) -> str:
    """What a run says of its windows."""
    if data is None:
        return f"{config.method} looks at the weights alone: no calibration data is read"
    windows, seqlen = data.ids.shape
    return f"calibrating on {windows} windows of {seqlen} tokens from {data.source}"


def calibrate(
    config: PruneConfig, limit: int | None, tokenizer: Any, *, progress: bool
) -> Calibration:
    """The calibration windows that `config` asks for, for a model that reads `limit` tokens.

    Raises:
        ConfigError: windows beyond `limit`.
        DataError: data that cannot be read or is too short.
    """
    calibrations.window(config.seqlen, limit)
    data = calibrations.load(
        config.calibration,
        tokenizer,
        samples=config.samples,
        seqlen=config.seqlen,
        seed=config.seed,
        text_column=config.text_column,
        model_limit=limit,
        progress=progress,
    )
    if limit is not None and data.ids.shape[1] > limit:
        raise ConfigError(f"windows of {data.ids.shape[1]} tokens; the model allows {limit}")
    return data
