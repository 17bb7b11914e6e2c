"""Turn the residual stream by one orthogonal matrix, which goes into every matrix that reads or writes it.

RMSNorm commutes with any rotation once its gain is folded. LayerNorm takes the mean away, so there the matrix
has to leave the direction of ones as it is: then mean and spread of what is turned are those of before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.transforms.fold import fold, fold_outside, turn_norm
from llmprune.transforms.sites import Block, Outside


def turn_block(block: Block, turn: Tensor, *, folded: bool) -> None:
    """Turn what a block reads and writes by `turn` [width, width] float64; with `folded`, fold first."""
    for norm in block.norms:
        if folded:
            fold(norm)
        turn_norm(norm, turn)
        for reader in norm.readers:
            reader.weight.turn_inputs(turn)
    for norm in block.others:
        turn_norm(norm, turn)
    for writer in block.writers:
        for cell in writer.cells():
            cell.turn_outputs(turn)


def turn_outside(outside: Outside, turn: Tensor, *, folded: bool) -> None:
    """Turn embeddings, last norm and output head."""
    if folded:
        fold_outside(outside)
    if outside.norm is not None:
        turn_norm(outside.norm, turn)
    head = [] if outside.head is None else [outside.head.weight]
    done: set[int] = set()
    for cell in (*outside.embeddings, *head):
        parameter = getattr(cell.module, cell.attribute)
        if id(parameter) not in done:  # a tied head is turned with its embedding
            done.add(id(parameter))
            cell.turn_inputs(turn)


def why_not(block: Block, *, folded: bool) -> str | None:
    """Why the residual stream of a block cannot be turned, or None; `folded` for more than a permutation."""
    if folded and (before := [n for n in block.others if n.gain() is not None]):
        names = ", ".join(n.name.rpartition(".")[2] for n in before)
        return f"gains that cannot be folded stand before the residual stream ({names})"
    if not block.norms:
        return "no matrix of a block reads a norm"
    return None


def why_not_outside(outside: Outside) -> str | None:
    """Why the residual stream cannot be turned outside of the blocks, or None."""
    if outside.unknown:
        return f"{outside.unknown[0]} stands between the embedding and the blocks, or behind them"
    if outside.norm is None or outside.head is None:
        return "the output head is not seen to read a norm"
    return None


def centred(block: Block) -> bool:
    """Whether a norm of the block takes the mean away."""
    return any(norm.centred for norm in (*block.norms, *block.others))


def made_up(width: int, random: torch.Generator, *, fixed: bool) -> Tensor:
    """A random orthogonal matrix [width, width] float64; with `fixed` one that leaves ones as they are."""
    inner = width - 1 if fixed else width
    q, r = torch.linalg.qr(torch.randn(inner, inner, generator=random, dtype=torch.float64))
    q = q * r.diagonal().sign()  # uniform over all of them
    return around_ones(q) if fixed else q


def around_ones(inner: Tensor) -> Tensor:
    """An orthogonal matrix [n - 1, n - 1] as one [n, n] that acts beside the direction of ones."""
    width = len(inner) + 1
    mirror = _mirror(width).to(inner.device)
    whole = torch.eye(width, dtype=inner.dtype, device=inner.device)
    whole[1:, 1:] = inner
    return mirror @ whole @ mirror


def _mirror(width: int) -> Tensor:
    """The reflection (its own inverse) that takes the first axis to the direction of ones."""
    v = torch.full((width,), -(width**-0.5), dtype=torch.float64)
    v[0] += 1
    if width == 1:
        return torch.eye(1, dtype=torch.float64)
    return torch.eye(width, dtype=torch.float64) - 2 * torch.outer(v, v) / v.dot(v)


def settled(turn: Tensor, *, fixed: bool) -> Tensor:
    """The orthogonal matrix next to `turn` [..., n, n], in float64; with `fixed` the next that keeps ones."""
    turn = turn.double()
    if fixed:
        mirror = _mirror(turn.shape[-1]).to(turn.device)
        inner = (mirror @ turn @ mirror)[1:, 1:]
        return around_ones(settled(inner, fixed=False))
    left, _, right = torch.linalg.svd(turn)
    nearest: Tensor = left @ right
    return nearest
