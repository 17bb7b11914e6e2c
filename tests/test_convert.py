"""Dense to sparse and back: bit for bit, in bounded memory, the same bytes each time, or one line why not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_files import bits, equal
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from streamed import save_llama
from test_sparse_format import thinned
from test_stream import BUILDS, build
from torch import Tensor

from llmprune.checkpoint import census, shards, target
from llmprune.checkpoint.convert import convert
from llmprune.checkpoint.inspect import inspect
from llmprune.cli import main
from llmprune.errors import CheckpointError, ConfigError, LLMPruneError

UP = "model.layers.{}.mlp.up_proj.weight"
SHAPES = [(1, 64), (64, 1), (37, 41), (64, 128), (300, 16)]


def folder_of(place: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """A checkpoint of a family that nobody knows."""
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps({"model_type": "odd", **config}))
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return place


def odd_tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    """Matrices of every awkward shape, with minus zero, infinity, a NaN and rows of zeros; other tensors."""
    found = {UP.format(i): thinned(shape, dtype, 0.8) for i, shape in enumerate(SHAPES)}
    experts = thinned((4, 24, 40), dtype)
    experts[1] = 0
    experts[2, ::2] = 0
    found["model.layers.9.mlp.experts.gate_up_proj"] = experts
    found[UP.format(10)] = torch.zeros(16, 16, dtype=dtype)
    found[UP.format(11)] = torch.randn(16, 16).to(dtype)  # nothing to gain
    found["model.embed_tokens.weight"] = thinned((64, 16), dtype)
    found["model.layers.0.norm.weight"] = torch.zeros(64, dtype=dtype)
    found["model.layers.0.count"] = torch.tensor(3)
    found["model.layers.0.flags"] = torch.tensor([True, False])
    found["model.layers.0.table"] = torch.arange(6, dtype=torch.int64).reshape(2, 3)
    return found


def unpacked(folder: Path) -> tuple[dict[str, Tensor], set[str]]:
    """Every tensor of a sparse folder, and the names of the packed ones, read as docs/format.md says."""
    found: dict[str, Tensor] = {}
    packed: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        content = load_file(path)
        with safe_open(path, "pt") as file:
            about = file.metadata()
        if "llmprune.packed" not in about:
            found |= content
            continue
        assert about["llmprune.format_version"] == "1"
        entries = json.loads(about["llmprune.packed"])
        guard = content.pop(min(entries))
        assert guard.shape == (0,)
        for name, entry in entries.items():
            values, bitmap = content.pop(name + "_values"), content.pop(name + "_bitmap")
            shape = entry["shape"]
            keep = np.unpackbits(bitmap.numpy(), axis=-1, bitorder="little")[..., : shape[-1]]
            words = bits(values).reshape(-1, values.element_size())
            dense = torch.zeros(*shape, values.element_size(), dtype=torch.uint8)
            dense[torch.from_numpy(keep).bool()] = words
            found[name] = dense.view(values.dtype).reshape(shape)
            assert guard.dtype == values.dtype or name != min(entries)
            packed.add(name)
        found |= content
    return found, packed


def same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [k for k in left if not equal(left[k], right[k])] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("at_once", [64, census.AT_ONCE])
def test_there_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, at_once: int
) -> None:
    monkeypatch.setattr(census, "AT_ONCE", at_once)
    tensors = odd_tensors(dtype)
    dense = folder_of(tmp_path / "dense", tensors)
    done = convert(dense, tmp_path / "sparse", "sparse")
    found, packed = unpacked(tmp_path / "sparse")
    same_tensors(found, tensors)
    gained = {k for k in tensors if ".layers." in k and tensors[k].ndim > 1}
    assert packed == gained - {UP.format(11), "model.layers.0.table"}
    want = {
        "matrices": len(packed),
        "dense_bytes": sum(tensors[k].nbytes for k in packed),
        "packed_bytes": sum(
            load.nbytes
            for path in (tmp_path / "sparse").glob("*.safetensors")
            for key, load in load_file(path).items()
            if key.endswith(("_values", "_bitmap"))
        ),
    }
    told = json.loads((tmp_path / "sparse/sparse.json").read_text())
    assert {k: told[k] for k in want} == want
    assert {k: done.as_dict()[k] for k in want} == want
    assert told["format_version"] == 1
    back = convert(tmp_path / "sparse", tmp_path / "back", "dense")
    same_tensors(load_file(tmp_path / "back/model.safetensors"), tensors)
    assert back.sizes == done.sizes
    assert not (tmp_path / "back/sparse.json").exists()
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config == json.loads((dense / "config.json").read_text())


def halved(share: float, columns: int = 1024) -> Tensor:
    """Each row of [64, columns] with exactly a share of its weights gone."""
    torch.manual_seed(0)
    weight = torch.randn(64, columns).abs() + 1
    gone = torch.rand(64, columns).argsort(1)[:, : round(share * columns)]
    return weight.scatter_(1, gone, 0).bfloat16()


@pytest.mark.parametrize(("share", "ratio"), [(0.5, 0.5625), (0.7, 0.3625)])
def test_the_size_of_the_file(tmp_path: Path, share: float, ratio: float) -> None:
    """9 bits a weight at half of bfloat16; the header of the file comes on top, and nothing else."""
    matrices = {UP.format(i): halved(share, 1000) for i in range(8)}  # 0.7 of 1000 is whole
    convert(folder_of(tmp_path / "dense", matrices), tmp_path / "sparse", "sparse")
    path = tmp_path / "sparse/model.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    dense = sum(m.nbytes for m in matrices.values())
    assert path.stat().st_size - header == ratio * dense
    assert header < 3000


@pytest.fixture(scope="module", params=sorted(BUILDS))
def pruned(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Path:
    """A checkpoint of a family, pruned 2:4 by magnitude."""
    place = tmp_path_factory.mktemp(request.param)
    dense = build(request.param, place / "dense")
    argv = ["--model", dense, "--sparsity", "2:4", "--method", "magnitude", "--no-eval", "--quiet"]
    assert main([*map(str, argv), "--save", str(place / "pruned")]) == 0
    return place / "pruned"


def test_every_family(pruned: Path, tmp_path: Path) -> None:
    convert(pruned, tmp_path / "sparse", "sparse", max_shard_size=20_000)
    before = {k: v for p in pruned.glob("*.safetensors") for k, v in load_file(p).items()}
    same_tensors(unpacked(tmp_path / "sparse")[0], before)
    one, two = inspect(pruned), inspect(tmp_path / "sparse")
    assert (one.sparsity, one.pattern) == (two.sparsity, two.pattern)
    report = json.loads((pruned / "llmprune.json").read_text())
    told = json.loads((tmp_path / "sparse/sparse.json").read_text())
    assert told["patterns"] == {"2:4": told["matrices"]}
    assert told["matrices"] >= sum(not layer["skipped"] for layer in report["layers"]) / 8
    convert(tmp_path / "sparse", tmp_path / "back", "dense")
    after = {
        k: v for p in (tmp_path / "back").glob("*.safetensors") for k, v in load_file(p).items()
    }
    same_tensors(after, before)
    for name in ("config.json", "llmprune.json", "README.md"):
        assert (tmp_path / "back" / name).read_bytes() == (pruned / name).read_bytes()


def entries(folder: Path) -> dict[str, dict[str, Any]]:
    """What the headers say of packed matrices."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= json.loads(file.metadata().get("llmprune.packed", "{}"))
    return found


def test_the_pattern_that_is_named(tmp_path: Path) -> None:
    """The recipe's where it holds (2:6 is not looked for otherwise), else the tightest, else none."""
    torch.manual_seed(0)
    keep = torch.rand(32, 16, 6).argsort(-1) < 2
    six = (torch.randn(32, 16, 6).abs() + 1) * keep
    four = torch.ones(32, 24, 4) * torch.tensor([1, 0, 0, 1])
    matrices = {
        UP.format(0): six.reshape(32, 96),
        UP.format(1): four.reshape(32, 96),
        UP.format(2): halved(0.5, 96).float(),
        UP.format(3): four.reshape(32, 96).T.contiguous(),
    }
    for recipe, want in (
        ({"recipe": {"sparsity": "2:6"}}, ["2:6", "2:4", "unstructured", "2:4"]),
        ({"recipe": {"sparsity": "3:4"}}, ["unstructured", "3:4", "unstructured", "3:4"]),
        ({"recipe": {"sparsity": "0.5"}}, ["unstructured", "2:4", "unstructured", "2:4"]),
        ({"recipe": []}, ["unstructured", "2:4", "unstructured", "2:4"]),
    ):
        dense = folder_of(tmp_path / "in", matrices)
        (dense / "llmprune.json").write_text(json.dumps(recipe))
        convert(dense, tmp_path / "out", "sparse")
        found = entries(tmp_path / "out")
        assert [found[UP.format(i)]["pattern"] for i in range(4)] == want
        assert found[UP.format(3)]["axis"] == "columns"
        shutil.rmtree(dense)
        shutil.rmtree(tmp_path / "out")


def test_a_minus_zero_is_kept_and_counts(tmp_path: Path) -> None:
    """By value this is 2:4; the bits keep three of a group."""
    weight = torch.tensor([[1.0, 0.0, 0.0, 1.0]]).repeat(32, 8)
    weight[3, 1] = -0.0
    convert(folder_of(tmp_path / "in", {UP.format(0): weight}), tmp_path / "out", "sparse")
    assert entries(tmp_path / "out")[UP.format(0)]["pattern"] == "3:4"
    same_tensors(unpacked(tmp_path / "out")[0], {UP.format(0): weight})


def test_twice_is_the_same_bytes(tmp_path: Path) -> None:
    """However the source is cut into files."""
    dense = folder_of(tmp_path / "in", odd_tensors(torch.bfloat16))
    content = load_file(dense / "model.safetensors")
    cut = folder_of(tmp_path / "cut", {})
    (cut / "model.safetensors").unlink()
    for i, key in enumerate(sorted(content, reverse=True)):
        save_file({key: content[key]}, cut / f"part-{i}.safetensors")
    for source, out in ((dense, "a"), (dense, "b"), (cut, "c")):
        convert(source, tmp_path / out, "sparse", max_shard_size=4000)
    found = [{p.name: p.read_bytes() for p in sorted((tmp_path / out).iterdir())} for out in "abc"]
    assert len(found[0]) > 5
    assert found[0] == found[1] == found[2]


def test_shards_hold_whole_matrices(tmp_path: Path) -> None:
    matrices = {UP.format(i): halved(0.5, 64) for i in range(12)}  # 8192 bytes dense, 4608 packed
    plain = {"model.embed_tokens.weight": torch.randn(40, 50)}
    dense = folder_of(tmp_path / "in", matrices | plain)
    convert(dense, tmp_path / "out", "sparse", max_shard_size=2 * 4608)
    table = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    for name in matrices:
        assert table[name + "_values"] == table[name + "_bitmap"]
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 1 + 6
    for path in files:
        content = load_file(path)
        assert set(content) == {k for k, v in table.items() if v == path.name}
        guards = [k for k, v in content.items() if v.shape == (0,)]
        assert guards == sorted(entries_of(path))[:1]
    assert sum(v.nbytes for p in files for v in load_file(p).values()) == 12 * 4608 + 8000


def entries_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata().get("llmprune.packed", "{}"))
    return found


def test_what_lies_beside_is_copied(tmp_path: Path) -> None:
    dense = folder_of(tmp_path / "in", {UP.format(0): halved(0.5)})
    kept = {"tokenizer.model": b"\x00\xff", "LICENSE": b"mine", "code/modeling_odd.py": b"x = 1\n"}
    left = {"pytorch_model.bin": b"p", ".git/config": b"g", "model.safetensors.index.json": b"{}"}
    for name, content in (kept | left).items():
        (dense / name).parent.mkdir(exist_ok=True)
        (dense / name).write_bytes(content)
    (dense / "README.md").write_text("---\nlicense: mit\n---\n\n# Odd\n")
    convert(dense, tmp_path / "out", "sparse")
    for name, content in kept.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    there = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")}
    made = {"config.json", "sparse.json", "README.md", "model.safetensors", "code"}
    assert there == kept.keys() | made
    card = (tmp_path / "out/README.md").read_text()
    front, _, rest = card.removeprefix("---\n").partition("---\n")
    assert front == "license: mit\n"
    first = rest.strip().splitlines()[0]
    assert "needs `import llmprune`" in first
    assert "llmprune.load(" in first
    assert "llmprune convert" in first
    convert(tmp_path / "out", tmp_path / "back", "dense")
    assert (tmp_path / "back/README.md").read_text() == (dense / "README.md").read_text()


def refused(error: type[LLMPruneError], match: str, *args: Any, **options: Any) -> None:
    """One line, and nothing left behind."""
    place: Path = args[1].parent
    before = {p: p.stat().st_mtime_ns for p in place.rglob("*")} if place.exists() else {}
    with pytest.raises(error, match=match) as caught:
        convert(*args, **options)
    assert "\n" not in str(caught.value)
    after = set(place.rglob("*")) if place.exists() else set()
    assert after == before.keys()


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    dense = folder_of(tmp_path / "dense", {UP.format(0): torch.randn(16, 16)})
    refused(ConfigError, "prune it first", dense, out, "sparse")
    refused(ConfigError, "dense already; --format sparse packs it", dense, out, "dense")
    half = folder_of(tmp_path / "half", {UP.format(0): halved(0.5)})
    convert(half, tmp_path / "sparse", "sparse")
    refused(ConfigError, "sparse already; --format dense", tmp_path / "sparse", out, "sparse")
    quantised = folder_of(
        tmp_path / "q", {UP.format(0): halved(0.5)}, quantization_config={"quant_method": "fp8"}
    )
    refused(CheckpointError, r"quantised \(fp8\)", quantised, out, "sparse")
    refused(CheckpointError, "has no config.json", half / "model.safetensors", out, "sparse")
    refused(CheckpointError, "no folder or file", tmp_path / "nothing", out, "sparse")
    refused(ConfigError, "exists; choose", half, tmp_path / "sparse", "sparse")
    refused(ConfigError, "holds the model", half, half, "sparse", overwrite=True)
    refused(ConfigError, "holds the model", half, tmp_path, "sparse", overwrite=True)
    (half / "model.safetensors").write_bytes((half / "model.safetensors").read_bytes()[:-9])
    refused(CheckpointError, "damaged or cut short", half, out, "sparse")
    (half / "model.safetensors").unlink()
    refused(CheckpointError, r"no \.safetensors file", half, out, "sparse")


def test_a_link_that_leads_out_is_not_copied(tmp_path: Path) -> None:
    dense = folder_of(tmp_path / "in/deep", {UP.format(0): halved(0.5)})
    (tmp_path / "secret").write_text("mine")
    (dense / "notes.txt").symlink_to(tmp_path / "secret")
    refused(CheckpointError, "outside of the checkpoint", dense, tmp_path / "in/out", "sparse")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = folder_of(tmp_path / "in", {UP.format(0): halved(0.5)})
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(target.shutil, "disk_usage", lambda path: usage(2**40, 2**40, 10_000))
    refused(
        CheckpointError, r"needs 1\.1 MB, .* has 10\.0 kB free", dense, tmp_path / "out", "sparse"
    )


def test_a_target_inside_the_source(tmp_path: Path) -> None:
    """As `--save` allows; it is no part of what is copied."""
    dense = folder_of(tmp_path / "in", {UP.format(0): halved(0.5)})
    convert(dense, dense / "small", "sparse")
    assert sorted(p.name for p in (dense / "small").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "sparse.json"
    ]  # fmt: skip


def test_overwriting(tmp_path: Path) -> None:
    dense = folder_of(tmp_path / "in", {UP.format(0): halved(0.5)})
    old = folder_of(tmp_path / "out", {UP.format(0): torch.ones(2, 2)})
    (old / "old.txt").touch()
    convert(dense, old, "sparse", overwrite=True)
    assert not (old / "old.txt").exists()
    same_tensors(unpacked(old)[0], {UP.format(0): halved(0.5)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("to", ["sparse", "dense"])
def test_a_wrong_bit_in_the_files_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Any
) -> None:
    source = folder_of(tmp_path / "dense", {UP.format(0): halved(0.5)})
    if to == "dense":
        convert(source, tmp_path / "sparse", "sparse")
        source = tmp_path / "sparse"
    write = shards._write_all

    def flawed(handle: int, content: memoryview, at: int) -> int:
        wrong = bytearray(content)
        wrong[0] ^= 128 if len(wrong) > 8192 else 0  # the sign of the first value
        return write(handle, memoryview(wrong), at)

    monkeypatch.setattr(shards, "_write_all", flawed)
    refused(CheckpointError, "up_proj.weight differs", source, tmp_path / "out", to)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = save_llama(tmp_path / "dense")
    prune = ["--model", dense, "--sparsity", "0.5", "--method", "magnitude", "--no-eval", "--quiet"]
    assert main([*map(str, prune), "--save", str(tmp_path / "a")]) == 0
    argv = ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--format", "sparse"]
    assert main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["format"] == "sparse"
    assert told["bytes"]["sparse"] < told["bytes"]["dense"]
    assert told["packed_bytes"] / told["dense_bytes"] == pytest.approx(0.5625, abs=1e-3)
    assert main(argv) == 2
    assert "exists; choose another folder, or --overwrite" in capsys.readouterr().err
    assert main([*argv, "--overwrite"]) == 0
    assert "compared bit for bit" in capsys.readouterr().out
    assert main([*argv, "--overwrite", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    for bad in (["--format", "small"], ["--max-shard-size", "many", "--format", "dense"]):
        assert main([*argv[:3], *bad]) == 2
        assert capsys.readouterr().err.count("\n") == 1


MEASURE = """
import resource, sys, torch
from pathlib import Path
from llmprune.checkpoint.convert import convert
from llmprune.kernels.packed import Packed, pack, unpack
unpack(pack(torch.ones(8, 8)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """One matrix of 134 MB, both ways, in less than 100 MB beside what the libraries take."""
    torch.manual_seed(0)
    weight = torch.randn(4096, 64).bfloat16().repeat(1, 256)
    weight.view(4096, -1, 4)[..., 1:3] = 0
    assert weight.nbytes == 2**27
    folder_of(tmp_path / "a", {UP.format(0): weight})
    del weight
    for source, out, to in (("a", "b", "sparse"), ("b", "c", "dense")):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, tmp_path / source, tmp_path / out, to],
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(done.stdout.split()[-1]) < 100_000, done.stdout  # kB
