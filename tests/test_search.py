"""The search: switches keep the total, the best is found where it is known, and a killed one goes on."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import streamed
import torch
from families import tiny as family
from streamed import interrupted, same
from test_allocation import IDS, uneven
from torch import nn

import llmprune
from llmprune.allocation.database import Database
from llmprune.allocation.evolution import State, evolved, switched
from llmprune.allocation.ladder import units
from llmprune.allocation.levels import count
from llmprune.allocation.search import Search
from llmprune.allocation.searching import Searching, divergence
from llmprune.config import PruneConfig
from llmprune.errors import ConfigError
from llmprune.model import blocks, matrices
from llmprune.pattern import NM, Unstructured
from llmprune.walk import Walker
from llmprune.whole import checked_walker

QUICK = {"generations": 6, "offspring": 8, "tokens": "48,288"}


def total(genes: Any, counts: Any) -> int:
    return sum(some[gene] for some, gene in zip(counts, genes, strict=True))


class TestEvolution:
    @pytest.mark.parametrize("seed", range(20))
    def test_a_switch_keeps_the_total(self, seed: int) -> None:
        draw = Random(seed)
        sizes = [draw.choice([2, 4, 11]) for _ in range(12)]
        counts = [[size * rung for rung in range(5)] for size in sizes]
        genes = tuple(2 for _ in sizes)
        for _ in range(30):
            new = switched(genes, counts, draw)
            assert new is not None
            assert new != genes
            assert total(new, counts) == total(genes, counts)
            genes = new

    def test_levels_that_remove_as_many_are_switched_alone(self) -> None:
        found = {switched((0, 0), [[4, 4], [6, 8]], Random(s)) for s in range(20)}
        assert found == {(1, 0)}  # 2:4 and 4:8 of the first; the second has no partner

    @pytest.mark.parametrize("seed", range(5))
    def test_the_best_of_all_is_found(self, seed: int) -> None:
        """Every unit has its own best level, which the total forbids, and two pairs depend on each other."""
        draw = Random(seed)
        counts = [[size * rung for rung in range(4)] for size in (4, 4, 2, 2, 6)]
        own = [[(rung - draw.uniform(0, 3)) ** 2 for rung in range(4)] for _ in counts]
        pair = [[draw.random() / 4 for _ in range(4)] for _ in range(4)]

        def cost(genes: Any, on: Any = None) -> float:
            each = sum(costs[gene] for costs, gene in zip(own, genes, strict=True))
            return each + pair[genes[0]][genes[1]] + pair[genes[3]][genes[4]]

        begin = (1, 1, 1, 1, 1)
        best = min(
            (g for g in itertools.product(range(4), repeat=5) if total(g, counts) == total(begin, counts)),
            key=cost,
        )  # fmt: skip
        state = State(0, begin, cost(begin), 0.0, 0)
        for generation in range(60):
            state = evolved(state, counts, cost, [2, 4], 8, 12, Random(f"{seed} {generation}"))
        assert state.genes == best
        assert state.score == cost(best)


class TestParts:
    @pytest.mark.parametrize("within", ["row", "columns", "matrix"])
    @pytest.mark.parametrize("grain", ["block", "matrix"])
    def test_rungs_are_exact_and_evenly_apart(self, within: Any, grain: str) -> None:
        base = Unstructured(0.53, within)
        for unit in units(Search(grain=grain, step=0.1), matrices(uneven()), base):
            uniform = sum(count(base, m.shape) for m in unit.matrices)
            assert unit.counts[unit.base] == uniform
            assert len({b - a for a, b in itertools.pairwise(unit.counts)}) == 1
            assert len(unit.rungs) == 7
            for rung in unit.rungs:
                for m in unit.matrices:
                    score = torch.rand(m.shape)
                    assert int((~rung[m.name].keep(score)).sum()) == count(rung[m.name], m.shape)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_database_gives_back_what_was_put(self, tmp_path: Path, dtype: Any) -> None:
        base, dense = Database(tmp_path), torch.randn(5, 7).to(dtype)
        keep = torch.rand(5, 7) < 0.5
        changed = (dense * 2).masked_fill(~keep, 0)
        base.put_dense(3, dense)
        base.put(3, 0, keep, dense.masked_fill(~keep, 0), dense)
        base.put(3, 1, keep, changed, dense)
        assert torch.equal(base.dense(3, dense), dense)
        assert torch.equal(base.get(3, 0, dense), dense.masked_fill(~keep, 0))
        assert torch.equal(base.get(3, 1, dense), changed)
        assert not (tmp_path / "000003-000.values").exists()  # kept weights are the dense ones

    def test_divergence_is_that_of_the_definition(self) -> None:
        p, q = torch.randn(2, 3, 11), torch.randn(2, 3, 11)
        wanted = nn.KLDivLoss(reduction="sum")(q.double().log_softmax(-1), p.double().softmax(-1))
        assert divergence(p, q) == pytest.approx(float(wanted), rel=1e-5)


def searching(model: Any, folder: Path, sparsity: Any, **settings: Any) -> Searching:
    config = PruneConfig(sparsity=sparsity, allocation="search", allocation_settings=settings)
    walker = checked_walker(model, blocks(model)[1], list(IDS.split(2)), print)
    search = config.allocated()
    assert isinstance(search, Search)
    return Searching(search, matrices(model), walker, config.task(), folder, lambda *told: None)


class TestModel:
    @pytest.mark.parametrize("sparsity", [0.6, NM(2, 4)])
    def test_the_best_of_all_candidates_is_found(self, tmp_path: Path, sparsity: Any) -> None:
        """Three blocks, three levels: every candidate is judged by a forward written anew, in float64."""
        torch.manual_seed(0)
        model = uneven(3).eval()
        before = {n: p.clone() for n, p in model.named_parameters()}
        settings = {
            "reach": 1,
            "step": 0.1,
            "levels": "3:4,1:4" if isinstance(sparsity, NM) else "",
        }
        work = searching(
            model, tmp_path, sparsity, generations=12, tokens="288", grain="block", **settings
        )
        levels, found = work.run()
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        with torch.no_grad():
            dense = model.double()(IDS).logits.log_softmax(-1)
            model.float()
            scores = {}
            for genes in itertools.product(range(3), repeat=3):
                if sum(genes) != 3:
                    continue
                for unit, gene in zip(work.units, genes, strict=True):
                    for m in unit.matrices:
                        m.write(work.database.get(work.chosen.index(m), gene, m.weight))
                given = model.double()(IDS).logits.log_softmax(-1)
                model.float()
                scores[genes] = float((dense.exp() * (dense - given)).sum(-1).mean())
        best = min(scores, key=scores.__getitem__)
        assert found["kl_found"] == pytest.approx(scores[best], rel=1e-4)
        assert found["kl_uniform"] == pytest.approx(scores[1, 1, 1], rel=1e-4)
        assert list(found["units"].values()) == [gene - 1 for gene in best]
        assert levels == {
            n: v for u, g in zip(work.units, best, strict=True) for n, v in u.rungs[g].items()
        }

    def test_the_model_is_dense_again_after_an_interrupt(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        model = uneven(3).eval()
        before = {n: p.clone() for n, p in model.named_parameters()}
        with interrupted("generation 1"), pytest.raises(KeyboardInterrupt):
            searching(model, tmp_path, 0.6, **QUICK).run()
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())

    @pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
    @pytest.mark.parametrize("sparsity", [0.5, "2:4"])
    def test_runs_keep_the_total(self, kind: str, sparsity: Any) -> None:
        reports = []
        for settings in (
            {},
            {"allocation": "search", "allocation_settings": {**QUICK, "grain": "matrix"}},
        ):
            torch.manual_seed(0)
            reports.append(
                llmprune.prune(
                    uneven() if kind == "llama" else family(kind),
                    calibration=IDS[:, :16],
                    method="sparsegpt",
                    sparsity=sparsity,
                    progress=False,
                    **settings,
                )
            )
        assert len({sum(layer.kept for layer in r.layers) for r in reports}) == 1
        found = reports[1].allocation
        assert found["kl_found"] < found["kl_uniform"]
        assert found["generations"] == 6
        assert any(found["units"].values())

    def test_no_time_is_uniform(self) -> None:
        masks = []
        for settings in (
            {},
            {"allocation": "search", "allocation_settings": {**QUICK, "minutes": 1e-6}},
        ):
            torch.manual_seed(0)
            model = uneven()
            llmprune.prune(model, calibration=IDS, sparsity=0.6, progress=False, **settings)
            masks.append(llmprune.masks(model))
        assert all(torch.equal(masks[0][n], masks[1][n]) for n in masks[0])


class TestWrong:
    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"tokens": "4096,1024"}, "growing numbers"),
            ({"tokens": "many"}, "growing numbers"),
            ({"offspring": 0}, "offspring is a number of at least 1"),
            ({"step": 0}, "step is a share"),
            ({"minutes": -1}, "minutes is a time"),
            ({"by": "wandas"}, "did you mean 'wanda'"),
            ({"grain": "row"}, "matrix or block"),
        ],
    )
    def test_settings(self, settings: Any, words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            PruneConfig(allocation="search", allocation_settings=settings)

    def test_a_method_without_exact_counts(self) -> None:
        with pytest.raises(ConfigError, match="a variant of this method has none"):
            PruneConfig(settings={"variant": True}, allocation="search")

    def test_state_outside_the_blocks(self) -> None:
        with pytest.raises(ConfigError, match="keeps state outside its blocks"):
            llmprune.prune(
                family("gemma3n_text"), calibration=IDS[:, :16], allocation="search", progress=False
            )

    def test_nothing_to_exchange(self, tmp_path: Path) -> None:
        model = uneven(1).eval()
        walker = Walker(model, blocks(model)[1], list(IDS.split(2)))
        with pytest.raises(ConfigError, match="nothing to exchange"):
            Searching(
                Search(grain="block"),
                matrices(model),
                walker,
                PruneConfig().task(),
                tmp_path,
                lambda *told: None,
            )


SEARCH = (
    "--allocation", "search", "--no-eval", "--max-shard-size", 30_000, "--sparsity", "0.6",
    *(x for k, v in QUICK.items() for x in ("--allocation-set", f"{k}={v}")),
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    uneven().bfloat16().save_pretrained(folder / "model")
    streamed.add_tokenizer(folder / "model")
    streamed.write_text(folder / "words.txt")
    return folder


def runs(source: Path, folder: Path, *more: object) -> streamed.Runs:
    folder.mkdir()
    return streamed.Runs(folder, source / "model", source / "words.txt", [*SEARCH, *more])


class TestOnDisk:
    @pytest.fixture(scope="class")
    def peace(self, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        run = runs(source, tmp_path_factory.mktemp("peace") / "run")
        assert run() == 0
        assert run.leftovers() == []
        return run.out

    def test_the_report_says_what_was_found(self, peace: Path) -> None:
        report = json.loads((peace / "llmprune.json").read_text())
        found = report["allocation"]
        assert found["name"] == "search"
        assert found["kl_found"] < found["kl_uniform"]
        assert report["recipe"]["allocation_settings"]["offspring"] == 8
        assert report["seconds"]["allocation"] > 0

    @pytest.mark.parametrize("step", ["block 1", "generation 0", "generation 4", "allocation"])
    def test_a_killed_search_goes_on(
        self, source: Path, tmp_path: Path, peace: Path, step: str, monkeypatch: Any, capsys: Any
    ) -> None:
        run = runs(source, tmp_path / "run")
        with interrupted(step):
            assert run() == 130
        pruned: list[int] = []
        prune = Searching._prune_block
        monkeypatch.setattr(
            Searching,
            "_prune_block",
            lambda self, i, *more: pruned.append(i) or prune(self, i, *more),
        )
        capsys.readouterr()
        assert run() == 0
        assert pruned == ([2, 3] if step == "block 1" else [])
        assert "taking up the unfinished run" in capsys.readouterr().err
        same(run.out, peace)
        assert run.leftovers() == []

    def test_it_is_refused_where_the_model_does_not_fit(
        self, source: Path, tmp_path: Path, capsys: Any
    ) -> None:
        run = runs(source, tmp_path / "run")
        assert run("--max-memory", "200MB", "--restart") == 2
        said = capsys.readouterr().err
        assert "runs the whole model" in said or "less than one block" in said
        assert run.leftovers() == []

    def test_minutes_by_their_own_name(self, source: Path, tmp_path: Path) -> None:
        run = runs(source, tmp_path / "run")
        assert run("--budget-minutes", "0.000001") == 0
        report = json.loads((run.out / "llmprune.json").read_text())
        assert report["allocation"]["generations"] == 0
        assert report["recipe"]["allocation_settings"]["minutes"] == 1e-6
