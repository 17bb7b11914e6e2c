"""Transforms leave what a model computes as it was: float64, random gains and biases, many families."""

from __future__ import annotations

import sys
from typing import Any

import families
import pytest
import torch
from torch import Tensor

import llmprune
from llmprune import transforms
from llmprune.errors import ConfigError
from llmprune.model import blocks
from llmprune.preserve import evaluating
from llmprune.transforms.apply import in_memory
from llmprune.whole import checked_walker

GAINS = "gains that cannot be folded stand before the residual stream"
OTHER = "gives something else after it"

# What is refused: every part that is not named here has to be done.
FAMILIES: dict[str, dict[str, str]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "phi3": {},
    "granite": {},
    "phi": {},
    "cohere": {},
    "stablelm": {},
    "olmo": {},
    "gpt2": {},
    "opt": {},
    "falcon": {},
    "mixtral": {"permute features": "no features in groups of 2:4"},
    "gpt_oss": {"permute features": "no features in groups of 2:4"},
    "qwen2_moe": {},
    "gemma2": {"rotate stream": GAINS},
    "gemma3_text": {"rotate stream": GAINS},
    "glm4": {"rotate stream": GAINS},
    "olmo2": {
        "fold norms": "no matrix of a block reads a norm",
        "rotate stream": GAINS,
        "permute stream": "no matrix of a block reads a norm",
    },
    "gpt_neox": {"rotate values": OTHER, "permute values": OTHER},
    "bloom": {
        "rotate stream": "word_embeddings_layernorm.weight stands between",
        "permute stream": "word_embeddings_layernorm.weight stands between",
        "rotate values": OTHER,
        "permute values": OTHER,
    },
    "mamba2": {
        "rotate values": "no attention with values",
        "permute values": "no values in groups of 2:4",
        "permute features": "no features in groups of 2:4",
    },
}


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers compute in float64 throughout: its norms narrow to float32 otherwise."""
    to, narrow = Tensor.to, Tensor.float

    def inside() -> bool:
        return str(sys._getframe(2).f_globals["__name__"]).startswith("transformers")

    def stay(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        asked = torch.float32 in args or kwargs.get("dtype") == torch.float32
        if self.dtype == torch.float64 and asked and inside():
            return self
        return to(self, *args, **kwargs)

    def stay_wide(self: Tensor) -> Tensor:
        return self if self.dtype == torch.float64 and inside() else narrow(self)

    monkeypatch.setattr(Tensor, "to", stay)
    monkeypatch.setattr(Tensor, "float", stay_wide)


def made(kind: str) -> Any:
    """A tiny model in float64 with no gain at one and no bias at zero."""
    model = families.tiny(kind)
    kept = dict(model.named_buffers())
    model.double()
    for name, buffer in kept.items():  # rotary tables are made in float32
        path, _, last = name.rpartition(".")
        model.get_submodule(path)._buffers[last] = buffer
    model.set_experts_implementation("eager")
    random = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        parameter.data = parameter.data + 0.3 * noise if parameter.dim() == 1 else 0.2 * noise
    return model


def done(
    model: Any, names: list[str], settings: Any = None, pattern: str = "2:4"
) -> dict[str, Any]:
    batches = list(families.WINDOWS.split(2))
    with evaluating(model):
        walker = checked_walker(model, blocks(model)[1], batches, lambda line: None)
        built = transforms.build(names, settings)
        task = llmprune.PruneConfig(sparsity=pattern).task()
        return in_memory(walker, built, task, {}, lambda line: None, False)


def check_refused(found: dict[str, Any], want: dict[str, str]) -> None:
    got = {f"{name} {part}": why for name, f in found.items() for part, why in f["refused"].items()}
    want = {key: why for key, why in want.items() if key.split()[0] in found}
    assert got.keys() == want.keys(), got
    for key, why in want.items():
        assert why in got[key]


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.usefixtures("wide")
def test_logits_stay(kind: str) -> None:
    model = made(kind)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        dense = families.logits(model)
        for names in (["fold"], ["rotate", "permute"]):
            found = done(model, names, {"steps": 3, "sweeps": 3} if "rotate" in names else None)
            check_refused(found, FAMILIES[kind])
            now = families.logits(model)
            assert (now - dense).abs().max() <= 1e-11 * dense.abs().max()
    changed = [
        n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])
    ]
    assert len(changed) >= len(list(blocks(model)[1]))  # something was done to every block


@pytest.mark.usefixtures("wide")
def test_gains_become_one_and_a_tied_head_gets_weights_of_its_own() -> None:
    model = made("gemma")  # gains are 1 + weight, the embedding is scaled, the head is tied
    assert model.lm_head.weight is model.model.embed_tokens.weight
    table, gain = model.model.embed_tokens.weight.clone(), 1 + model.model.norm.weight
    done(model, ["fold"])
    assert model.config.tie_word_embeddings is False
    assert torch.equal(model.model.embed_tokens.weight, table)
    assert torch.equal(model.lm_head.weight, table * gain)
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    assert len(norms) == 2 * len(model.model.layers) + 1
    assert not any(bool(p.any()) for p in norms)


@pytest.mark.usefixtures("wide")
def test_a_permutation_keeps_every_number() -> None:
    model = made("qwen2")
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = done(model, ["permute"])
    assert found["permute"]["done"] == ["features", "values", "stream"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.flatten().sort().values, before[name].flatten().sort().values)
    assert model.config.tie_word_embeddings is False or model.lm_head.weight is not None


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("kind", ["identity", "random", "hadamard"])
def test_rotations_that_are_not_learnt(kind: str) -> None:
    model = made("gpt2")
    with torch.no_grad():
        dense = families.logits(model)
        found = done(model, ["rotate"], {"stream": kind, "values": kind})
        assert found["rotate"]["done"] == ([] if kind == "identity" else ["stream", "values"])
        assert (families.logits(model) - dense).abs().max() <= 1e-11 * dense.abs().max()


def test_what_a_share_does_not_need_is_left_out() -> None:
    found = done(made("llama"), ["permute"], pattern="0.5")
    assert found["permute"]["done"] == []
    assert "does not matter to 0.5" in found["permute"]["refused"]["features"]


def test_rotate_folds_by_itself() -> None:
    found = done(made("llama"), ["fold", "rotate"], {"steps": 1})
    assert found["fold"]["notes"] == {"done_by": "rotate"}


def test_clipped_values_are_not_rotated() -> None:
    model = made("olmo")
    model.config.clip_qkv = 1000.0  # never reached in the trial, so only the config can tell
    found = done(model, ["rotate"], {"steps": 1})
    assert "clip_qkv" in found["rotate"]["refused"]["values"]


def test_state_outside_the_blocks_is_said() -> None:
    found = done(families.tiny("gemma4_text"), ["rotate"])
    assert "outside its blocks" in found["rotate"]["refused"]["all"]


def test_a_failed_trial_leaves_every_bit() -> None:
    model = families.tiny("gpt_neox")
    before = [p.clone() for p in model.parameters()]
    done(model, ["permute"], {"parts": "values"})
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["rotat"], {}, "did you mean 'rotate'"),
        (["fold", "fold"], {}, "named twice"),
        (["rotate"], {"step": 3}, "did you mean 'steps'"),
        (["fold"], {"steps": 3}, "they have none"),
        ([], {"steps": 3}, "no transform has no setting"),
        (["rotate"], {"stream": "spin"}, "stream=learned, random, hadamard, identity"),
        (["rotate", "permute"], {"stream": "spin"}, "stream=learned"),
        (["rotate"], {"steps": "few"}, "takes a whole number"),
        (["rotate"], {"rate": 0}, "rate between 0 and 1"),
        (["permute"], {"rows": 0}, "rows of 1 or more"),
        (["permute"], {"parts": "heads"}, "parts=features,values,stream or some"),
        ("rotate", {}, "not one text"),
    ],
)
def test_settings_are_checked_before_anything_runs(names: Any, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        llmprune.PruneConfig(transforms=names, transform_settings=settings)
