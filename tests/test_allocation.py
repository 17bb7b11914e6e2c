"""How much of each matrix goes: totals exact to the weight, shares as the papers say, mixes valid."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import streamed
import torch
from families import tiny as family
from safetensors.torch import load_file
from streamed import Runs, interrupted, same
from tiny import llama

import llmprune
from llmprune import allocation as allocations
from llmprune.allocation.alphapruning import AlphaPruning, hill
from llmprune.allocation.exact import exact
from llmprune.allocation.levels import count, offered
from llmprune.cli import main
from llmprune.config import PruneConfig
from llmprune.errors import ConfigError, LLMPruneError
from llmprune.pattern import NM, Pattern, Unstructured, as_text, from_text

IDS = torch.randint(3, 60, (12, 24), generator=torch.Generator().manual_seed(0))


def removed(level: Pattern | None, shape: tuple[int, int]) -> int:
    """What a mask of the level really removes."""
    if level is None:
        return 0
    score = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    return int((~level.keep(score)).sum())


class TestExact:
    @pytest.mark.parametrize("seed", range(30))
    @pytest.mark.parametrize("within", ["row", "matrix", "columns"])
    def test_shares_of_any_shapes_remove_what_uniform_removes(self, within: Any, seed: int) -> None:
        draw = random.Random(f"{within} {seed}")
        shapes = {
            f"m{i}": (draw.randint(1, 60), draw.choice([7, 64, 129, 200, 256, 300]))
            for i in range(draw.randint(6, 24))
        }
        base = Unstructured(draw.uniform(0.02, 0.98), within, draw.choice([16, 128]))
        shares = {name: draw.random() ** 2 for name in shapes}
        levels = exact(base, shapes, shares, [])
        assert levels is not None
        assert levels.keys() == shapes.keys()
        got = {name: removed(levels[name], shapes[name]) for name in shapes}
        assert sum(got.values()) == sum(removed(base, shape) for shape in shapes.values())
        assert got == {name: count(levels[name], shapes[name]) for name in shapes}
        for level in levels.values():
            assert isinstance(level, Unstructured)
            assert from_text(as_text(level), base) == level

    @pytest.mark.parametrize("seed", range(30))
    def test_mixes_of_any_shapes_remove_what_uniform_removes(self, seed: int) -> None:
        draw = random.Random(seed)
        base = draw.choice([NM(2, 4), NM(1, 4), NM(4, 8), NM(3, 5)])
        wide = base.m * 2 if base.m in (4, 8) else base.m
        shapes = {
            f"m{i}": (draw.randint(1, 60), wide * draw.randint(1, 20))
            for i in range(draw.randint(12, 24))
        }
        levels = offered(draw.choice(["", "dense,1:4,2:4,3:8"]) if base.n == 2 else "", base)
        found = exact(base, shapes, {name: draw.random() for name in shapes}, levels)
        assert found is not None
        total = sum(removed(found[name], shapes[name]) for name in shapes)
        assert total == sum(removed(base, shape) for shape in shapes.values())
        assert set(found.values()) <= set(levels)

    def test_levels_lie_near_what_was_wanted(self) -> None:
        kinds = [(256, 256), (128, 256), (704, 256), (256, 704)]
        shapes = {f"{b}.{i}": s for b in range(8) for i, s in enumerate(kinds)}
        wanted = {name: 0.4 + 0.05 * int(name[0]) for name in shapes}
        found = exact(Unstructured(0.575, "row"), shapes, wanted, [])
        assert found is not None
        for name, level in found.items():
            assert level is not None
            assert abs(level.sparsity - wanted[name]) < 3 / shapes[name][1]

    def test_many_matrices_of_one_kind_are_quick(self) -> None:
        shapes = {f"{i}": (96, 64 if i % 3 else 96) for i in range(6000)}
        base = NM(2, 4)
        found = exact(base, shapes, {n: (int(n) % 7) / 7 for n in shapes}, offered("", base))
        assert found is not None
        total = sum(a * b // 2 for a, b in shapes.values())
        assert sum(count(found[n], s) for n, s in shapes.items()) == total

    def test_sizes_without_anything_in_common_have_no_levels(self) -> None:
        shapes = {"a": (5, 8), "b": (7, 8)}
        shares = {"a": 0.45, "b": 0.55}
        assert exact(Unstructured(0.5, "row"), shapes, shares, []) is None
        assert exact(Unstructured(0.5, "matrix"), shapes, shares, []) is not None


def reference_owl(model: Any, ids: torch.Tensor, m: float, bound: float, sparsity: float) -> list:
    """Shares by block as the paper's code has them, in float64, from the model's own dense forward."""
    model = model.double().eval()
    squares: dict[str, torch.Tensor] = {}
    found, handles = [], []
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):

            def see(mod: Any, args: Any, name: str = name) -> None:
                squares[name] = squares.get(name, 0) + args[0].flatten(0, 1).square().sum(0)

            handles.append(module.register_forward_pre_hook(see))
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    for layer in range(len(model.model.layers)):
        scores = [
            (module.weight.abs() * squares[name].sqrt()).flatten()
            for name, module in model.model.layers.named_modules()
            if isinstance(module, torch.nn.Linear) and name.startswith(f"{layer}.")
        ]
        score = torch.cat(scores)
        found.append(float((score > m * score.mean()).double().mean()))
    ratio = np.array(found)
    ratio = (ratio - ratio.min()) * (1 / (ratio.max() - ratio.min()) * bound * 2)
    return list(1 - (ratio - ratio.mean() + (1 - sparsity)))


def by_block(report: Any) -> list[float]:
    """Share removed of each block."""
    counts: dict[str, list[int]] = {}
    for layer in report.layers:
        block = counts.setdefault(layer.name.split(".")[2], [0, 0])
        block[0] += math.prod(layer.shape) - layer.kept
        block[1] += math.prod(layer.shape)
    return [gone / size for gone, size in counts.values()]


def uneven(blocks: int = 4) -> Any:
    """A tiny Llama whose blocks differ."""
    model = streamed.LlamaForCausalLM(
        streamed.LlamaConfig(**{**streamed.SHAPE, "num_hidden_layers": blocks})
    )
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for index, block in enumerate(model.model.layers):
            for p in block.parameters():
                if p.dim() == 2:
                    p.mul_(1 + index * torch.randn(p.shape, generator=draw) ** 2)
    return model


class TestPapers:
    def test_owl_gives_the_papers_shares(self) -> None:
        torch.manual_seed(0)
        model = uneven()
        wanted = reference_owl(model, IDS, 5.0, 0.08, 0.6)
        report = llmprune.prune(
            model.float(),
            calibration=IDS,
            sparsity=0.6,
            within="matrix",
            allocation="owl",
            progress=False,
        )
        assert np.allclose(by_block(report), wanted, atol=2e-3)
        assert max(wanted) - min(wanted) == pytest.approx(0.16)
        assert set(report.allocation["measured"]) == {f"block {i}" for i in range(4)}

    @pytest.mark.parametrize("shape", [(20, 33), (48, 16), (7, 7)])
    def test_alpha_is_hills_estimate(self, shape: tuple[int, int]) -> None:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = np.sort(np.linalg.svd(weight.double().numpy(), compute_uv=False) ** 2)
        n, k = len(values), len(values) // 2
        alpha = 1 + k / sum(math.log(values[n - i] / values[n - k - 1]) for i in range(1, k + 1))
        assert hill(weight) == pytest.approx(alpha, rel=1e-6)

    def test_alphapruning_gives_the_papers_shares(self) -> None:
        torch.manual_seed(0)
        model = uneven()
        alphas = np.array([
            np.mean([hill(m.weight.detach()) for m in block.modules() if isinstance(m, torch.nn.Linear)])
            for block in model.model.layers
        ])  # fmt: skip
        line = (alphas - alphas.min()) / (alphas.max() - alphas.min()) * 0.6 + 0.7
        report = llmprune.prune(
            model, sparsity=0.5, method="magnitude", allocation="alphapruning", progress=False
        )
        assert np.allclose(by_block(report), 0.5 * line / line.mean(), atol=2e-3)
        assert report.calibration is None  # the weights are all it looks at

    def test_no_block_loses_nearly_all(self) -> None:
        found = AlphaPruning().shares([2.0, 1.0, 1.0, 1.0, 1.0, 1.0], [1] * 6, Unstructured(0.7))
        assert found[0] == pytest.approx(0.85)  # of 1.14
        assert found[1:] == pytest.approx([0.7 * 0.7 / 0.8] * 5)

    def test_a_matrix_of_zeros_or_of_one_row_has_a_finite_alpha(self) -> None:
        assert hill(torch.zeros(4, 6)) == hill(torch.ones(1, 5)) == pytest.approx(101)


class TestRuns:
    @pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
    @pytest.mark.parametrize("sparsity", [0.63, "2:4"])
    @pytest.mark.parametrize("name", ["owl", "alphapruning"])
    def test_the_total_is_uniforms_to_the_weight(
        self, name: str, sparsity: Any, method: str
    ) -> None:
        kept = []
        for allocation in ("uniform", name):
            torch.manual_seed(0)
            report = llmprune.prune(
                uneven(), calibration=IDS, sparsity=sparsity, method=method,
                allocation=allocation, progress=False,
            )  # fmt: skip
            kept.append(sum(layer.kept for layer in report.layers))
        assert kept[0] == kept[1]
        assert len({layer.pattern for layer in report.layers}) > 1
        assert report.recipe["allocation"] == name
        assert report.seconds["allocation"] > 0

    def test_uniform_says_nothing_of_an_allocation(self) -> None:
        report = llmprune.prune(llama(), calibration=IDS, progress=False)
        assert report.recipe["allocation"] == "uniform"
        assert (report.allocation, "allocation" in report.seconds) == ({}, False)
        assert {layer.pattern for layer in report.layers} == {"0.5"}

    @pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
    def test_matrices_of_one_input_with_levels_of_their_own_are_as_alone(self, method: str) -> None:
        """q, k and v share statistics, and each is what it is when it is pruned by itself."""
        from llmprune import methods
        from llmprune.model import matrices
        from llmprune.prune_matrix import Task, prune_matrices

        built = methods.build(method)
        stats = built.stats.empty(32, torch.device("cpu"))
        stats.add(torch.randn(300, 32, generator=torch.Generator().manual_seed(0)))
        found = []
        for together in (True, False):
            torch.manual_seed(0)
            here = [
                m for m in matrices(uneven()) if "0.self_attn" in m.name and "o_proj" not in m.name
            ]
            levels = dict(zip([m.name for m in here], [NM(1, 4), NM(2, 4), NM(1, 4)], strict=True))
            task = Task(built, NM(2, 4), levels=levels)
            groups = [here] if together else [[m] for m in here]
            done = [d for some in groups for d in prune_matrices(some, stats, None, task)]
            found.append({d.matrix.name: d.matrix.weight.clone() for d in done})
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])

    def test_levels_of_their_own_share_one_eigendecomposition(self, monkeypatch: Any) -> None:
        from llmprune.methods import alps

        made: list[int] = []
        first = alps.Basis.__init__
        monkeypatch.setattr(
            alps.Basis, "__init__", lambda self, problem: made.append(1) or first(self, problem)
        )
        report = llmprune.prune(
            uneven(), calibration=IDS, sparsity=0.6, method="alps", allocation="owl",
            allocation_settings={"grain": "matrix"}, progress=False,
        )  # fmt: skip
        assert len({layer.pattern for layer in report.layers}) > 4
        assert len(made) == 4 * 4  # q, k, v; o; gate, up; down

    @pytest.mark.parametrize("kind", ["gpt2", "mixtral", "gpt_oss", "gemma3n_text"])
    @pytest.mark.parametrize("sparsity", [0.5, "2:4"])
    def test_families(self, kind: str, sparsity: Any) -> None:
        reports = [
            llmprune.prune(
                family(kind), calibration=IDS[:, :16], sparsity=sparsity, allocation=name,
                allocation_settings=settings, progress=False,
            )
            for name, settings in (("uniform", {}), ("owl", {"grain": "matrix", "bound": 0.4}))
        ]  # fmt: skip
        assert len({sum(layer.kept for layer in r.layers) for r in reports}) == 1
        assert len({layer.pattern for layer in reports[1].layers}) > 1


class TestWrong:
    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"allocation": "owls"}, "no allocation 'owls': did you mean 'owl'"),
            (
                {"allocation_settings": {"bound": 0.1}},
                "uniform has no setting 'bound': it has none",
            ),
            ({"allocation": "owl", "allocation_settings": {"lambda": 1}}, "no setting 'lambda'"),
            ({"allocation": "owl", "allocation_settings": {"bound": "wide"}}, "takes a number"),
            ({"allocation": "owl", "allocation_settings": {"bound": 1.0}}, "bound is a distance"),
            ({"allocation": "owl", "allocation_settings": {"outlier": 0}}, "outlier is a factor"),
            ({"allocation": "owl", "allocation_settings": {"grain": "head"}}, "block or matrix"),
            ({"allocation": "owl", "allocation_settings": {"levels": "2:4"}}, "are for n:m"),
            ({"allocation": "alphapruning", "allocation_settings": {"tau": 1}}, "tau is a share"),
            (
                {"sparsity": "2:4", "allocation": "owl", "allocation_settings": {"levels": "0.3"}},
                "n:m or dense, such as",
            ),
        ],
    )
    def test_settings_are_refused_before_anything_is_read(self, settings: Any, words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            PruneConfig(**settings)

    def test_a_mix_that_would_be_uniform_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"gives every matrix 2:4: .*widen its band"):
            llmprune.prune(
                uneven(), calibration=IDS, sparsity="2:4", allocation="owl",
                allocation_settings={"bound": 0.001}, progress=False,
            )  # fmt: skip

    def test_one_block_cannot_share(self) -> None:
        with pytest.raises(LLMPruneError, match="grain=matrix or --allocation uniform"):
            llmprune.prune(
                llama(),
                calibration=IDS,
                targets=["re:.*layers.0.*"],
                allocation="owl",
                progress=False,
            )

    def test_the_command_line_lists_them(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["allocations"]) == 0
        said = capsys.readouterr().out
        assert all(f"{name}: " in said for name in allocations.known())
        assert "--allocation-set bound=0.0" in said
        assert main(["allocations", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["owl"]["settings"]["outlier"] == 5.0

    def test_a_setting_without_a_value_names_its_option(self, capsys: Any) -> None:
        argv = [
            "--model",
            "demo",
            "--sparsity",
            "0.5",
            "--allocation",
            "owl",
            "--allocation-set",
            "bound",
        ]
        assert main(argv) == 2
        assert "--allocation-set takes key=value, got 'bound'" in capsys.readouterr().err


OWL = ("--allocation", "owl", "--no-eval", "--max-shard-size", 30_000)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    uneven().bfloat16().save_pretrained(folder / "model")
    streamed.add_tokenizer(folder / "model")
    streamed.write_text(folder / "words.txt")
    return folder


def runs(source: Path, folder: Path, *options: object) -> Runs:
    return Runs(folder, source / "model", source / "words.txt", [*options, *OWL])


class TestOnDisk:
    @pytest.mark.parametrize("pattern", ["0.6", "2:4"])
    def test_both_routes_give_the_same(self, source: Path, tmp_path: Path, pattern: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        run = runs(source, tmp_path, "--sparsity", pattern)
        assert run() == 0
        model = AutoModelForCausalLM.from_pretrained(source / "model", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source / "model")
        report = llmprune.prune(
            model, tokenizer, calibration=str(source / "words.txt"), samples=40, sparsity=pattern,
            allocation="owl", progress=False,
        )  # fmt: skip
        written = json.loads((run.out / "llmprune.json").read_text())
        assert [x["pattern"] for x in written["layers"]] == [x.pattern for x in report.layers]
        assert [x["kept"] for x in written["layers"]] == [x.kept for x in report.layers]
        assert written["allocation"] == report.allocation
        stored = {k: v for f in run.out.glob("*.safetensors") for k, v in load_file(f).items()}
        for layer in report.layers:
            mine = model.get_submodule(layer.name).weight.detach().bfloat16()
            assert torch.equal(stored[f"{layer.name}.weight"], mine)

    @pytest.mark.parametrize("step", ["allocation", "block 1"])
    def test_a_run_taken_up_again_has_the_same_levels(
        self, source: Path, tmp_path: Path, step: str, capsys: Any
    ) -> None:
        (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
        whole, cut = (runs(source, tmp_path / x, "--sparsity", "2:4") for x in "ab")
        assert whole() == 0
        with interrupted(step):
            assert cut() == 130
        capsys.readouterr()
        assert cut("--allocation-set", "bound=0.2") == 2
        assert "allocation_settings.bound was 0.0 then and is 0.2 now" in capsys.readouterr().err
        assert cut() == 0
        assert "levels are those that owl has found earlier" in capsys.readouterr().err
        same(whole.out, cut.out)
        assert cut.leftovers() == []

    def test_a_mix_is_stored_with_each_tensors_own_pattern(
        self, source: Path, tmp_path: Path
    ) -> None:
        run = runs(
            source, tmp_path, "--sparsity", "2:4", "--method", "sparsegpt", "--format", "sparse"
        )
        assert run() == 0
        layers = json.loads((run.out / "llmprune.json").read_text())["layers"]
        patterns = {layer["name"]: layer["pattern"] for layer in layers}
        held = json.loads((run.out / "sparse.json").read_text())["patterns"]
        told = list(patterns.values())
        assert held == {p: told.count(p) for p in sorted(set(told) - {None})}
        assert len(held) > 1
        dense = llmprune.load(run.out, sparse=False)
        for name, pattern in patterns.items():
            weight = dense.get_submodule(name).weight
            if pattern is not None:
                n, m = map(int, pattern.split(":"))
                assert int((weight.reshape(-1, m) != 0).sum(1).max()) <= n

    def test_magnitude_reads_data_for_owl_alone(self, source: Path, tmp_path: Path) -> None:
        run = runs(source, tmp_path, "--sparsity", "0.5", "--method", "magnitude")
        assert run() == 0
        report = json.loads((run.out / "llmprune.json").read_text())
        assert report["calibration"]["samples"] == 40
        assert report["sparsity"] == pytest.approx(0.5, abs=1e-3)
        assert len({layer["pattern"] for layer in report["layers"]}) > 1
