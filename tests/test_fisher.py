"""Fisher information against gradients of the whole model, and what pruning makes of it."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import streamed
import torch
from families import kept_for_backward, tiny
from safetensors.torch import load_file
from streamed import Runs, interrupted, same
from test_repair import IDS, llama, outputs
from torch import Tensor

import llmprune
from llmprune.allocation.fisher import ByFisher
from llmprune.cli import main
from llmprune.errors import ConfigError
from llmprune.fisher import measure
from llmprune.fisher.kept import InMemory, OnDisk
from llmprune.fisher.known import BINS, Known, Part, histogram
from llmprune.fisher.measure import known_in_memory
from llmprune.fisher.settings import TOGETHER, Fisher
from llmprune.informed import room_to_measure
from llmprune.memory import of_gradients
from llmprune.model import Matrix, blocks, matrices
from llmprune.pattern import NM, Unstructured
from llmprune.walk import Walker


def known(model: Any, ids: Tensor = IDS, **settings: Any) -> Known:
    model.eval()
    walker = Walker(model, blocks(model)[1], list(ids.split(4)))
    walker.self_check()
    with torch.no_grad():
        return known_in_memory(walker, matrices(model), Fisher(**settings), progress=False)


def by_hand(
    model: Any, ids: Tensor, group: int, seed: int
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Squared gradients by each matrix [out, in], and the metric of each block, by plain autograd."""
    some = matrices(model)
    squares = {m.name: torch.zeros(m.shape) for m in some}
    metrics: list[Tensor] = []
    passed: list[Tensor] = []

    def keep(module: Any, args: Any, out: Any) -> None:
        passed.append(out if isinstance(out, Tensor) else out[0])

    hooks = [block.register_forward_hook(keep) for block in blocks(model)[1]]
    for number in range(0, len(ids), group):
        passed.clear()
        logits = model(input_ids=ids[number : number + group], use_cache=False).logits / 2
        loss = torch.zeros(())
        for window, own in enumerate(logits):
            draw = torch.Generator().manual_seed(seed + number + window)
            drawn = torch.multinomial(own.detach().softmax(-1), 1, generator=draw)
            loss = loss - own.log_softmax(-1).gather(1, drawn).sum()
        parameters = list({id(m.parameter): m.parameter for m in some}.values())
        found = torch.autograd.grad(loss, [*parameters, *passed], allow_unused=True)
        of = {id(p): g for p, g in zip(parameters, found, strict=False)}
        for m in some:
            whole = of[id(m.parameter)]
            if whole is not None:
                part = whole if m.expert is None else whole[m.expert]
                squares[m.name] += (part.T if m.transposed else part).square()
        flat = [g.reshape(-1, g.shape[-1]) for g in found[len(parameters) :] if g is not None]
        flat = [g / g.norm(dim=1, keepdim=True) for g in flat]
        metrics = [a + g.T @ g for a, g in zip(metrics or [0.0] * len(flat), flat, strict=True)]
    for hook in hooks:
        hook.remove()
    return squares, metrics


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_it_is_that_of_the_whole_model(kind: str) -> None:
    model = llama() if kind == "llama" else tiny(kind)
    model.float().eval()
    ids = IDS % model.config.get_text_config().vocab_size
    found = known(model, ids, seed=3, temperature=2.0)
    squares, metrics = by_hand(model, ids, TOGETHER // ids.shape[1], seed=3)
    sizes = [squares[m.name].sum() for m in matrices(model)]
    factor = 0.0
    for index, metric in enumerate(metrics):
        part = found.part(index)
        assert part is not None
        torch.testing.assert_close(part.metric, metric, rtol=5e-3, atol=1e-3)
        for m in (m for m in matrices(model) if m.block == index):
            rows = squares[m.name].sum(1)
            factor = factor or float(part.rows[m.name].sum() / rows.sum())  # one for all blocks
            torch.testing.assert_close(part.rows[m.name] / factor, rows, rtol=2e-3, atol=1e-7)
            by = histogram(m.weight, rows * factor, squares[m.name].sum(0) * factor)
            assert int((by - part.counts[m.name]).abs().sum()) <= 0.05 * m.weight.numel()
            reached = bool(part.rows[m.name].any())
            assert int(part.counts[m.name].sum()) == (m.weight.numel() if reached else 0)
    assert max(sizes) > 0


def test_it_leaves_the_model_as_it_was() -> None:
    model = llama()
    before = {n: p.clone() for n, p in model.named_parameters()}
    known(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert parameter.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_half_precision(dtype: torch.dtype, method: str) -> None:
    """Of a model that is in training, with frozen weights; values that come back late have its dtype."""
    model = llama(dtype).requires_grad_(False).train()
    report = llmprune.prune(
        model, calibration=IDS, sparsity=0.6, method=method, within="matrix", fisher=True,
        allocation="fisher", repair=True, repair_settings={"epochs": 1}, progress=False,
    )  # fmt: skip
    assert model.training
    assert sum(int((m.weight != 0).sum()) for m in matrices(model)) <= sum(
        layer.kept for layer in report.layers
    )
    whole, half = (known(llama(d)).part(0) for d in (torch.float32, dtype))
    assert whole is not None
    assert half is not None
    alike = torch.cosine_similarity(whole.metric.flatten(), half.metric.flatten(), dim=0)
    assert float(alike) > 0.95


def test_blocks_below_the_first_chosen_one_need_no_gradient(monkeypatch: Any) -> None:
    model = llama()
    told: list[str] = []
    chosen = [m for m in matrices(model) if m.block == 1]
    walker = Walker(model.eval(), blocks(model)[1], list(IDS.split(4)))
    parts: dict[int, Part] = {}
    run = measure.Measuring(
        walker, chosen, Fisher(), lambda index: nullcontext(), parts.__setitem__,
        lambda block, depth, doing: told.append(f"{block} {doing.split()[0]}"), InMemory(),
    )  # fmt: skip
    run.run()
    assert len(told) == run.steps
    assert [t for t in dict.fromkeys(told) if "backward" in t] == ["2 backward", "1 backward"]
    whole = known(model).part(1)
    assert whole is not None
    assert list(parts) == [1]
    assert torch.equal(parts[1].metric, whole.metric)
    for name, rows in whole.rows.items():
        assert torch.equal(parts[1].rows[name], rows)


def test_what_lies_outside_of_the_blocks_is_not_weighed() -> None:
    models = llama(), llama()
    for model, fisher in zip(models, (False, True), strict=True):
        llmprune.prune(
            model, calibration=IDS, sparsity=0.6, within="matrix", fisher=fisher, targets=["lm_head"],
            progress=False,
        )  # fmt: skip
    assert torch.equal(models[0].lm_head.weight, models[1].lm_head.weight)


def test_what_no_gradient_reaches_gets_the_share_asked_for() -> None:
    model = tiny("mixtral").eval()
    for block in blocks(model)[1]:
        with torch.no_grad():  # the last two experts are never chosen
            block.mlp.gate.weight[-2:] = 0
            block.mlp.gate.weight[:-2] = 1
    found = known(model, IDS.abs() % 60)
    missed = [m for m in matrices(model) if found.scale(m) is None]
    assert missed
    for m in missed:
        part = found.part(m.block or 0)
        assert part is not None
        assert int(part.counts[m.name].sum()) == 0
    some = histogram(torch.randn(4, 8), torch.ones(4), torch.ones(8))
    nothing = torch.zeros_like(some)
    shares = ByFisher(strength=1.0).shares({"a": some, "b": nothing}, Unstructured(0.6))
    assert shares == pytest.approx({"a": 0.6, "b": 0.6}, abs=0.02)
    assert ByFisher().shares({"b": nothing}, Unstructured(0.6)) == {"b": 0.6}


def test_windows_are_spread_over_all(monkeypatch: Any) -> None:
    def first(logits: Tensor, seeds: Any) -> Tensor:
        p = logits.softmax(-1)
        p[..., 0] -= 1
        return p

    monkeypatch.setattr(measure, "_of_drawn", first)
    assert Fisher(tokens=64).windows(24, 16) == [0, 6, 12, 18]
    assert Fisher(tokens=1).windows(24, 16) == [0]
    assert Fisher().windows(3, 16) == [0, 1, 2]
    assert Fisher(share=0.25).windows(24, 16) == [0, 4, 8, 12, 16, 20]
    assert Fisher(share=0.25, tokens=32).windows(24, 16) == [0, 12]
    assert Fisher(share=0.25).windows(3, 16) == [0]
    part = known(llama(), tokens=64).part(0)
    same_windows = known(llama(), IDS[[0, 6, 12, 18]]).part(0)
    assert part is not None
    assert same_windows is not None
    shape = [p.metric / p.metric.trace() for p in (part, same_windows)]
    torch.testing.assert_close(*shape)


def scaled(parts: dict[int, Part], **settings: Any) -> Known:
    return Known(Fisher(**settings), parts.get)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_rows_that_weigh_nothing_lose_first(method: str, monkeypatch: Any) -> None:
    name = "model.layers.0.mlp.up_proj"
    light = torch.arange(48) % 2 == 0

    def measured(walker: Any, chosen: Any, settings: Any, progress: bool) -> Known:
        rows = {m.name: torch.ones(m.shape[0]) for m in chosen if m.block == 0}
        rows[name] = torch.where(light, 0.0, 1.0)
        return scaled({0: Part(rows, {}, torch.eye(32))})

    monkeypatch.setattr("llmprune.run.known_in_memory", measured)
    counts = {}
    for fisher in (False, True):
        model = llama()
        report = llmprune.prune(
            model, calibration=IDS, sparsity=0.5, within="matrix", method=method, fisher=fisher,
            progress=False,
        )  # fmt: skip
        kept = (model.get_submodule(name).weight != 0).float().mean(1)
        counts[fisher] = float(kept[light].mean()), float(kept[~light].mean())
        assert [layer.kept for layer in report.layers] == [
            m.weight.numel() - m.weight.numel() // 2 for m in matrices(model)
        ]
        if method in ("magnitude", "wanda"):
            dense = dict(llama().named_parameters())[f"{name}.weight"]
            mine = model.get_submodule(name).weight
            assert torch.equal(mine[mine != 0], dense[mine != 0])
    assert counts[False][0] > 0.3
    assert counts[True][0] < 0.1
    assert counts[True][1] > 0.9


@pytest.mark.parametrize(
    ("settings", "weighed"),
    [
        ({"within": "matrix"}, "rows that compete"),
        ({"repair": True}, "the error that a repair lowers"),
        (
            {"within": "matrix", "repair": True},
            "rows that compete and the error that a repair lowers",
        ),
    ],
)
def test_the_report_says_what_was_weighed(settings: Any, weighed: str) -> None:
    more = {"repair_settings": {"epochs": 0.1}} if "repair" in settings else {}
    report = llmprune.prune(
        llama(), calibration=IDS, sparsity=0.5, fisher=True, progress=False, **settings, **more
    )
    assert f"weighed by Fisher information: {weighed}" in report.table().splitlines()
    assert report.seconds["fisher"] > 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss", "deepseek_v3"])
def test_the_memory_that_is_planned_for_is_enough(family: str) -> None:
    """What autograd keeps, as it tells it, gradients, squares of the largest matrix, and the metric."""
    model = tiny(family)
    here = [m for m in matrices(model) if m.block == 1]
    walker = Walker(model, blocks(model)[1], [IDS])
    with torch.no_grad():
        hidden = walker.run(0, 0, None)
    out, kept = kept_for_backward(model, lambda: walker.run(1, 0, hidden.requires_grad_(True)))
    parameters = list({id(m.parameter): m.parameter for m in here}.values())
    found = torch.autograd.grad(out.sum(), parameters, allow_unused=True)
    squares = max(8 * m.weight.numel() for m in here)
    held = sum(g.nbytes for g in found if g is not None) + squares + 8 * out.shape[-1] ** 2
    assert kept + held <= of_gradients(blocks(model)[1][1], here, IDS.numel())


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_rows_by_themselves_do_not_change(pattern: str) -> None:
    """Then nothing is measured either, and the report says so."""
    models = [llama(), llama()]
    for fisher, model in enumerate(models):
        report = llmprune.prune(
            model, calibration=IDS, sparsity=pattern, fisher=bool(fisher), method="wanda", progress=False
        )  # fmt: skip
    assert "fisher" not in report.seconds
    assert report.recipe["fisher_settings"] == {}
    assert "Fisher information: nothing, as no rows compete and no repair uses it" in report.table()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_repair_lowers_the_error_that_counts() -> None:
    """With a metric that sees one feature alone, the error of that feature falls further than without."""
    dense = outputs(llama(), IDS)[0]
    errors = []
    metric = torch.zeros(32, 32)
    metric[5, 5] = 1
    for given in (None, metric):
        model = llama()
        walker = Walker(model, blocks(model)[1], list(IDS.split(4)))
        first = [m for m in matrices(model) if m.block == 0]
        from llmprune.prune_matrix import Task
        from llmprune.refine.settings import Repair
        from llmprune.sweep import prune_blocks

        task = Task(llmprune.methods.build("wanda"), Unstructured(0.6, "row"), repair=Repair())
        if given is not None:
            known = scaled({0: Part({}, {}, given)}, mix=1.0)
            task = Task(task.method, task.pattern, repair=Repair(), fisher=known)
        walker.self_check()
        with torch.no_grad():
            model.eval()
            list(prune_blocks(walker, first, task, lambda *args: None))
        errors.append((outputs(model, IDS)[0] - dense)[..., 5].square().mean().item())
    assert errors[1] < 0.8 * errors[0]


def test_the_metric_is_mixed_with_that_of_all_alike() -> None:
    torch.manual_seed(0)
    g = torch.randn(50, 6)
    part = Part({}, {}, g.T @ g)
    found = scaled({2: part}, mix=0.75).metric(2)
    assert found is not None
    wanted = 0.75 * part.metric / part.metric.diagonal().mean() + 0.25 * torch.eye(6)
    torch.testing.assert_close(found, wanted)
    assert float(found.diagonal().mean()) == pytest.approx(1)
    assert scaled({2: part}, mix=0.0).metric(2) is None
    assert scaled({2: part}).metric(1) is None
    assert scaled({2: Part({}, {}, torch.zeros(6, 6))}).metric(2) is None


class TestAllocation:
    def test_shares_are_those_of_one_threshold(self) -> None:
        """Against a sort of all saliencies, for a strength of one."""
        torch.manual_seed(0)
        weights = [torch.randn(30, 40), 0.1 * torch.randn(50, 40), 3 * torch.randn(20, 40)]
        rows = [torch.rand(len(w)) for w in weights]
        columns = torch.rand(40)
        values = [
            (w.square() * r[:, None] * columns / r.sum()).flatten()
            for w, r in zip(weights, rows, strict=True)
        ]
        counts = {
            str(i): histogram(w, r, columns)
            for i, (w, r) in enumerate(zip(weights, rows, strict=True))
        }
        limit = torch.cat(values).sort().values[int(0.6 * sum(len(v) for v in values))]
        wanted = [float((v < limit).float().mean()) for v in values]
        found = ByFisher(strength=1.0).shares(counts, Unstructured(0.6))
        assert list(found.values()) == pytest.approx(wanted, abs=0.03)
        half = ByFisher(strength=0.5).shares(counts, Unstructured(0.6))
        assert list(half.values()) == pytest.approx([0.5 * w + 0.3 for w in wanted], abs=0.015)

    def test_weights_without_any_effect_go_first(self) -> None:
        nothing = histogram(torch.zeros(4, 8), torch.ones(4), torch.ones(8))
        assert int(nothing[0]) == 32
        assert nothing.shape == (BINS,)
        some = histogram(torch.ones(4, 8), torch.ones(4), torch.ones(8))
        found = ByFisher(strength=1.0).shares({"a": nothing, "b": some}, NM(2, 4))
        assert found == pytest.approx({"a": 1.0, "b": 0.0})

    @pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
    @pytest.mark.parametrize("sparsity", [0.6, "4:8"])
    @pytest.mark.parametrize("grain", ["matrix", "block"])
    def test_the_total_is_uniforms(self, method: str, sparsity: Any, grain: str) -> None:
        kept = []
        for settings in ({}, {"allocation": "fisher", "allocation_settings": {"grain": grain}}):
            model = llama()
            report = llmprune.prune(
                model, calibration=IDS, sparsity=sparsity, method=method, progress=False, **settings
            )
            kept.append(sum(layer.kept for layer in report.layers))
            assert kept[-1] == sum(int((m.weight != 0).sum()) for m in matrices(model))
        assert kept[0] == kept[1]
        shares = report.allocation["measured"]
        if (sparsity, grain) != ("4:8", "block"):  # whose shares lie within one level here
            assert len({layer.sparsity for layer in report.layers}) > 1
        assert set(shares) == (
            {m.name for m in matrices(llama())}
            if grain == "matrix"
            else {f"block {i}" for i in range(3)}
        )

    def test_it_measures_for_itself_and_weighs_nothing_else(self) -> None:
        report = llmprune.prune(
            llama(), calibration=IDS, sparsity=0.6, allocation="fisher", fisher_settings={"tokens": 64},
            progress=False,
        )  # fmt: skip
        assert report.recipe["fisher"] is False
        told = report.recipe["fisher_settings"]
        assert (told["tokens"], told["rows"], told["mix"]) == (64, False, 0.0)
        assert "fisher" in report.seconds


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"tokens": 0}, "tokens of fisher is a number from 1 on, got 0"),
            ({"mix": 2}, "mix of fisher is a share from 0 to 1, got 2"),
            ({"temperature": 0}, "temperature of fisher is a number from 0.1 to 100, got 0"),
            ({"seed": -1}, "seed of fisher is a number from 0 on"),
            ({"mixx": 1}, "fisher has no setting 'mixx'"),
        ],
    )
    def test_settings(self, settings: Any, words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            llmprune.PruneConfig(fisher=True, fisher_settings=settings)

    def test_settings_for_nothing(self) -> None:
        with pytest.raises(ConfigError, match="add --fisher"):
            llmprune.PruneConfig(fisher_settings={"mix": 0.5})

    @pytest.mark.parametrize("settings", [{"strength": 0}, {"strength": 2}, {"grain": "row"}])
    def test_allocation(self, settings: Any) -> None:
        with pytest.raises(ConfigError, match=next(iter(settings))):
            llmprune.PruneConfig(allocation="fisher", allocation_settings=settings)

    def test_a_model_that_predicts_nothing(self) -> None:
        model = llama()
        model.lm_head.weight.data[3] = torch.nan
        with pytest.raises(llmprune.LLMPruneError, match=r"dense model gives NaN or Inf .*--dtype"):
            known(model)

    @pytest.mark.parametrize("what", ["fisher", "repair"])
    def test_weights_that_autograd_does_not_take(self, what: str) -> None:
        with torch.inference_mode():
            model = llama()
        with pytest.raises(ConfigError, match=f"made under torch.inference_mode.*--{what}"):
            llmprune.prune(model, calibration=IDS, progress=False, within="matrix", **{what: True})

    def test_blocks_that_pass_nothing_on(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(
            measure, "_gradients", lambda walker, out, by, outer: [None for _ in by]
        )
        with pytest.raises(llmprune.LLMPruneError, match=r"no gradient goes back through it"):
            known(llama())

    def test_nan_is_named(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(
            measure, "_of_drawn", lambda logits, seed: torch.full_like(logits, torch.nan)
        )
        with pytest.raises(llmprune.LLMPruneError, match=r"gradient at block 2 of Llama.* is NaN"):
            known(llama())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    streamed.save_llama(folder / "model")
    streamed.write_text(folder / "words.txt")
    return folder


FEW = (
    "--fisher",
    "--allocation",
    "fisher",
    "--method",
    "sparsegpt",
    "--repair",
    "--repair-set",
    "epochs=1",
)


def runs(source: Path, folder: Path, *options: object) -> Runs:
    more = ["--sparsity", "0.6", "--no-eval", *FEW, *options]
    return Runs(folder, source / "model", source / "words.txt", more)


class TestOnDisk:
    @pytest.mark.parametrize("tied", [False, True])
    def test_both_routes_give_the_same(self, source: Path, tmp_path: Path, tied: bool) -> None:
        """Of a tied embedding few rows are used on the way in, and all of them at the head."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.manual_seed(0)
        place = streamed.save_llama(tmp_path / "model", tie_word_embeddings=tied)
        text = tmp_path / "few.txt"
        text.write_text(" ".join(streamed.WORDS[i * i % 17] for i in range(4000)))
        run = runs(source, tmp_path, "--model", place, "--calibration", text)
        assert run() == 0
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        report = llmprune.prune(
            model, AutoTokenizer.from_pretrained(place), calibration=str(text), samples=40, sparsity=0.6,
            method="sparsegpt", fisher=True, allocation="fisher", repair=True,
            repair_settings={"epochs": 1}, progress=False,
        )  # fmt: skip
        written = json.loads((run.out / "llmprune.json").read_text())
        assert [x["kept"] for x in written["layers"]] == [x.kept for x in report.layers]
        assert written["allocation"] == report.allocation
        assert "fisher" in written["seconds"]
        stored = {k: v for f in run.out.glob("*.safetensors") for k, v in load_file(f).items()}
        for layer in report.layers:
            mine = model.get_submodule(layer.name).weight.detach()
            assert torch.equal(
                stored[f"{layer.name}.weight"], mine.to(stored[f"{layer.name}.weight"].dtype)
            )
        assert sorted(run.leftovers()) == ["few.txt", "model"]

    def test_the_room_that_is_planned_for_is_enough(
        self, source: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
    ) -> None:
        """And not much more: files have headers."""
        planned: list[tuple[int, int]] = []
        found: list[tuple[int, int]] = []

        def plan(*args: Any) -> tuple[int, int]:
            planned.append(room_to_measure(*args))
            return planned[0]

        def size(folder: Path) -> int:
            return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))

        def forget(self: OnDisk, what: str) -> None:
            found.append((size(self.folder), size(self.folder.parent / "fisher")))
            forgets(self, what)

        forgets = OnDisk.forget
        monkeypatch.setattr(OnDisk, "forget", forget)
        monkeypatch.setattr("llmprune.to_disk.room_to_measure", plan)
        run = runs(source, tmp_path)
        usage = shutil.disk_usage(tmp_path)
        with monkeypatch.context() as full:
            full.setattr(shutil, "disk_usage", lambda path: usage._replace(free=300_000))
            assert run() == 2
        assert "for hidden states while it is made" in capsys.readouterr().err
        assert run() == 0
        first, stays = planned[-1]
        most = [max(sizes) for sizes in zip(*found, strict=True)]
        assert 0.9 * first <= most[0] <= 1.05 * first
        assert 0.9 * stays * 3 / 4 <= most[1] <= 1.05 * stays  # the last block follows

    def test_the_least_memory_counts_it(self, source: Path, tmp_path: Path, capsys: Any) -> None:
        assert runs(source, tmp_path)("--max-memory", "1GB") == 2
        assert "with sparsegpt and a repair and Fisher information: " in capsys.readouterr().err

    def test_a_run_that_is_killed_while_it_measures(self, source: Path, tmp_path: Path) -> None:
        """Half of what it has written is not used, and goes."""
        whole, cut = (runs(source, tmp_path / x) for x in "ab")
        for name in "ab":
            (tmp_path / name).mkdir()
        assert whole() == 0
        with interrupted("fisher"):
            assert cut() == 130
        journal = cut.unfinished / "journal.jsonl"
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join(line for line in lines if b'"step": "fisher"' not in line))
        (cut.unfinished / "fisher-of-a-killed-run").mkdir()
        (cut.unfinished / "fisher" / "block-00002.safetensors").write_bytes(b"half")
        assert cut() == 0
        same(whole.out, cut.out)
        assert cut.leftovers() == []

    @pytest.mark.parametrize("step", ["fisher", "block 1"])
    @pytest.mark.parametrize("damaged", [False, True])
    def test_a_run_taken_up_again(
        self, source: Path, tmp_path: Path, step: str, damaged: bool, capsys: Any
    ) -> None:
        (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
        whole, cut = (runs(source, tmp_path / x) for x in "ab")
        assert whole() == 0
        with interrupted(step):
            assert cut() == 130
        capsys.readouterr()
        assert cut("--fisher-set", "mix=0.7") == 2
        assert "fisher_settings.mix was 0.5 then and is 0.7 now" in capsys.readouterr().err
        if damaged:
            file = next(tmp_path.glob("b/.*/fisher/block-00000.safetensors"))
            file.write_bytes(file.read_bytes()[:-1])
        assert cut() == 0
        said = capsys.readouterr().err
        assert ("Fisher information is what was measured earlier" in said) is not damaged
        same(whole.out, cut.out)
        assert cut.leftovers() == []


def test_the_command_line_teaches_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["allocations"]) == 0
    said = capsys.readouterr().out
    assert "fisher: By one threshold over all weights" in said
    assert "--allocation-set strength=" in said


def test_every_matrix_of_a_block_is_known() -> None:
    model = llama()
    found = known(model)
    few: list[Matrix] = [m for m in matrices(model) if m.block == 1]
    part = found.part(1)
    assert part is not None
    assert set(part.rows) == {m.name for m in few} == set(part.counts)
    scale = found.scale(few[0])
    assert scale is not None
    assert scale.shape == (few[0].shape[0], 1)
    assert found.part(3) is None
