"""`--format sparse` of a run: what `convert` makes of the dense result, wherever the run was ended."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import streamed
from hub_server import point_at, serving
from streamed import Runs, content, same
from test_convert import same_tensors, unpacked

from llmprune import job, workplace
from llmprune.checkpoint import packing, rewrite
from llmprune.checkpoint.convert import convert
from llmprune.checkpoint.inspect import inspect
from llmprune.checkpoint.shards import Shards
from llmprune.cli import main
from llmprune.errors import NotByBlock
from llmprune.workplace import Workplace

OPTIONS = ("--method", "magnitude", "--sparsity", "2:4", "--no-eval", "--max-shard-size", 30_000)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return streamed.save_llama(tmp_path_factory.mktemp("llama") / "model")


def runs_in(folder: Path, model: Path) -> Runs:
    text = folder.parent / f"{folder.name}.txt"
    return Runs(folder, model, streamed.write_text(text), [*OPTIONS, "--format", "sparse"])


@pytest.fixture
def runs(tmp_path: Path, model: Path) -> Runs:
    (tmp_path / "here").mkdir()
    return runs_in(tmp_path / "here", model)


@pytest.fixture(scope="module")
def peace(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The result of a run that nothing disturbed."""
    return streamed.peaceful(
        lambda folder: runs_in(folder, model), tmp_path_factory.mktemp("peace")
    )


def test_it_is_what_convert_makes_of_the_dense_one(runs: Runs, peace: Path) -> None:
    dense = runs.folder / "dense"
    assert runs("--format", "dense", "--save", dense) == 0
    convert(dense, runs.out, "sparse", max_shard_size=30_000)
    one, two = content(runs.out), content(peace)
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    assert len([name for name in one if name.endswith(".safetensors")]) > 1
    card = (peace / "README.md").read_text()
    front, _, rest = card.removeprefix("---\n").partition("---\n")
    assert "- llmprune-sparse-format" in front
    assert rest.strip().splitlines()[0].startswith("> **This checkpoint needs `import llmprune`.**")
    assert "| 28 packed matrices | " in card
    assert "stored like any other weight" not in card
    assert inspect(peace).pattern == "2:4"


STEPS: dict[str, tuple[Any, str]] = {
    "counting": (packing, "measure"),
    "writing": (Shards, "write_packed"),
    "comparing": (rewrite, "same_bits"),
    "renaming": (Workplace, "put_in_place"),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_run_that_is_ended_while_it_packs_goes_on(
    runs: Runs, peace: Path, capsys: pytest.CaptureFixture[str], step: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        where, name = STEPS[step]
        plain, calls = getattr(where, name), []

        def stops(*args: Any, **options: Any) -> Any:
            calls.append(args)
            if len(calls) == (1 if step == "renaming" else 5):
                raise KeyboardInterrupt
            return plain(*args, **options)

        patch.setattr(where, name, stops)
        assert runs() == 130
    assert not runs.out.exists()
    assert "goes on behind it" in capsys.readouterr().err
    assert runs() == 0
    assert "(4 blocks finished)" in capsys.readouterr().err
    same(runs.out, peace)
    assert runs.leftovers() == []


KILLED = """
import os, signal, sys
from llmprune.cli import main
from llmprune.checkpoint.shards import Shards
from llmprune import workplace
plain = Shards.write_packed
def write(self, key, pieces):
    plain(self, key, pieces)
    if "layers.2" in key:
        os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "writing":
    Shards.write_packed = write
put = workplace.put_in_place
def renamed(*args):
    put(*args)
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "renamed":
    workplace.put_in_place = renamed
main(sys.argv[2:])
"""


def killed(runs: Runs, when: str) -> None:
    argv = [sys.executable, "-c", KILLED, when, *map(str, runs.argv)]
    assert subprocess.run(argv, capture_output=True).returncode == -signal.SIGKILL


def test_kill_9_while_it_packs(runs: Runs, peace: Path) -> None:
    killed(runs, "writing")
    assert (runs.unfinished / workplace.PACKED).is_dir()
    assert runs() == 0
    same(runs.out, peace)
    assert runs.leftovers() == []


def test_kill_9_behind_the_rename(
    runs: Runs, peace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The result is in its place and whole; what is left of the run goes with the next command."""
    killed(runs, "renamed")
    same(runs.out, peace)
    assert runs.unfinished.is_dir()
    assert runs() == 2
    assert "exists; choose another folder" in capsys.readouterr().err
    assert runs.leftovers() == []


def test_a_killed_run_is_not_taken_for_one_in_place(runs: Runs, peace: Path) -> None:
    """With --overwrite there is a target all the time."""
    shutil.copytree(peace, runs.out)
    (runs.out / "README.md").unlink()
    runs.argv.append("--overwrite")
    killed(runs, "writing")
    workplace.settle(runs.out)
    assert (runs.unfinished / "checkpoint").is_dir()
    assert runs() == 0
    assert (runs.out / "README.md").is_file()
    same(runs.out, peace)
    assert runs.leftovers() == []


def test_a_model_that_is_pruned_in_memory(
    runs: Runs, peace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise NotByBlock("not by block")

    monkeypatch.setattr(job, "run_to_disk", refuse)
    assert runs() == 0
    same_tensors(unpacked(runs.out)[0], unpacked(peace)[0])
    assert unpacked(runs.out)[1] == unpacked(peace)[1]
    told = [json.loads((p / "sparse.json").read_text()) for p in (runs.out, peace)]
    assert told[0] == told[1]
    assert not (runs.out / "dense").exists()
    assert "needs `import llmprune`" in (runs.out / "README.md").read_text()
    assert runs.leftovers() == []


def test_pruning_a_sparse_checkpoint_further(runs: Runs, peace: Path) -> None:
    dense = runs.folder / "dense"
    convert(peace, dense, "dense")
    for source, out in ((peace, "a"), (dense, "b")):
        assert runs("--model", source, "--sparsity", "1:4", "--save", runs.folder / out) == 0
    one, two = (unpacked(runs.folder / out) for out in "ab")
    same_tensors(one[0], two[0])
    assert one[1] == two[1]
    found = inspect(runs.folder / "a")
    assert found.pattern == "1:4"
    assert found.sparse is not None
    assert found.sparse["ratio"] == pytest.approx(0.25 + 1 / 16)


def test_the_card_of_a_pushed_one_names_its_repository(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as hub:
        point_at(monkeypatch, hub.url, str(runs.folder / "cache"))
        assert runs("--push-to-hub", "ann/small") == 0
    card = (runs.out / "README.md").read_text()
    assert 'llmprune.load("ann/small")' in card
    assert "convert ann/small DIR" in card


def test_what_is_refused_before_a_weight_is_read(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(a) for a in runs.argv if a not in ("--save", runs.out)]) == 2
    assert "name one" in capsys.readouterr().err
    assert runs("--sparsity", "0.05") == 2
    assert "makes nothing smaller; raise the sparsity above 0.0625" in capsys.readouterr().err
    assert runs.leftovers() == []


def test_the_room_that_both_need(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `convert` would need comes on top of the dense files."""
    usage = namedtuple("usage", "total used free")
    dense, room = runs.folder / "dense", 100_000  # 79 kB dense, 51 kB packed
    monkeypatch.setattr(workplace.shutil, "disk_usage", lambda path: usage(room, 0, room))
    assert runs("--format", "dense", "--save", dense) == 0
    assert runs() == 2
    assert "kB to pack it" in capsys.readouterr().err
    room = 1_000_000
    assert runs() == 0
