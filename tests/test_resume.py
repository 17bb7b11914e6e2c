"""A run that was ended, however hard, goes on behind its last finished block, to the same bytes."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import streamed
from safetensors import safe_open
from streamed import Runs, flip, interrupted, same

from llmprune import stream, to_disk
from llmprune.checkpoint.journal import Journal

LLAMA = ("--no-eval", "--max-shard-size", 30_000)
COMMANDS = {
    "wanda": ("llama", "--method", "wanda", "--sparsity", "2:4"),
    "sparsegpt": ("llama", "--method", "sparsegpt", "--sparsity", "0.5"),
    "magnitude": ("llama", "--method", "magnitude", "--sparsity", "0.5"),
    "repair": (
        *("llama", "--method", "sparsegpt", "--sparsity", "0.5"),
        *("--repair", "--repair-set", "epochs=2"),
    ),
    "experts": ("mixtral", "--method", "wanda", "--sparsity", "2:4"),
}


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> dict[str, Path]:
    """Models and a text."""
    folder = tmp_path_factory.mktemp("sources")
    return {
        "llama": streamed.save_llama(folder / "llama"),
        "mixtral": streamed.save_mixtral(folder / "mixtral"),
        "text": streamed.write_text(folder / "words.txt"),
    }


@pytest.fixture(scope="session")
def peace(sources, tmp_path_factory):
    """The result of a run that nothing disturbed, by name of the command."""
    done: dict[str, Path] = {}

    def result(name: str) -> Path:
        if name not in done:
            runs = start(name, sources, tmp_path_factory.mktemp(name))
            assert runs() == 0
            assert runs.leftovers() == []
            done[name] = runs.out
        return done[name]

    return result


def start(name: str, sources: dict[str, Path], folder: Path) -> Runs:
    model, *options = COMMANDS[name]
    return Runs(folder, sources[model], sources["text"], [*options, *LLAMA])


@pytest.fixture
def wanda(sources, tmp_path) -> Runs:
    return start("wanda", sources, tmp_path)


def goes_on(runs: Runs, capsys, peace: Path) -> str:
    """The same command again ends well, with the same bytes, and leaves nothing; what it said."""
    capsys.readouterr()
    assert runs() == 0
    said = capsys.readouterr().err
    assert "taking up the unfinished run" in said
    same(runs.out, peace)
    assert runs.leftovers() == []
    return said


class TestGoingOn:
    @pytest.mark.parametrize("name", COMMANDS)
    @pytest.mark.parametrize("step", ["copy", "block 0", "block 2", "block 3"])
    def test_the_same_command_goes_on_to_the_same_bytes(
        self, sources, tmp_path, capsys, peace, name, step
    ):
        runs = start(name, sources, tmp_path)
        with interrupted(step):
            assert runs() == 130
        assert not runs.out.exists()
        if step == "copy":
            assert runs.leftovers() == []  # nothing is finished yet
            return
        said = goes_on(runs, capsys, peace(name))
        assert f"({int(step[-1]) + 1} blocks finished)" in said

    def test_finished_blocks_are_not_done_again(self, wanda, monkeypatch):
        with interrupted("block 2"):
            wanda()
        done = []
        prune = stream.prune_block
        monkeypatch.setattr(
            stream, "prune_block", lambda *args: done.append(args[1]) or prune(*args)
        )
        assert wanda() == 0
        assert done == [3]

    def test_restart_discards(self, wanda, capsys, peace):
        with interrupted("block 2"):
            wanda("--seed", 1)
        assert wanda("--restart") == 0
        assert "taking up" not in capsys.readouterr().err
        same(wanda.out, peace("wanda"))

    def test_memory_may_change(self, wanda, capsys, peace):
        with interrupted("block 1"):
            wanda()
        wanda.argv += ["--max-memory", "1100MB"]
        goes_on(wanda, capsys, peace("wanda"))

    def test_a_run_that_removes_nothing_leaves_nothing(self, wanda, capsys):
        assert wanda("--sparsity", "0.001") == 2
        assert "raise the sparsity" in capsys.readouterr().err
        assert wanda.leftovers() == []


class TestSomethingElse:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (("--sparsity", "0.5"), "sparsity was 2:4 then and is 0.5 now"),
            (("--method", "magnitude"), "method was wanda then and is magnitude now"),
            (("--method", "sparsegpt"), "method was wanda then and is sparsegpt now"),
            (("--within", "matrix"), "within was row then and is matrix now"),
            (("--targets", "q_proj"), "targets was [] then and is ['q_proj'] now"),
            (("--repair",), "repair was False then and is True now"),
            (("--seed", "1"), "seed was 0 then and is 1 now"),
            (("--samples", "16"), "samples was 40 then and is 16 now"),
            (("--seqlen", "32"), "seqlen was 64 then and is 32 now"),
            (("--dtype", "bfloat16"), "dtype was auto then and is bfloat16 now"),
            (("--max-shard-size", "1MB"), "max_shard_size was 30000 then and is 1000000 now"),
        ],
    )
    def test_a_changed_recipe_is_refused_with_the_difference(self, wanda, capsys, change, words):
        if change[0] == "--within":
            wanda.argv += ["--sparsity", "0.5"]
        with interrupted("block 1"):
            wanda()
        assert wanda(*change) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert words in said
        assert "--restart" in said
        assert wanda.unfinished.exists()

    def test_a_changed_weight_config_or_text_is_refused(self, sources, tmp_path, capsys):
        model, text = tmp_path / "model", tmp_path / "words.txt"
        shutil.copytree(sources["llama"], model)
        shutil.copy(sources["text"], text)
        (tmp_path / "runs").mkdir()
        runs = Runs(tmp_path / "runs", model, text, ["--sparsity", "2:4", *LLAMA])
        with interrupted("block 1"):
            runs()
        weights = model / "model.safetensors"
        stat = weights.stat()
        flip(weights, stat.st_size - 5)
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as rsync or cp -p may leave it
        self.refused(runs, capsys, "the weights in model.safetensors are not what they were then")
        flip(weights, stat.st_size - 5)
        plain = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**plain, "rms_norm_eps": 1e-5}))
        self.refused(runs, capsys, "rms_norm_eps was 1e-06 then and is 1e-05 now")
        (model / "config.json").write_text(json.dumps(plain))
        text.write_text(text.read_text().replace("w8 ", "w9 "))
        self.refused(runs, capsys, "the calibration text is not what it was then")
        shutil.copy(sources["text"], text)
        assert runs() == 0

    @staticmethod
    def refused(runs: Runs, capsys, words: str) -> None:
        capsys.readouterr()
        assert runs() == 2
        assert words in capsys.readouterr().err.splitlines()[-1]

    def test_two_at_once(self, wanda, capsys):
        with interrupted("block 1"):
            wanda()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)  # the lock does not go by that
            first = Journal(wanda.unfinished, Journal.header(wanda.unfinished), restart=False)
        assert wanda() == 2
        assert "another process is at work" in capsys.readouterr().err.splitlines()[-1]
        first.close()
        assert wanda() == 0


def tensor_at(shard: Path, key: str) -> int:
    """First byte of a tensor in a file."""
    head = shard.read_bytes()
    length = int.from_bytes(head[:8], "little")
    return 8 + length + json.loads(head[8 : 8 + length])[key]["data_offsets"][0]


def shard_with(runs: Runs, key: str) -> Path:
    for path in runs.shards():
        with safe_open(path, framework="pt") as file:
            if key in file.keys():  # noqa: SIM118 - it is no dictionary
                return path
    raise AssertionError(key)


UP = "model.layers.1.mlp.up_proj.weight"


class TestDamage:
    """What a disk or a crash may have done to an unfinished run: found, named, done again."""

    @pytest.fixture
    def stopped(self, wanda) -> Runs:
        with interrupted("block 2"):
            wanda()
        return wanda

    def test_a_flipped_bit_in_a_pruned_tensor(self, stopped, capsys, peace):
        shard = shard_with(stopped, UP)
        flip(shard, tensor_at(shard, UP) + 70)
        said = goes_on(stopped, capsys, peace("wanda"))
        assert f"{shard.name} is damaged at {UP}: block 1 is done again" in said

    def test_a_flipped_bit_in_a_copied_tensor(self, stopped, capsys, peace):
        key = "model.embed_tokens.weight"
        shard = shard_with(stopped, key)
        flip(shard, tensor_at(shard, key) + 3)
        said = goes_on(stopped, capsys, peace("wanda"))
        assert f"{shard.name} is damaged at {key}: copy is done again" in said

    def test_a_flipped_bit_in_a_header(self, stopped, capsys, peace):
        flip(stopped.shards()[0], 20)
        goes_on(stopped, capsys, peace("wanda"))

    def test_a_truncated_shard(self, stopped, capsys, peace):
        shard = shard_with(stopped, UP)
        os.truncate(shard, tensor_at(shard, UP) + 100)
        said = goes_on(stopped, capsys, peace("wanda"))
        assert f"{shard.name} is damaged at" in said
        assert "block 1 is done again" in said

    def test_a_shard_that_is_gone(self, stopped, capsys, peace):
        shard_with(stopped, UP).unlink()
        assert "block 1 is done again" in goes_on(stopped, capsys, peace("wanda"))

    def test_a_damaged_block_of_a_method_without_data_alone_is_done_again(
        self, sources, tmp_path, capsys, peace, monkeypatch
    ):
        runs = start("magnitude", sources, tmp_path)
        with interrupted("block 2"):
            runs()
        shard = shard_with(runs, UP)
        flip(shard, tensor_at(shard, UP))
        goes_on(runs, capsys, peace("magnitude"))

    @pytest.mark.parametrize("how", ["flipped", "short", "gone"])
    def test_hidden_states(self, stopped, capsys, peace, how):
        hidden = max(stopped.unfinished.glob("hidden-*.bin"))  # of block 2
        if how == "flipped":
            flip(hidden, 5000)
        elif how == "short":
            os.truncate(hidden, 5000)
        else:
            hidden.unlink()
        said = goes_on(stopped, capsys, peace("wanda"))
        assert f"{hidden.name} is damaged: all blocks are done again" in said

    def test_an_end_while_blocks_are_done_again_loses_only_the_block_in_hand(
        self, stopped, capsys, peace
    ):
        hidden = max(stopped.unfinished.glob("hidden-*.bin"))  # of block 2
        flip(hidden, 0)
        with interrupted("block 0"):
            assert stopped() == 130
        said = goes_on(stopped, capsys, peace("wanda"))
        assert "going on behind block 1 of 4" in said
        assert "damaged" not in said

    def test_a_torn_last_line_of_the_journal(self, stopped, capsys, peace):
        journal = stopped.unfinished / "journal.jsonl"
        os.truncate(journal, journal.stat().st_size - 20)
        said = goes_on(stopped, capsys, peace("wanda"))
        assert "(2 blocks finished)" in said

    def test_a_damaged_line_of_the_journal(self, stopped, capsys, peace):
        journal = stopped.unfinished / "journal.jsonl"
        lines = journal.read_bytes().splitlines(keepends=True)
        assert b'"step": "block 0"' in lines[2]
        flip(journal, len(b"".join(lines[:2])) + 40)
        said = goes_on(stopped, capsys, peace("wanda"))
        assert "line 3 of" in said
        assert "(2 blocks finished)" in said

    @pytest.mark.parametrize("how", ["empty", "first line"])
    def test_a_journal_of_which_nothing_can_be_known(self, stopped, capsys, peace, how):
        journal = stopped.unfinished / "journal.jsonl"
        if how == "empty":
            os.truncate(journal, 0)
        else:
            flip(journal, 30)
        assert stopped() == 0
        assert ("line 1 of" in capsys.readouterr().err) == (how != "empty")
        same(stopped.out, peace("wanda"))
        assert stopped.leftovers() == []


class TestSignals:
    def test_sigterm_finishes_the_block_in_hand(self, wanda, capsys, peace, monkeypatch):
        prune = stream.prune_block

        def asked(*args):
            if args[1] == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return prune(*args)

        with monkeypatch.context() as patch:
            patch.setattr(stream, "prune_block", asked)
            assert wanda() == 143
        said = capsys.readouterr().err.splitlines()[-1]
        assert "stopped behind block 2" in said
        assert "the same command goes on" in said
        assert "going on behind block 2 of 4" in goes_on(wanda, capsys, peace("wanda"))
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    def test_sigterm_before_the_first_block_leaves_nothing(self, wanda, capsys, monkeypatch):
        monkeypatch.setattr(
            stream, "check_walk", lambda *args: os.kill(os.getpid(), signal.SIGTERM)
        )
        assert wanda() == 143
        assert "nothing is left" in capsys.readouterr().err.splitlines()[-1]
        assert wanda.leftovers() == []

    @pytest.mark.parametrize("which", ["dense", "pruned"])
    def test_sigterm_during_evaluation(self, wanda, sources, capsys, monkeypatch, which):
        measure = to_disk._Run._measure

        def asked(self, name, *args):
            if name == which:
                os.kill(os.getpid(), signal.SIGTERM)
            return measure(self, name, *args)

        wanda.argv += ["--eval-dataset", sources["text"]]
        wanda.argv.remove("--no-eval")
        with monkeypatch.context() as patch:
            patch.setattr(to_disk._Run, "_measure", asked)
            assert wanda() == 143
        assert wanda.leftovers() == ([] if which == "dense" else [".out.unfinished"])
        assert ("behind block 4" in capsys.readouterr().err) == (which == "pruned")
        assert wanda() == 0
        assert wanda.leftovers() == []

    def test_a_run_that_died_before_it_could_tidy_up(self, wanda, capsys, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "discard", lambda self: self.close())
            assert wanda() == 0
        assert wanda.leftovers() == [".out.unfinished"]
        assert wanda() == 2
        assert "out exists" in capsys.readouterr().err.splitlines()[-1]
        assert wanda.leftovers() == []


def fill(folder: Path) -> Path:
    """A file that takes all the room that is left."""
    ballast = folder / "ballast"
    ballast.touch()
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**12))
    assert shutil.disk_usage(folder).free < 2**12
    return ballast


@pytest.fixture
def small_disk(tmp_path):
    """Gives a disk of the size asked for; skips where none can be mounted."""
    mounted = []

    def make(count: int) -> Path:
        place = tmp_path / f"disk-{len(mounted)}"
        place.mkdir()
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={count}", "tmpfs", str(place)],
            capture_output=True,
        )
        if made.returncode:
            pytest.skip("no tmpfs can be mounted here")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


class TestFullDisk:
    def test_is_known_at_the_start(self, sources, small_disk, capsys):
        """Room for the model (about 100 kB), and not for its hidden states (2 x 327,680 bytes)."""
        runs = start("wanda", sources, small_disk(700_000))
        assert runs() == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert re.search(r"out needs \d+\.\d kB \(655.4 kB for hidden states", said)
        assert re.search(r"its disk has \d+\.\d kB free", said)
        assert runs.leftovers() == []

    @pytest.mark.parametrize("moment", ["hidden", "tokenizer"])
    def test_in_the_middle(self, sources, small_disk, capsys, peace, monkeypatch, moment):
        disk = small_disk(4_000_000)
        runs = start("wanda", sources, disk)
        prune, side_files = stream.prune_block, to_disk.write_side_files

        def filling(*args):
            if args[1] == 2:
                fill(disk)
            return prune(*args)

        with monkeypatch.context() as patch:
            if moment == "hidden":
                patch.setattr(stream, "prune_block", filling)
            else:
                patch.setattr(to_disk, "write_side_files", lambda *a: (fill(disk), side_files(*a)))
            assert runs() == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert "No space left on device" in said
        assert "make room and give the same command again" in said
        assert not runs.out.exists()
        assert runs() == 2  # still full: nothing is lost by trying
        capsys.readouterr()
        (disk / "ballast").unlink()
        goes_on(runs, capsys, peace("wanda"))

    def test_a_limit_on_file_sizes(self, wanda, capsys, peace):
        """The shards are below it, the hidden states are not."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
        try:
            assert wanda() == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "File too large" in capsys.readouterr().err.splitlines()[-1]
        assert wanda.leftovers() == []
        assert wanda() == 0
        same(wanda.out, peace("wanda"))


def test_kill_9(sources, tmp_path, root):
    """At moments spread over the run; benchmarks/results/kill-9.json has fifty random ones each."""
    common = ["--calibration", sources["text"], "--samples", 40, "--eval-dataset", sources["text"]]
    runs = [
        ["--method", "wanda", "--sparsity", "2:4", *common],
        ["--method", "magnitude", "--sparsity", "0.5", *common],
    ]
    done = subprocess.run(
        [
            *(sys.executable, "benchmarks/kill.py", "--model", str(sources["llama"])),
            *("--kills", "3", "--even", "--scratch", str(tmp_path), "--"),
            *(str(a) for a in runs[0]),
            "--and",
            *(str(a) for a in runs[1]),
        ],
        cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["different"] for row in rows] == [[], []]
    assert all(row["kills"] >= 3 for row in rows)
