"""The benchmarks for GPUs: rehearsed on a CPU, and what they make of results that are wrong or missing."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed on this platform")


@pytest.fixture
def bench(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives a module of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module


def sh(root: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(root / "benchmarks" / "gpu.sh"), *args]
    return subprocess.run(
        command, env={**os.environ, **environment}, cwd="/", capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_whole_script_is_rehearsed_without_datasets(root: Path, tmp_path: Path) -> None:
    (tmp_path / "datasets.py").write_text("raise ImportError('no datasets on that machine')")
    out = tmp_path / "out"
    done = sh(
        root,
        str(out),
        "--device",
        "cpu",
        "--small",
        PYTHON=sys.executable,
        PYTHONPATH=str(tmp_path),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    correct, few, experts, whole = (
        json.loads((out / f"{name}.json").read_text())
        for name in ("correct", "few_tokens", "experts", "end_to_end")
    )
    kernels = ("s24_mma", "s24_bits", "n8_mma", "nm_gemv", "bitmap", "dispatch")
    assert correct["right"] == dict.fromkeys(kernels, True)
    assert [part["cases"] for part in correct["parts"].values()] == [0] * 14 + [2] * 6
    found = [(row["shape"], row["tokens"], row["kernel"]) for row in few["rows"]]
    with_others = ("dense", "int8", "int4", "nm_gemv", "dispatch")
    ragged = ("dense", "nm_gemv", "bitmap", "dispatch")
    assert found == [
        (shape, tokens, kernel)
        for shape, kernels in (("small", with_others), ("ragged", ragged))
        for tokens in (1, 3)
        for kernel in kernels
    ]
    assert few["wrong"] == few["left_out"] == []
    for name in ("s24_mma", "s24_bits int8", "s24_bits int4", "n8_mma"):
        assert few["not_here"][name] == "needs an NVIDIA GPU"
    eight = json.loads((out / "few_tokens_3_8.json").read_text())
    assert {row["kernel"] for row in eight["rows"]} == set(with_others)
    assert eight["wrong"] == []
    assert set(few["questions"].values()) == {"not measured: needs an NVIDIA GPU"}
    assert [(row["mixture"], row["tokens"], row["way"]) for row in experts["rows"]] == [
        (mixture, tokens, way)
        for mixture in ("small Qwen3", "small Mixtral")
        for tokens in (1, 5)
        for way in ("dense", "s24_experts", "expanded")
    ]
    assert experts["wrong"] == experts["left_out"] == []
    assert whole["lost"] == {}
    assert whole["logits"]["sparse and dense"] < 0.02
    contenders = ["dense", "sparse", "int8", "int4"]
    assert [row["contender"] for row in whole["decode"] + whole["prefill"]] == contenders * 4
    assert whole["model"] == {
        "shape": "Llama-3-8B", "layers": 2, "of_layers": 32, "weights": "random"
    }  # fmt: skip
    for one in (correct, few, experts, whole):
        assert one["small"]
        assert one["commit"]
        assert torch.__version__.startswith(one["versions"]["torch"])  # without +cu130


FAKE = """#!/bin/sh
echo "$*" >> "$LOG"
case "$*" in
*"$FAILS"*) exit "$STATUS" ;;
esac
"""


@pytest.mark.parametrize(
    ("fails", "status", "told"),
    [
        ("nothing at all", "0", None),
        ("correct.py", "1", "FAILED: right: status 1"),
        ("correct.py", "124", "FAILED: right: not known in time"),
        ("few_tokens.py", "3", "FAILED: few tokens: status 3"),
        ("experts.py", "1", "FAILED: experts: status 1"),
        ("end_to_end.py", "124", "for want of time: end to end: ended after"),
    ],
)
def test_parts_go_on_after_one_that_failed(
    fails: str, status: str, told: str | None, root: Path, tmp_path: Path
) -> None:
    fake, log = tmp_path / "python", tmp_path / "log"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    done = sh(root, str(tmp_path), PYTHON=str(fake), LOG=str(log), FAILS=fails, STATUS=status)
    ran = [line.split()[0] for line in log.read_text().splitlines()]
    names = ("correct", "few_tokens", "experts", "end_to_end", "few_tokens")
    assert ran == [f"benchmarks/{name}.py" for name in names]
    assert done.returncode == (1 if told and told.startswith("FAILED") else 0)
    assert told is None or told in done.stdout


def test_no_microseconds_for_wrong_experts(bench: Any) -> None:
    experts = bench("experts")
    device, wrong = torch.device("cpu"), list[str]()
    mixture = experts.SMALL["small Mixtral"]
    ways = experts._ways(mixture, device, True)
    right = ways["s24_experts"]
    ways["s24_experts"] = lambda *given: right(*given) * 1.1
    ways["expanded"] = lambda *given: right(*given).fill_(torch.nan)
    rows = list(experts._measure(mixture, ways, 2, device, "here", wrong))
    assert [row["way"] for row in rows] == ["dense"]
    assert [line.split(":")[0] for line in wrong] == ["s24_experts, here", "expanded, here"]


def test_pruning_is_asked_for_apart(root: Path, tmp_path: Path) -> None:
    fake, log = tmp_path / "python", tmp_path / "log"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    out = str(tmp_path / "out")
    done = sh(root, out, "--pruning", PYTHON=str(fake), LOG=str(log), FAILS="-", STATUS="0")
    ran = [line.split()[0] for line in log.read_text().splitlines()[2:]]
    names = ("gpu", "speed", "solver_kernels", "big", "big", "big")
    assert ran == [f"benchmarks/{name}.py" for name in names]
    assert done.returncode == 0


def contender(bench: Any, name: str, off: float = 0.0) -> Any:
    baselines = bench("baselines")
    return baselines.Contender(name, 64, 1, [lambda x: x @ WEIGHT.T + off])


WEIGHT = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.parametrize("off", [1.0, float("nan")])
def test_no_microseconds_for_a_wrong_product(off: float, bench: Any) -> None:
    few_tokens = bench("few_tokens")
    x = torch.randn(2, 16).bfloat16()
    state = few_tokens.Bench(torch.device("cpu"), 1.0, ("nm_gemv",), ("int8",))
    right, ours = contender(bench, "dense"), contender(bench, "nm_gemv", off)
    theirs, good = contender(bench, "int8", off), contender(bench, "s24_mma")
    left = few_tokens._right(state, "here", [right, ours, theirs, good], x, WEIGHT)
    assert left == [right, good]
    assert [line.split(":")[0] for line in state.wrong] == ["nm_gemv, here"]
    assert list(state.lost) == ["int8, here"]


def test_a_baseline_that_breaks_off_is_left_out(bench: Any) -> None:
    few_tokens, baselines = bench("few_tokens"), bench("baselines")

    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("not for so many tokens\nand more")

    state = few_tokens.Bench(torch.device("cpu"), 1.0, (), ("cusparselt",))
    everyone = [contender(bench, "dense"), baselines.Contender("cusparselt", 64, 1, [broken])]
    left = few_tokens._right(state, "here", everyone, torch.randn(2, 16).bfloat16(), WEIGHT)
    assert left == everyone[:1]
    assert state.lost == {"cusparselt, here": "not for so many tokens"}
    lost: dict[str, str] = {}  # 16 inputs are less than a group of 128
    assert [c.name for c in baselines.contenders(WEIGHT, ("int4", "int8"), lost)] == [
        "dense",
        "int8",
    ]
    assert list(lost) == ["int4, [8, 16]"]


def test_more_tokens_than_a_kernel_takes_are_not_asked_of_it(bench: Any) -> None:
    few_tokens = bench("few_tokens")
    state = few_tokens.Bench(torch.device("cpu"), 1.0, (), ())
    everyone = [bench("baselines").Contender("dense", 100, 1, [lambda x: x @ WEIGHT.T])]
    everyone.append(contender(bench, "s24_mma"))
    left = few_tokens._right(state, "here", everyone, torch.randn(65, 16).bfloat16(), WEIGHT)
    assert left == everyone[:1]
    assert not state.wrong


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda y, turn: y * 1.1, "error"),
        (lambda y, turn: y.masked_fill(y == y.max(), float("nan")), "error"),
        (lambda y, turn: torch.empty_like(y), "error nan"),  # fresh memory is NaN
        (lambda y, turn: y if turn < 3 else y * (1 + 2**-8), "a repeat differs"),
    ],
)
def test_a_kernel_that_is_wrong_is_found_out(make: Any, told: str, bench: Any) -> None:
    correct = bench("correct")
    turns = iter(range(10**6))

    def call(x: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.nn.functional.linear(x, WEIGHT, bias)
        return make(y, next(turns))

    for wrong in (False, True):
        found = correct.Found()
        right = lambda x, bias: torch.nn.functional.linear(x, WEIGHT, bias)  # noqa: E731
        correct._compare(found, "here", call if wrong else right, [WEIGHT], 3, small=False)
        assert found.cases == 2
        assert bool(found.wrong) == wrong
    assert told in " ".join(found.wrong)


def test_a_part_that_dies_is_wrong(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    correct = bench("correct")
    monkeypatch.setattr(correct, "PARTS", ("nm_gemv of nothing",))  # the child refuses the name
    args = argparse.Namespace(device="cpu", small=True, out=Path("unused"))
    parts = correct._in_processes(args)
    assert "ended with status 2: correct.py: error" in parts["nm_gemv of nothing"]["wrong"][0]
    assert not correct._right(parts, "nm_gemv", torch.device("cpu"))


def test_a_kernel_that_a_gpu_refuses_is_not_right(bench: Any) -> None:
    correct = bench("correct")
    parts = {"s24_mma bfloat16": vars(correct.Found(refused="gives wrong results"))}
    assert correct._right(parts, "s24_mma", torch.device("cpu"))
    assert not correct._right(parts, "s24_mma", torch.device("cuda"))


def rows() -> list[dict[str, Any]]:
    """Two Llama layers and another, one of the Llamas large; dense takes 100 us."""
    made = []
    for shape, size in (
        ("Llama-3-8B o", (4096, 4096)),
        ("Llama-3-70B o", (8192, 8192)),
        ("Qwen3-4B down", (2560, 9728)),
    ):
        for tokens in (1, 64):
            gains = {"dense": 1.0, "s24_mma": 1.6, "dispatch": 1.6 if tokens == 1 else 0.9}
            if shape == "Llama-3-8B o":
                gains["dispatch"] = 1.0
            for kernel, gain in gains.items():
                us = 100 / gain
                made.append({"shape": shape, "size": size, "tokens": tokens, "kernel": kernel})
                made[-1] |= {"us": [us, us, us], "against_dense": gain, "of_copy": 0.5 * gain}
                made[-1] |= {"held": "s24_mma"} if kernel == "dispatch" else {}
    return made


def test_means_targets_and_losses(bench: Any) -> None:
    tally = bench("tally")
    means = tally.means(rows())
    assert means["s24_mma, 1 tokens"] == {"mean": pytest.approx(1.6), "shapes": 2}
    assert means["dispatch, all tokens"]["mean"] == pytest.approx((1.6 * 0.9) ** 0.25)
    large, mean, worst = tally.targets(rows()).values()
    assert (large["measured"], large["met"]) == (1.6, True)
    assert (mean["measured"], mean["met"]) == (pytest.approx(1.6**0.5), False)
    assert (worst["measured"], worst["met"]) == (0.9, False)
    lost = tally.losses(rows())
    assert (lost["of"], len(lost["where"])) == (6, 2)
    assert lost["where"][0] == "Llama-3-70B o, 64 tokens: 0.900 (s24_mma)"
    assert all(target["met"] is None for target in tally.targets([]).values())
    large = {"shape": "Llama-3-70B o", "size": (8192, 8192), "kernel": "s24_bits int4"}
    few = [{**large, "tokens": t, "against_dense": gain} for t, gain in ((1, 3.4), (16, 3.2))]
    (name, target), *others = tally.targets_beyond([*rows(), *few]).items()
    assert name.startswith("s24_bits int4, 1 to 16 tokens")
    assert (target, others) == ({"wanted": 3.3, "measured": 3.2, "met": False}, [])
    large = {"shape": "Llama-3-70B o", "size": (8192, 8192), "kernel": "n8_mma 3:8"}
    eight = [{**large, "tokens": t, "against_dense": gain} for t, gain in ((1, 1.7), (16, 1.6))]
    (name, target), *others = tally.targets_beyond([*rows(), *eight]).items()
    assert name.startswith("n8_mma 3:8, 1 to 16 tokens")
    assert (target, others) == ({"wanted": 1.65, "measured": 1.6, "met": False}, [])


def test_the_first_questions_are_answered_by_name(bench: Any) -> None:
    tally = bench("tally")
    result = {"not_here": {}, "wrong": [], "correct": None, "lost": {}, "small": False}
    result |= {"copy_gb_per_s": 4000.0, "matmul_tflops": 700.0}
    hot = {"size": [8192, 8192], "bytes": 9 * 8192**2 // 8, "us": {"64": [20.0, 20.0, 20.0]}}
    answers = tally.questions(rows(), hot, result)
    assert list(answers) == ["correctness", "rate of mma.sp at 64 tokens", "bandwidth"]
    assert answers["correctness"].startswith("as good as dense in all 6 products")
    # 2 * 8192 * 8192 * 64 operations in 62.5 us, and in 20; 75.5 MB at 4000 GB/s are 18.9 us
    rate = answers["rate of mma.sp at 64 tokens"]
    assert rate.startswith("137 TFLOP/s from memory, 429 from the L2 cache (20.0 us")
    assert "takes 18.9: computing is the bound" in rate
    assert "80% to 80% of a copy at 1 token" in answers["bandwidth"]
    wrong = tally.questions(rows(), hot, {**result, "wrong": ["s24_mma, here: off"]})
    assert wrong["correctness"] == "wrong: s24_mma, here: off"
    refused = tally.questions(rows(), hot, {**result, "not_here": {"s24_mma": "too old"}})
    assert set(refused.values()) == {"not measured: too old"}
    assert "target 1.5 x dense" in tally.told({**result, **tally.tally(rows(), hot, result)})


@pytest.mark.parametrize("tokens", [1, 3, 33])
@pytest.mark.parametrize("shape", [(37, 300), (70, 512)])
def test_the_int8_baseline_is_a_product(shape: tuple[int, int], tokens: int, bench: Any) -> None:
    torch.manual_seed(0)
    weight, scale = bench("baselines").round8(torch.randn(shape))
    x = torch.randn(tokens, shape[1]).bfloat16()
    y = bench("int8_triton").int8_mm(x, weight, scale)
    exact = x.double() @ (weight.double() * scale.double()[:, None]).T
    assert (y - exact).norm() < 0.005 * exact.norm()


def test_baselines_stand_for_their_weight(bench: Any) -> None:
    baselines = bench("baselines")
    torch.manual_seed(0)
    dense = torch.randn(64, 256).bfloat16()
    for name, most in (("int8", 0.01), ("int4", 0.12)):
        made = baselines._other(dense, name)
        assert (made.stands_for - dense).norm() < most * dense.norm()
        assert baselines.difference(made, torch.randn(3, 256).bfloat16(), dense) < 0.01
    found = baselines.refused(torch.device("cpu"))
    assert found["int8"] is found["int4"] is None
    assert found["cusparselt"]  # no cuSPARSELt in this torch, or none on a CPU


def test_two_of_four_are_the_largest(bench: Any) -> None:
    two_of_four = bench("few_tokens").two_of_four
    weight = torch.tensor([[1.0, -3, 2, 0.5, 1, 1, -1, 1], [0, 0, 0, 0, 5, 4, 4, 4]])
    expected = torch.tensor([[0, -3, 2, 0, 1, 1, 0, 0], [0, 0, 0, 0, 5, 4, 0, 0]])
    assert torch.equal(two_of_four(weight), expected)


def test_decoding_is_that_of_the_model(bench: Any) -> None:
    """decode.py against the model's own forward, which sees the whole sequence each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=97, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 97, (3, 12))
    decode = bench("decode")
    decoder = decode.Decoder(model, 3, 32)
    logits, step = decoder.prefill(ids), decode.record(decoder)
    for _ in range(6):
        with torch.no_grad():
            theirs = model(ids).logits[:, -1]
        torch.testing.assert_close(logits, theirs, rtol=1e-4, atol=1e-5)
        assert torch.equal(decoder.token[:, 0], theirs.argmax(-1))
        ids = torch.cat([ids, decoder.token], 1)
        logits = step()
    assert int(decoder.at) == 18


def test_what_was_not_measured_has_no_gain(bench: Any) -> None:
    end_to_end = bench("end_to_end")
    row = {
        "contender": "sparse",
        "batch": 1,
        "tokens_per_s": [1.0, 2.0, 3.0],
        "against_dense": None,
    }
    row |= {"weights_gb": 1.0, "peak_gb": None}
    prefill = {"contender": "sparse", "tokens": 512, "ms": [1.0, 2.0, 3.0], "against_dense": 0.5}
    result = {"decode": [row], "prefill": [prefill], "model": {"layers": 4, "of_layers": 32}}
    result |= {"between_linear_layers": "eager", "lost": {"dense, batch 1": "out of memory"}}
    told = end_to_end.table(result)
    assert "2.0 tokens/s  dense was not measured" in told
    assert "2.00 ms  0.50 x dense" in told
    assert "4 of 32 layers" in told
    assert "lost: dense, batch 1: out of memory" in told


def test_what_is_slow_is_replayed_less_often(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = bench("timing")
    took: dict[str, list[float]] = {"quick": [], "slow": []}
    us = {"quick": 10.0, "slow": 5000.0}  # a graph of 20 calls in 0.1 s: ten of them in a second

    def run(name: str) -> float:
        took[name].append(us[name])
        return us[name]

    runs = {name: lambda name=name: run(name) for name in us}
    times = timing.in_turn(runs, torch.device("cuda"))
    assert {name: len(of) for name, of in times.items()} == {"quick": 30, "slow": 10}
    assert {name: len(of) for name, of in took.items()} == {"quick": 31, "slow": 11}
    assert timing.quartiles([3.0, 1.0, 2.0]) == [1.5, 2.0, 2.5]


def test_the_commit_is_given_where_git_is_not(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMMIT", "0123abcd")
    assert bench("timing").commit() == "0123abcd"


def test_a_sweep_goes_on_where_the_last_one_ended(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With made-up times, and nm_gemv in the interpreter for the one shape of a rehearsal."""
    from llmprune.kernels import gpu, measure, table
    from llmprune.kernels.words import Words

    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "cache"))
    table.current.cache_clear()
    monkeypatch.setattr(gpu, "missing", lambda device: None)
    monkeypatch.setattr(
        Words, "unfit", lambda self, case: "no Gluon" if self.name == "s24_mma" else None
    )
    measured = []

    def timer(device: torch.device, ways: Any) -> list[float]:
        measured.append(ways[0].tokens)
        return [10.0 if way.name == "dense" else 5.0 + i for i, way in enumerate(ways)]

    monkeypatch.setattr(measure, "slow_timer", timer)
    monkeypatch.setattr(measure.Bench, "launches", lambda self: [(None, None), (4, 1)])
    out = tmp_path / "gpu.json"
    sweep = bench("sweep")

    def run(*more: str) -> None:
        command = ["sweep.py", "--out", str(out), "--device", "cpu", "--small", *more]
        monkeypatch.setattr(sys, "argv", command)
        sweep.main()

    run("--processes", "1", "--tokens", "1")
    run("--processes", "1", "--tokens", "1")
    assert measured == [1]
    run("--processes", "1", "--tokens", "1", "2")
    assert measured == [1, 1, 2]
    (matrix,), (timings,) = zip(*table.read(out).timings.items(), strict=True)
    assert (matrix.kernel, matrix.rows, matrix.columns) == ("nm_gemv 2:4", 64, 256)
    assert {t.tokens: (t.kernel_us, t.dense_us) for t in timings.values()} == {
        1: (7.0, 10.0),
        2: (7.0, 10.0),
    }
    monkeypatch.setattr(table, "SHIPPED", tmp_path)
    table.current.cache_clear()
    assert matrix in table.current().timings  # what ships is read
    other = tmp_path / "other.json"
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--merge", str(out), "--out", str(other)])
    sweep.main()
    assert other.read_text() == out.read_text()
    table.current.cache_clear()


def test_the_counted_slots_are_those_of_the_gate(root: Path) -> None:
    """benchmarks/results/slots.json is of every case that tests/test_kernel_codegen.py bounds."""
    from test_kernel_codegen import BUDGET_H200, GEMV, S24
    from test_kernel_n8_codegen import BUDGET, N8
    from test_kernel_s24_bits_codegen import BITS, BUDGETS

    result = json.loads((root / "benchmarks" / "results" / "slots.json").read_text())
    most = {("s24_mma", tokens, "2:4"): bound for tokens, bound in S24.items()}
    most |= {("nm_gemv", tokens, f"{n}:{m}"): bound for (tokens, n, m), bound in GEMV.items()}
    most |= {(f"s24_bits int{bits}", tokens, "2:4"): b for (bits, tokens), b in BITS.items()}
    beyond = {("nm_gemv", 8, "2:4"), ("s24_bits int4", 64, "2:4")}
    most |= {("n8_mma", tokens, f"{n}:8"): bound for (tokens, n), bound in N8.items()}
    budgets = {(f"s24_bits int{bits}", "2:4"): budget for bits, budget in BUDGETS.items()}
    budgets |= {("n8_mma", f"{n}:8"): budget for n, budget in BUDGET.items()}
    for arch in (80, 89, 90, 100):
        rows = {
            (row["kernel"], row["tokens"], row["pattern"]): row
            for row in result["rows"]
            if row["arch"] == arch
        }
        assert rows.keys() == most.keys()
        for case, row in rows.items():
            assert row["spilled_bytes"] <= 16
            assert row["slots_per_weight"] <= most[case] * 1.1
            budget = budgets.get((case[0], case[2]), BUDGET_H200)
            assert row["slots_per_weight"] <= budget or case in beyond
    assert " + changes" not in result["commit"]
