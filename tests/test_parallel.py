"""Runs of several processes against runs of one: the same masks, one voice, and a death that is noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from streamed import content, save_llama, save_mixtral, write_text

from llmprune import cli
from llmprune.methods.base import Share
from llmprune.parallel import ALONE, Ranks, started

HERE = Path(__file__).parent
EXACT = {  # name -> model and options; all of them in float64 sums
    "sparsegpt": ("llama", "--method sparsegpt --sparsity 0.5"),
    "sparsegpt-matrix": ("llama", "--method sparsegpt --sparsity 0.6 --within matrix"),
    "sparsegpt-2of4": ("llama", "--method sparsegpt --sparsity 2:4"),
    "wanda": ("llama", "--method wanda --sparsity 0.5"),
    "variant": ("llama", "--method wanda --sparsity 0.5 --set variant=true"),
    "magnitude": ("llama", "--method magnitude --sparsity 0.5"),
    "owl": ("llama", "--method sparsegpt --sparsity 0.6 --allocation owl"),
    "owl-mix": ("mixtral", "--method wanda --sparsity 2:4 --allocation owl"),
    "alps": ("llama", "--method alps --sparsity 0.6"),
    "alps-2of4": ("llama", "--method alps --sparsity 2:4"),
    "refit": ("llama", "--method sparsegpt --sparsity 0.6 --set refit=true"),
    "experts-alps": ("mixtral", "--method alps --sparsity 0.5"),
    "int4": ("llama", "--method sparsegpt --sparsity 2:4 --quantize int4"),
    "experts-int8": ("mixtral", "--method wanda --sparsity 0.5 --quantize int8"),
    "head": ("llama", "--method sparsegpt --sparsity 0.5 --targets lm_head 're:.*2.mlp.*'"),
    "experts": ("mixtral", "--method sparsegpt --sparsity 0.5"),
    "experts-2of4": ("mixtral", "--method wanda --sparsity 2:4"),
    # one window is measured, by one process: the sums are its own
    "fisher": (
        "llama",
        "--method sparsegpt --sparsity 0.6 --fisher --allocation fisher --fisher-set tokens=1",
    ),
    "generate": ("llama", "--method sparsegpt --sparsity 2:4 --generate 0.5"),
    # two processes have no room for the sums of a whole block, one has
    "rounds": (
        "mixtral",
        f"--method sparsegpt --sparsity 0.5 --max-memory {2 * (2**30 + 130_000)}",
    ),
}
ODD = ("sparsegpt", "wanda", "experts", "owl")  # those that three processes do as well


@dataclass
class Place:
    """A folder with tiny models and text."""

    folder: Path

    def argv(self, out: Path, model: str, options: str, *more: object) -> list[str]:
        split = [o.strip("'") for o in options.split()]
        text = self.folder / "text.txt"
        return [
            *("--model", str(self.folder / model), "--calibration", str(text), "--samples", "24"),
            *("--batch-size", "2", "--quiet", "--save", str(out), *split, *map(str, more)),
        ]

    def exact(self, name: str, out: Path, *more: object) -> list[str]:
        model, options = EXACT[name]
        return self.argv(out, model, options, "--sums", "float64", "--no-eval", *more)


def torchrun(world: int, *argv: object) -> subprocess.CompletedProcess[str]:
    """Start `world` processes on this machine, and wait for them."""
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "--nproc-per-node", str(world), *map(str, argv)],
        cwd=HERE.parent, env={**env, "PYTHONPATH": str(HERE.parent)},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def spoken(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What llmprune said, without torchrun's own lines."""
    return [line for line in done.stderr.splitlines() if line.startswith("llmprune:")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("parallel")
    save_llama(folder / "llama", torch.float32)
    save_mixtral(folder / "mixtral")
    write_text(folder / "text.txt")
    return Place(folder)


@pytest.fixture(scope="module")
def done(place: Place) -> Path:
    """Folders `1`, `2` and `3` of the results of so many processes."""
    folder = place.folder
    evaluated = ("--eval-dataset", folder / "text.txt", "--seqlen", "32")
    plain = "--method sparsegpt --sparsity 0.5"

    def commands(world: int, names: Sequence[str]) -> list[list[str]]:
        return [place.exact(name, folder / str(world) / name) for name in names]

    def more(world: int) -> list[list[str]]:
        out = folder / str(world)
        weighed = "--method sparsegpt --sparsity 0.6 --fisher --allocation fisher"
        repair = ("--repair", "--repair-set", "epochs=2", "--sums", "float64", "--no-eval")
        return [
            place.argv(out / "float32", "llama", plain, *evaluated),
            place.argv(out / "repair", "llama", plain, *repair),
            place.argv(out / "weighed", "mixtral", weighed, *repair),
        ]

    assert all(cli.main(argv) == 0 for argv in [*commands(1, list(EXACT)), *more(1)])
    for world, names in ((2, list(EXACT)), (3, ODD)):
        path = folder / f"{world}.json"
        path.write_text(json.dumps([*commands(world, names), *(more(2) if world == 2 else [])]))
        ended = torchrun(world, HERE / "ranks.py", "runs", path)
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert ended.stdout == ""
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def layers(folder: Path) -> list[dict[str, Any]]:
    """What the report says of each matrix, without clocks."""
    found = json.loads((folder / "llmprune.json").read_text())["layers"]
    return sorted(({**e, "seconds": 0} for e in found), key=lambda e: e["name"])


@pytest.mark.parametrize(
    ("world", "name"), [*((2, name) for name in EXACT), *((3, name) for name in ODD)]
)
def test_float64_sums_make_the_number_of_processes_invisible(
    done: Path, world: int, name: str
) -> None:
    one, several = (weights(done / str(w) / name) for w in (1, world))
    assert one.keys() == several.keys()
    assert [k for k in one if not torch.equal(one[k], several[k])] == []


@pytest.mark.parametrize("name", ["sparsegpt", "wanda", "magnitude"])
def test_the_report_is_that_of_one_process(done: Path, name: str) -> None:
    """The output error too: every process keeps the same tokens for it that one would."""
    for one, two in zip(layers(done / "1" / name), layers(done / "2" / name), strict=True):
        assert one == two


def test_every_expert_is_told_of_once_with_all_its_tokens(done: Path) -> None:
    one, two = (layers(done / w / "experts") for w in "12")
    assert [(e["name"], e["kept"], e["tokens"]) for e in one] == [
        (e["name"], e["kept"], e["tokens"]) for e in two
    ]


def test_float32_sums_differ_in_rounding_only(done: Path) -> None:
    one, two = weights(done / "1" / "float32"), weights(done / "2" / "float32")
    same = sum(int(((one[k] != 0) == (two[k] != 0)).sum()) for k in one)
    assert same >= 0.9999 * sum(t.numel() for t in one.values())


def test_a_repair_on_two_processes_differs_in_rounding_only(done: Path) -> None:
    """Gradients are added up over the windows of both; one process may round the sums otherwise."""
    one, two = (weights(done / world / "repair") for world in ("1", "2"))
    for key, weight in one.items():
        assert torch.equal(weight == 0, two[key] == 0), key
        torch.testing.assert_close(two[key], weight, rtol=1e-2, atol=1e-4)
    assert any(not torch.equal(one[k], w) for k, w in weights(done / "1" / "sparsegpt").items())


def test_fisher_information_of_two_processes_differs_in_rounding_only(done: Path) -> None:
    one, two = (json.loads((done / w / "weighed" / "llmprune.json").read_text()) for w in "12")
    shares = [report["allocation"]["measured"] for report in (one, two)]
    assert max(shares[0].values()) > min(shares[0].values()) + 0.1
    assert shares[1] == pytest.approx(shares[0], abs=1e-3)
    assert one["sparsity"] == two["sparsity"]
    left, right = (weights(done / w / "weighed") for w in "12")
    same = sum(int(((left[k] != 0) == (right[k] != 0)).sum()) for k in left)
    assert same >= 0.999 * sum(t.numel() for t in left.values())
    far = sum(int(((left[k] - right[k]).abs() > 1e-2).sum()) for k in left)
    assert far <= 0.001 * sum(t.numel() for t in left.values())


def test_perplexity_is_that_of_one_process(done: Path) -> None:
    one, two = (
        json.loads((done / w / "float32" / "llmprune.json").read_text())["perplexity"] for w in "12"
    )
    for name in ("dense", "pruned"):
        assert two[name]["windows"] == one[name]["windows"] > 100
        assert two[name]["perplexity"] == pytest.approx(one[name]["perplexity"], rel=1e-5)
    assert two["dense"]["perplexity"] == one["dense"]["perplexity"]


class TestADeath:
    """Rank 1 is killed behind the second of four blocks."""

    @pytest.fixture(scope="class")
    def ended(self, place: Place) -> tuple[subprocess.CompletedProcess[str], float]:
        begun = time.monotonic()
        argv = place.exact("sparsegpt", place.folder / "out")
        ended = torchrun(2, HERE / "ranks.py", "killed", "block 1", *argv)
        return ended, time.monotonic() - begun

    def test_stops_the_others_within_a_minute_and_in_one_line(
        self, ended: tuple[subprocess.CompletedProcess[str], float], place: Place
    ) -> None:
        said, seconds = ended
        assert said.returncode != 0
        assert seconds < 60
        assert len(spoken(said)) <= 1  # none where torchrun ends the other before it can notice
        assert all("another process" in line for line in spoken(said))
        assert not (place.folder / "out").exists()

    def test_another_number_of_processes_is_refused(
        self, ended: object, place: Place, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(place.exact("sparsegpt", place.folder / "out")) == 2
        assert "processes was 2 then and is 1 now" in capsys.readouterr().err

    def test_an_error_of_one_process_ends_all_with_one_line(
        self, ended: object, place: Place
    ) -> None:
        """Only rank 0 reads the journal: it refuses the other recipe while rank 1 waits."""
        argv = place.exact("wanda", place.folder / "out")
        refused = torchrun(2, "-m", "llmprune", *argv)
        assert refused.returncode != 0
        (line,) = spoken(refused)
        assert "method was sparsegpt then and is wanda now" in line

    def test_the_same_command_goes_on_to_the_same_bits(
        self, ended: object, place: Place, done: Path
    ) -> None:
        log = place.folder / "log.txt"
        argv = place.exact("sparsegpt", place.folder / "out", "--log-file", log)
        again = torchrun(2, "-m", "llmprune", *argv)
        assert again.returncode == 0, again.stderr[-3000:]
        assert "going on behind block 2 of 4" in log.read_text()
        here, peace = content(place.folder / "out"), content(done / "2" / "sparsegpt")
        assert [k for k in peace if peace[k] != here.get(k)] == []
        assert not (place.folder / ".out.unfinished").exists()


def test_more_processes_than_batches_are_refused(place: Place, tmp_path: Path) -> None:
    from llmprune.errors import ConfigError
    from llmprune.order import Job
    from llmprune.to_disk import _Run

    job = object.__new__(Job)
    object.__setattr__(job, "ranks", Ranks(0, 4))
    run = object.__new__(_Run)
    run.job = job
    with pytest.raises(ConfigError, match=r"4 processes .* make 3"):
        run._own([torch.zeros(1, 2)] * 3)


def test_shares_follow_each_other_and_differ_by_one_at_most() -> None:
    for world in (1, 2, 3, 7):
        for count in (0, 1, 6, 7, 50):
            spans = Ranks(0, world).spans(count)
            assert [i for s in spans for i in range(count)[s]] == list(range(count))
            sizes = [s.stop - s.start for s in spans]
            assert max(sizes) - min(sizes) <= 1


def test_places_are_counted_from_the_first_own_row() -> None:
    places = torch.tensor([[0, 5], [3, 1], [4, 2], [6, 0]])
    assert Share(7, slice(3, 6)).mine(places).tolist() == [[0, 1], [1, 2]]
    assert Share(7).mine(places).tolist() == places.tolist()


def test_a_process_by_itself_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert started() is ALONE
    tensor = torch.arange(3)
    ALONE.add_up([tensor])
    ALONE.hand_out(tensor, 0)
    assert (ALONE.tell("x"), ALONE.gather("x"), tensor.tolist()) == ("x", ["x"], [0, 1, 2])
    code = (
        "import sys; from llmprune.parallel import joined\n"
        "with joined(): pass\n"
        "assert not {m for m in sys.modules if m == 'torch' or m.startswith('torch.')}"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE.parent).returncode == 0
