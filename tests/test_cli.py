"""The command line as a user types it: the whole run, and one line with status 2 for wrong input."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from llmprune.cli import main
from llmprune.options import prune_parser

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A file of 4,000 words that the tiny tokenizer knows."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(WORDS[(i * i + 7 * i) % 60] for i in range(4000)))
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A random two-block Llama with a tokenizer, in bfloat16."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = {word: i for i, word in enumerate(["<unk>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys, tiny, text, tmp_path, monkeypatch):
    """Run a command line; gives status, stdout, stderr. `--model` and text are there by default."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: object, model: object = tiny, calibration: object = text):
        line = [str(a) for a in argv]
        if not line or line[0].startswith("-"):
            line += ["--model", str(model)] if "--model" not in line else []
            line += ["--calibration", str(calibration)] if "--calibration" not in line else []
            if "--no-eval" not in line and "--eval-dataset" not in line:
                line += ["--no-eval"]
        status = main(line)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def copy_model(tiny: Path, folder: Path, **config: object) -> Path:
    """The tiny model elsewhere, with changes to its config."""
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**plain, **config}))
    return folder


def refused(result, *words: str) -> None:
    """Status 2, nothing on stdout, the last line of stderr an error with all of `words`."""
    status, out, err = result
    line = err.strip().splitlines()[-1]
    assert status == 2, err
    assert out == ""
    assert line.startswith("llmprune: error: "), err
    assert "Traceback" not in err
    for word in words:
        assert word in line, line


class TestWholeRun:
    @pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
    def test_prunes_measures_saves_and_verifies(self, run, tmp_path, text, method):
        out = tmp_path / "out"
        status, shown, said = run(
            "--sparsity", "2:4", "--method", method, "--save", out, "--eval-dataset", text
        )
        assert status == 0, said
        assert "perplexity dense" in shown
        assert "perplexity pruned" in shown
        weights = load_file(out / "model.safetensors")
        for name, weight in weights.items():
            assert weight.dtype == torch.bfloat16
            if name.endswith("_proj.weight"):
                kept = weight.reshape(-1, 4).ne(0).sum(1)
                assert int(kept.max()) <= 2
            elif weight.dim() == 2:
                assert float(weight.eq(0).float().mean()) < 0.05  # head and embedding stay
        report = json.loads((out / "llmprune.json").read_text())
        assert report["recipe"]["method"] == method
        assert len(report["layers"]) == 14
        assert "quantization_config" not in (out / "config.json").read_text()
        AutoTokenizer.from_pretrained(out)
        model = AutoModelForCausalLM.from_pretrained(out)
        assert model(torch.arange(8)[None]).logits.isfinite().all()

    def test_measured_perplexity_is_that_of_the_saved_files(self, run, tmp_path, text):
        out = tmp_path / "out"
        run("--sparsity", "0.5", "--method", "sparsegpt", "--save", out, "--eval-dataset", text)
        inside = json.loads((out / "llmprune.json").read_text())["perplexity"]["pruned"]
        status, shown, _ = run("eval", "--model", out, "--dataset", text, "--json")
        assert status == 0
        assert json.loads(shown)["perplexity"] == pytest.approx(inside["perplexity"], rel=1e-6)

    def test_same_command_same_files(self, run, tmp_path):
        for name in ("a", "b"):
            run("--sparsity", "0.6", "--method", "sparsegpt", "--save", tmp_path / name)
        one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in "ab")
        assert one == two

    def test_json_is_all_of_stdout_and_quiet_says_nothing(self, run):
        _, shown, _ = run("--sparsity", "0.5", "--json")
        assert json.loads(shown)["sparsity"] == pytest.approx(0.5, abs=0.01)
        status, shown, said = run("--sparsity", "0.5", "--quiet")
        assert (status, shown, said) == (0, "", "")

    def test_log_file_holds_what_was_said(self, run, tmp_path):
        run("--sparsity", "0.5", "--log-file", tmp_path / "log.txt", "--quiet")
        assert "14 matrices" in (tmp_path / "log.txt").read_text()

    def test_default_window_is_said(self, run):
        _, _, said = run("--sparsity", "0.5")
        assert "128 windows of 64 tokens" in said

    def test_method_settings_targets_and_ignore(self, run):
        _, shown, _ = run(
            "--sparsity", "0.5", "--method", "sparsegpt", "--set", "damping=0.1", "--set", "block=16",
            "--targets", "*_proj", "--ignore", "re:.*layers.0", "down_proj", "--json",
        )  # fmt: skip
        report = json.loads(shown)
        assert report["recipe"]["settings"] == {"damping": 0.1, "block": 16}
        names = [layer["name"] for layer in report["layers"]]
        assert len(names) == 6
        assert all("layers.1" in n and "down_proj" not in n for n in names)

    def test_lists_that_are_given_twice_add_up(self, run):
        _, shown, _ = run(
            "--sparsity", "0.5", "--targets", "q_proj", "k_proj", "--targets", "v_proj",
            "--ignore", "k_proj", "--ignore", "re:.*layers.0", "--json",
        )  # fmt: skip
        names = [layer["name"].rsplit(".", 1)[1] for layer in json.loads(shown)["layers"]]
        assert names == ["q_proj", "v_proj"]
        parsed = prune_parser().parse_args(
            ["--model", "x", "--sparsity", "2:4", "--transform", "rotate", "--transform", "permute"]
        )
        assert parsed.transform == ["rotate", "permute"]

    def test_ragged_dense_leaves_and_reports(self, run):
        _, shown, _ = run("--sparsity", "16:32", "--ragged", "dense", "--json")
        skipped = {x["name"]: x["skipped"] for x in json.loads(shown)["layers"] if x["skipped"]}
        assert set(skipped) == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}

    def test_default_text_that_cannot_be_had_is_said_and_the_run_goes_on(
        self, run, tiny, text, monkeypatch
    ):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        code = main(
            ["--model", str(tiny), "--sparsity", "0.5", "--calibration", str(text), "--quiet"]
        )
        assert code == 0

    def test_float16_that_overflows_is_an_error(self, tiny, text, run, tmp_path):
        folder = copy_model(tiny, tmp_path / "m")
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.0.mlp.up_proj.weight"] *= 1e38
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        refused(
            run("--sparsity", "0.5", "--method", "magnitude", "--dtype", "float16", model=folder)
        )


class TestOtherCommands:
    def test_methods_lists_all_with_settings(self, run):
        status, shown, _ = run("methods")
        assert status == 0
        for word in (
            "magnitude",
            "wanda",
            "sparsegpt",
            "damping=0.01",
            "variant=false",
            "2301.00774",
        ):
            assert word in shown

    def test_inspect_tells_the_pattern(self, run, tmp_path):
        run("--sparsity", "2:4", "--save", tmp_path / "out")
        status, shown, _ = run("inspect", tmp_path / "out")
        assert status == 0
        lines = shown.splitlines()
        assert any(
            "model.layers.1.mlp.up_proj" in x and "2:4" in x and "50.00%" in x for x in lines
        )
        assert any(x.startswith("decoder matrices") and "2:4" in x for x in lines)
        _, short, _ = run("inspect", tmp_path / "out", "--summary")
        assert "layers.1" not in short

    def test_help_teaches(self, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["--help"])
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        for word in ("--sparsity", "2:4", "examples:", "inspect", "eval"):
            assert word in shown


class TestWrongInput:
    @pytest.mark.parametrize(
        ("sparsity", "words"),
        [
            ("0", ["between 0 and 1"]),
            ("1", ["between 0 and 1"]),
            ("50", ["0.5"]),
            ("2:5:4", ["2:5:4", "2:4"]),
            ("4:2", ["2:4"]),
            ("half", ["half", "0.5"]),
            ("nan", ["between 0 and 1"]),
        ],
    )
    def test_sparsity(self, run, sparsity, words):
        refused(run("--sparsity", sparsity), *words)

    def test_method_setting_and_command(self, run):
        refused(run("--sparsity", "0.5", "--method", "wonda"), "'wanda'", "sparsegpt")
        refused(run("--sparsity", "0.5", "--set", "variants=true"), "'variant'")
        refused(run("--sparsity", "0.5", "--set", "variant"), "key=value")
        refused(run("--sparsity", "0.5", "--set", "variant=maybe"), "true or false")
        refused(run("--sparsity", "2:4", "--set", "variant=true"), "variant=true")
        refused(run("inspekt", "x"), "'inspect'")
        refused(run("--sparsity", "0.5", "--no-such"), "--no-such")
        refused(run("--sparsity", "2:4", "--within", "row"), "within")

    def test_model_not_found(self, run, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        refused(run("--sparsity", "0.5", model=tmp_path / "nowhere"), "nowhere")
        refused(run("--sparsity", "0.5", model="nobody/nothing"), "nobody/nothing")
        (tmp_path / "empty").mkdir()
        refused(run("--sparsity", "0.5", model=tmp_path / "empty"), "config.json")

    def test_no_causal_language_model(self, run, tmp_path):
        t5 = T5ForConditionalGeneration(
            T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, vocab_size=32)
        )
        t5.save_pretrained(tmp_path / "t5")
        refused(run("--sparsity", "0.5", model=tmp_path / "t5"), "encoder-decoder")
        small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        bert = BertForMaskedLM(BertConfig(**small, num_hidden_layers=1, vocab_size=32))
        bert.save_pretrained(tmp_path / "bert")
        refused(run("--sparsity", "0.5", model=tmp_path / "bert"), "Bert")
        judge = LlamaForSequenceClassification(
            LlamaConfig(**small, num_hidden_layers=1, vocab_size=32, pad_token_id=0)
        )
        judge.save_pretrained(tmp_path / "judge")
        refused(
            run("--sparsity", "0.5", model=tmp_path / "judge"), "LlamaForSequenceClassification"
        )

    def test_quantised_pickled_and_foreign_code(self, run, tiny, tmp_path):
        quantised = copy_model(
            tiny, tmp_path / "q", quantization_config={"quant_method": "gptq", "bits": 4}
        )
        refused(run("--sparsity", "0.5", model=quantised), "already quantised", "gptq")
        pickled = copy_model(tiny, tmp_path / "p")
        weights = load_file(pickled / "model.safetensors")
        (pickled / "model.safetensors").unlink()
        torch.save(weights, pickled / "pytorch_model.bin")
        refused(run("--sparsity", "0.5", model=pickled), "pickle", "safetensors")
        marker = tmp_path / "ran"
        foreign = copy_model(
            tiny, tmp_path / "f", model_type="foreign",
            auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
        )  # fmt: skip
        (foreign / "code.py").write_text(f"open({str(marker)!r}, 'w')\n")
        refused(run("--sparsity", "0.5", model=foreign), "--trust-remote-code")
        assert not marker.exists()

    def test_missing_weights_would_be_random(self, run, tiny, tmp_path):
        folder = copy_model(tiny, tmp_path / "m")
        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        refused(run("--sparsity", "0.5", model=folder), "layers.1.mlp.up_proj")

    def test_calibration_text(self, run, tmp_path, tiny, monkeypatch):
        (tmp_path / "empty.txt").write_text("")
        refused(run("--sparsity", "0.5", calibration=tmp_path / "empty.txt"), "empty")
        (tmp_path / "short.txt").write_text("w1 w2 w3")
        refused(run("--sparsity", "0.5", calibration=tmp_path / "short.txt"), "3", "64")
        (tmp_path / "rows.jsonl").write_text('{"body": "w1 w2", "title": "w3"}\n')
        refused(
            run("--sparsity", "0.5", "--text-column", "text", calibration=tmp_path / "rows.jsonl"),
            "body", "title",
        )  # fmt: skip
        refused(run("--sparsity", "0.5", calibration=tmp_path / "nowhere.txt"), "nowhere.txt")
        refused(run("--sparsity", "0.5", "--seqlen", "65"), "65", "64")
        refused(run("--sparsity", "0.5", "--samples", "0"), "samples")

    def test_no_network_says_how_to_pass_a_file(self, tiny, tmp_path):
        env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
        begun = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "llmprune", "--model", str(tiny), "--sparsity", "0.5"],
            capture_output=True, text=True, env=env, cwd=Path(__file__).parents[1],
        )  # fmt: skip
        assert done.returncode == 2
        assert "--calibration" in done.stderr.strip().splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert time.monotonic() - begun < 60

    @pytest.mark.parametrize("method", ["magnitude", "wanda"])
    def test_nan_in_weights_names_the_layer(self, run, tiny, tmp_path, method):
        folder = copy_model(tiny, tmp_path / "m")
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        result = run(
            "--sparsity", "0.5", "--method", method, "--save", tmp_path / "o", model=folder
        )
        refused(result, "model.layers.1.mlp.up_proj", "NaN")
        assert not (tmp_path / "o").exists()

    def test_nan_in_activations_names_the_layer(self, run, tiny, tmp_path):
        folder = copy_model(tiny, tmp_path / "m")
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.1.input_layernorm.weight"][0] = float("inf")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        refused(run("--sparsity", "0.5", model=folder), "model.layers.1.self_attn", "activations")

    def test_patterns_and_names_that_fit_nothing(self, run):
        refused(run("--sparsity", "16:32"), "down_proj", "--ragged dense")
        refused(run("--sparsity", "3:7", "--ragged", "dense"), "3:7")
        refused(run("--sparsity", "0.001"), "0.001")
        refused(run("--sparsity", "0.5", "--targets", "q_prj"), "q_prj", "q_proj")
        refused(run("--sparsity", "0.5", "--ignore", "nothing"), "nothing")
        refused(run("--sparsity", "0.5", "--targets", "re:["), "regular expression")
        refused(run("--sparsity", "0.5", "--ignore", "*"), "left to prune")

    def test_target_folder(self, run, tmp_path, tiny):
        (tmp_path / "there").mkdir()
        (tmp_path / "there" / "notes.txt").write_text("mine")
        refused(run("--sparsity", "0.5", "--save", tmp_path / "there"), "--overwrite")
        refused(run("--sparsity", "0.5", "--save", tmp_path / "there", "--overwrite"), "there")
        assert (tmp_path / "there" / "notes.txt").read_text() == "mine"
        refused(run("--sparsity", "0.5", "--save", tiny, "--overwrite"), "pruned")
        refused(run("--sparsity", "0.5", "--save", "/proc/nothing/out"), "/proc/nothing/out")
        refused(run("--sparsity", "0.5", "--save", "o", "--log-file", "/proc/nothing/log"), "log")

    def test_no_room_is_known_before_the_work(self, run, tmp_path, monkeypatch):
        import shutil

        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        refused(run("--sparsity", "0.5", "--save", tmp_path / "out"), "free")
        assert not (tmp_path / "out").exists()

    def test_names_of_dtype_device_and_choices(self, run):
        refused(run("--sparsity", "0.5", "--dtype", "float8"), "float8")
        refused(run("--sparsity", "0.5", "--device", "gpu"), "gpu")
        if not torch.cuda.is_available():
            refused(run("--sparsity", "0.5", "--device", "cuda"), "--device cpu")
        refused(run("--sparsity", "0.5", "--within", "rows"), "rows")
        refused(run("--sparsity", "0.5", "--push-to-hub", "no spaces/here please"), "user/name")


def test_what_nobody_reads_to_the_end_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "llmprune", "methods"],
        stdout=writing, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("delay", [0.0, 0.3, 1.0])
def test_ctrl_c_leaves_nothing_and_exits_130(tiny, text, tmp_path, delay):
    """Interrupt a run that would take a minute, some time after it has begun to speak."""
    out, log = tmp_path / "out", tmp_path / "log.txt"
    long = tmp_path / "long.txt"
    long.write_text((text.read_text() + " ") * 400)
    process = subprocess.Popen(
        [
            sys.executable, "-m", "llmprune", "--model", str(tiny), "--sparsity", "0.5",
            "--method", "sparsegpt", "--calibration", str(text), "--eval-dataset", str(long),
            "--save", str(out), "--quiet", "--log-file", str(log),
        ],
        cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's & ignores it
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert not out.exists()
    assert list(tmp_path.glob(".out*")) == []
