"""A checkpoint may come from anyone: each reader gives a result or one clear line, and touches no more."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import pytest
from hostile import INDEX, finish, link, valid
from readers import config, expanded_model, model, packed_model, shelf

from llmprune import loading
from llmprune.checkpoint import files, sparse, tensors
from llmprune.checkpoint.convert import convert
from llmprune.checkpoint.inspect import inspect
from llmprune.errors import CheckpointError, LLMPruneError, short

T = "model.layers.0.mlp.up_proj.weight"


def refused(read: Callable[[], object], match: str) -> str:
    """The message with which a checkpoint was refused: one line, short, and harmless on a terminal."""
    with pytest.raises(CheckpointError, match=match) as error:
        read()
    message = str(error.value)
    assert len(message) < 500
    assert message.isprintable()
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "folder"
    finish(valid(sparse=True, shards=2)).write(place)
    return place


PARTS = ("bytes", "header", "metadata", "content", "index", "config", "folder")
CHECKS = {
    "files._inside", "files._indexed", "files.json", "tensors.__enter__", "tensors.header", "sparse._spec",
    "sparse._said", "sparse.specs", "unpack._values", "unpack.__init__", "unpack._checked",
    "file_census.read",
}  # fmt: skip


def test_a_thousand_hostile_checkpoints() -> None:
    found = fuzz.Tally()
    fuzz.watch("random", 0, 1000, found)
    assert found.failures == {}
    assert found.inputs == 1000
    assert all(found.parts[f"{part}: refused"] > 100 for part in PARTS)
    assert all(found.parts[f"{part}: ok"] > 50 for part in PARTS)
    assert found.refused.keys() >= CHECKS


BAD = """
import socket, subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import fuzz, torch
from safetensors import safe_open
from llmprune.errors import CheckpointError
from llmprune.kernels.packed import bitmap_shape

def imports(folder, scratch):
    (folder / "evil.py").write_text("x = 1")
    sys.path.insert(0, str(folder))
    import evil

def refuses(message):
    def read(folder, scratch):
        raise CheckpointError(message)
    return read

def hides(what):
    def read(folder, scratch):
        try:
            what()
        except Exception as error:
            raise CheckpointError("it is damaged") from error
    return read

bench = fuzz.Bench(Path(sys.argv[2]))
secret = bench.place / "outside" / "model.safetensors"
bench.slow = {}
bench.readers = {
    "raises": lambda f, s: int("x"),
    "opens": lambda f, s: open("/etc/passwd").close(),
    "maps": lambda f, s: safe_open(secret, framework="pt"),
    "writes": lambda f, s: (f / "config.json").open("a").close(),
    "lists": lambda f, s: list(Path("/etc").iterdir()),
    "removes": lambda f, s: (f / "config.json").unlink(missing_ok=True),
    "imports": imports,
    "runs": lambda f, s: subprocess.run(["true"]),
    "asks": lambda f, s: socket.create_connection(("127.0.0.1", 9), 1),
    "reserves": lambda f, s: torch.empty(2**28),
    "unpickles": lambda f, s: torch.load(s / "x", weights_only=False),
    "hides": hides(lambda: bitmap_shape(5)),
    "hoards": hides(lambda: torch.empty(2**28)),
    "excused": hides(lambda: (bench.folder / "nowhere").read_text()),
    "rambles": refuses("x" * 600),
    "breaks": refuses("a\\nb"),
    "shines": refuses("\\x1b[31m"),
    "good": lambda f, s: (s / "out").write_text(str(torch.zeros(2**20).sum())),
    "clear": refuses("it is damaged"),
}
import pickle
fresh = bench._fresh
def with_pickle():
    place = fresh()
    torch.save(Path("x"), place / "x")
    return place
bench._fresh = with_pickle
bench.run(b"")
print("\\n".join(bench.tally.failures))
"""


def test_what_no_reader_may_do_is_noticed(root: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BAD, str(root / "tests"), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    names = {line.split(":")[0] for line in said}
    bad = {"raises", "opens", "maps", "writes", "lists", "removes", "imports", "runs", "asks"}
    assert names == bad | {
        *("reserves", "unpickles", "hides", "hoards", "rambles", "breaks", "shines")
    }
    for expected in (
        "raises: ValueError in elsewhere",
        "opens: open /etc/passwd",
        "maps: touches outside/model.safetensors",
        "reserves: RuntimeError in elsewhere",
        "imports: imports evil",
        "hides: hides TypeError in packed.bitmap_shape",
        "hoards: asks for more memory than the files explain: elsewhere",
    ):
        assert expected in said


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os; os.abort()", "ends with status -6"),
        ("import time; time.sleep(60)", "hangs"),
        ("", ""),
    ],
)
def test_a_process_that_dies_or_hangs_is_noticed(
    code: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "HANG", 0.5)
    (tmp_path / "current").write_bytes(b"")
    process = subprocess.Popen([sys.executable, "-S", "-c", code], stderr=subprocess.DEVNULL)
    assert fuzz._ended(process, tmp_path) == why


def test_coverage_can_lead_the_inputs() -> None:
    pytest.importorskip("atheris")
    found = fuzz.Tally()
    fuzz.watch("coverage", 0, 100, found)
    assert (found.inputs, found.failures) == (100, {})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.weight", "model.weight"),
        ("a\nb\t c", "a b c"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\ud800\u202e", "\\ud800\\u202e"),
        ("", "''"),
        ("\n", "'\\n'"),
        ("x" * 10**7, "x" * 77 + "..."),
        ("\x00" * 80, "\\x00" * 19 + "\\..."),
        ("x" * 80, "x" * 80),
        ([1, 2], "[1, 2]"),
    ],
)
def test_what_a_file_says_is_shown_harmlessly(text: object, shown: str) -> None:
    assert short(text) == shown
    assert len(shown) <= 80


@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00002-of-00002.safetensors"])
@pytest.mark.parametrize("target", ["../secret", "/etc/passwd"])
def test_a_link_out_of_the_folder_is_not_followed(folder: Path, name: str, target: str) -> None:
    (folder.parent / "secret").write_text('{"model_type": "secret"}')
    link(target, name)(folder)
    found = files.find(folder)
    refused(lambda: found.fetch(name), f"{name} of .* is a link to .*, outside of the checkpoint")
    if name.endswith(".json"):
        refused(lambda: found.json(name), "outside of the checkpoint")


def test_a_link_inside_and_a_folder_that_is_a_link_are_followed(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "config.json").rename(folder / "sub" / "real.json")
    link("sub/real.json", "config.json")(folder)
    link("folder", "other")(folder.parent)
    for place in (folder, folder.parent / "other"):
        assert files.find(place).json("config.json")["model_type"] == "llama"


def cached(folder: Path, blobs: str) -> Path:
    """`folder` moved into what looks like the cache of the Hub's client; its snapshot."""
    repo = folder.parent / "cache" / "models--ann--tiny"
    snapshot = repo / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repo / blobs).mkdir(parents=True)
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(repo / blobs / str(i))
        link(f"../../{blobs}/{i}", path.name)(snapshot)
    return snapshot


@pytest.mark.parametrize("blobs", ["blobs", "../blobs"])
def test_the_cache_of_the_hub_is_made_of_links_and_is_read(folder: Path, blobs: str) -> None:
    snapshot = cached(folder, blobs)
    found = files.find(snapshot)
    assert found.json("config.json")["model_type"] == "llama"
    assert all(found.fetch(shard).is_file() for shard in found.shards())


def test_a_cache_whose_blobs_are_elsewhere_is_no_cache(folder: Path) -> None:
    snapshot = cached(folder, "blobs")
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(folder.parent / "elsewhere")
    link(folder.parent / "elsewhere", "blobs")(blobs.parent)
    refused(lambda: files.find(snapshot).json("config.json"), "outside of the checkpoint")
    other = snapshot.parent.parent.rename(folder.parent / "no-cache") / "snapshots" / "0123abcd"
    refused(lambda: files.find(other).json("config.json"), "outside of the checkpoint")


def test_what_is_no_regular_file_is_not_there(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    link("/dev/zero", "config.json")(tmp_path)
    link("loop", "loop")(tmp_path)
    (tmp_path / "x.safetensors").mkdir()
    found = files.find(tmp_path)
    assert found.names == ()
    assert found.json("config.json") == {}
    refused(found.shards, r"holds no \.safetensors file")
    refused(lambda: files.find(tmp_path / "model.safetensors"), "no folder or file")


def test_a_json_file_that_nests_or_grows_without_end(folder: Path) -> None:
    found = files.find(folder)
    for text in ("[" * 10**6, '{"a":' * 10**6, '{"a": ' + "9" * 10**6 + "}", "\ufeff{}", "{]", ""):
        (folder / "config.json").write_text(text)
        refused(lambda: found.json("config.json"), r"config\.json of .* cannot be read")
    (folder / "config.json").write_bytes(b'{"a": "\xff"}')
    refused(lambda: found.json("config.json"), "cannot be read")
    os.truncate(folder / "config.json", 10**11)  # takes no room on the disk
    refused(lambda: found.json("config.json"), "has 100,000,000,000 bytes; no more than")


@pytest.mark.parametrize(
    ("shard", "why"),
    [
        ("../outside/model.safetensors", "outside of the checkpoint"),
        ("..\\outside\\model.safetensors", "outside of the checkpoint"),
        ("/etc/passwd", "outside of the checkpoint"),
        ("//etc/passwd", "outside of the checkpoint"),
        ("sub/../../x.safetensors", "outside of the checkpoint"),
        ("~/x.safetensors", "is missing"),
        ("MODEL-00001-OF-00002.safetensors", "is missing"),
        ("./model-00001-of-00002.safetensors", "is missing"),
        ("https://example.invalid/x.safetensors", "is missing"),
        ("C:\\x.safetensors", "is missing"),
        ("\x00.safetensors", "is missing"),
        ("\ud800.safetensors", "is missing"),
        ("\x1b[2Jx" * 10**5 + ".safetensors", "is missing"),
        ("MODEL-00001-OF-00002.SAFETENSORS", "is no .safetensors file"),
        ("config.json", "is no .safetensors file"),
        ("", "is no .safetensors file"),
        (None, "names None as the file"),
        (["model-00001-of-00002.safetensors"], "as the file"),
        ({}, "as the file"),
        (True, "as the file"),
    ],
)
def test_an_index_names_files_of_the_folder(folder: Path, shard: Any, why: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["\x1b[2J\ud800" * 1000] = shard
    (folder / INDEX).write_text(json.dumps(index))
    refused(files.find(folder).shards, why)


def test_a_large_index_is_read_in_linear_time(tmp_path: Path) -> None:
    names = [f"model-{i}.safetensors" for i in range(500)]
    for name in names:
        (tmp_path / name).touch()
    index = {"weight_map": {str(i): names[i % 500] for i in range(100_000)}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    found, begun = files.find(tmp_path), time.process_time()
    assert len(found.shards()) == 500
    assert time.process_time() - begun < 5  # a scan per key takes ten times as long


def small(header: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def about(dtype: str, shape: list[int], size: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}


@pytest.mark.parametrize(
    "shape",
    [[0, 2**63], [2**64 - 1, 0], [2**40, 0, 2**40], [0] + [2] * 63, [1] * 64 + [0]],
    ids=lambda shape: short(shape, 30),
)
def test_no_elements_in_more_dimensions_than_torch_can_hold(
    tmp_path: Path, shape: list[int]
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(small({"x": about("F32", shape, 0)}))
    refused(lambda: tensors.index(files.find(path)), "x in .* has shape")
    refused(lambda: inspect(path), "x in .* has shape")


@pytest.mark.parametrize(
    ("dtype", "size"), [("F4", 2), ("F6_E2M3", 3), ("F8_E4M3", 4), ("C64", 32)]
)
def test_a_dtype_that_is_not_pruned(tmp_path: Path, dtype: str, size: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(small({"\x1b[2J" * 10**5: about(dtype, [4], size)}, bytes(size)))
    refused(lambda: tensors.index(files.find(path)), f"is stored as {dtype}")
    if dtype == "F6_E2M3":
        refused(lambda: inspect(path), "damaged or cut short .*Dtype not understood: F6_E2M3")
    else:
        assert inspect(path).tensors[0].bytes == size


def test_names_that_only_look_like_numbers_are_listed(tmp_path: Path) -> None:
    names = ["model.layers.10.w.weight", "model.layers.9.w.weight", "model.layers.².w.weight"]
    names += [f"model.layers.{'9' * 5000}.w.weight", "model.layers.1.\x1b[2J.weight"]
    size = 4 * len(names)
    header = {
        n: {**about("F32", [1, 1], 0), "data_offsets": [4 * i, 4 * i + 4]}
        for i, n in enumerate(names)
    }
    (tmp_path / "x.safetensors").write_bytes(small(header, bytes(size)))
    found = inspect(tmp_path)
    layers = found.layers().splitlines()
    shown = ["model.layers.1.\\x1b[2J", "model.layers.9.w", "model.layers.10.w"]
    assert [line.split()[0] for line in layers[:3]] == shown
    assert all(
        line.isprintable() and len(line) < 200 for line in layers + found.table().splitlines()
    )


def test_a_file_of_very_many_tensors_is_read_in_linear_time(tmp_path: Path) -> None:
    header = {f"x.{i}": about("F32", [0], 0) for i in range(20_000)}
    (tmp_path / "x.safetensors").write_bytes(small(header))
    begun = time.process_time()
    found = tensors.index(files.find(tmp_path))
    for stored in list(found.values())[:2000]:
        tensors.load(stored)
    assert time.process_time() - begun < 5  # opening the file for each tensor takes a minute


def changed(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**found, **changes}))


def test_an_index_does_not_lead_transformers_to_a_pickle(folder: Path) -> None:
    (folder / "evil.bin").write_bytes(b"\x80\x04.")
    changed(folder, INDEX, weight_map={"model.norm.weight": "evil.bin"})
    refused(
        lambda: loading.check(str(folder)), "is no .safetensors file; only safetensors are read"
    )


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "more", INDEX])
def test_a_link_does_not_lead_transformers_out_of_the_folder(folder: Path, name: str) -> None:
    (folder.parent / "secret.json").write_text("{}")
    link("../secret.json", name)(folder)
    refused(lambda: loading.check(str(folder)), "outside of the checkpoint")


@pytest.mark.parametrize(
    "files_named", [["../secret/tokenizer.1.json"], "tokenizer.json", [None], 7, {"a": 1}]
)
def test_a_tokenizer_file_is_one_of_the_folder(folder: Path, files_named: Any) -> None:
    (folder.parent / "secret").mkdir()
    (folder.parent / "secret" / "tokenizer.1.json").write_text("{}")
    changed(folder, "tokenizer_config.json", fast_tokenizer_files=files_named)
    refused(lambda: loading.check(str(folder)), "fast_tokenizer_files")


def test_an_adapter_beside_the_model_is_refused(folder: Path) -> None:
    changed(folder, "adapter_config.json", base_model_name_or_path="../other")
    refused(lambda: loading.check(str(folder)), "holds an adapter")


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": {"a": 1}}, {"hidden_size": "8"}, {"hidden_size": -8}, {"num_attention_heads": 0},
        {"architectures": [None]}, {"architectures": {"a": 1}}, {"architectures": "x"}, {"model_type": []},
        {"model_type": "\x1b[2J" * 10**5}, {"dtype": "load"}, {"dtype": "nothing"}, {"rope_parameters": 1},
        {"hidden_act": "os.system"}, {"vocab_size": 10**30}, {"quantization_config": ["llmprune"]},
        {"auto_map": 7, "model_type": "evil"}, {"transformers_weights": "../outside/x.safetensors"},
        {"dtype": True},
        {"transformers_weights": "model.bin"}, {"num_hidden_layers": 10**9}, {"intermediate_size": 10**9},
        {"model_type": "gpt2", "n_embd": 10**5, "n_head": 1, "n_layer": 8},
        {"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"},
    ],
    ids=lambda changes: short(changes, 40),
)  # fmt: skip
def test_a_config_of_wrong_types_is_one_line(folder: Path, changes: dict[str, Any]) -> None:
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    changed(folder, "config.json", **changes)
    for read in (config, shelf, model, packed_model, expanded_model):
        said = ""
        try:
            read(folder, folder.parent)
        except LLMPruneError as error:
            said = str(error)
        assert said or read is config or changes.keys() & {"dtype", "rope_parameters"}
        assert len(said) < 500
        assert said.isprintable()


@pytest.mark.parametrize(
    "text", ["[" * 10**5, '{"version": "1.0", "model": []}', '{"tokenizer_class": {}}']
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_of_wrong_types_is_one_line(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    with contextlib.suppress(LLMPruneError):
        loading.tokenizer(loading.check(str(folder)))


def test_convert_copies_nothing_from_outside(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    link("../secret.txt", "vocab.txt")(folder)
    refused(lambda: convert(folder, tmp_path / "out", "dense"), "outside of the checkpoint")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "secret.txt"]


def test_convert_makes_files_of_links_that_stay_inside(folder: Path, tmp_path: Path) -> None:
    link("tokenizer.json", "same.json")(folder)
    convert(folder, tmp_path / "out", "dense")
    copied = tmp_path / "out" / "same.json"
    assert not copied.is_symlink()
    assert copied.read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_names_of_tensors_become_no_names_of_files(tmp_path: Path) -> None:
    names = [
        "../../evil",
        "/etc/evil",
        "a\x00b",
        f"model.layers.{'9' * 5000}.w.weight",
        "²",
        "x" * 3000,
    ]
    header = {
        n: {**about("F32", [4, 8], 0), "data_offsets": [128 * i, 128 * i + 128]}
        for i, n in enumerate(names)
    }
    source = tmp_path / "folder"
    source.mkdir()
    (source / "model.safetensors").write_bytes(small(header, bytes(128 * len(names))))
    (source / "config.json").write_text("{}")
    convert(source, tmp_path / "out", "sparse", max_shard_size=128)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "out"]
    assert tensors.index(files.find(tmp_path / "out")).keys() == set(names)


def test_a_matrix_and_a_part_of_it_in_two_files(tmp_path: Path) -> None:
    """Each file alone says nothing wrong."""
    inner = f"{T}_values"
    for number, name in enumerate((T, inner)):
        specs = json.dumps({name: {**entry(), "shape": [1, 8], "pattern": "unstructured"}})
        header: dict[str, Any] = {
            "__metadata__": {"llmprune.format_version": "1", "llmprune.packed": specs}
        }
        header[f"{name}_bitmap"] = about("U8", [1, 1], 1)
        if number:
            header[f"{name}_values"] = about("F32", [0], 0) | {"data_offsets": [1, 1]}
            header[T + "_values"] = about("F32", [0], 0) | {"data_offsets": [1, 1]}
        (tmp_path / f"{number}.safetensors").write_bytes(small(header, b"\x00"))
    refused(lambda: tensors.index(files.find(tmp_path)), "is packed, and so is a part of it")


def entry(**changes: Any) -> dict[str, Any]:
    return {"shape": [12, 8], "dtype": "F32", "pattern": "2:4", "axis": "rows", **changes}


def said(entries: str, **tensors: tuple[str, list[int]]) -> Callable[[], dict[str, sparse.Spec]]:
    about = {"llmprune.format_version": "1", "llmprune.packed": entries}
    there = {f"{T}_values": ("F32", [48]), f"{T}_bitmap": ("U8", [12, 1]), **tensors}
    return lambda: sparse.specs("model.safetensors", about, there)


def test_a_true_header_is_believed() -> None:
    assert said(json.dumps({T: entry()}))() == {T: sparse.Spec((12, 8), "F32", "2:4", "rows", 48)}
    assert said(json.dumps({T: entry()}), **{T: ("F32", [0])})()


@pytest.mark.parametrize(
    "shape",
    [
        [12], [], [12, 0], [0, 8], [-12, -8], [12.0, 8], ["12", 8], [True, 12, 8], [None, 8], 96, "12, 8",
        None, {"0": 12, "1": 8}, [[12, 8]], [2**62, 2**62], [2**63, 1], [2**31, 2**31], [10**30, 8],
        [1] * 7 + [12, 8], [2**62] * 10**5, [8, 12], [12, 9], [1, 12, 8], [96, 1],
    ],
    ids=lambda shape: short(shape, 30),
)  # fmt: skip
def test_a_shape_is_a_few_whole_numbers_that_fit_the_file(shape: Any) -> None:
    begun = time.process_time()
    refused(said(json.dumps({T: entry(shape=shape)})), "is no valid sparse file")
    assert time.process_time() - begun < 1  # the product of very many numbers takes minutes


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "F64"}, {"dtype": "F16"}, {"dtype": "U8"}, {"dtype": None}, {"dtype": []},
        {"dtype": "float32"}, {"dtype": "\x1b[2J" * 10**5}, {"axis": "Rows"}, {"axis": 0}, {"axis": None},
        {"axis": ["rows"]}, {"axis": "\ud800"}, {"more": 1}, {"pattern": "4:2"}, {"pattern": "4:4"},
        {"pattern": "0:4"}, {"pattern": "2:3"}, {"pattern": "2:16"}, {"pattern": "2:4\n"},
        {"pattern": " 2:4"}, {"pattern": "02:4"}, {"pattern": "٢:٤"}, {"pattern": "2:0"},
        {"pattern": "2:9999999999"}, {"pattern": [2, 4]}, {"pattern": None},
        {"pattern": "4:8", "axis": "columns"}, {"pattern": "\x1b[2J" * 10**5},
    ],
    ids=lambda changes: short(changes, 30),
)  # fmt: skip
def test_every_word_of_an_entry_is_checked(changes: dict[str, Any]) -> None:
    refused(said(json.dumps({T: entry(**changes)})), "is no valid sparse file")


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[" * 10**6, "is no JSON"),
        ("9" * 10**6, "is no JSON"),
        ("[]", "is no JSON object"),
        ("null", "is no JSON object"),
        (json.dumps({T: None}), "needs shape, dtype, pattern and axis"),
        (json.dumps({T: {}}), "needs shape, dtype, pattern and axis"),
        (json.dumps({T: entry()})[:-1] + f', "{T}": {json.dumps(entry())}}}', "a key stands there twice"),
        (json.dumps({T: entry()}).replace('"dtype"', '"dtype": "F16", "dtype"'), "a key stands there twice"),
        (json.dumps({T: entry(), f"{T}_values": entry()}), "another name needs its place"),
        (json.dumps({f"{T}_bitmap": entry(), T: entry()}), "another name needs its place"),
        (json.dumps({"__metadata__": entry()}), "another name needs its place"),
        (json.dumps({"\x1b[2J\ud800" * 10**5: entry()}), "lacks its _values"),
        (json.dumps({"../../x": entry()}), "lacks its _values"),
    ],
    ids=lambda part: short(part, 30),
)  # fmt: skip
def test_the_list_of_packed_matrices_is_checked(entries: str, why: str) -> None:
    refused(said(entries), why)


@pytest.mark.parametrize(
    "tensors",
    [
        {f"{T}_values": ("F16", [48])},
        {f"{T}_values": ("F32", [97])},
        {f"{T}_values": ("F32", [6, 8])},
        {f"{T}_values": ("F32", [])},
        {f"{T}_bitmap": ("I8", [12, 1])},
        {f"{T}_bitmap": ("U8", [12])},
        {f"{T}_bitmap": ("U8", [2**60, 0])},
        {T: ("F32", [12, 8])},
        {T: ("F32", [0, 8])},
    ],
    ids=str,
)
def test_the_tensors_are_those_of_the_entry(tensors: dict[str, tuple[str, list[int]]]) -> None:
    refused(said(json.dumps({T: entry()}), **tensors), "is no valid sparse file")


@pytest.mark.parametrize("version", ["3", "0", "", "1.0", " 1", "\x1b[2J" * 10**5, None])
def test_another_version_is_refused(version: str | None) -> None:
    about = {"llmprune.packed": "{}"}
    if version is not None:
        about["llmprune.format_version"] = version
    refused(
        lambda: sparse.specs("model.safetensors", about, {}), "this llmprune reads versions 1 and 2"
    )


def test_very_many_matrices_are_checked_in_linear_time() -> None:
    names = [f"model.layers.{i}.weight" for i in range(20_000)]
    there = {f"{n}_values": ("F32", [48]) for n in names}
    there |= {f"{n}_bitmap": ("U8", [12, 1]) for n in names}
    begun = time.process_time()
    assert len(said(json.dumps({n: entry() for n in names}), **there)()) == 20_000
    assert time.process_time() - begun < 5
