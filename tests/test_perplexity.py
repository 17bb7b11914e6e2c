"""Perplexity against float64 arithmetic, the papers' number, and everything that must not matter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BOS, WORDS, llama, word_tokenizer, words
from torch import Tensor

from llmprune.errors import ConfigError, DataError, NumericalError
from llmprune.eval import perplexity as module
from llmprune.eval.perplexity import perplexity, token_ids

SEQLEN = 16


@pytest.fixture
def model() -> Any:
    return llama()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(WORDS + 3, (7 * SEQLEN + 5,), generator=torch.Generator().manual_seed(1))


def by_hand(model: Any, ids: Tensor, bos: int | None = None) -> list[float]:
    """The loss of each window in float64, one window and one token at a time."""
    twin = llama().double().eval()
    twin.load_state_dict(model.state_dict())
    width = SEQLEN if bos is None else SEQLEN - 1
    losses = []
    for start in range(0, len(ids) - width + 1, width):
        window = ids[start : start + width].tolist()
        window = window if bos is None else [bos, *window]
        with torch.no_grad():
            logits = twin(torch.tensor([window])).logits[0]
        nll = [
            float(torch.logsumexp(logits[i], 0) - logits[i, window[i + 1]])
            for i in range(SEQLEN - 1)
        ]
        losses.append(sum(nll) / len(nll))
    return losses


@pytest.mark.parametrize("bos", [None, BOS])
def test_it_is_the_exp_of_the_mean_window_loss(model: Any, ids: Tensor, bos: int | None) -> None:
    losses = by_hand(model, ids, bos)
    assert len(losses) == 7
    mean = sum(losses) / 7
    spread = math.sqrt(sum((x - mean) ** 2 for x in losses) / 6)
    found = perplexity(model, ids, seqlen=SEQLEN, dataset="here", bos=bos)
    assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    assert found.standard_error == pytest.approx(math.exp(mean) * spread / math.sqrt(7), rel=1e-4)
    assert (found.windows, found.seqlen, found.dataset) == (7, SEQLEN, "here")
    assert ("no special tokens" if bos is None else "BOS 0 before every") in found.protocol
    assert found.tokens_per_second == pytest.approx(7 * SEQLEN / found.seconds)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_does_not_matter(model: Any, ids: Tensor, batch_size: int) -> None:
    one = perplexity(model, ids, seqlen=SEQLEN, dataset="", batch_size=1)
    many = perplexity(model, ids, seqlen=SEQLEN, dataset="", batch_size=batch_size)
    assert many.perplexity == pytest.approx(one.perplexity, rel=1e-5)


def test_neither_do_chunks_of_logits(
    model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = perplexity(model, ids, seqlen=SEQLEN, dataset="")
    monkeypatch.setattr(module, "CHUNK_VALUES", 7 * (WORDS + 3) * 4)  # 4 of 15 positions at a time
    pieces = perplexity(model, ids, seqlen=SEQLEN, dataset="")
    assert pieces.perplexity == pytest.approx(whole.perplexity, rel=1e-6)


def test_loss_of_half_precision_logits_is_taken_in_float32() -> None:
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.arange(10).reshape(2, 5)
    expected = -logits.double().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).mean((1, 2))
    found = module.window_losses(logits, ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_the_model_is_left_as_it_was(model: Any, ids: Tensor) -> None:
    model.train()
    model.model.layers[1].eval()
    before = [m.training for m in model.modules()]
    first = perplexity(model, ids, seqlen=SEQLEN, dataset="")
    assert [m.training for m in model.modules()] == before
    assert first.perplexity == perplexity(model, ids, seqlen=SEQLEN, dataset="").perplexity
    assert all(p.grad is None for p in model.parameters())


def test_the_mode_is_restored_after_an_error(model: Any, ids: Tensor) -> None:
    model.train()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="loss of window 0 is nan"):
        perplexity(model, ids, seqlen=SEQLEN, dataset="")
    assert all(m.training for m in model.modules())


def test_a_window_with_a_bad_loss_is_named(model: Any, ids: Tensor) -> None:
    ids = ids.clamp(max=WORDS)
    ids[5 * SEQLEN + 3] = WORDS + 1
    with torch.no_grad():
        model.get_input_embeddings().weight[WORDS + 1] = float("inf")
    for batch_size in (1, 2, 4):
        with pytest.raises(NumericalError, match="window 5 "):
            perplexity(model, ids, seqlen=SEQLEN, dataset="", batch_size=batch_size)


def test_a_limit_uses_the_first_windows(model: Any, ids: Tensor) -> None:
    found = perplexity(model, ids, seqlen=SEQLEN, dataset="", limit=2)
    same = perplexity(model, ids[: 2 * SEQLEN], seqlen=SEQLEN, dataset="")
    assert found.windows == 2
    assert found.perplexity == pytest.approx(same.perplexity, rel=1e-6)
    assert "first 2" in found.protocol
    assert perplexity(model, ids, seqlen=SEQLEN, dataset="", limit=1).standard_error == 0.0


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"seqlen": 1}, ConfigError, "seqlen must be 2"),
        ({"seqlen": 8, "batch_size": 0}, ConfigError, "batch_size must be 1"),
        ({"seqlen": 8, "limit": 0}, ConfigError, "limit must be 1"),
        ({"seqlen": 500}, DataError, "117 tokens, less than one window of 500"),
    ],
)
def test_impossible_settings_are_refused(
    model: Any, ids: Tensor, options: dict[str, int], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        perplexity(model, ids, dataset="here", **options)


def test_ids_of_another_tokenizer_are_refused(model: Any, ids: Tensor) -> None:
    ids[3] = WORDS + 3
    with pytest.raises(DataError, match="to 63, but the model knows 0 to 62"):
        perplexity(model, ids, seqlen=SEQLEN, dataset="")
    with pytest.raises(DataError, match=r"\[2, 8\]"):
        perplexity(model, torch.zeros(2, 8), seqlen=SEQLEN, dataset="")


def test_a_text_is_tokenised_whole_without_special_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(words(0, 40))
    ids, name = token_ids(tmp_path / "a.txt", word_tokenizer())
    assert ids.tolist() == list(range(3, 43))
    assert name == str(tmp_path / "a.txt")


def test_the_oracles_ids_are_those_of_the_file(shared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "wikillama-5m")
    ids, _ = token_ids(shared / "data" / "wikitext-2" / "test.txt", tokenizer)
    assert torch.equal(ids, token_ids(shared / "oracles" / "test_ids.npy", None)[0])


@pytest.mark.slow
def test_the_papers_number(shared: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        shared / "models" / "wikillama-5m", dtype=torch.float32
    )
    ids, name = token_ids(shared / "oracles" / "test_ids.npy", None)
    found = perplexity(model, ids, seqlen=256, dataset=name)
    assert found.windows == 1425
    assert found.perplexity == pytest.approx(30.745, abs=5e-4)
