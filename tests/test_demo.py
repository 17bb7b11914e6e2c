"""The embedded model tells the methods apart: what `--model demo` shows must be plain."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import llmprune
from llmprune.demo import MODEL_DIR
from llmprune.eval.perplexity import perplexity, token_ids
from llmprune.report import PerplexityReport

WINDOW = 256


@pytest.fixture(scope="module")
def measured() -> dict[str, PerplexityReport]:
    """Perplexity on a part of the held-out text: dense, and pruned to 60% by each method."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    ids, name = token_ids("demo", tokenizer)
    found = {}
    for method in ("dense", "magnitude", "wanda", "sparsegpt"):
        model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
        if method != "dense":
            llmprune.prune(
                model, tokenizer, calibration="demo", sparsity=0.6, method=method, progress=False
            )
        found[method] = perplexity(model, ids, seqlen=WINDOW, dataset=name, limit=150)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("better", "worse"),
    [("dense", "sparsegpt"), ("sparsegpt", "wanda"), ("sparsegpt", "magnitude")],
)
def test_at_60_percent_the_order_is_plain(measured, better, worse):
    """More than three standard errors apart, both errors counted."""
    low, high = measured[better], measured[worse]
    error = (low.standard_error**2 + high.standard_error**2) ** 0.5
    assert high.perplexity - low.perplexity > 3 * error


@pytest.mark.slow
def test_at_60_percent_wanda_is_no_worse_than_magnitude(measured):
    assert measured["wanda"].perplexity <= measured["magnitude"].perplexity


def test_the_default_window_is_the_trained_one():
    assert AutoConfig.from_pretrained(MODEL_DIR).max_position_embeddings == WINDOW
    assert len(token_ids("demo", AutoTokenizer.from_pretrained(MODEL_DIR))[0]) >= 400 * WINDOW
