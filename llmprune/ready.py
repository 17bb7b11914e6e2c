"""What is checked of a model in memory, and made ready, before anything of it changes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from llmprune.calibration import Calibration
from llmprune.config import PruneConfig
from llmprune.errors import ConfigError, ModelError
from llmprune.fisher.measure import check_measurable
from llmprune.generate import generated
from llmprune.memory import default_batch
from llmprune.model import Matrix, blocks, check_weights, matrices
from llmprune.observe import check_floodable
from llmprune.prune_matrix import Task, check_fit
from llmprune.quality import going_on
from llmprune.refine.repair import check_repairable
from llmprune.walk import Walker
from llmprune.whole import checked_walker


def chosen_of(config: PruneConfig, model: nn.Module, task: Task) -> list[Matrix]:
    """The matrices to prune, once it is known that they can be."""
    chosen = matrices(model, config.targets, config.ignore)
    check_fit(chosen, task.pattern, config.ragged)
    check_weights(chosen)
    if config.calibrate_all_experts:
        check_floodable(chosen)
    return chosen


def walker_on(
    model: nn.Module, data: Calibration, config: PruneConfig, say: Callable[[str], None]
) -> Walker:
    """What runs the blocks of `model` on the windows of `data`, checked."""
    return checked_walker(model, blocks(model)[1], batches_of(config, model, data), say)


def batches_of(config: PruneConfig, model: nn.Module, data: Calibration) -> list[Tensor]:
    """The windows of `data`, as many at once as `config` says or suits the device of `model`."""
    device = next(model.parameters()).device
    return list(data.batches(config.batch_size or default_batch(device, data.ids.shape[1])))


def able(
    config: PruneConfig, walker: Walker | None, say: Callable[[str], None]
) -> tuple[PruneConfig, dict[str, str]]:
    """`config` without the parts that its quality brings and the model cannot take, and why.

    Raises:
        ConfigError: for a part that the user has asked for.
    """
    left_out: dict[str, str] = {}
    if walker is None:
        return config, left_out
    parts = {
        "repair": (config.repair, check_repairable),
        "fisher": (config.fisher and config.weighing() is not None, check_measurable),
        "allocation": (config.allocation == "fisher", check_measurable),
    }
    for part, (asked, check) in parts.items():
        try:
            if asked:
                check(walker)
        except ConfigError as error:
            if not config.optional(part):
                raise
            left_out[part] = str(error).partition(";")[0]  # behind it is what to do about it
            say(going_on(config.quality, part, left_out[part]))
    return config.without(*left_out), left_out


def with_written(
    config: PruneConfig,
    model: nn.Module,
    data: Calibration,
    say: Callable[[str], None],
    progress: bool,
) -> tuple[Calibration, dict[str, str]]:
    """`data` and what the dense `model` writes beside it, where that is asked for; or why there is nothing.

    Raises:
        ModelError: when it writes nothing, and the user has asked for it.
    """
    if not config.generate:
        return data, {}
    try:
        more = generated(model, data, config.generate, config.seed, progress=progress)
    except ModelError as error:
        if not config.optional("generate"):
            raise
        why = str(error).partition(";")[0]  # behind it is what to do about it
        say(going_on(config.quality, "generate", why))
        return data, {"generate": why}
    say(f"the model has written {more.written} more windows of {data.ids.shape[1]} tokens")
    return more, {}
