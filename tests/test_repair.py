"""Block repair against plain Adam on a copy of the block, and what it must leave alone."""

from __future__ import annotations

import copy
import importlib
import json
import math
import re
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from families import kept_for_backward, tiny
from streamed import Runs, save_llama, write_text
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import llmprune
from llmprune.errors import ConfigError, LLMPruneError
from llmprune.matrix import Matrix
from llmprune.memory import of_repair
from llmprune.model import blocks, matrices
from llmprune.refine import settings
from llmprune.refine.settings import Repair
from llmprune.refine.tuned import Tuned, repeatable
from llmprune.report import LayerReport, Report
from llmprune.run import PruneConfig, prune_with
from llmprune.walk import Walker

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
RANDOM = torch.Generator().manual_seed(7)
IDS = torch.randint(0, 64, (24, 16), generator=RANDOM)
FRESH = torch.randint(0, 64, (16, 16), generator=RANDOM)  # windows that no run has seen


def llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).to(dtype).eval()


def pruned(model: Any, **recipe: Any) -> tuple[Report, dict[str, Tensor]]:
    """Prune in place; the report and every mask, by the name of the matrix."""
    masks: dict[str, Tensor] = {}

    def see(matrix: Matrix, report: LayerReport, keep: Tensor) -> None:
        masks[matrix.name] = keep.clone()

    given = {"sparsity": 0.6, "calibration": IDS, "batch_size": 4, **recipe}
    return prune_with(PruneConfig(**given), model, progress=False, on_mask=see), masks


@torch.no_grad()
def outputs(model: Any, ids: Tensor) -> list[Tensor]:
    """What each block gives in a plain forward."""
    found: list[Tensor] = []
    hooks = [
        block.register_forward_hook(
            lambda module, args, out: found.append(out if isinstance(out, Tensor) else out[0])
        )
        for block in blocks(model)[1]
    ]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def errors(model: Any, dense: Any) -> list[float]:
    """Squared error of each block's output on fresh windows, as a share."""
    pairs = zip(outputs(model, FRESH), outputs(dense, FRESH), strict=True)
    return [float((a - b).float().square().sum() / b.float().square().sum()) for a, b in pairs]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("sparsity", [0.6, "2:4"])
def test_outputs_on_windows_that_it_never_saw_come_nearer(
    method: str, sparsity: float | str
) -> None:
    dense, plain, repaired = llama(), llama(), llama()
    pruned(plain, method=method, sparsity=sparsity)
    few = {"rate": 0.1}  # there are 352 tokens to learn from
    report, masks = pruned(
        repaired, method=method, sparsity=sparsity, repair=True, repair_settings=few
    )
    before, after = errors(plain, dense), errors(repaired, dense)
    assert all(a < 0.95 * b for a, b in zip(after, before, strict=True)), (before, after)
    assert [block.block for block in report.repair] == [0, 1, 2]
    for block in report.repair:
        assert block.held_out_after < block.held_out_before
        assert block.after < block.before
        assert 1 <= block.best_epoch <= block.epochs <= Repair().epochs
        assert (block.windows, block.held_out_windows) == (22, 2)
    for layer, matrix in zip(report.layers, matrices(repaired), strict=True):
        assert layer.name == matrix.name
        assert not (matrix.weight != 0)[~masks[layer.name]].any()
        assert int((matrix.weight != 0).sum()) == layer.kept == int(masks[layer.name].sum())


def test_it_is_adam_on_the_block_alone() -> None:
    """The last block, two epochs: torch's own Adam on a copy, run by hand on the two streams."""
    how = Repair(epochs=2, tokens=70, held_out=0.125, rate=0.05, seed=3)
    dense, plain, repaired = llama(), llama(), llama()
    only = {"targets": ["re:model.layers.2.*"], "method": "wanda"}
    _, masks = pruned(plain, **only)
    report, _ = pruned(repaired, **only, repair=True, repair_settings=how.as_dict())
    goal = outputs(dense, IDS)[2]

    learnt = [n for n in range(24) if n not in (4, 12, 20)]
    held = [4, 12, 20]
    lost = min(1 / 3, math.sqrt(fmean(layer.output_error or 0 for layer in report.layers)))
    first = float((outputs(plain, IDS)[2] - goal)[held].square().mean())
    copy_ = copy.deepcopy(plain)
    named = dict(copy_.model.layers[2].named_parameters())
    keeps = {f"{name[len('model.layers.2.') :]}.weight": m for name, m in masks.items()}
    groups = []
    for name, p in named.items():
        kept, pace = (p.detach()[keeps[name]], 1) if name in keeps else (p.detach(), 0.1)
        groups.append({"params": [p], "size": pace * float(kept.square().mean().sqrt())})
    adam = torch.optim.Adam(groups, betas=(0.9, 0.95))
    order = torch.Generator().manual_seed(3 + 2)
    number, whole = 0, 2 * 6
    for _ in range(2):
        mixed = [learnt[i] for i in torch.randperm(21, generator=order).tolist()]
        for start in range(0, 21, 4):
            some = mixed[start : start + 4]
            caught: list[Tensor] = []
            hook = copy_.model.layers[2].register_forward_hook(
                lambda module, args, out, caught=caught: caught.append(out)
            )
            copy_(input_ids=IDS[some])
            hook.remove()
            size = math.sqrt(
                len(some) * 16 * first
            )  # it shows where gradients are near Adam's epsilon
            loss = (caught[0] - goal[some]).square().sum() / (2 * size)
            adam.zero_grad()
            loss.backward()
            fall = (1 + torch.cos(torch.tensor(torch.pi * number / whole))) / 2
            number += 1
            for group in adam.param_groups:
                group["lr"] = float(0.05 * lost * fall * group["size"])
            for name, keep in keeps.items():
                named[name].grad *= keep
            adam.step()
    assert report.repair[0].best_epoch == 2
    for name, parameter in repaired.model.layers[2].named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-3, atol=1e-6)


def test_what_is_not_repaired_keeps_every_bit() -> None:
    dense, model = llama(), llama()
    pruned(model, targets=["re:model.layers.1.*"], ignore=["down_proj"], repair=True)
    before = dict(dense.named_parameters())
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    own = {n for n in before if n.startswith("model.layers.1.") and "down_proj" not in n}
    assert changed == own


def test_weights_alone_may_be_tuned() -> None:
    dense, model = llama(), llama()
    pruned(model, repair=True, repair_settings={"tune": "weights"})
    before = dict(dense.named_parameters())
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if n.endswith("proj.weight")}


def test_the_model_is_handed_back_as_it_was() -> None:
    model = llama().train()
    frozen = model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    state = torch.random.get_rng_state()
    pruned(model, repair=True)
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]


def test_half_precision_is_tuned_in_float32() -> None:
    """Steps far smaller than a weight's last bit add up; what is left is rounded once."""
    dense, plain = llama(torch.bfloat16), llama(torch.bfloat16)
    small, usual = llama(torch.bfloat16), llama(torch.bfloat16)
    pruned(plain, method="sparsegpt")
    pruned(small, method="sparsegpt", repair=True, repair_settings={"rate": 2e-3, "epochs": 8})
    _, masks = pruned(usual, method="sparsegpt", repair=True)
    first, second = (dict(m.named_parameters()) for m in (plain, small))
    name = "model.layers.0.mlp.up_proj.weight"
    assert first[name].dtype == second[name].dtype == torch.bfloat16
    moved = (first[name] != second[name])[first[name] != 0]  # block 0: the same mask
    assert moved.float().mean() > 0.05
    assert errors(usual, dense)[-1] < errors(small, dense)[-1] < errors(plain, dense)[-1]
    for matrix in matrices(usual):
        assert not (matrix.weight != 0)[~masks[matrix.name]].any()


def test_float16_neither_overflows_nor_vanishes() -> None:
    dense, plain, model = (llama(torch.float16) for _ in range(3))
    pruned(plain)
    pruned(model, repair=True)
    assert errors(model, dense)[-1] < 0.95 * errors(plain, dense)[-1]


def test_what_sparsegpt_holds_back_is_tuned_and_stays() -> None:
    """It zeroes its last weights until the block has passed on; a repair works on the final ones."""
    model = llama()
    _, masks = pruned(model, method="sparsegpt", repair=True)
    for matrix in matrices(model):
        assert torch.equal(matrix.weight != 0, masks[matrix.name])


def test_the_seed_decides() -> None:
    def run(seed: int) -> dict[str, Tensor]:
        model = llama()
        pruned(model, repair=True, repair_settings={"seed": seed})
        return dict(model.state_dict())

    one, again, other = run(0), run(0), run(1)
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)


def test_batch_size_changes_rounding_only() -> None:
    models = []
    for size in (1, 5, 24):
        models.append(llama())
        pruned(models[-1], batch_size=size, sums="float64", repair=True)
    for model in models[1:]:
        for a, b in zip(models[0].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-2, atol=1e-4)


def test_half_an_epoch_is_half_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    step = Tuned.step
    monkeypatch.setattr(Tuned, "step", lambda self, rate, n: taken.append(n) or step(self, rate, n))
    short = {"epochs": 0.5, "tokens": 32, "tune": "weights"}
    report, _ = pruned(llama(), repair=True, repair_settings=short)
    assert max(taken) == 6  # of 22 windows, two at a time
    assert [block.epochs for block in report.repair] == [1, 1, 1]


def test_what_makes_a_gpu_repeatable_is_put_back() -> None:
    """The switches are torch's own and need no GPU; what they do there is for one to show."""
    assert not torch.are_deterministic_algorithms_enabled()
    with repeatable(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()
    with repeatable(torch.device("cuda")):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_a_limit_of_time_ends_it() -> None:
    report, _ = pruned(llama(), repair=True, repair_settings={"seconds": 1e-3, "epochs": 500})
    assert [block.epochs for block in report.repair] == [1, 1, 1]


def test_where_held_out_windows_get_worse_the_block_stays_as_it_was_pruned() -> None:
    plain, model = llama(), llama()
    pruned(plain)
    wild = {"rate": 10.0, "epochs": 5, "patience": 1}
    report, _ = pruned(model, repair=True, repair_settings=wild)
    assert [block.best_epoch for block in report.repair] == [0, 0, 0]
    assert [block.epochs for block in report.repair] == [1, 1, 1]
    for one, two in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_one_window_is_enough() -> None:
    report, _ = pruned(llama(), calibration=IDS[:1], repair=True)
    assert (report.repair[0].windows, report.repair[0].held_out_windows) == (1, 1)


@pytest.mark.parametrize(
    "family",
    ["gpt2", "qwen3", "mixtral", "qwen2_moe", "gpt_oss", "gemma3_text", "opt", "bloom", "xlnet"],
)
def test_families(family: str) -> None:
    """Conv1D, q and k norms, experts fused and shared, sinks, biases, tuple outputs, positions first."""
    dense, plain, model = tiny(family), tiny(family), tiny(family)
    recipe = {"method": "wanda", "sparsity": "2:4"}
    _, masks = pruned(plain, **recipe)
    report, again = pruned(model, **recipe, repair=True)
    assert errors(model, dense)[-1] < errors(plain, dense)[-1]
    assert [block.block for block in report.repair] == list(range(len(blocks(model)[1])))
    for matrix in matrices(model):
        assert not (matrix.weight != 0)[~again[matrix.name]].any()
    first = blocks(model)[0] + ".0."
    assert all(torch.equal(masks[n], again[n]) for n in masks if n.startswith(first))
    routers = [n for n, _ in model.named_parameters() if re.search(r"\.(gate|router)\.", n)]
    before, after = dict(dense.named_parameters()), dict(model.named_parameters())
    assert all(torch.equal(before[n], after[n]) for n in routers)


def test_positions_may_come_before_windows() -> None:
    """As many windows at once as a window has tokens: the shape does not tell which is which."""
    models = [tiny("xlnet"), tiny("xlnet")]
    for size, model in zip((3, 16), models, strict=True):
        report, _ = pruned(
            model, batch_size=size, calibration=IDS[:16], sums="float64", repair=True
        )
        assert [block.epochs for block in report.repair] == [4, 4, 4]
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-2, atol=1e-4)


def test_blocks_that_mix_windows_are_refused() -> None:
    model = llama()
    for block in model.model.layers:
        inner = block.forward

        def flat(x: Tensor, *args: Any, inner: Any = inner, **kwargs: Any) -> Tensor:
            out: Tensor = inner(x.view(-1, 16, 32), *args, **kwargs)
            return out.reshape(-1, 32)

        block.forward = flat
    norm = model.model.norm.forward
    model.model.norm.forward = lambda x: norm(x.view(-1, 16, 32))
    pruned(model)  # a plain method takes them
    with pytest.raises(ConfigError, match="do not keep windows apart"):
        pruned(model, repair=True)


def test_an_expert_that_no_token_reaches_is_left_as_it_was_pruned() -> None:
    plain, model = tiny("mixtral"), tiny("mixtral")
    for each in (plain, model):
        with torch.no_grad():
            each.model.layers[1].mlp.gate.weight[3:] = 0  # of eight experts two are chosen
            each.model.layers[1].mlp.gate.weight[:3] *= 100
    recipe = {"method": "wanda", "targets": ["re:model.layers.1.mlp.experts.*"]}
    pruned(plain, **recipe)
    report, _ = pruned(model, **recipe, repair=True)
    reached = {layer.expert: layer.tokens > 0 for layer in report.layers}
    assert set(reached.values()) == {True, False}
    for one, two in zip(matrices(plain), matrices(model), strict=True):
        if ".1.mlp.experts." in one.name:
            assert torch.equal(one.weight, two.weight) != reached[one.expert]


def test_a_matrix_that_two_blocks_share_is_left() -> None:
    plain, model = llama(), llama()
    for each in (plain, model):
        each.model.layers[2].mlp.up_proj = each.model.layers[0].mlp.up_proj
    pruned(plain)
    pruned(model, repair=True)
    one, two = (m.model.layers[0].mlp for m in (plain, model))
    assert torch.equal(one.up_proj.weight, two.up_proj.weight)
    assert not torch.equal(one.gate_proj.weight, two.gate_proj.weight)


def test_a_family_that_keeps_state_outside_its_blocks_is_refused_untouched() -> None:
    model = tiny("gemma3n_text")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ConfigError, match="keeps state outside its blocks, so none can be repaired"
    ):
        pruned(model, sparsity="2:4", repair=True)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_block_without_gradients_is_named() -> None:
    model = llama()
    block = model.model.layers[1]
    inner = block.mlp.forward
    block.mlp.forward = lambda x: torch.no_grad()(inner)(x)
    block.self_attn.forward = torch.no_grad()(block.self_attn.forward)
    with pytest.raises(LLMPruneError, match=r"block 1 of LlamaForCausalLM gives no gradient"):
        pruned(model, repair=True, repair_settings={"tune": "weights"})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("epoch", 3, "repair has no setting 'epoch': did you mean 'epochs'"),
        ("epochs", 0, "setting epochs of repair is a number above 0, got 0"),
        ("epochs", "nan", "setting epochs of repair is a number above 0, got nan"),
        ("epochs", "two", "setting epochs of repair takes a number, got 'two'"),
        ("tokens", -1, "setting tokens of repair is a number from 1 on, got -1"),
        ("rate", 0, "setting rate of repair is a number above 0 and up to 10, got 0"),
        ("rate", "nan", "setting rate of repair is a number above 0 and up to 10, got nan"),
        ("held_out", 1, "setting held_out of repair is a share of the windows between 0 and 1"),
        ("seconds", -1, "setting seconds of repair is a number from 0 on, got -1"),
        ("seconds", "inf", "setting seconds of repair is a number from 0 on, got inf"),
        ("patience", -1, "setting patience of repair is a number from 0 on, got -1"),
        ("tune", "all", "setting tune of repair is weights or vectors, got 'all'"),
    ],
)
def test_wrong_settings(key: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        PruneConfig(repair=True, repair_settings={key: value})


def test_settings_without_a_repair_are_refused() -> None:
    with pytest.raises(ConfigError, match="epochs is of a repair: add --repair"):
        PruneConfig(repair_settings={"epochs": 3})


def test_settings_are_in_the_recipe_as_typed_or_by_default() -> None:
    assert PruneConfig().recipe()["repair"] is False
    recipe = PruneConfig(repair=True, repair_settings={"epochs": "3"}).recipe()
    assert recipe["repair_settings"] == {**Repair().as_dict(), "epochs": 3}
    assert settings.build(recipe["repair_settings"]) == Repair(epochs=3)


@pytest.mark.parametrize("windows", [2, 3, 16, 128])
def test_held_out_windows_are_spread(windows: int) -> None:
    learnt, held = Repair().parted(windows)
    assert sorted([*learnt, *held]) == list(range(windows))
    assert len(held) == max(1, windows // 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model") / "llama", torch.float32)


def test_block_by_block_from_disk_it_is_the_same(model: Path, tmp_path: Path) -> None:
    """Norms are written too, and nothing else than in memory; the report tells of every block."""
    text = write_text(tmp_path / "words.txt")
    options = (
        "--method",
        "sparsegpt",
        "--sparsity",
        "0.5",
        "--repair",
        "--no-eval",
        "--seqlen",
        "16",
    )
    (tmp_path / "runs").mkdir()
    runs = Runs(tmp_path / "runs", model, text, options)
    assert runs() == 0
    memory = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    report = llmprune.prune(
        memory, tokenizer, calibration=str(text), samples=40, seqlen=16, method="sparsegpt",
        repair=True, progress=False,
    )  # fmt: skip
    written = AutoModelForCausalLM.from_pretrained(runs.out)
    for (name, one), (_, two) in zip(
        memory.named_parameters(), written.named_parameters(), strict=True
    ):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6, msg=name)
    told = json.loads((runs.out / "llmprune.json").read_text())
    assert [b["block"] for b in told["repair"]] == [0, 1, 2, 3]
    assert told["recipe"]["repair_settings"] == Repair().as_dict()
    for one, two in zip(report.repair, told["repair"], strict=True):
        assert one.held_out_after == pytest.approx(two["held_out_after"], rel=1e-3)
    assert "repaired: 4 blocks" in report.table()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss", "deepseek_v3"])
def test_the_memory_that_is_planned_for_is_enough(family: str) -> None:
    """What a backward pass keeps, as autograd tells it, and everything a repair holds of a block."""
    model = tiny(family)
    block = blocks(model)[1][1]
    walker = Walker(model, blocks(model)[1], [IDS])
    with torch.no_grad():
        hidden = walker.run(0, 0, None)
    total, kept = kept_for_backward(model, lambda: walker.run(1, 0, hidden).sum())
    total.backward()
    states = 0
    for parameter in block.parameters():
        one = Tuned.of(parameter, torch.ones_like(parameter, dtype=torch.bool))
        held = [one.gradient, one.mean, one.square, one.best, one.keep, parameter.grad]
        states += sum(t.nbytes for t in held if t is not None)
    assert kept + states <= of_repair(block, IDS.numel())


def test_the_benchmark_of_its_settings(
    root: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs, and takes up what it has measured."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    bench = importlib.import_module("repair")
    np.save(tmp_path / "ids.npy", IDS.numpy())
    out = tmp_path / "repair.json"
    argv = ["repair.py", "--model", model, "--windows", tmp_path / "ids.npy", "--out", out]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    for cases in (({"rate": 0.02},), ({"rate": 0.02}, {"epochs": 1})):
        monkeypatch.setattr(bench, "CASES", cases)
        bench.main()
        rows = json.loads(out.read_text())["rows"]
        assert [row["settings"] for row in rows] == list(cases)
    assert all(row["held out"] < row["held out before"] for row in rows)
