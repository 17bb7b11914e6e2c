"""Experts whose statistics do not fit into memory at once are observed in rounds, with the same result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_experts import family, tokens

from llmprune.model import blocks, matrices
from llmprune.rounds import least_statistics, of_statistics, rounds
from llmprune.run import PruneConfig
from llmprune.sweep import prune_blocks
from llmprune.walk import Walker

PAIR = 4 * (16 * 16 + 24 * 24)  # bytes of both Gram matrices of one of Mixtral's experts here


def pruned(name: str, room: int | None) -> tuple[dict[str, Any], list[str]]:
    """The weights after pruning one by one block, and what progress was told of."""
    model = family(name).eval()
    config = PruneConfig(method="sparsegpt", sparsity=0.5)
    said: list[str] = []
    walker = Walker(model, blocks(model)[1], [tokens()])
    with torch.no_grad():
        walker.self_check()
    task = replace(config.task(), room=room)
    for _ in prune_blocks(walker, matrices(model), task, lambda *step: said.append(step[2])):
        pass
    return dict(model.state_dict()), said


@pytest.mark.parametrize("name", ["mixtral", "jetmoe", "llama4", "deepseek_v3"])
def test_rounds_change_nothing_but_memory(name: str) -> None:
    whole, once = pruned(name, None)
    parted, often = pruned(name, 0)
    observed = [sum(step.startswith("observing") for step in said) for said in (once, often)]
    assert observed[1] > observed[0]
    for key, value in whole.items():
        # matrices with one input are solved as one unless a round parts them, which rounds otherwise
        assert torch.equal(value != 0, parted[key] != 0), key
        torch.testing.assert_close(value, parted[key], rtol=1e-4, atol=1e-6)


def test_a_round_holds_as_many_experts_as_fit() -> None:
    model = family("mixtral")
    method, _ = PruneConfig(method="sparsegpt").built()
    here = [m for m in matrices(model) if m.block == 0]
    assert rounds(here, method, None) == [here]
    assert rounds(here, method, of_statistics(here, method)) == [here]
    parted = rounds(here, method, 2 * PAIR + 1)
    assert [m for r in reversed(parted) for m in r] == here
    assert all(of_statistics(r, method) <= 2 * PAIR + 1 for r in parted)
    assert len(parted) < len(here)
    attention, expert = rounds(here, method, 0)[-1], rounds(here, method, 0)[0]
    assert len(attention) == 4  # q, k, v and o of one width
    assert len(expert) == 1
    assert least_statistics(here, method) == 4 * 24 * 24
