"""`--generate`: windows that the dense model writes are drawn from its own predictions, and are used."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from streamed import Runs, interrupted, same, save_llama, write_text
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

import llmprune
from llmprune import ready
from llmprune.calibration import Calibration
from llmprune.config import PruneConfig
from llmprune.errors import ConfigError, ModelError
from llmprune.generate import PROMPT, generated, prompts
from llmprune.preserve import evaluating, random_state
from llmprune.quality import Parts, Quality

IDS = torch.randint(0, 64, (6, 24), generator=torch.Generator().manual_seed(1))
GIVEN = Calibration(IDS, "a test", 0)


def written(model: Any, share: float = 1.0, seed: int = 0) -> Tensor:
    """What the model writes beside `GIVEN`."""
    with evaluating(model), random_state(model):
        found = generated(model, GIVEN, share, seed, progress=False)
    assert torch.equal(found.ids[: len(IDS)], IDS)
    assert found.written == len(found.ids) - len(IDS)
    return found.ids[len(IDS) :]


def by_hand(model: Any, starts: Tensor, length: int, seed: int) -> Tensor:
    """Token by token from the logits of all that is there, without a cache."""
    torch.manual_seed(seed)
    ids = starts
    with torch.no_grad():
        while ids.shape[1] < length:
            p = model(ids).logits[:, -1].float().softmax(-1)
            ids = torch.cat([ids, torch.multinomial(p, 1)], 1)
    return ids


class TestText:
    @pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "mamba"])
    def test_each_token_is_drawn_from_what_the_model_predicts(self, family: str) -> None:
        model = tiny(family).eval()
        with random_state(model):
            expected = by_hand(model, IDS[:, :PROMPT], IDS.shape[1], 3)
        assert torch.equal(written(model, seed=3), expected)

    def test_settings_of_the_checkpoint_play_no_part(self) -> None:
        model, plain = tiny("llama").eval(), tiny("llama").eval()
        model.load_state_dict(plain.state_dict())
        everything = list(range(32))
        own = GenerationConfig(
            do_sample=True, temperature=0.01, top_k=1, repetition_penalty=9.0, eos_token_id=everything,
            max_new_tokens=2, num_beams=3, suppress_tokens=everything,
        )  # fmt: skip
        model.generation_config = own
        assert torch.equal(written(model), written(plain))
        assert model.generation_config is own

    def test_a_seed_chooses_and_the_global_random_state_stays(self) -> None:
        model = tiny("llama").eval()
        before = torch.get_rng_state()
        one, again, other = written(model), written(model), written(model, seed=1)
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
        assert torch.equal(torch.get_rng_state(), before)

    def test_what_is_likely_is_written_often(self) -> None:
        model = tiny("llama").eval()
        with torch.no_grad():
            model.lm_head.weight.mul_(30)  # far from uniform
        text = written(model, share=20)
        with torch.no_grad():
            logp = model(text).logits[:, PROMPT - 1 : -1].log_softmax(-1)
        said = logp.gather(-1, text[:, PROMPT:, None]).squeeze(-1)
        expected = (logp.exp() * logp).sum(-1)  # of a token that is drawn from the predictions
        spread = ((logp.exp() * logp.square()).sum(-1) - expected.square()).sum().sqrt()
        assert abs(float((said - expected).sum())) < 4 * float(spread)
        assert float(expected.mean()) > -0.8 * math.log(64)  # a uniform draw would be told apart

    @pytest.mark.parametrize(
        ("share", "count"), [(1.0, 6), (0.5, 3), (0.01, 1), (2.5, 15), (1.2, 8)]
    )
    def test_as_many_as_asked_for(self, share: float, count: int) -> None:
        assert written(tiny("llama").eval(), share).shape == (count, IDS.shape[1])

    def test_beginnings_are_all_of_other_places(self) -> None:
        ids = torch.arange(400).view(10, 40)
        assert torch.equal(prompts(ids, 10), ids[:, :PROMPT])
        assert prompts(ids, 2)[:, 0].tolist() == [0, 200]  # spread over all windows
        many = prompts(ids, 25)
        assert many.shape == (25, PROMPT)
        assert len(set(many[:, 0].tolist())) == 25
        assert torch.equal(many, many[:, :1] + torch.arange(PROMPT))
        assert prompts(ids[:, :6], 10).shape == (10, 3)
        assert prompts(ids[:, :2], 10).shape == (10, 1)

    def test_more_windows_than_are_written_at_once(self, monkeypatch: Any) -> None:
        monkeypatch.setattr("llmprune.generate.TOGETHER", 2 * IDS.shape[1])
        model = tiny("llama").eval()
        with random_state(model):
            torch.manual_seed(0)
            state = torch.get_rng_state()
            expected = []
            for rows in IDS[:, :PROMPT].split(2):
                torch.set_rng_state(state)
                expected.append(_from_here(model, rows))
                state = torch.get_rng_state()
        assert torch.equal(written(model), torch.cat(expected))


def _from_here(model: Any, starts: Tensor) -> Tensor:
    """`by_hand`, with the random state as it is."""
    ids = starts
    with torch.no_grad():
        while ids.shape[1] < IDS.shape[1]:
            p = model(ids).logits[:, -1].float().softmax(-1)
            ids = torch.cat([ids, torch.multinomial(p, 1)], 1)
    return ids


class TestRefused:
    def test_a_model_that_cannot_write(self, monkeypatch: Any) -> None:
        model = tiny("llama").eval()

        def broken(*args: Any, **kwargs: Any) -> Any:
            raise ValueError("no cache\nof that kind")

        monkeypatch.setattr(model, "generate", broken, raising=False)
        with pytest.raises(
            ModelError, match="writes no text: ValueError, no cache of that kind; lea"
        ):
            llmprune.prune(model, calibration=IDS, generate=1)
        monkeypatch.setattr(model, "generate", None)
        with pytest.raises(ModelError, match=r"has no generate\(\)"):
            llmprune.prune(model, calibration=IDS, generate=1)

    def test_memory_that_runs_out_is_no_fault_of_the_model(self, monkeypatch: Any) -> None:
        def full(*args: Any, **kwargs: Any) -> Any:
            raise torch.OutOfMemoryError("none left")

        model = tiny("llama").eval()
        monkeypatch.setattr(model, "generate", full)
        with pytest.raises(torch.OutOfMemoryError):
            llmprune.prune(model, calibration=IDS, generate=1)

    def test_a_quality_goes_on_without(self, monkeypatch: Any) -> None:
        made = Parts(generate=1.0)
        monkeypatch.setattr("llmprune.quality.QUALITIES", {"own": Quality("of a test", made, made)})
        model, other = tiny("llama").eval(), tiny("llama").eval()
        other.load_state_dict(model.state_dict())
        monkeypatch.setattr(model, "generate", None)
        report = llmprune.prune(model, calibration=IDS, quality="own")
        assert list(report.left_out) == ["generate"]
        assert report.recipe["generate"] == 0
        assert report.calibration is not None
        assert report.calibration.written == 0
        assert "generate" not in report.seconds
        llmprune.prune(other, calibration=IDS)
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two)
        with pytest.raises(ModelError, match="has no generate"):
            llmprune.prune(model, calibration=IDS, quality="own", generate=0.5)

    @pytest.mark.parametrize("share", [-1.0, math.nan, math.inf, 101.0])
    def test_a_share_that_is_none(self, share: float) -> None:
        with pytest.raises(ConfigError, match="from 0 to 100, got"):
            PruneConfig(generate=share)

    def test_a_method_without_data(self) -> None:
        with pytest.raises(ConfigError, match="magnitude looks at the weights alone; leave it out"):
            PruneConfig(method="magnitude", generate=1)


class TestRuns:
    def test_what_is_written_is_calibrated_on(self) -> None:
        model, by_hand_ = tiny("llama").eval(), tiny("llama").eval()
        by_hand_.load_state_dict(model.state_dict())
        own = written(model, seed=5)
        report = llmprune.prune(model, calibration=IDS, generate=1, seed=5, method="sparsegpt")
        assert report.calibration is not None
        assert (report.calibration.samples, report.calibration.written) == (6, 6)
        assert report.recipe["generate"] == 1
        assert report.seconds["generate"] > 0
        assert report.layers[0].tokens == 12 * IDS.shape[1]
        llmprune.prune(by_hand_, calibration=torch.cat([IDS, own]), method="sparsegpt")
        for one, two in zip(model.parameters(), by_hand_.parameters(), strict=True):
            assert torch.equal(one, two)

    def test_it_is_written_before_the_model_is_transformed(self, monkeypatch: Any) -> None:
        model = tiny("llama").eval()
        expected = written(model)
        seen: list[Tensor] = []
        pruned = ready.generated
        monkeypatch.setattr(
            ready, "generated", lambda *a, **k: seen.append((r := pruned(*a, **k)).ids) or r
        )
        llmprune.prune(
            model, calibration=IDS, generate=1, sparsity="2:4", transforms=["rotate", "permute"],
            transform_settings={"steps": 2, "sweeps": 1},
        )  # fmt: skip
        assert torch.equal(seen[0][len(IDS) :], expected)


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    model = save_llama(tmp_path / "model", torch.float32)
    text = write_text(tmp_path / "words.txt")
    (tmp_path / "runs").mkdir()
    options = ["--seqlen", 16, "--samples", 6, "--no-eval", "--sparsity", 0.5, "--generate", 0.5]
    options += ["--method", "sparsegpt", "--transform", "rotate", "--transform-set", "steps=2"]
    return Runs(tmp_path / "runs", model, text, options)


class TestToDisk:
    def test_the_same_as_in_memory(self, runs: Runs) -> None:
        assert runs() == 0
        assert runs.leftovers() == []
        model = AutoModelForCausalLM.from_pretrained(runs.model, dtype=torch.float32)
        tokenizer = llmprune.loading.tokenizer(llmprune.loading.check(str(runs.model)))
        report = llmprune.prune(
            model, tokenizer, calibration=str(runs.argv[3]), seqlen=16, samples=6, generate=0.5,
            method="sparsegpt", transforms=["rotate"], transform_settings={"steps": 2},
        )  # fmt: skip
        found = AutoModelForCausalLM.from_pretrained(runs.out, dtype=torch.float32)
        for (name, one), two in zip(found.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(one, two), name
        told = json.loads((runs.out / "llmprune.json").read_text())
        assert told["calibration"]["written"] == 3
        assert told["calibration"]["fingerprint"] == report.calibration.fingerprint
        assert told["recipe"]["generate"] == 0.5
        assert told["seconds"]["generate"] > 0
        assert "| written by the model itself | 3 |" in (runs.out / "README.md").read_text()

    def test_a_run_that_is_taken_up_does_not_write_again(
        self, runs: Runs, tmp_path: Path, capsys: Any, monkeypatch: Any
    ) -> None:
        peace = Runs(tmp_path / "peace", runs.model, Path(runs.argv[3]), runs.argv[8:])
        (tmp_path / "peace").mkdir()
        assert peace() == 0
        with interrupted("generate"):
            assert runs() == 130
        monkeypatch.setattr(ready, "generated", None)  # may not be called
        capsys.readouterr()
        assert runs() == 0
        assert "that the model wrote earlier is used again" in capsys.readouterr().err
        assert runs.leftovers() == []
        same(runs.out, peace.out)

    def test_damaged_text_is_written_again(self, runs: Runs, capsys: Any) -> None:
        with interrupted("block 1"):
            assert runs() == 130
        file = runs.unfinished / "written.safetensors"
        file.write_bytes(file.read_bytes()[:-8])
        capsys.readouterr()
        assert runs() == 0
        assert "has written 3 more windows" in capsys.readouterr().err

    def test_a_model_that_does_not_fit(self, runs: Runs, capsys: Any, monkeypatch: Any) -> None:
        monkeypatch.setattr("llmprune.generated.fits", lambda model, budget: False)
        assert runs() == 2
        assert "to write text the whole model has to be in memory" in capsys.readouterr().err
        made = Parts(generate=1.0)
        monkeypatch.setattr("llmprune.quality.QUALITIES", {"own": Quality("of a test", made, made)})
        runs.argv = _without(runs.argv, "--generate")
        assert runs("--quality", "own") == 0
        assert "going on without generate: to write text the whole" in capsys.readouterr().err
        told = json.loads((runs.out / "llmprune.json").read_text())
        assert list(told["left_out"]) == ["generate"]
        assert told["calibration"]["written"] == 0


def _without(argv: list[Any], option: str) -> list[Any]:
    """A command line without an option and its value."""
    at = argv.index(option)
    return [*argv[:at], *argv[at + 2 :]]
