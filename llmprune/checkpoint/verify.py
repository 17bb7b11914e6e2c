"""Hold the files of a checkpoint against what was decided: counts and patterns, per tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llmprune.checkpoint import tensors
from llmprune.checkpoint.files import find
from llmprune.checkpoint.tensors import Stored
from llmprune.errors import CheckpointError
from llmprune.pattern import NM, Pattern, Unstructured, from_text
from llmprune.report import LayerReport


@dataclass(frozen=True)
class Expected:
    """What the file must hold for one matrix.

    Attributes:
        name: full module name in the model.
        shape: (out, in).
        kept: number of weights that stay; a kept weight may round to zero, so it is an upper bound.
        pattern: what each row or comparison group must satisfy, or None for the count alone. An
            unstructured pattern whose `within` is not decided is held to the count alone, too.
        transposed: whether the file holds [in, out], as GPT-2's Conv1D does.
        exact: whether the method promises the pattern's count in every comparison group.
        key: the tensor's name in the file where it is known; otherwise it is looked up by `name`.
    """

    name: str
    shape: tuple[int, int]
    kept: int
    pattern: Pattern | None = None
    transposed: bool = False
    exact: bool = True
    key: str | None = None


def expectations(
    layers: Iterable[LayerReport],
    pattern: Pattern,
    *,
    transposed: Collection[str] = (),
    exact: bool = True,
) -> list[Expected]:
    """What a report promises of the files; a matrix that was left dense promises its shape only.

    Args:
        layers: the entries of the report.
        pattern: the pattern of the run, with its comparison group decided; a matrix is held to its own
            where the report names it.
        transposed: names of the matrices that are stored [in, out].
        exact: `Method.exact` of the method that ran.
    """
    return [
        Expected(
            name=layer.name,
            shape=layer.shape,
            kept=layer.kept,
            pattern=None if layer.skipped else from_text(layer.pattern, pattern),
            transposed=layer.name in transposed,
            exact=exact,
        )
        for layer in layers
    ]


def verify(folder: Path, expected: Iterable[Expected]) -> None:
    """Read every expected matrix back from the safetensors files in `folder`, one at a time.

    Raises:
        CheckpointError: naming the first tensor that is missing, misshapen, not finite, denser than
            was decided, or off its pattern, with the figures.
    """
    stored = tensors.index(find(folder))
    located = [_located(e, stored) for e in expected]
    for entry in sorted(located, key=lambda e: stored[str(e.key)].file):
        check_matrix(entry, tensors.load(stored[str(entry.key)]))


def find_key(name: str, keys: Iterable[str]) -> str:
    """The key of module `name` in a file whose prefixes may differ from the model's.

    The key that shares most trailing parts wins; what is shared must name the block or be one of
    the two names whole. Among equals the one with more parts in common wins.

    Raises:
        CheckpointError: when none fits, or two fit equally well.
    """
    wanted = f"{name}.weight".split(".")
    ranked: list[tuple[int, int, str]] = []
    for key in keys:
        parts = key.split(".")
        tail = _shared_tail(wanted, parts)
        whole = tail == min(len(wanted), len(parts))
        if tail > 1 and (whole or any(p.isdigit() for p in wanted[-tail:])):
            ranked.append((tail, len(set(parts) & set(wanted)), key))
    ranked.sort(reverse=True)
    if not ranked:
        raise CheckpointError(
            f"the files hold no weight for {name}; transformers renamed it on saving"
        )
    if len(ranked) > 1 and ranked[0][:2] == ranked[1][:2]:
        raise CheckpointError(f"{name} could be {ranked[0][2]} or {ranked[1][2]} in the files")
    return ranked[0][2]


def _shared_tail(left: list[str], right: list[str]) -> int:
    """How many parts two dotted names share, counted from the end."""
    count = 0
    for a, b in zip(reversed(left), reversed(right), strict=False):
        if a != b:
            break
        count += 1
    return count


def _located(entry: Expected, index: Mapping[str, Stored]) -> Expected:
    if entry.key is not None and entry.key in index:
        return entry
    if (key := f"{entry.name}.weight") in index:
        return replace(entry, key=key)
    return replace(entry, key=find_key(entry.name, index))


def verify_zeros(folder: Path, name: str, keep: Mapping[str, Tensor]) -> None:
    """Hold the tensors that one parameter became against its mask.

    Args:
        folder: holds safetensors files.
        name: of the parameter in the model, for the message.
        keep: by key in the files, a tensor of the same shape that is zero where the file must be.

    Raises:
        CheckpointError: naming the first tensor that is missing, misshapen, not finite or denser.
    """
    files = tensors.index(find(folder))
    for key, mask in keep.items():
        if key not in files:
            raise CheckpointError(
                f"the written file is not what was decided: it lacks {key} ({name})"
            )
        stored = tensors.load(files[key])
        entry = Expected(name, (0, 0), 0, key=key)  # whom the message is about
        if stored.shape != mask.shape:
            raise _mismatch(entry, f"has shape {tuple(stored.shape)}, expected {tuple(mask.shape)}")
        if not bool(stored.isfinite().all()):
            raise _mismatch(entry, f"holds NaN or Inf weights in {stored.dtype}")
        if bad := int((stored.ne(0) & mask.to(stored.device).eq(0)).sum()):
            raise _mismatch(entry, f"holds {bad} weights that were to go")


def check_matrix(entry: Expected, stored: Tensor) -> None:
    """Hold one tensor as it was read against `entry`.

    Raises:
        CheckpointError: when it is misshapen, not finite, denser than was decided, or off its pattern.
    """
    weight = stored.T if entry.transposed else stored
    if tuple(weight.shape) != entry.shape:
        raise _mismatch(entry, f"has shape {tuple(weight.shape)}, expected {entry.shape}")
    if not bool(weight.isfinite().all()):
        bad = int((~weight.isfinite()).sum())
        raise _mismatch(entry, f"holds {bad} NaN or Inf weights in {stored.dtype}")
    nonzero = weight != 0
    if (count := int(nonzero.sum())) > entry.kept:
        raise _mismatch(entry, f"holds {count} nonzero weights, {entry.kept} were to stay")
    if entry.pattern is not None and (wrong := _off_pattern(nonzero, entry.pattern, entry.exact)):
        raise _mismatch(entry, wrong)


def _off_pattern(nonzero: Tensor, pattern: Pattern, exact: bool) -> str | None:
    """What is wrong with `nonzero` [out, in] bool under `pattern`, or None."""
    if isinstance(pattern, NM):
        if not pattern.fits(nonzero.shape[1]):
            return f"has rows of {nonzero.shape[1]}, which {pattern} does not divide"
        over = nonzero.reshape(-1, pattern.m).sum(1, dtype=torch.int32) > pattern.n
        return f"has {int(over.sum())} groups that are not {pattern}" if bool(over.any()) else None
    return _overfull(nonzero, pattern) if exact and pattern.within is not None else None


def _overfull(nonzero: Tensor, pattern: Unstructured) -> str | None:
    """The first comparison group with too many nonzero weights, or None."""
    for group in pattern.groups(nonzero):
        bound = group.shape[1] - pattern.removed(group.shape[1])
        most = int(group.sum(1, dtype=torch.int32).max())
        if most > bound:
            return f"keeps {most} of {group.shape[1]} in a {pattern.within}, {bound} were to stay"
    return None


def _mismatch(entry: Expected, what: str) -> CheckpointError:
    where = entry.name if entry.key == f"{entry.name}.weight" else f"{entry.name} ({entry.key})"
    return CheckpointError(f"the written file is not what was decided: {where} {what}")
