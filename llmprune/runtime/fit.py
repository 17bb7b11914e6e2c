"""Whether the parts of a packed matrix fit each other, asked before a module holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llmprune.checkpoint.whole import flaw
from llmprune.errors import CheckpointError
from llmprune.kernels.few_bits import FewBits, check_few, numbers_of
from llmprune.kernels.packed import Packed, bitmap_shape, count, unpack_bits


def take_packed(
    module: nn.Module, name: str, shape: Sequence[int], state_dict: dict[str, Any], prefix: str
) -> None:
    """Before a module loads its own: check a packed parameter and make room for as many values.

    Args:
        module: holds `<name>_values` and `<name>_bitmap`.
        name: of the parameter when it is dense.
        shape: of the parameter when it is dense.
        state_dict: what is loaded; a dense parameter in it gives place to its packed form.
        prefix: of the module's keys.

    Raises:
        CheckpointError: for what does not fit, or a dense weight that is not zero outside the mask.
    """
    key, bitmap = prefix + name, module.get_buffer(f"{name}_bitmap")
    if key in state_dict and f"{key}_values" not in state_dict:
        dense = state_dict.pop(key)
        if tuple(dense.shape) != tuple(shape):
            raise CheckpointError(f"{key} is {list(dense.shape)}, the layer {list(shape)}")
        bits = unpack_bits(bitmap, shape[-1]).to(dense.device)
        if outside := int(((dense != 0) & ~bits).sum()):
            raise CheckpointError(
                f"{key} has {outside} weights that are zero here; call llmprune.densify(model) first"
            )
        state_dict |= {f"{key}_values": dense[bits], f"{key}_bitmap": bitmap}
    values, given = state_dict.get(f"{key}_values"), state_dict.get(f"{key}_bitmap")
    if values is None or given is None:
        return  # torch says what is missing
    check_packed(Packed(values, given, tuple(shape)))
    mine = module.get_parameter(f"{name}_values")
    if values.shape != mine.shape:
        room = nn.Parameter(mine.new_empty(values.shape), mine.requires_grad)
        setattr(module, f"{name}_values", room)


def check_packed(packed: Packed) -> None:
    """Refuse values and a bitmap that do not fit each other or the shape.

    Raises:
        CheckpointError: saying what does not fit.
    """
    values, bitmap, wanted = packed.values, packed.bitmap, bitmap_shape(packed.shape)
    if bitmap.dtype != torch.uint8 or tuple(bitmap.shape) != wanted:
        raise CheckpointError(
            f"a bitmap is {bitmap.dtype} {list(bitmap.shape)}, not uint8 {list(wanted)}"
        )
    if values.dim() != 1 or not values.is_floating_point():
        raise CheckpointError(f"packed values are {values.dtype} {list(values.shape)}, not [kept]")
    if bitmap.is_meta or values.is_meta:
        return
    if (kept := count(bitmap)) != len(values):
        raise CheckpointError(f"a bitmap keeps {kept} weights of {len(values)} values")
    left = packed.shape[-1] % 8
    if left and bool((bitmap[..., -1] >> left).any()):
        raise CheckpointError("a bitmap has bits behind the last column")


def check_few_bits(few: FewBits, kept: int) -> None:
    """Refuse whole numbers, scales and a bitmap that do not fit each other, or that no writer writes.

    Raises:
        CheckpointError: saying what does not fit.
    """
    try:
        check_few(few)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if len(few.whole) != (kept if few.bits == 8 else -(-kept // 2)):
        raise CheckpointError(f"{len(few.whole)} bytes of whole numbers are not those of {kept}")
    if few.whole.is_meta:
        return
    like = torch.zeros((), device=few.bitmap.device).expand(kept)  # of that length, and no memory
    check_packed(Packed(like, few.bitmap, few.shape))
    numbers = numbers_of(few)
    if bool(numbers[kept:].any()):
        raise CheckpointError("half a byte behind the last whole number is not 0")
    if why := flaw(numbers[:kept], few.scales, few.bits):
        raise CheckpointError(why)
