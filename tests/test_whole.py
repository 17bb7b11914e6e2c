"""The walk from the beginning: for models whose blocks cannot be run alone."""

from __future__ import annotations

import copy
import functools
from typing import Any, ClassVar

import pytest
import torch
from test_walk import Spy, decoder_matrices, inputs_of, is_matrix, tiny, tokens
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llmprune import methods
from llmprune.errors import WalkError
from llmprune.model import blocks, matrices
from llmprune.pattern import NM
from llmprune.prune_matrix import Task
from llmprune.run import PruneConfig, prune_with
from llmprune.sweep import prune_blocks
from llmprune.whole import WholeWalker, checked_walker

BLOCKS = 3


class Leaky(LlamaDecoderLayer):
    """A block that adds what the block before it has left on a board they share."""

    board: ClassVar[dict[str, Tensor]] = {}

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.self_attn.layer_idx == 0:
            self.board.clear()
        out = super().forward(hidden_states, *args, **kwargs)
        out = out + 0.1 * self.board.get("last", torch.zeros_like(out))
        self.board["last"] = out
        return out


class Remembering(Leaky):
    """The same, but the board is never wiped: one forward changes the next."""

    board: ClassVar[dict[str, Tensor]] = {}

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = LlamaDecoderLayer.forward(self, hidden_states, *args, **kwargs)
        out = out + 0.1 * self.board.get("last", torch.zeros_like(out))
        self.board["last"] = out
        return out


class Forgetful(LlamaDecoderLayer):
    """A block that fails without what the block before it left, as shared keys and values do."""

    board: ClassVar[dict[int, Tensor]] = {}

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        index = self.self_attn.layer_idx
        if index:
            self.board.pop(index - 1)
        self.board[index] = hidden_states
        return super().forward(hidden_states, *args, **kwargs)


def twice(decoder: Any, **kwargs: Any) -> Any:
    """A decoder's forward through all of its blocks and through all of them again."""
    layers = decoder.layers
    decoder.layers = nn.ModuleList([*layers, *layers])
    decoder.config.num_hidden_layers = 2 * BLOCKS
    try:
        return type(decoder).forward(decoder, **kwargs)
    finally:
        decoder.layers = layers
        decoder.config.num_hidden_layers = BLOCKS


def stateful(kind: str) -> Any:
    """A Llama whose blocks are of a class above, or run twice in a forward."""
    model = tiny()
    if kind == "twice":
        model.model.forward = functools.partial(twice, model.model)
        return model
    for block in model.model.layers:
        block.__class__ = globals()[kind]
    globals()[kind].board.clear()
    return model


def all_inputs(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """As `inputs_of`, with the inputs of every call where a matrix is called more than once."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(args[0].double())
        )
        for name, module in model.named_modules()
        if is_matrix(module)
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(calls).flatten(0, -2) for name, calls in seen.items()}


@pytest.mark.parametrize("kind", ["Leaky", "Forgetful", "twice"])
@pytest.mark.parametrize(("method", "sparsity"), [("wanda", "2:4"), ("sparsegpt", 0.5)])
def test_statistics_equal_those_of_plain_forwards_of_the_model_pruned_so_far(
    kind: str, method: str, sparsity: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for SparseGPT at a share, which brings weights back once a block has settled."""
    model, naive = stateful(kind), stateful(kind)
    spy = Spy(monkeypatch, model, method)
    said: list[str] = []
    config = PruneConfig(calibration=tokens(), sparsity=sparsity, method=method)
    report = prune_with(config, model, progress=False, say=said.append)
    assert report.walk == "whole model"
    assert report.as_dict()["walk"] == "whole model"
    reason = {
        "Leaky": "block 1 of LlamaForCausalLM run alone differs from its plain forward",
        "Forgetful": "block 1 of LlamaForCausalLM run alone fails (KeyError: 0)",
        "twice": "block 0 of LlamaForCausalLM runs 2 times in a forward",
    }[kind]
    assert said[-1] == (
        f"LlamaForCausalLM keeps state outside its blocks ({reason}): every block is calibrated by a "
        "forward from the beginning, 6 runs of a block per window instead of 5"
    )
    pruned = decoder_matrices(model)
    assert list(spy.stats) == list(pruned)
    for block in range(BLOCKS):
        inputs = all_inputs(naive, tokens())
        for name, weight in decoder_matrices(naive).items():
            if f".{block}." not in name:
                continue
            x, stats = inputs[name], spy.stats[name]
            assert stats.tokens == len(x) == tokens().numel() * (2 if kind == "twice" else 1)
            if method == "wanda":
                expected = x.square().sum(0)
                torch.testing.assert_close(stats.sum_sq.double(), expected, rtol=1e-5, atol=0)
            else:
                gram = x.T @ x
                scale = gram.diagonal().sqrt()
                assert ((stats.gram - gram) / (scale[:, None] * scale)).abs().max() < 1e-5
            with torch.no_grad():
                weight.copy_(pruned[name])


@pytest.mark.parametrize("kind", ["Leaky", "Forgetful", "twice"])
def test_counts_are_exact_and_nothing_else_changes(kind: str) -> None:
    model = stateful(kind)
    before = copy.deepcopy(model.state_dict())
    prune_with(PruneConfig(calibration=tokens(), sparsity="2:4"), model, progress=False)
    matrices = decoder_matrices(model)
    for name, value in model.state_dict().items():
        if name.removesuffix(".weight") in matrices:
            assert (value.reshape(-1, 4).count_nonzero(1) == 2).all()
            kept = value != 0
            assert torch.equal(value[kept], before[name][kept])
        else:
            assert torch.equal(value, before[name])
    assert not any("forward" in block.__dict__ for block in model.model.layers)
    assert not any(block._forward_hooks for block in model.model.layers)


def test_the_output_head_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stateful("Leaky")
    spy = Spy(monkeypatch, model, "wanda")
    config = PruneConfig(calibration=tokens(), targets=["Linear"])
    prune_with(config, model, progress=False)
    assert list(spy.stats)[-1] == "lm_head"
    expected = inputs_of(model, tokens())["lm_head"].square().sum(0)
    sums = spy.stats["lm_head"].sum_sq.double()
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("targets", [(), ("lm_head",), ("q_proj", "lm_head")])
def test_progress_comes_as_often_as_announced(targets: tuple[str, ...]) -> None:
    model = stateful("Leaky")
    batches = list(tokens().split(2))
    walk = checked_walker(model, blocks(model)[1], batches, lambda line: None)
    assert isinstance(walk, WholeWalker)
    chosen = matrices(model, targets)
    seen: list[int] = []
    task = Task(methods.build("wanda"), NM(2, 4))
    for _ in prune_blocks(walk, chosen, task, lambda block, *_: seen.append(block)):
        pass
    assert len(seen) == walk.steps(chosen)


def test_blocks_behind_the_one_of_interest_do_not_run() -> None:
    model = stateful("Leaky")
    walk = WholeWalker(model, blocks(model)[1], [tokens()])
    ran: list[int] = []
    for i, block in enumerate(walk.layers):
        block.register_forward_pre_hook(lambda module, args, i=i: ran.append(i))
    with torch.no_grad():
        walk.run(1, 0, None)
    assert ran == [0, 1]


def test_a_plain_family_walks_block_by_block() -> None:
    said: list[str] = []
    config = PruneConfig(calibration=tokens())
    assert prune_with(config, tiny(), progress=False, say=said.append).walk == "blocks"
    assert not any("state outside" in line for line in said)
    magnitude = PruneConfig(method="magnitude")
    assert prune_with(magnitude, tiny(), progress=False).walk is None


def test_state_from_one_forward_to_the_next_is_refused() -> None:
    model = stateful("Remembering")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        WalkError,
        match=r"LlamaForCausalLM gives other results for the same tokens in a second forward.*; and "
        r"block 0 of LlamaForCausalLM run alone differs from its plain forward",
    ):
        prune_with(PruneConfig(calibration=tokens()), model, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any("forward" in block.__dict__ for block in model.model.layers)
