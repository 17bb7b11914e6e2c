"""Which matrices of a model may be pruned: the only room that knows families.

A *block* is one decoder layer. A *matrix* is a weight that multiplies hidden states: `nn.Linear`,
transformers' `Conv1D`, which stores its weight [in, out], or one expert of a fused parameter, [experts,
out, in] or [experts, in, out]; all are seen as [out, in] from here on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from llmprune import experts
from llmprune.errors import ConfigError, DataError, ModelError
from llmprune.matrix import Matrix as Matrix
from llmprune.runtime.experts import PackedModule
from llmprune.runtime.linear import SparseLinear

# Where a config says how deep the decoder is; in a decoder that was cut from an encoder-decoder,
# `num_hidden_layers` is the encoder's. Longcat counts two halves of each block there.
_DEPTHS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "num_layers")
_SENSES = ("vision", "image", "visual", "audio", "speech")  # encoders beside the language model


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks.

    Raises:
        ModelError: when no list of modules is as long as the config says the decoder is deep.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise ModelError(
            f"{type(model).__name__} has no config; llmprune takes transformers models"
        )
    text = config.get_text_config(decoder=True)
    depths = [d for key in _DEPTHS if isinstance(d := getattr(text, key, None), int) and d]
    get_decoder: Any = getattr(model, "get_decoder", lambda: model)
    decoder = get_decoder()
    for depth in depths:
        for root in (decoder, model):
            if not isinstance(root, nn.Module):
                continue
            for within, module in root.named_modules():
                if not isinstance(module, nn.ModuleList) or len(module) != depth:
                    continue
                if not any(sense in within for sense in _SENSES):
                    name = next(n for n, m in model.named_modules() if m is module)
                    return name, module
    deep = " or ".join(map(str, dict.fromkeys(depths))) or "decoder"
    raise ModelError(
        f"{type(model).__name__} has no list of {deep} blocks; llmprune prunes decoder-only "
        "language models"
    )


def matrices(
    model: nn.Module, targets: Sequence[str] = (), ignore: Sequence[str] = ()
) -> list[Matrix]:
    """Every matrix that is to be pruned, in the order of the blocks, those outside of them last.

    By default all matrices of the decoder blocks but routers; `targets` chooses others instead,
    `ignore` leaves out. An entry is a class name, an fnmatch pattern or `re:` and a regular expression;
    it is held against the full name, the name inside the block and the last part of the name.

    Raises:
        ConfigError: for an entry that matches nothing, or when nothing is left.
        ModelError: for a matrix that cannot be pruned: tied, or experts in a layout of their own.
    """
    layers = blocks(model)[1]
    found = [m for m in every_matrix(model) if m.block is not None or targets]
    for entry in (*targets, *ignore):
        if not any(_matches(entry, m.name, m.module) for m in found):
            kinds = sorted({m.name.split(".")[-1] for m in found})
            where = "--targets" if entry in targets else "--ignore"
            raise ConfigError(f"{where} {entry!r} matches no matrix; there are: {', '.join(kinds)}")
    if targets:
        chosen = [m for m in found if any(_matches(t, m.name, m.module) for t in targets)]
    else:
        chosen = [m for m in found if not is_router(m.name)]
        experts.refuse_flat(layers)
    chosen = [m for m in chosen if not any(_matches(i, m.name, m.module) for i in ignore)]
    if not chosen:
        raise ConfigError("no matrix is left to prune; loosen --targets or --ignore")
    _refuse_tied(model, chosen)
    return sorted(chosen, key=lambda m: len(layers) if m.block is None else m.block)


def every_matrix(model: nn.Module) -> Iterator[Matrix]:
    """Every matrix of the model, routers and those outside of the blocks too, each parameter once."""
    prefix = blocks(model)[0]
    seen: set[int] = set()
    probed: dict[tuple[type, str], bool] = {}
    for name, module in model.named_modules():
        inside = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
        index = int(inside[1]) if inside else None
        if isinstance(module, SparseLinear):
            yield Matrix(name, module, module.transposed, index)
        elif _is_matrix(module) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            yield Matrix(name, module, type(module).__name__ == "Conv1D", index)
        if isinstance(module, PackedModule):
            yield from _held(model, name, module, index, probed)
        for attribute, parameter in experts.fused(module):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                flipped = experts.transposed(model, module, attribute, probed)
                for e in range(len(parameter)):
                    called = experts.named(name, attribute, e)
                    yield Matrix(called, module, flipped, index, attribute, e)


def _held(
    model: nn.Module,
    name: str,
    module: PackedModule,
    index: int | None,
    probed: dict[tuple[type, str], bool],
) -> Iterator[Matrix]:
    """The matrices that a module of experts, or a linear layer of a family's own, holds packed."""
    for attribute, room in module.rooms.items():
        if len(room.shape) == 2:
            yield Matrix(name, module, False, index, attribute)
            continue
        flipped = room.transposed
        if flipped is None:
            flipped = experts.transposed(model, module, attribute, probed)
        for e in range(room.shape[0]):
            yield Matrix(experts.named(name, attribute, e), module, flipped, index, attribute, e)


def _is_matrix(module: nn.Module) -> bool:
    """Whether a module multiplies by a two-dimensional floating-point `weight`."""
    if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
        return False
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2 and weight.is_floating_point()


def is_router(name: str) -> bool:
    """Whether the module called `name` chooses experts; its outputs are decisions, not features."""
    parts = name.split(".")
    return parts[-1] in {"gate", "router", "shared_expert_gate"} or "router" in parts


def _matches(entry: str, name: str, module: nn.Module) -> bool:
    if entry.startswith("re:"):
        try:
            return re.match(entry[3:], name) is not None
        except re.error as error:
            raise ConfigError(f"{entry!r} is no regular expression: {error}") from None
    if entry == type(module).__name__:
        return True
    parts = name.split(".")
    tails = (".".join(parts[i:]) for i in range(len(parts)))
    return any(fnmatchcase(tail, entry) for tail in tails)


def _refuse_tied(model: nn.Module, chosen: Sequence[Matrix]) -> None:
    """An output head that is the embedding cannot be pruned without pruning the embedding."""
    embeddings = {
        id(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.Embedding)
    }
    for matrix in chosen:
        if not matrix.packed and id(matrix.parameter) in embeddings:
            tied = embeddings[id(matrix.parameter)]
            raise ModelError(
                f"{matrix.name} is tied to the embedding {tied}; untie it or ignore it"
            )


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside `torch.compile` or data-parallel wrappers.

    Raises:
        ModelError: for a model with adapters, whose own matrices must not be pruned.
    """
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    if getattr(model, "peft_config", None):
        raise ModelError("the model carries adapters; merge_and_unload() them before pruning")
    if any(isinstance(m, SparseLinear | PackedModule) for m in model.modules()):
        raise ModelError("the model's weights are packed; llmprune.densify(model) it, then prune")
    if getattr(model, "quantization_method", None) or getattr(model, "is_quantized", False):
        raise ModelError("the model is quantised; prune the original, then quantise")
    return model


def check_weights(chosen: Sequence[Matrix]) -> None:
    """Refuse weights that are not numbers.

    Raises:
        ModelError: naming the first matrix with a NaN or Inf.
    """
    for matrix in chosen:
        weight = matrix.weight
        # a sum is finite only if every term is, and costs one pass; the exact test only on suspicion
        if not weight.float().sum().isfinite() and not weight.isfinite().all():
            bad = int((~weight.isfinite()).sum())
            raise ModelError(
                f"{matrix.name} holds {bad} NaN or Inf weights; the checkpoint is damaged"
            )


def check_vocabulary(ids: Tensor, source: str, model: Any) -> None:
    """Refuse token `ids` of any shape, read from `source`, that the model has no embedding for.

    Raises:
        DataError: with the range of both.
    """
    size = model.get_input_embeddings().weight.shape[0]
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        raise DataError(
            f"{source} has token ids from {low} to {high}, the model knows 0 to {size - 1}; "
            "tokenise with the tokenizer of this model"
        )


def max_seqlen(config: Any) -> int | None:
    """Longest window the positions of a model with this config allow, or None where none is set."""
    text: Any = config.get_text_config(decoder=True)
    for key in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(limit := getattr(text, key, None), int) and limit > 0:
            return limit
    return None


def masks(model: nn.Module) -> dict[str, Tensor]:
    """Keep masks of the decoder matrices as they stand: name to bool [out, in], False where zero.

    Read from the weights, so a kept weight that happens to be zero counts as removed.
    """
    return {m.name: m.weight != 0 for m in _decoder_matrices(model)}


def sparsity(model: nn.Module) -> float:
    """Share of the decoder matrices' weights that is zero."""
    zeros = total = 0
    for matrix in _decoder_matrices(model):
        total += matrix.weight.numel()
        zeros += matrix.weight.numel() - int(matrix.weight.count_nonzero())
    return zeros / max(1, total)


def _decoder_matrices(model: nn.Module) -> Iterator[Matrix]:
    return (m for m in every_matrix(model) if m.block is not None and not is_router(m.name))
