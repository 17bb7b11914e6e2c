"""Which matrices of a model may be pruned: the only room that knows families.

A *block* is one decoder layer. A *matrix* is a weight that multiplies hidden states: `nn.Linear`, or
transformers' `Conv1D`, which stores its weight [in, out]; both are seen as [out, in] from here on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.errors import ConfigError, ModelError


@dataclass(frozen=True)
class Matrix:
    """One prunable weight.

    Attributes:
        name: full module name, such as `model.layers.0.mlp.up_proj`.
        module: the module that holds it as `weight`.
        transposed: whether `module.weight` is stored [in, out].
        block: index of the decoder block, or None for a matrix outside of them.
    """

    name: str
    module: nn.Module
    transposed: bool
    block: int | None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself, in its own layout."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def weight(self) -> Tensor:
        """The weight as [out, in], sharing memory with the model."""
        weight = self.parameter.detach()
        return weight.T if self.transposed else weight

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out, features = self.weight.shape
        return out, features

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Put `weight` [out, in] into the model."""
        self.parameter.data.copy_(weight.T if self.transposed else weight)


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
    depth = getattr(text, "num_hidden_layers", None)
    get_decoder: Any = getattr(model, "get_decoder", lambda: model)
    decoder = get_decoder()
    for root in (decoder, model):
        if not isinstance(root, nn.Module):
            continue
        for _, module in root.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth and depth:
                name = next(n for n, m in model.named_modules() if m is module)
                return name, module
    raise ModelError(
        f"{type(model).__name__} has no list of {depth} decoder blocks; llmprune prunes decoder-only "
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
        ModelError: for a matrix that cannot be pruned: tied, or fused experts.
    """
    prefix, layers = blocks(model)
    found: list[Matrix] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not _is_matrix(module) or id(module.weight) in seen:
            continue
        inside = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
        index = int(inside[1]) if inside else None
        if inside or targets:
            seen.add(id(module.weight))
            found.append(Matrix(name, module, type(module).__name__ == "Conv1D", index))
    for entry in (*targets, *ignore):
        if not any(_matches(entry, m.name, m.module) for m in found):
            kinds = sorted({m.name.split(".")[-1] for m in found})
            where = "--targets" if entry in targets else "--ignore"
            raise ConfigError(f"{where} {entry!r} matches no matrix; there are: {', '.join(kinds)}")
    if targets:
        chosen = [m for m in found if any(_matches(t, m.name, m.module) for t in targets)]
    else:
        chosen = [m for m in found if not _is_router(m)]
        _refuse_fused_experts(layers)
    chosen = [m for m in chosen if not any(_matches(i, m.name, m.module) for i in ignore)]
    if not chosen:
        raise ConfigError("no matrix is left to prune; loosen --targets or --ignore")
    _refuse_tied(model, chosen)
    return sorted(chosen, key=lambda m: len(layers) if m.block is None else m.block)


def _is_matrix(module: nn.Module) -> bool:
    """Whether a module multiplies by a two-dimensional floating-point `weight`."""
    if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
        return False
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2 and weight.is_floating_point()


def _is_router(matrix: Matrix) -> bool:
    """Whether a matrix chooses experts; its outputs are decisions, not features."""
    last = matrix.name.split(".")[-1]
    return last in {"gate", "router", "shared_expert_gate"} or "router" in matrix.name.split(".")


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
        if id(matrix.parameter) in embeddings:
            tied = embeddings[id(matrix.parameter)]
            raise ModelError(
                f"{matrix.name} is tied to the embedding {tied}; untie it or ignore it"
            )


def _refuse_fused_experts(layers: nn.ModuleList) -> None:
    """Experts that are one three-dimensional parameter would silently stay dense."""
    for name, parameter in layers.named_parameters():
        if parameter.dim() == 3 and "expert" in name:
            raise ModelError(
                f"{name} holds fused experts, which llmprune cannot prune yet; "
                "to prune the rest only, name it: --targets '*_proj'"
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
    prefix, layers = blocks(model)
    for index, block in enumerate(layers):
        for name, module in block.named_modules():
            if _is_matrix(module):
                conv = type(module).__name__ == "Conv1D"
                matrix = Matrix(f"{prefix}.{index}.{name}", module, conv, index)
                if not _is_router(matrix):
                    yield matrix
