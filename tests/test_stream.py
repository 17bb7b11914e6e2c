"""Block by block from disk gives what the whole model in memory gives, in the checkpoint's own layout."""

import json
import os
import pty
import re
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hub_server import point_at, serving
from safetensors.torch import load_file, save_file
from streamed import SHAPE, add_tokenizer, content, interrupted, save_llama, write_text
from test_experts import FAMILIES
from test_experts import SHAPE as SMALL
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import llmprune
from llmprune import loading, to_disk
from llmprune.activations import Activations
from llmprune.checkpoint.files import find
from llmprune.checkpoint.tensors import index
from llmprune.cli import main
from llmprune.in_memory import round_to_stored

BUILDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 1, "intermediate_size": 24}),
    "gpt2": ("GPT2", {"n_positions": 32}),
    "gemma2": (
        "Gemma2",
        {"num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 24, "sliding_window": 8},
    ),
    **{k: FAMILIES[k] for k in ("mixtral", "gpt_oss", "qwen3_next", "deepseek_v3", "granitemoe")},
}


def build(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """A random checkpoint of a family, two blocks unless it needs more."""
    kind, own = BUILDS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **own, **changes})
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ids(tmp_path_factory) -> Path:
    """Calibration windows, 12 of 16 tokens."""
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 64, (12, 16)))
    return path


@pytest.fixture
def prune(ids, tmp_path, capsys):
    """Run the command line on a model into `out`; gives status and what was said."""

    def run(model: Path, *options: object, out: str = "out") -> tuple[int, str]:
        argv = ["--model", model, "--calibration", ids, "--save", tmp_path / out, "--no-eval"]
        status = main([str(a) for a in (*argv, "--sparsity", "2:4", *options)])
        return status, capsys.readouterr().err

    return run


def in_memory(
    model: Path, ids: Path, dtype: str = "auto", **recipe: Any
) -> dict[str, torch.Tensor]:
    """Parameters by name after `llmprune.prune` on the loaded model, rounded to the stored dtype."""
    opened = loading.open_model(loading.check(str(model)), dtype=dtype, device="cpu")
    windows = torch.from_numpy(np.load(ids))
    recipe = {"sparsity": "2:4", "method": "wanda", **recipe}
    llmprune.prune(opened.model, calibration=windows, progress=False, **recipe)
    round_to_stored(opened)
    return dict(opened.model.named_parameters())


def on_disk(folder: Path) -> dict[str, torch.Tensor]:
    """Parameters of a checkpoint by name, as float32 loads them."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    return dict(model.named_parameters())


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [n for n in found if not torch.equal(found[n], wanted[n].float())] == []


def headers(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Key, dtype and shape of every tensor."""
    return {k: (v.dtype, v.shape) for k, v in index(find(folder)).items()}


class TestEqualToMemory:
    @pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
    @pytest.mark.parametrize("family", BUILDS)
    def test_bit_for_bit_in_its_own_layout(self, prune, ids, tmp_path, family, method):
        model = build(family, tmp_path / "model")
        status, said = prune(model, "--method", method)
        assert status == 0, said
        assert "whole model is loaded" not in said
        equal(on_disk(tmp_path / "out"), in_memory(model, ids, method=method))
        assert headers(tmp_path / "out") == headers(model)

    @pytest.mark.parametrize(
        ("dtype", "stored"),
        [("bfloat16", torch.float32), ("float16", torch.float32), ("float32", torch.bfloat16)],
    )
    def test_dtypes(self, prune, ids, tmp_path, dtype, stored):
        """Saved in the stored dtype, or in the computed one where that is narrower."""
        model = build("llama", tmp_path / "model", stored)
        assert prune(model, "--dtype", dtype)[0] == 0
        equal(on_disk(tmp_path / "out"), in_memory(model, ids, dtype))
        narrow = stored if dtype == "float32" else getattr(torch, dtype)
        assert {d for d, _ in headers(tmp_path / "out").values()} == {narrow}
        assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == str(narrow)[6:]

    @pytest.mark.parametrize(
        "recipe",
        [
            {"targets": ["lm_head"]},
            {"targets": ["lm_head", "re:.*layers.1.*q_proj"]},
            {"targets": ["re:.*layers.1.*"]},
            {"ignore": ["re:.*layers.0.*", "down_proj"]},
            {"targets": ["lm_head"], "method": "magnitude"},
        ],
    )
    def test_targets(self, prune, ids, tmp_path, recipe):
        model = build("llama", tmp_path / "model")
        line = [("--" + key, *([v] if isinstance(v, str) else v)) for key, v in recipe.items()]
        status, said = prune(model, *(part for option in line for part in option))
        assert status == 0, said
        equal(on_disk(tmp_path / "out"), in_memory(model, ids, **recipe))


class TestLayouts:
    def test_one_file_or_many_in_and_out(self, prune, tmp_path):
        model = build("llama", tmp_path / "model")
        sharded = tmp_path / "sharded"
        AutoModelForCausalLM.from_pretrained(model).save_pretrained(sharded, max_shard_size=3000)
        assert len(list(sharded.glob("*.safetensors"))) > 2
        for source, out in ((model, "a"), (sharded, "b")):
            assert prune(source, out=out)[0] == 0
        assert prune(sharded, "--max-shard-size", 3000, out="c")[0] == 0
        one = load_file(tmp_path / "a/model.safetensors")
        assert (tmp_path / "b/model.safetensors").read_bytes() == (
            tmp_path / "a/model.safetensors"
        ).read_bytes()
        plan = json.loads((tmp_path / "c/model.safetensors.index.json").read_text())
        files = sorted((tmp_path / "c").glob("*.safetensors"))
        assert set(plan["weight_map"].values()) == {f.name for f in files}
        held = {}
        for file in files:
            tensors = load_file(file)
            size = sum(t.nbytes for t in tensors.values())
            assert size <= 3000 or len(tensors) == 1
            assert all(plan["weight_map"][key] == file.name for key in tensors)
            held |= tensors
        assert plan["metadata"]["total_size"] == sum(t.nbytes for t in held.values())
        assert held.keys() == one.keys()
        assert all(torch.equal(held[k], one[k]) for k in one)
        on_disk(tmp_path / "c")

    def test_a_tensor_above_the_size_has_a_file_of_its_own(self, prune, tmp_path):
        model = build("llama", tmp_path / "model")
        assert prune(model, "--max-shard-size", 100)[0] == 0
        plan = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        large = [k for k, (d, s) in headers(model).items() if np.prod(s) * d.itemsize > 100]
        for key in large:
            assert list(plan["weight_map"].values()).count(plan["weight_map"][key]) == 1

    def test_without_the_base_prefix(self, prune, ids, tmp_path):
        """As `LlamaModel.save_pretrained` writes it: keys without `model.`, the head tied."""
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPE, tie_word_embeddings=True)
        LlamaForCausalLM(config).model.bfloat16().save_pretrained(tmp_path / "model")
        assert "layers.0.mlp.up_proj.weight" in headers(tmp_path / "model")
        assert prune(tmp_path / "model")[0] == 0
        assert headers(tmp_path / "out") == headers(tmp_path / "model")
        equal(on_disk(tmp_path / "out"), in_memory(tmp_path / "model", ids))

    @pytest.mark.parametrize("copies", ["one", "equal", "different", "head alone"])
    def test_tied_embeddings(self, prune, ids, tmp_path, copies):
        """Written once; two copies that differ are two."""
        model = build("llama", tmp_path / "model", tie_word_embeddings=True)
        held = load_file(model / "model.safetensors")
        table = held["model.embed_tokens.weight"]
        if copies == "head alone":
            del held["model.embed_tokens.weight"]
        if copies != "one":
            held["lm_head.weight"] = table.clone() * (2 if copies == "different" else 1)
        save_file(held, model / "model.safetensors", metadata={"format": "pt"})
        status, said = prune(model)
        assert status == 0, said
        names = {"lm_head.weight", "model.embed_tokens.weight"}
        kept = len(names & headers(tmp_path / "out").keys())
        assert kept == (2 if copies == "different" else 1)
        equal(on_disk(tmp_path / "out"), in_memory(model, ids))

    def test_what_the_model_does_not_know_is_kept(self, prune, tmp_path):
        model = build("llama", tmp_path / "model")
        held = load_file(model / "model.safetensors")
        extra = {
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4),
            "notes.count": torch.tensor(7),
            "notes.flags": torch.tensor([True, False, True]),
        }
        save_file({**held, **extra}, model / "model.safetensors", metadata={"format": "pt"})
        assert prune(model)[0] == 0
        written = load_file(tmp_path / "out/model.safetensors")
        assert all(torch.equal(written[k], v) for k, v in extra.items())
        assert headers(tmp_path / "out") == headers(model)

    def test_tokenizer_and_generation_config_come_along(self, prune, tmp_path):
        model = build("llama", tmp_path / "model")
        add_tokenizer(model)
        plain = json.loads((model / "generation_config.json").read_text())
        plain |= {"temperature": 0.3, "do_sample": False}  # transformers would not save this
        (model / "generation_config.json").write_text(json.dumps(plain))
        assert prune(model)[0] == 0
        saved = json.loads((tmp_path / "out/generation_config.json").read_text())
        assert saved["temperature"] == 0.3
        assert (tmp_path / "out/tokenizer.json").read_bytes() == (
            model / "tokenizer.json"
        ).read_bytes()
        modes = {p.stat().st_mode for p in (tmp_path / "out").iterdir()}
        assert len(modes) == 1

    def test_code_of_the_checkpoints_own_comes_along(self, prune, ids, tmp_path):
        model = build("llama", tmp_path / "model")
        plain = json.loads((model / "config.json").read_text())
        plain |= {
            "model_type": "own-llama",
            "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
        }
        (model / "config.json").write_text(json.dumps(plain))
        (model / "own.py").write_text(
            "from transformers import LlamaConfig, LlamaForCausalLM\n"
            "class OwnConfig(LlamaConfig):\n    model_type = 'own-llama'\n"
            "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        )
        assert prune(model)[0] == 2
        status, said = prune(model, "--trust-remote-code")
        assert status == 0, said
        assert headers(tmp_path / "out") == headers(model)
        assert (tmp_path / "out/own.py").read_bytes() == (model / "own.py").read_bytes()
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)


class TestDamagedSource:
    def refused(self, result: tuple[int, str], folder: Path, *words: str) -> None:
        status, said = result
        line = said.strip().splitlines()[-1]
        assert status == 2, said
        assert line.startswith("llmprune: error: ")
        assert "Traceback" not in said
        assert all(word in line for word in words), line
        assert not list(folder.glob(".out*"))

    def test_truncated_and_missing_shards(self, prune, tmp_path):
        build("llama", tmp_path / "whole")
        model = tmp_path / "model"
        AutoModelForCausalLM.from_pretrained(tmp_path / "whole").save_pretrained(
            model, max_shard_size=6000
        )
        shard = sorted(model.glob("*.safetensors"))[1]
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-100])
        self.refused(prune(model), tmp_path, shard.name, "damaged", "again")
        shard.unlink()
        self.refused(prune(model), tmp_path, shard.name, "missing")

    @pytest.mark.parametrize("method", ["wanda", "magnitude"])
    def test_nan_in_the_last_block_is_found_before_the_first_is_pruned(
        self, prune, tmp_path, method
    ):
        model = build("llama", tmp_path / "model", num_hidden_layers=3)
        held = load_file(model / "model.safetensors")
        held["model.layers.2.mlp.up_proj.weight"][1, 1] = float("nan")
        save_file(held, model / "model.safetensors", metadata={"format": "pt"})
        result = prune(model, "--method", method)
        if method == "wanda":
            self.refused(result, tmp_path, "model.layers.2.mlp.up_proj", "1 NaN")
        assert result[0] == 2
        assert "model.layers.2.mlp.up_proj" in result[1]

    def test_a_weight_beyond_float16(self, prune, tmp_path):
        model = build("llama", tmp_path / "model", torch.float32)
        held = load_file(model / "model.safetensors")
        held["model.layers.0.mlp.up_proj.weight"][1, 1] = 1e6
        save_file(held, model / "model.safetensors", metadata={"format": "pt"})
        result = prune(model, "--method", "magnitude", "--dtype", "float16")
        self.refused(result, tmp_path, "model.layers.0.mlp.up_proj")

    def test_a_matrix_without_a_part_in_the_forward_is_no_reason_to_load_the_whole_model(
        self, prune, tmp_path
    ):
        model = build("llama", tmp_path / "model")
        plain = json.loads((model / "config.json").read_text())
        plain["auto_map"] = {"AutoModelForCausalLM": "own.OwnModel"}
        (model / "config.json").write_text(json.dumps(plain))
        (model / "own.py").write_text(
            "import torch\nfrom transformers import LlamaForCausalLM\n"
            "class OwnModel(LlamaForCausalLM):\n"
            "    def __init__(self, config):\n"
            "        super().__init__(config)\n"
            "        self.model.layers[1].spare_proj = torch.nn.Linear(16, 16, bias=False)\n"
        )
        held = load_file(model / "model.safetensors")
        held["model.layers.1.spare_proj.weight"] = torch.rand(16, 16)
        save_file(held, model / "model.safetensors", metadata={"format": "pt"})
        result = prune(model, "--trust-remote-code")
        assert "whole model" not in result[1]
        status, said = result
        assert status == 2
        assert "model.layers.1.spare_proj takes no part in the forward" in said.splitlines()[-1]


class TestMemory:
    @pytest.mark.parametrize("text", ["5 bananas", "-3GB", "0", "1=5GB", "cpu=", "cuda=1GB"])
    def test_what_is_no_size(self, prune, tmp_path, text):
        model = build("llama", tmp_path / "model")
        status, said = prune(model, f"--max-memory={text}")
        assert status == 2
        assert said.splitlines()[-1].startswith("llmprune: error: --max-memory")
        assert prune(model, "--max-shard-size", "big")[0] == 2

    def test_too_small_a_size_is_refused_with_one_that_will_do(self, prune, tmp_path):
        model = build("llama", tmp_path / "model", hidden_size=512, intermediate_size=8000)
        status, said = prune(model, "--max-memory", "1GB", "--method", "sparsegpt")
        assert status == 2
        found = re.search(r"less than one block .* needs with sparsegpt: ([\d.]+GB)", said)
        assert found
        assert float(found[1][:-2]) > 1.3
        assert prune(model, "--max-memory", found[1], "--sparsity", "0.5")[0] == 0

    def test_hidden_states_are_read_from_disk_when_memory_is_short(
        self, prune, tmp_path, monkeypatch
    ):
        """28 blocks in 1 GiB beside one block: nothing may stay in memory, and nothing changes."""
        from llmprune import activations

        model = build("llama", tmp_path / "model", num_hidden_layers=4)
        assert prune(model, out="plenty")[0] == 0
        read: list[int] = []
        inner = activations._read

        def counted(*args: Any) -> torch.Tensor:
            found = inner(*args)
            read.append(found.nbytes)
            return found

        monkeypatch.setattr(activations, "_read", counted)
        least = 2**30 + 20_000  # nothing of the hidden states (12,288 bytes) fits beside a block
        assert prune(model, "--max-memory", least, out="little")[0] == 0
        # blocks 1 to 3 read them to observe, blocks 1 and 2 once more to pass on
        assert sum(read) == 5 * 12 * 16 * 16 * 4
        one, two = content(tmp_path / "plenty"), content(tmp_path / "little")
        assert one == two

    def test_rooms_are_filled_in_turn_whatever_a_device_is_called(self, tmp_path):
        """`cpu:0` and `cpu` are one device that compare unequal, as `cuda` and `cuda:0` are."""
        hidden = torch.arange(24.0).reshape(1, 4, 6)
        rooms = [(torch.device("cpu:0"), 200), (torch.device("cpu"), 100)]
        states = Activations(tmp_path, 4, rooms, torch.device("cpu"))
        for generation in range(2):
            states.begin(generation)
            for batch in range(4):
                states[batch] = (hidden + batch + generation).mT  # strides that are not kept
            states.commit()
            states.forget_old()
        assert [kept is not None for kept in states._kept] == [True, True, True, False]
        for batch in range(4):
            found = states[batch]
            assert found is not None
            assert found.is_contiguous()
            assert torch.equal(found, (hidden + batch + 1).mT)
        assert [p.name for p in tmp_path.iterdir()] == ["hidden-00001.bin"]

    def test_a_perplexity_block_by_block_is_that_of_the_whole_model(
        self, tmp_path, capsys, monkeypatch
    ):
        """And without --save, what does not fit goes to a temporary folder that is gone afterwards."""
        import tempfile

        model, text = save_llama(tmp_path / "model"), write_text(tmp_path / "words.txt", 3000)
        place = tmp_path / "temporary"
        place.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        argv = ["--model", model, "--calibration", text, "--samples", 8, "--sparsity", "0.5"]
        argv += ["--eval-dataset", text, "--json"]
        assert main([str(a) for a in argv]) == 0
        whole = json.loads(capsys.readouterr().out)
        monkeypatch.setattr("llmprune.to_disk.fits", lambda model, budget: False)
        assert main([str(a) for a in argv]) == 0
        shown = capsys.readouterr()
        assert "pruned blocks go to" in shown.err
        found = json.loads(shown.out)
        assert found["sparsity"] == whole["sparsity"]
        for name in ("dense", "pruned"):
            one, two = (r["perplexity"][name] for r in (whole, found))
            assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-6)
            assert two["standard_error"] == pytest.approx(one["standard_error"], rel=1e-6)
        assert list(place.iterdir()) == []
        assert main([str(a) for a in (*argv, "--save", tmp_path / "out")]) == 0
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


class TestSaying:
    @pytest.mark.parametrize(
        "options",
        [
            ("--method", "wanda"),
            ("--method", "wanda", "--targets", "re:.*layers.1.*"),
            ("--method", "wanda", "--targets", "lm_head"),
            ("--method", "magnitude"),
            ("--method", "magnitude", "--targets", "lm_head"),
        ],
    )
    def test_the_bar_ends_at_its_end(self, prune, tmp_path, monkeypatch, options):
        bars = []

        class Seen(to_disk.Bar):
            def __exit__(self, *error: Any) -> None:
                bars.append((self._bar.n, self._bar.total))
                super().__exit__(*error)

        monkeypatch.setattr(to_disk, "Bar", Seen)
        model = build("mixtral", tmp_path / "model")
        assert prune(model, *options)[0] == 0
        if options[1] == "wanda":  # taken up again, with fewer steps
            with interrupted("block 0"):
                prune(model, *options, out="again")
            bars.pop()
            assert prune(model, *options, out="again")[0] == 0
            assert bars[1] != bars[0]
        assert [n for n, _ in bars] == [total for _, total in bars]
        assert min(total for _, total in bars) > 3

    def test_in_a_terminal(self, tmp_path, root):
        """A bar that reaches its end, a few lines, and nothing from the libraries."""
        model = build("llama", tmp_path / "model", num_hidden_layers=6)
        np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 64, (400, 16)))
        argv = ["--model", model, "--calibration", tmp_path / "ids.npy", "--batch-size", 1]
        argv += ["--sparsity", "2:4", "--save", tmp_path / "out", "--no-eval"]
        child, terminal = pty.fork()
        if child == 0:
            os.chdir(root)
            line = [sys.executable, "-m", "llmprune", *map(str, argv)]
            os.execve(sys.executable, line, {**os.environ, "HF_HUB_OFFLINE": "1"})
        termios.tcsetwinsize(terminal, (30, 100))
        shown = b""
        with suppress(OSError):  # what reading says once the other side is closed
            while chunk := os.read(terminal, 65536):
                shown += chunk
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, shown
        lines = shown.decode().replace("\r\n", "\n").split("\n")
        said = [line for line in lines if "pruning:" not in line and line.strip()]
        assert said[0] == "LlamaForCausalLM: 42 matrices to prune with wanda, 2:4"
        assert said[1].startswith("calibrating on 400 windows of 16 tokens from")
        assert said[-1].startswith("all ")
        assert not [x for x in said if re.search("warn|deprecat|it/s|Loading|Writing", x, re.I)]
        (bar,) = (line for line in lines if "pruning:" in line)
        drawn = [part for part in bar.split("\r") if part.strip()]
        assert "pruning: 100%|" in drawn[-1]
        assert "block 6/6" in drawn[-1]
        shares = [int(found[1]) for part in drawn if (found := re.search(r"(\d+)%", part))]
        assert shares == sorted(shares)


PEAK = (
    "import re, sys; from pathlib import Path; from llmprune.cli import main; "
    "status = main(sys.argv[1:]); text = Path('/proc/self/status').read_text(); "
    "print('peak', int(re.search(r'VmHWM:\\s+(\\d+)', text)[1]) * 1024); sys.exit(status)"
)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak from /proc")
def test_memory_is_one_block(tmp_path, root, ids):
    """16 blocks of 2.6M weights: 10.5 MB each in float32, 168 MB in all; 1 block is the base."""
    shape = {"hidden_size": 256, "intermediate_size": 3072, "num_key_value_heads": 2}
    peaks = {}
    for name, blocks, save in (("base", 1, True), ("streamed", 16, True), ("whole", 16, False)):
        model = build("llama", tmp_path / name, num_hidden_layers=blocks, **shape)
        argv = ["--model", model, "--calibration", ids, "--sparsity", "2:4", "--no-eval", "--quiet"]
        argv += ["--save", tmp_path / f"{name}-out"] if save else []
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *map(str, argv)],
            cwd=root, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        peaks[name] = int(done.stdout.split()[-1])
    block = 4 * 2.6e6
    assert peaks["streamed"] - peaks["base"] < 5 * block
    assert peaks["whole"] - peaks["base"] > 12 * block  # the measure can tell


def test_a_model_on_the_hub_streams_as_a_folder_does(prune, tmp_path, monkeypatch):
    model = build("mixtral", tmp_path / "model")
    add_tokenizer(model)
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    assert prune(model, out="folder")[0] == 0
    with serving(files=files, private=False) as hub:
        point_at(monkeypatch, hub.url, str(tmp_path / "cache"))
        status, said = prune(Path("ann/tiny"), out="hub")
    assert status == 0, said
    assert "whole model" not in said
    one, two = content(tmp_path / "folder"), content(tmp_path / "hub")
    for found in (one, two):
        found["llmprune.json"]["model"].pop("name")
        del found["tokenizer_config.json"]  # transformers notes in it where it came from
    assert "tokenizer.json" in two
    assert one == two
