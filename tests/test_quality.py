"""`--quality`: what a name stands for, what wins over it, and what a run does without."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from streamed import Runs, add_tokenizer, interrupted, same, save_llama, write_text
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmprune
from llmprune import methods
from llmprune.cli import main
from llmprune.config import PruneConfig
from llmprune.errors import ConfigError
from llmprune.memory import SLACK
from llmprune.options import prune_parser
from llmprune.pattern import NM, Unstructured
from llmprune.quality import QUALITIES, Asked, Parts, Quality, get, resolve
from llmprune.refine import settings as repairs
from llmprune.report import Report

IDS = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(7))
PATTERNS = (0.5, "2:4")
STATEFUL = "gemma3n_text"  # keys and values of early blocks reach late ones past the hidden state
CHEAP = {"rotate": {"steps": 3}, "permute": {"sweeps": 2}}


def cheap(parts: Parts) -> dict[str, Any]:
    """Settings with which the transforms among `parts` are soon done."""
    return {key: value for name in parts.transforms for key, value in CHEAP[name].items()}


def quality(method: str = "wanda", **parts: Any) -> Quality:
    """One that is made of the same for every pattern."""
    made = Parts(method=method, **parts)
    return Quality("of a test", made, made)


def config(name: str | None, sparsity: float | str = 0.5, **asked: Any) -> PruneConfig:
    parts = resolve(name, sparsity, Asked(**asked))
    return PruneConfig(sparsity, quality=name, **vars(parts))


def weights(model: Any) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def equal(one: Any, two: Any) -> bool:
    """Whether two models hold the same weights, bit for bit."""
    left, right = weights(one), weights(two)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def prune(model: Any, **given: Any) -> Report:
    return llmprune.prune(model, calibration=IDS, batch_size=4, progress=False, **given)


class TestTable:
    @pytest.mark.parametrize("name", QUALITIES)
    @pytest.mark.parametrize("sparsity", PATTERNS)
    def test_every_one_is_a_recipe(self, name: str, sparsity: float | str) -> None:
        """Each part is built, and its recipe is plain JSON that names it and spells everything out."""
        recipe = config(name, sparsity).recipe()
        assert json.loads(json.dumps(recipe)) == recipe
        parts = QUALITIES[name].nm if sparsity == "2:4" else QUALITIES[name].share
        assert recipe["quality"] == name
        assert recipe["method"] == parts.method
        assert recipe["settings"] == methods.build(parts.method, parts.settings).settings()
        assert recipe["repair"] == parts.repair
        whole = repairs.build(parts.repair_settings).as_dict() if parts.repair else {}
        assert recipe["repair_settings"] == whole
        assert recipe["allocation"] == parts.allocation
        assert recipe["transforms"] == list(parts.transforms)
        assert recipe["fisher"] == parts.fisher
        assert list(recipe["transform_settings"]) == list(parts.transforms)

    def test_its_parts_are_fields_of_a_run(self) -> None:
        mine = {f.name: getattr(Parts(), f.name) for f in fields(Parts)}
        assert {name: getattr(PruneConfig(), name) for name in mine} == mine
        assert [f.name for f in fields(Asked)] == list(mine)

    @pytest.mark.parametrize("name", QUALITIES)
    def test_help_says_what_each_is_for(self, name: str) -> None:
        told = " ".join(prune_parser().format_help().split())
        assert f"{name}: {' '.join(QUALITIES[name].summary.split())}" in told

    @pytest.mark.parametrize("name", QUALITIES)
    @pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
    def test_the_options_that_the_listing_shows_stand_for_it(
        self, name: str, pattern: NM | Unstructured, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Typed after `llmprune` they make the same run, but for the name."""
        made = typed(monkeypatch, str(pattern), *get(name).parts(pattern).options().split())
        asked = config(name, str(pattern)).recipe()
        assert made.recipe() == {**asked, "quality": None}

    def test_a_list_of_them(self, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        parts = {"transforms": ("fold",), "allocation_settings": {"bound": 0.1}}
        odd = replace(quality("ria", **parts), nm=Parts(allocation="owl"), cost="a day")
        monkeypatch.setitem(QUALITIES, "odd", odd)
        assert main(["qualities"]) == 0
        shown = capsys.readouterr().out
        for name, one in QUALITIES.items():
            assert f"{name}: {one.summary}\n" in shown
        assert "    a share: --method ria --transform fold\n" in shown
        assert "    n:m:     --method wanda --allocation owl\n    costs a day" in shown
        assert shown.count("costs") == sum(one.cost is not None for one in QUALITIES.values())
        assert main(["qualities", "--json"]) == 0
        plain = json.loads(capsys.readouterr().out)
        assert list(plain) == list(QUALITIES)
        assert plain["odd"]["share"]["transforms"] == ["fold"]
        assert plain["odd"]["cost"] == "a day"


def typed(monkeypatch: pytest.MonkeyPatch, sparsity: str, *options: str) -> PruneConfig:
    """What the command line makes of options."""
    seen: list[PruneConfig] = []
    monkeypatch.setattr("llmprune.job.run", lambda job: seen.append(job.prune))
    assert main(["--model", "demo", "--sparsity", sparsity, *options]) == 0
    return seen[0]


class TestWhatWins:
    @pytest.fixture(autouse=True)
    def table(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A quality with a setting in every part."""
        own = quality(
            "sparsegpt",
            settings={"block": 64, "damping": 0.02},
            repair=True,
            repair_settings={"epochs": 2.0, "seed": 5},
            allocation="owl",
            allocation_settings={"bound": 0.1},
            transforms=("rotate", "permute"),
            transform_settings={"steps": 7, "sweeps": 3},
            fisher=True,
            fisher_settings={"mix": 0.5},
            generate=0.5,
        )
        monkeypatch.setitem(QUALITIES, "own", own)

    def made(self, monkeypatch: pytest.MonkeyPatch, *options: str) -> PruneConfig:
        return typed(monkeypatch, "0.5", "--quality", "own", *options)

    def test_nothing_asked_is_all_of_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = self.made(monkeypatch)
        assert {f.name: getattr(made, f.name) for f in fields(Parts)} == vars(
            QUALITIES["own"].share
        )
        assert made.quality == "own"

    def test_without_a_quality_it_is_wanda_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        recipe = typed(monkeypatch, "0.5").recipe()
        assert recipe == PruneConfig().recipe()
        assert (recipe["quality"], recipe["method"], recipe["repair"]) == (None, "wanda", False)
        assert (recipe["allocation"], recipe["transforms"]) == ("uniform", [])

    def test_another_method_comes_with_its_own_settings(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = self.made(monkeypatch, "--method", "alps", "--set", "damping=0.5")
        assert (made.method, made.settings) == ("alps", {"damping": "0.5"})
        assert made.repair_settings == {"epochs": 2.0, "seed": 5}

    def test_settings_are_laid_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = self.made(
            monkeypatch, "--set", "block=32", "--repair-set", "epochs=1", "--method", "sparsegpt",
            "--allocation-set", "grain=matrix", "--transform-set", "steps=9",
        )  # fmt: skip
        recipe = made.recipe()
        assert recipe["settings"] | {"block": 32, "damping": 0.02} == recipe["settings"]
        assert recipe["repair_settings"] | {"epochs": 1.0, "seed": 5} == recipe["repair_settings"]
        allocated = {"bound": 0.1, "grain": "matrix"}
        assert recipe["allocation_settings"] | allocated == recipe["allocation_settings"]
        assert recipe["transform_settings"]["rotate"]["steps"] == 9

    def test_repair_may_be_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = self.made(monkeypatch, "--no-repair")
        assert (made.repair, made.repair_settings) == (False, {})
        with pytest.raises(ConfigError, match="epochs is of a repair: add --repair"):
            config("own", repair=False, repair_settings={"epochs": 3})

    def test_fisher_information_may_be_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = self.made(monkeypatch, "--fisher-set", "tokens=64")
        assert (made.fisher, made.fisher_settings) == (True, {"mix": 0.5, "tokens": "64"})
        made = self.made(monkeypatch, "--no-fisher")
        assert (made.fisher, made.fisher_settings) == (False, {})
        made = self.made(monkeypatch, "--no-fisher", "--allocation", "fisher")
        assert made.fisher_settings == {"mix": 0.5}  # what it is shared out by is still measured

    def test_another_allocation(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = self.made(monkeypatch, "--allocation", "uniform")
        assert (made.allocation, made.allocation_settings) == ("uniform", {})
        made = self.made(monkeypatch, "--allocation", "search", "--budget-minutes", "3")
        assert (made.allocation, made.allocation_settings) == ("search", {"minutes": "3"})

    def test_other_transforms_keep_the_settings_of_those_they_share(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = self.made(monkeypatch, "--transform", "permute")
        assert (made.transforms, made.transform_settings) == (["permute"], {"sweeps": 3})
        made = self.made(monkeypatch, "--transform", "fold", "rotate")
        assert made.transforms == ["fold", "rotate"]
        assert made.transform_settings == {"steps": 7}

    def test_no_transforms(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for made in (self.made(monkeypatch, "--transform", "none"), config("own", transforms=())):
            assert (list(made.transforms), made.transform_settings) == ([], {})
        with pytest.raises(ConfigError, match="no transform 'none'"):
            config("own", transforms=["none", "fold"])

    def test_in_python_as_typed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[PruneConfig] = []
        monkeypatch.setattr(
            "llmprune.run.prune_with", lambda config, *args, **kwargs: seen.append(config)
        )
        prune(None, quality="own", repair_settings={"epochs": 1}, allocation="uniform")
        options = ("--repair-set", "epochs=1", "--allocation", "uniform")
        mine = self.made(monkeypatch, *options, "--batch-size", "4")
        assert seen[0].recipe() == mine.recipe()

    @pytest.mark.parametrize("part", ["repair", "allocation", "fisher", "generate"])
    def test_only_what_it_brings_may_be_left_out(self, part: str) -> None:
        asked = {"repair": True, "allocation": "owl", "fisher": True, "generate": 0.5}[part]
        assert config("own").optional(part)
        assert config("own", **{part: asked}).optional(part)  # the same, said twice
        assert not config(None, **{part: asked}).optional(part)
        assert not config("fast", **{part: asked}).optional(part)
        assert not config("own", **{part: getattr(Parts(), part)}).optional(part)
        assert not config("own").without(part).optional(part)
        assert config("own").without(part).quality == "own"

    def test_another_allocation_than_its_own_is_an_order(self) -> None:
        assert not config("own", allocation="search").optional("allocation")


@pytest.mark.parametrize("name", ["bset", "BEST", ""])
def test_an_unknown_name(name: str, capsys: Any) -> None:
    known = "known: balanced, best, fast"
    with pytest.raises(ConfigError, match=rf"no quality {name!r}: .*{known}"):
        llmprune.prune(tiny("llama"), calibration=IDS, quality=name)
    with pytest.raises(ConfigError, match=known):
        PruneConfig(quality=name)
    assert main(["--model", "demo", "--sparsity", "0.5", "--quality", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert known in line
    assert ("did you mean 'best'" in line) == (name == "bset")


def test_a_wrong_sparsity_is_still_named() -> None:
    with pytest.raises(ConfigError, match="for 50 percent use"):
        llmprune.prune(tiny("llama"), calibration=IDS, quality="best", sparsity=50)


CASES = [("llama", name, sparsity) for name in QUALITIES for sparsity in PATTERNS]


@pytest.mark.parametrize(("family", "name", "sparsity"), [*CASES, ("gpt2", "best", 0.5)])
def test_it_is_the_same_as_its_parts(family: str, name: str, sparsity: float | str) -> None:
    """Bit for bit."""
    by_name, by_parts = tiny(family), tiny(family)
    parts = QUALITIES[name].nm if sparsity == "2:4" else QUALITIES[name].share
    quick = cheap(parts)
    settings = {**parts.transform_settings, **quick}
    named = prune(by_name, quality=name, sparsity=sparsity, transform_settings=quick)
    spelt = prune(by_parts, sparsity=sparsity, **{**vars(parts), "transform_settings": settings})
    assert equal(by_name, by_parts)
    assert named.recipe == {**spelt.recipe, "quality": name}
    assert (named.left_out, spelt.left_out) == ({}, {})
    assert bool(named.repair) == parts.repair
    assert list(named.transforms) == list(parts.transforms)


@pytest.mark.parametrize("family", ["xlnet", "jetmoe", "mixtral"])
def test_odd_families_take_all_of_it(family: str) -> None:
    """Positions before windows; a mixture that wants three axes; fused experts."""
    quick = cheap(QUALITIES["best"].nm)
    report = prune(tiny(family), quality="best", sparsity="2:4", transform_settings=quick)
    assert report.left_out == {}
    assert len(report.repair) == 3
    for block in report.repair:
        assert block.held_out_after <= block.held_out_before


@pytest.mark.parametrize(("name", "sparsity"), [("balanced", 0.5), ("best", "2:4")])
def test_state_outside_of_blocks_is_gone_around(name: str, sparsity: float | str) -> None:
    """Without the repair and transforms: the same weights as its method alone gives on the same text."""
    model, plain = tiny(STATEFUL), tiny(STATEFUL)
    parts = QUALITIES[name].nm if sparsity == "2:4" else QUALITIES[name].share
    report = prune(model, quality=name, sparsity=sparsity)
    prune(
        plain, method=parts.method, settings=parts.settings, sparsity=sparsity,
        generate=parts.generate,
    )  # fmt: skip
    assert equal(model, plain)
    why = "Gemma3nForCausalLM keeps state outside its blocks, so none can be repaired by itself"
    assert report.left_out["repair"] == why
    assert f"repair left out: {why}" in report.table().splitlines()
    assert report.repair == []
    recipe = report.recipe
    assert (recipe["quality"], recipe["repair"], recipe["repair_settings"]) == (name, False, {})
    assert all(done["done"] == [] for done in report.transforms.values())
    assert json.loads(report.to_json())["left_out"] == report.left_out


def test_fisher_information_that_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anything shared out by it then."""
    own = quality("alps", fisher=True, fisher_settings={"mix": 0.5}, allocation="fisher")
    monkeypatch.setitem(QUALITIES, "own", own)
    model, plain = tiny(STATEFUL), tiny(STATEFUL)
    report = prune(model, quality="own")
    prune(plain, method="alps")
    assert equal(model, plain)
    why = "Gemma3nForCausalLM keeps state outside its blocks, so gradients cannot go back block by block"
    assert report.left_out == {"fisher": why, "allocation": why}
    recipe = report.recipe
    assert (recipe["fisher"], recipe["fisher_settings"], recipe["allocation"]) == (
        False,
        {},
        "uniform",
    )
    for given in ({"fisher": True, "within": "matrix"}, {"allocation": "fisher"}):
        with pytest.raises(ConfigError, match=r"gradients cannot go back.*leave --fisher and"):
            prune(tiny(STATEFUL), **given)


@pytest.mark.parametrize("asked", [{}, {"quality": "fast"}], ids=["alone", "beside a quality"])
def test_what_the_user_asks_for_himself_is_refused(asked: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"keeps state outside its blocks.*leave --repair out"):
        prune(tiny(STATEFUL), repair=True, **asked)
    search = {"allocation": "search", "allocation_settings": {"generations": 1}}
    with pytest.raises(ConfigError, match="keeps state outside its blocks, and search has to run"):
        prune(tiny(STATEFUL), **search, **asked)


@pytest.mark.parametrize(
    ("family", "parts", "given", "why"),
    [
        (
            "llama",
            {"allocation": "fisher"},
            {"targets": ["re:model.layers.0.mlp.up*"]},
            "lies in 1",
        ),
        (STATEFUL, {"allocation": "search"}, {}, "search has to run them one by one"),
        ("llama", {"allocation": "owl"}, {"targets": ["re:model.layers.0.*"]}, "lies in 1"),
        ("llama", {"allocation": "search"}, {"targets": ["lm_head"]}, "nothing to exchange"),
    ],
)
def test_an_allocation_that_cannot_be(
    family: str,
    parts: dict[str, Any],
    given: dict[str, Any],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In memory the model is what uniform gives; asked for without a quality it is an error."""
    monkeypatch.setitem(QUALITIES, "own", quality("wanda", **parts))
    model, plain = tiny(family), tiny(family)
    report = prune(model, quality="own", **given)
    prune(plain, **given)
    assert equal(model, plain)
    assert why in report.left_out["allocation"]
    assert report.allocation == {}
    assert report.recipe["allocation"] == "uniform"
    with pytest.raises(ConfigError, match=re.escape(why)):
        prune(tiny(family), **parts, **given)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def stateful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / STATEFUL
    tiny(STATEFUL).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def runs(source: Path, folder: Path, *options: object) -> Runs:
    folder.mkdir(exist_ok=True)
    text = write_text(folder.parent / "words.txt", 2000)
    return Runs(folder, source, text, ["--samples", 8, "--seqlen", 16, "--no-eval", *options])


def test_a_run_to_disk_is_taken_up_again(source: Path, tmp_path: Path, capsys: Any) -> None:
    """With the same command; with another quality it is refused, and what differs is named."""
    parts = QUALITIES["best"].nm
    quick = [word for k, v in cheap(parts).items() for word in ("--transform-set", f"{k}={v}")]
    options = ("--sparsity", "2:4", "--quality", "best", *quick)
    whole, cut = (runs(source, tmp_path / x, *options) for x in "ab")
    assert whole() == 0
    with interrupted("block 1"):
        assert cut() == 130
    capsys.readouterr()
    assert cut("--quality", "fast", *parts.options().split()) == 2
    assert "quality was best then and is fast now" in capsys.readouterr().err
    assert cut("--repair-set", "epochs=1") == 2
    assert "repair_settings.epochs was" in capsys.readouterr().err
    assert cut() == 0
    assert "going on behind block 2" in capsys.readouterr().err
    same(whole.out, cut.out)
    assert cut.leftovers() == []
    report = json.loads((cut.out / "llmprune.json").read_text())
    assert report["recipe"]["quality"] == "best"
    assert len(report["repair"]) == 4
    assert report["left_out"] == {}
    card = (cut.out / "README.md").read_text()
    assert "--quality best" in card
    assert "| quality | best |" in card


def test_to_disk_it_is_the_same_as_its_parts(source: Path, tmp_path: Path) -> None:
    run = runs(source, tmp_path / "a", "--sparsity", "2:4", "--quality", "balanced")
    assert run() == 0
    report = json.loads((run.out / "llmprune.json").read_text())
    parts = QUALITIES["balanced"].nm
    made = config("balanced", "2:4").recipe()
    shared = [f.name for f in fields(Parts)]
    assert {k: report["recipe"][k] for k in shared} == {k: made[k] for k in shared}
    assert len(report["repair"]) == 4 * parts.repair
    again = runs(source, tmp_path / "b", "--sparsity", "2:4", *parts.options().split())
    assert again() == 0
    one, two = (AutoModelForCausalLM.from_pretrained(r.out) for r in (run, again))
    assert equal(one, two)


@pytest.mark.parametrize("allocation", ["uniform", "alphapruning", "search"])
def test_from_disk_state_outside_of_blocks_is_gone_around(
    stateful: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, allocation: str
) -> None:
    """The run changes over to memory, and leaves nothing beside its result."""
    own = quality("wanda", repair=True, transforms=("fold",), allocation=allocation)
    monkeypatch.setitem(QUALITIES, "own", own)
    run = runs(stateful, tmp_path / "a", "--sparsity", "0.5", "--quality", "own")
    assert run() == 0
    said = capsys.readouterr().err
    assert "quality own: going on without repair: Gemma3nForCausalLM keeps state" in said
    assert "transforms: nothing done" in said
    report = json.loads((run.out / "llmprune.json").read_text())
    left = {"repair", "allocation"} if allocation == "search" else {"repair"}
    assert report["left_out"].keys() == left
    assert "| repair left out | Gemma3n" in (run.out / "README.md").read_text()
    assert run.leftovers() == []


def test_a_block_that_memory_takes_without_repair_alone(
    source: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a limit that the user sets, the plain method is what counts."""
    monkeypatch.setitem(QUALITIES, "own", quality("wanda", repair=True))
    options = ("--sparsity", "0.5", "--max-memory", SLACK + 2**20, "--seqlen", 32)
    wide = ("--samples", 64, "--batch-size", 64)
    plain = runs(source, tmp_path / "a", *options, *wide, "--method", "wanda")
    assert plain() == 0
    asked = runs(source, tmp_path / "b", *options, *wide, "--method", "wanda", "--repair")
    assert asked() == 2
    assert "with wanda and a repair" in capsys.readouterr().err
    by_name = ("--quality", "own")
    run = runs(source, tmp_path / "c", *options, *wide, *by_name)
    assert run() == 0
    assert "going on without repair: --max-memory 1074790400 is less" in capsys.readouterr().err
    report = json.loads((run.out / "llmprune.json").read_text())
    assert "--max-memory" in report["left_out"]["repair"]
    assert report["recipe"]["repair"] is False
    one, two = (AutoModelForCausalLM.from_pretrained(r.out) for r in (plain, run))
    assert equal(one, two)


def test_an_allocation_that_cannot_be_is_noted_for_the_run_that_goes_on(
    source: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was decided the first time holds."""
    monkeypatch.setitem(QUALITIES, "own", quality("wanda", allocation="search"))
    monkeypatch.setattr("llmprune.allocate.fits", lambda model, budget: False)
    options = ("--sparsity", "0.5", "--quality", "own")
    run = runs(source, tmp_path / "a", *options)
    with interrupted("block 1"):
        assert run() == 130
    monkeypatch.undo()
    monkeypatch.setitem(QUALITIES, "own", quality("wanda", allocation="search"))
    capsys.readouterr()
    assert run() == 0
    said = capsys.readouterr().err
    assert "going on without allocation: --allocation search runs the whole model" in said
    assert "going on behind block 2" in said
    report = json.loads((run.out / "llmprune.json").read_text())
    assert "runs the whole model" in report["left_out"]["allocation"]
    assert report["recipe"]["allocation"] == "uniform"
    plain = runs(source, tmp_path / "b", "--sparsity", "0.5")
    assert plain() == 0
    one, two = (AutoModelForCausalLM.from_pretrained(r.out) for r in (run, plain))
    assert equal(one, two)


@pytest.mark.parametrize("save", [False, True])
def test_alone_on_the_command_line(
    source: Path, tmp_path: Path, save: bool, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but model, sparsity and quality, in memory and to disk."""
    monkeypatch.chdir(tmp_path)
    text = write_text(tmp_path / "words.txt", 2000)
    line = ["--model", source, "--sparsity", "2:4", "--quality", "best", "--calibration", text]
    line += ["--samples", 8, "--eval-dataset", text, *(["--save", "out"] if save else [])]
    assert main([str(part) for part in line]) == 0
    shown = capsys.readouterr().out
    assert "repaired: 4 blocks" in shown
    assert "permute: " in shown
    assert "perplexity pruned" in shown
    assert (tmp_path / "out").is_dir() == save
