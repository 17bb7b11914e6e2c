"""Tasks by lm-eval: a task over a local file, for real where it is installed; clear errors anyway."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BOS, llama, word_tokenizer, words

from llmprune.errors import ConfigError
from llmprune.eval import tasks as module
from llmprune.eval.tasks import check, run_tasks

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")

TASK = """task: tiny_pages
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list:
  - metric: word_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
"""


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "llmprune\[eval\]"'):
        check(["arc_easy"])


def test_the_unknown_is_answered_with_what_is_near() -> None:
    message = module._unknown("arc_esy", ["arc_easy", "arc_challenge", "boolq"], is_file=False)
    assert "did you mean 'arc_easy'" in message
    assert "no task file x.yaml" in module._unknown("x.yaml", [], is_file=True)


def test_results_become_plain_json() -> None:
    plain = module._plain({"acc,none": torch.tensor(0.5), "err": "N/A", "n": 3, "x": math.nan})
    assert json.loads(json.dumps(plain)) == {"acc,none": 0.5, "err": None, "n": 3, "x": None}


@needs_lm_eval
def test_an_unknown_task_is_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="did you mean 'hellaswag'"):
        run_tasks(None, None, ["hellaswg"])
    with pytest.raises(ConfigError, match="no task is named"):
        check([])


@needs_lm_eval
def test_a_local_task_agrees_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    pages = [words(0, 20), words(7, 30), words(11, 12)]
    data, task = tmp_path / "pages.jsonl", tmp_path / "tiny_pages.yaml"
    data.write_text("".join(json.dumps({"page": page}) + "\n" for page in pages))
    task.write_text(TASK.format(data=data))
    model: Any = llama()
    tokenizer = word_tokenizer()
    found = run_tasks(model, tokenizer, [str(task)], batch_size=2)
    assert tokenizer.pad_token is None
    assert all(m.training for m in model.modules())
    model.eval()
    total = 0.0
    for page in pages:
        ids = word_tokenizer()(page)["input_ids"]  # lm-eval counts the BOS that this one adds
        window = torch.tensor([[BOS, *ids]])
        with torch.no_grad():
            log_p = model(window).logits[0, :-1].double().log_softmax(-1)
        total -= float(log_p[range(len(ids)), ids].sum())
    expected = math.exp(total / sum(len(page.split()) for page in pages))
    result = found["results"]["tiny_pages"]["word_perplexity,none"]
    assert result == pytest.approx(expected, rel=1e-4)
    assert found["tool"].startswith("lm-eval 0.")
    json.dumps(found, allow_nan=False)
