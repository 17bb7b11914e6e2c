"""What a block is made of, for transforms: norms with their readers, writers, values and features.

Seen, not known: one short window runs through the block, and what reads the output of a norm is told by the
memory that it reads. Names only say which matrices face each other across an activation or an attention. A
wrong guess does no harm, because every change is tried on every block first (`llmprune.transforms.trial`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.matrix import Matrix
from llmprune.transforms.cells import Cell, Site, site
from llmprune.transforms.inner import Features, Values, find_features, find_values
from llmprune.transforms.norms import Norm, recognised

_BACK = ("down", "w2", "out")  # names of experts' matrices that give, not read, the hidden state


@dataclass(frozen=True)
class Block:
    """One decoder block while it is loaded.

    Attributes:
        index: its place.
        width: of the hidden state.
        norms: those over the hidden state with what reads them.
        others: norms over the width that no matrix is seen to read.
        writers: matrices that give something of the width of the hidden state and read no norm of it.
        values: of its attentions.
        features: of its feed-forwards, experts left out.
    """

    index: int
    module: nn.Module
    width: int
    norms: tuple[Norm, ...]
    others: tuple[Norm, ...]
    writers: tuple[Site, ...]
    values: tuple[Values, ...]
    features: tuple[Features, ...]


Seen = tuple[str, nn.Module, Tensor, Tensor | None]  # name, module, what it was given, what it gave


def watched(root: nn.Module, prefix: str, forward: Callable[[], object]) -> list[Seen]:
    """What every module of `root` that has parameters of its own, or none inside it, took and gave."""
    seen: list[Seen] = []

    def note(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            given = out if isinstance(out, Tensor) else None
            if tensors:
                seen.append((name, module, tensors[0], given if len(tensors) == 1 else None))

        return see

    with ExitStack() as handles:
        for name, module in root.named_modules():
            if next(module.parameters(recurse=False), None) is not None or not list(
                module.children()
            ):
                full = f"{prefix}.{name}" if name else prefix
                hook = module.register_forward_hook(note(full), with_kwargs=True)
                handles.callback(hook.remove)
        forward()
    return seen


def find_norms(
    seen: Sequence[Seen], matrices: Sequence[Matrix], width: int, dtypes: Mapping[str, torch.dtype]
) -> list[Norm]:
    """The norms among what was seen, with the matrices that read what they gave."""
    of: dict[nn.Module, list[Matrix]] = {}
    for matrix in matrices:
        of.setdefault(matrix.module, []).append(matrix)
    found = []
    for name, module, taken, given in seen:
        if given is None or module in of or width not in (taken.shape[-1],):
            continue
        norm = recognised(name, module, width, taken, dtypes)
        if norm is None:
            continue
        readers = [
            m for _, other, x, _ in seen if _same(x, given) for m in _reading(other, of, width)
        ]
        unique = {(m.name, m.attribute): m for m in readers}
        found.append(replace(norm, readers=tuple(site(m, dtypes) for m in unique.values())))
    return found


def _same(x: Tensor, given: Tensor) -> bool:
    """Whether two tensors are the same memory, perhaps in another shape."""
    return (
        x.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
        and x.numel() == given.numel()
    )


def _reading(
    module: nn.Module, of: Mapping[nn.Module, list[Matrix]], width: int
) -> Iterator[Matrix]:
    for matrix in of.get(module, []):
        experts = matrix.expert is not None
        if matrix.shape[1] == width and not (experts and _gives(matrix.attribute)):
            yield matrix


def _gives(attribute: str) -> bool:
    return any(part in attribute for part in _BACK)


def routers(
    seen: Sequence[Seen], matrices: Sequence[Matrix], index: int, width: int
) -> list[Matrix]:
    """Modules that multiply by a matrix of their own without being linear layers, as routers do."""
    known = {m.module for m in matrices}
    found: dict[str, Matrix] = {}
    for name, module, _, _ in seen:
        weight = module._parameters.get("weight")
        if module in known or weight is None or isinstance(module, nn.Embedding):
            continue
        if weight.dim() == 2 and weight.shape[1] == width:
            found[name] = Matrix(name, module, False, index)
    return list(found.values())


def look(
    index: int,
    module: nn.Module,
    name: str,
    matrices: Sequence[Matrix],
    forward: Callable[[], Tensor],
    dtypes: Mapping[str, torch.dtype],
) -> Block:
    """Block `index`, called `name`; `forward` runs it alone and gives its hidden state."""
    out: list[Tensor] = []
    seen = watched(module, name, lambda: out.append(forward()))
    width = out[0].shape[-1]
    matrices = [*matrices, *routers(seen, matrices, index, width)]
    norms = find_norms(seen, matrices, width, dtypes)
    read = {(s.name, s.weight.attribute) for norm in norms for s in norm.readers}
    inner = {
        s.weight.module for norm in norms for s in norm.readers
    }  # a norm of what they give is inside
    given = [y for _, m, _, y in seen if m in inner and y is not None]
    taken = {n: x for n, _, x, _ in seen}
    others = [n for n in norms if not n.readers and not any(_same(taken[n.name], y) for y in given)]
    writers = [m for m in matrices if m.shape[0] == width and (m.name, m.attribute) not in read]
    sites = {m.name: site(m, dtypes) for m in matrices if m.expert is None}
    return Block(
        index,
        module,
        width,
        tuple(n for n in norms if n.readers),
        tuple(others),
        tuple(site(m, dtypes) for m in writers),
        tuple(find_values(module, name, sites)),
        tuple(find_features(module, name, sites)),
    )


@dataclass(frozen=True)
class Outside:
    """What is in no block.

    Attributes:
        model: the whole model.
        width: of the hidden state.
        embeddings: tables whose rows enter the residual stream: of tokens, of positions.
        norm: what the output head reads, or None where that is not seen.
        head: the output head, or None.
        unknown: names of parameters that are none of these.
        tied: whether the head is an embedding.
    """

    model: Any
    width: int
    embeddings: tuple[Cell, ...]
    norm: Norm | None
    head: Site | None
    unknown: tuple[str, ...]
    tied: bool


def look_outside(
    model: Any,
    prefix: str,
    width: int,
    forward: Callable[[], object],
    dtypes: Mapping[str, torch.dtype],
) -> Outside:
    """What is in no block of `model`; `forward` runs all of that, and no block."""
    seen = [s for s in watched(model, "", forward) if not s[0].lstrip(".").startswith(f"{prefix}.")]
    seen = [(name.lstrip("."), module, x, y) for name, module, x, y in seen]
    head = model.get_output_embeddings()
    named = next((n for n, m in model.named_modules() if m is head), None)
    matrix = None
    if named is not None and isinstance(head, nn.Linear):
        matrix = Matrix(named, head, False, None)
    norms = find_norms(seen, [matrix] if matrix else [], width, dtypes)
    norm = next((n for n in norms if n.readers), None)
    embeddings = [
        Cell(f"{n}.weight", m, "weight", dtypes.get(f"{n}.weight", m.weight.dtype))
        for n, m in model.named_modules()
        if isinstance(m, nn.Embedding)
        and not n.startswith(f"{prefix}.")
        and m.embedding_dim == width
    ]
    of = (
        {id(c.module) for c in embeddings}
        | {id(head)}
        | ({id(norm.weight.module)} if norm and norm.weight else set())
    )
    unknown = [
        name
        for name, parameter in model.named_parameters()
        if not name.startswith(f"{prefix}.")
        and id(model.get_submodule(name.rpartition(".")[0])) not in of
    ]
    same = [c for c in embeddings if matrix is not None and c.module.weight is head.weight]
    known = {**dtypes, **({f"{named}.weight": same[0].stored} if same else {})}
    place = site(matrix, known) if matrix else None
    if norm is not None and place is not None:
        norm = replace(norm, readers=(place,))
    return Outside(model, width, tuple(embeddings), norm, place, tuple(unknown), bool(same))
