"""From a model's parameters back to the tensors that its checkpoint holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from llmprune.checkpoint.tensors import Stored
from llmprune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def to_files(
    model: PreTrainedModel,
    stored: Mapping[str, Stored],
    parameters: Mapping[str, Tensor],
    wanted: Collection[str],
) -> dict[str, Tensor]:
    """Parameters by name as the tensors that the files hold, by file key.

    The reverse of what transformers did on loading (`revert_weight_conversion`): fused experts come
    apart, new names become old ones. A checkpoint that was itself saved in the new layout keeps it.

    Args:
        model: knows its conversions.
        stored: what the checkpoint holds.
        parameters: those of a block; transformers may need several to make one tensor.
        wanted: names of those that have to be there; others that no file holds are left out.

    Raises:
        ModelError: when the checkpoint has no tensor for one that is wanted.
    """
    from transformers.core_model_loading import revert_weight_conversion

    prefix = model.base_model_prefix + "."
    whole = _own(revert_weight_conversion(model, dict(parameters)), stored, prefix)
    if whole is not None:
        return whole
    found: dict[str, Tensor] = {}
    for name, value in parameters.items():
        single = _own(revert_weight_conversion(model, {name: value}), stored, prefix)
        fits = single or _own({name: value}, stored, prefix)
        if fits is not None:
            found.update(fits)
        elif name in wanted:
            raise ModelError(
                f"{name} cannot be put back into the checkpoint's own layout; leave it out with "
                "--ignore"
            )
    return found


def _own(
    values: Mapping[str, Tensor], stored: Mapping[str, Stored], prefix: str
) -> dict[str, Tensor] | None:
    """`values` under the checkpoint's own keys, which may lack the base model's prefix or have one.

    None when one of them has no place there.
    """
    found: dict[str, Tensor] = {}
    for key, value in values.items():
        for name in (key, key.removeprefix(prefix), prefix + key):
            if name in stored and stored[name].shape == tuple(value.shape):
                found[name] = value
                break
        else:
            return None
    return found
