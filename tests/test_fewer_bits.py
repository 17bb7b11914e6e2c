"""Whole numbers of few bits in files: found again from the values, read back bit for bit, by others too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_files import equal
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from streamed import Runs, figures, save_llama, save_mixtral, write_text
from test_convert import UP, folder_of
from test_sparse_format import decoder
from test_stream import build
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmprune
from llmprune import loading
from llmprune.checkpoint import census, sparse, tensors, unpack
from llmprune.checkpoint.convert import convert
from llmprune.checkpoint.files import find
from llmprune.checkpoint.inspect import inspect
from llmprune.cli import main
from llmprune.errors import CheckpointError
from llmprune.runtime.seats import few_weights

TOP = {4: 7, 8: 127}
IDS = torch.arange(12).reshape(1, 12)


def made(
    shape: tuple[int, ...],
    bits: int,
    group: int,
    dtype: torch.dtype,
    *,
    axis: str = "rows",
    seed: int = 0,
) -> Tensor:
    """Random products on random bfloat16 scales, every second weight gone; group 0 is the whole length."""
    random = np.random.default_rng(seed)
    wide = shape if axis == "rows" else (*shape[:-2], shape[-1], shape[-2])
    group = min(group, wide[-1]) or wide[-1]
    groups = -(-wide[-1] // group)
    scales = torch.from_numpy(random.uniform(0.001, 0.1, (*wide[:-1], groups))).bfloat16().double()
    whole = torch.from_numpy(random.integers(-TOP[bits], TOP[bits] + 1, wide)).double()
    spread = scales.repeat_interleave(group, -1)[..., : wide[-1]]
    dense = whole * spread * torch.from_numpy(np.arange(wide[-1]) % 4 < 2) + 0.0
    dense = dense.to(dtype)  # from float64, which holds the product exactly: rounded once
    return (dense if axis == "rows" else dense.transpose(-1, -2)).contiguous()


def recipe(kind: str, group: int, sparsity: Any = "2:4") -> dict[str, Any]:
    """What llmprune.json says of a run."""
    settings = {"rounding": "gptq", "group": group}
    return {
        "recipe": {"sparsity": sparsity, "quantize": kind, "quantize_settings": settings},
        "layers": [],
    }


def tell(folder: Path, report: dict[str, Any]) -> Path:
    (folder / "llmprune.json").write_text(json.dumps(report))
    return folder


def read_by_hand(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and what it says of the packed ones, by numpy and docs/format.md alone."""
    content = load_file(path)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    entries = json.loads(about["llmprune.packed"])
    few = any("bits" in entry for entry in entries.values())
    assert about["llmprune.format_version"] == ("2" if few else "1")
    assert content.pop(min(entries)).shape == (0,)
    for name, entry in entries.items():
        shape = entry["shape"]
        bits = np.unpackbits(content.pop(name + "_bitmap").numpy(), axis=-1, bitorder="little")
        keep = torch.from_numpy(bits[..., : shape[-1]]).bool()
        if "bits" not in entry:
            dense = torch.zeros(shape, dtype=content[name + "_values"].dtype)
            dense[keep] = content.pop(name + "_values")
            content[name] = dense
            continue
        whole = content.pop(name + "_whole")
        if entry["bits"] == 4:
            halves = np.stack((whole.numpy() & 15, whole.numpy() >> 4), 1).reshape(-1)
            assert not halves[entry["kept"] :].any()
            numbers = np.where(halves > 7, halves.astype(int) - 16, halves)[: entry["kept"]]
            whole = torch.from_numpy(numbers)
        assert len(whole) == entry["kept"] == int(keep.sum())
        dim = -1 if entry["axis"] == "rows" else -2
        scales = content.pop(name + "_scales").double().repeat_interleave(entry["group"], dim)
        scales = scales.narrow(dim, 0, shape[dim])
        exact = torch.zeros(shape, dtype=torch.float64)
        exact[keep] = whole.double()
        names = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
        content[name] = torch.where(keep, exact * scales, 0.0).to(names[entry["dtype"]])
    return content, entries


SHAPES = [(1, 64), (64, 1), (37, 41), (64, 128), (300, 16), (5, 24, 40), (3, 2, 7, 11)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("kind", "group"), [("int8", 0), ("int8", 20), ("int4", 16), ("int4", 3)])
@pytest.mark.parametrize("at_once", [64, census.AT_ONCE])
def test_there_and_back(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    kind: str,
    group: int,
    at_once: int,
) -> None:
    monkeypatch.setattr(census, "AT_ONCE", at_once)
    monkeypatch.setattr(unpack, "WEIGHTS_AT_ONCE", at_once)
    bits = int(kind[3:])
    found = {UP.format(i): made(s, bits, group, dtype, seed=i) for i, s in enumerate(SHAPES)}
    found["model.layers.7.mlp.experts.down_proj"] = made(
        (4, 24, 40), bits, group, dtype, axis="columns"
    )
    found["model.layers.8.norm.weight"] = torch.randn(9).to(dtype)
    dense = tell(folder_of(tmp_path / "dense", found), recipe(kind, group, 0.5))
    done = convert(dense, tmp_path / "sparse", "sparse")
    read, entries = read_by_hand(tmp_path / "sparse/model.safetensors")
    assert read.keys() == found.keys()
    assert [k for k in found if not equal(read[k], found[k])] == []
    few = {k: e for k, e in entries.items() if "bits" in e}
    assert len(few) >= 4
    assert {e["bits"] for e in few.values()} == {bits}
    assert few["model.layers.7.mlp.experts.down_proj"]["axis"] == "columns"
    told = json.loads((tmp_path / "sparse/sparse.json").read_text())
    assert told["format_version"] == 2
    assert told["fewer_bits"] == {kind: len(few)}
    config = json.loads((tmp_path / "sparse/config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "llmprune", "format_version": 2}
    stored = load_file(tmp_path / "sparse/model.safetensors")
    ends = ("_values", "_bitmap", "_whole", "_scales")
    assert done.sizes.packed_bytes == sum(t.nbytes for k, t in stored.items() if k.endswith(ends))
    index = tensors.index(find(tmp_path / "sparse"))
    for key, entry in index.items():
        assert equal(tensors.load(entry), found[key])
        if len(entry.shape) == 2:  # any range of rows
            rows = tensors.rows_of(entry)
            for first, count in ((0, 1), (rows.count // 2, rows.count // 3), (rows.count - 1, 1)):
                assert equal(rows.rows(first, count), found[key][first : first + count])
    assert convert(tmp_path / "sparse", tmp_path / "back", "dense").sizes == done.sizes
    back = load_file(tmp_path / "back/model.safetensors")
    assert [k for k in found if not equal(back[k], found[k])] == []


@pytest.mark.parametrize(("kind", "group", "bits"), [("int8", 0, 5.004), ("int4", 128, 3.125)])
def test_bits_per_weight_of_two_of_four(tmp_path: Path, kind: str, group: int, bits: float) -> None:
    """Of the file itself, with 4096 columns; its header comes on top."""
    weight = on_grid((256, 4096), kind, group)
    dense = tell(folder_of(tmp_path / "dense", {UP.format(0): weight}), recipe(kind, group))
    convert(dense, tmp_path / "sparse", "sparse")
    path = tmp_path / "sparse/model.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    measured = 8 * (path.stat().st_size - header) / weight.numel()
    assert measured == pytest.approx(bits, abs=1e-3)
    told = inspect(tmp_path / "sparse")
    assert told.sparse is not None
    assert told.sparse["bits_per_weight"] == measured
    assert (
        f"{measured:.3f} bits per weight of these: {kind} in groups of {group or 4096} in 1"
        in told.table()
    )
    assert f"{measured:.3f} bits, {kind} in groups of {group or 4096}" in told.layers()


def on_grid(shape: tuple[int, int], kind: str, group: int) -> Tensor:
    """Products of which exactly two of four are kept: no whole number is zero."""
    rows, columns = torch.arange(shape[0]), torch.arange(shape[1])
    groups = columns // (group or shape[1])
    scale = (1 + (7 * groups + rows[:, None]) % 100).bfloat16() / 128
    whole = 1 + (columns * 31 + rows[:, None] * 17) % TOP[int(kind[3:])]
    return (whole * scale.double() * (columns % 4 < 2)).bfloat16()


def test_what_lies_on_no_grid_keeps_its_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on = made((64, 128), 4, 16, torch.bfloat16)
    minus = on.clone()
    minus[3, 3] = -0.0
    nan, inf = on.clone(), on.clone()
    nan[0, 0], inf[0, 0] = float("nan"), float("inf")
    off = torch.randn(64, 128).bfloat16().where(on != 0, 0)
    found = {UP.format(i): t for i, t in enumerate((on, off, minus, nan, inf))}
    dense = tell(folder_of(tmp_path / "dense", found), recipe("int4", 16))
    argv = ["convert", str(dense), str(tmp_path / "sparse"), "--format", "sparse"]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "fewer bits: int4 in 1" in said
    assert "4 matrices keep their values, such as model.layers.1.mlp.up_proj.weight" in said
    read, entries = read_by_hand(tmp_path / "sparse/model.safetensors")
    assert [k for k in found if not equal(read[k], found[k])] == []
    assert [k for k in entries if "bits" in entries[k]] == [UP.format(0)]


@pytest.mark.parametrize(
    "report",
    [
        {}, {"recipe": None}, {"recipe": {"quantize": "int3", "quantize_settings": {"group": 1}}},
        {"recipe": {"quantize": "int8"}}, {"recipe": {"quantize": "int8", "quantize_settings": []}},
        {"recipe": {"quantize": ["int8"], "quantize_settings": {"group": True}}},
        {"recipe": {"quantize": "int8", "quantize_settings": {"group": -1}}},
    ],
    ids=str,
)  # fmt: skip
def test_without_a_recipe_the_file_is_as_ever(tmp_path: Path, report: dict[str, Any]) -> None:
    found = {UP.format(0): made((64, 128), 8, 0, torch.bfloat16)}
    convert(tell(folder_of(tmp_path / "a", found), report), tmp_path / "out", "sparse")
    content, entries = read_by_hand(tmp_path / "out/model.safetensors")
    assert equal(content[UP.format(0)], found[UP.format(0)])
    assert set(entries[UP.format(0)]) == {"shape", "dtype", "pattern", "axis"}
    assert json.loads((tmp_path / "out/sparse.json").read_text())["format_version"] == 1


def rounded(dense: Path, axis: str, kind: str = "int4", group: int = 8) -> Path:
    """A checkpoint with products in the place of its block matrices, dense (in place) and packed."""
    for path in dense.glob("*.safetensors"):
        content = load_file(path)
        for number, (name, tensor) in enumerate(sorted(content.items())):
            if tensor.ndim > 1 and decoder(name, tensor):
                shape = tuple(tensor.shape)
                content[name] = made(
                    shape, int(kind[3:]), group, tensor.dtype, axis=axis, seed=number
                )
        save_file(content, path, {"format": "pt"})
    packed = dense.with_name(dense.name + "-packed")
    convert(tell(dense, recipe(kind, group)), packed, "sparse", max_shard_size=20_000)
    return packed


@pytest.fixture(scope="module", params=["llama", "mixtral", "gpt2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Path, Path]:
    """A checkpoint of a family, dense and in fewer bits: renamed, merged, and stored [in, out]."""
    place = tmp_path_factory.mktemp(request.param) / "dense"
    dense = build(request.param, place)
    return dense, rounded(dense, "columns" if request.param == "gpt2" else "rows")


LOADS: dict[str, Callable[[Path], Any]] = {
    "transformers": AutoModelForCausalLM.from_pretrained,
    "expanded": lambda p: AutoModelForCausalLM.from_pretrained(
        p, quantization_config=llmprune.SparseConfig(expand=True)
    ),
    "in float16": lambda p: AutoModelForCausalLM.from_pretrained(p, dtype=torch.float16),
    "load": lambda p: llmprune.load(p, "cpu", progress=False),
    "load dense": lambda p: llmprune.load(p, "cpu", sparse=False, progress=False),
    "to prune": lambda p: loading.open_model(loading.check(str(p)), device="cpu").model,
}


@pytest.mark.parametrize("way", LOADS)
@pytest.mark.filterwarnings("ignore:.*loading attributes")
def test_models_are_the_dense_one(pair: tuple[Path, Path], way: str) -> None:
    dense, packed = pair
    assert any(t.bits == 4 for t in inspect(packed).tensors)
    there = dense if way in ("in float16", "to prune") else None
    want = LOADS[way](there) if there else AutoModelForCausalLM.from_pretrained(dense)
    model = LOADS[way](packed)
    holds_packed = way in ("transformers", "in float16", "load")
    assert bool(few_weights(model)) == holds_packed
    if holds_packed:
        llmprune.densify(model)
    left, right = want.state_dict(), model.state_dict()
    assert left.keys() == right.keys()
    assert [k for k in left if not equal(left[k], right[k])] == []


@pytest.mark.filterwarnings("ignore:.*loading attributes")
def test_what_transformers_saves_of_values_has_values(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    config = llmprune.SparseConfig(few_bits=False)
    model = AutoModelForCausalLM.from_pretrained(pair[1], quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["quantization_config"]["format_version"] == 1
    assert not [t for t in inspect(tmp_path / "saved").tensors if t.bits]
    one, two = (
        model(IDS).logits,
        llmprune.load(tmp_path / "saved", "cpu", progress=False)(IDS).logits,
    )
    assert torch.equal(one, two)


@pytest.mark.parametrize("make", [save_llama, save_mixtral])
def test_a_run_and_what_can_be_done_with_it(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "model")
    text = write_text(tmp_path / "text.txt", 700)
    options = ("--sparsity", "2:4", "--quantize", "int4", "--quantize-set", "group=8")
    options += ("--no-eval", "--quiet", "--samples", "8")
    folders = []
    for name, more in (("dense", ()), ("sparse", ("--format", "sparse"))):
        (tmp_path / name).mkdir()
        run = Runs(tmp_path / name, tmp_path / "model", text, (*options, *more))
        assert run() == 0
        folders.append(run.out)
    dense, packed = folders
    told = inspect(packed).sparse
    assert told is not None
    assert told["kinds"] == {"int4 in groups of 8": told["matrices"]}
    convert(packed, tmp_path / "back", "dense")
    one, two = (tensors.index(find(p)) for p in (dense, tmp_path / "back"))
    assert one.keys() == two.keys()
    assert [k for k in one if not equal(tensors.load(one[k]), tensors.load(two[k]))] == []
    shown = [
        figures(capsys, "eval", "--model", m, "--dataset", text, "--seqlen", 16)["perplexity"]
        for m in folders
    ]
    assert shown[0] == shown[1]
    again = ("--sparsity", "1:4", "--method", "wanda", "--calibration", text, "--samples", 8)
    for model in folders:
        argv = (
            "--model",
            model,
            *again,
            "--seqlen",
            16,
            "--no-eval",
            "--save",
            tmp_path / f"x{model.parent.name}",
        )
        figures(capsys, *argv)
    left, right = (tensors.index(find(tmp_path / f"x{m.parent.name}")) for m in folders)
    assert [k for k in left if not equal(tensors.load(left[k]), tensors.load(right[k]))] == []


def test_a_run_says_what_it_stores_as_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A scale for each weight takes more than the weight."""
    save_llama(tmp_path / "model")
    text = write_text(tmp_path / "text.txt", 700)
    options = ("--sparsity", "2:4", "--quantize", "int8", "--quantize-set", "group=1")
    options += ("--no-eval", "--samples", "8", "--format", "sparse")
    run = Runs(tmp_path, tmp_path / "model", text, options)
    assert run() == 0
    told = inspect(run.out).sparse
    assert told is not None
    assert told["kinds"] == {"values": told["matrices"]}
    assert told["format_version"] == 1
    count = told["matrices"]
    said = " ".join(capsys.readouterr().err.split())
    assert f"{count} of {count} packed matrices are stored as values: no scales give them" in said


T = "model.layers.0.mlp.up_proj.weight"


def said(version: str = "2", drop: str = "", more: Any = None, **changes: Any) -> Callable[[], Any]:
    """The check of a header, of a matrix [12, 8] of which 47 are kept in 4 bits, that lies in some way."""
    entry: dict[str, Any] = {"shape": [12, 8], "dtype": "F32", "pattern": "2:4", "axis": "rows"}
    entry |= {"bits": 4, "group": 3, "kept": 47} | changes
    entry = {k: v for k, v in entry.items() if v != "gone"}
    there: dict[str, tuple[str, list[int]]] = {
        f"{T}_whole": ("U8", [24]),
        f"{T}_scales": ("BF16", [12, 3]),
        f"{T}_bitmap": ("U8", [12, 1]),
    }
    there |= more or {}
    if drop:
        del there[T + drop]
    about = {"llmprune.format_version": version, "llmprune.packed": json.dumps({T: entry})}
    return lambda: sparse.specs("model.safetensors", about, there)


def test_a_true_header_is_believed() -> None:
    spec = sparse.Spec((12, 8), "F32", "2:4", "rows", 47, 4, 3)
    assert said()() == {T: spec}
    assert spec.bytes == 24 + 12 * 3 * 2 + 12
    eight = {f"{T}_whole": ("I8", [47]), f"{T}_scales": ("BF16", [2, 8])}
    assert said(bits=8, group=7, axis="columns", more=eight)()


@pytest.mark.parametrize(
    "lie",
    [
        {"version": "1"}, {"bits": 5}, {"bits": 2}, {"bits": 16}, {"bits": True}, {"bits": "4"},
        {"bits": None},
        {"bits": 8}, {"bits": 4.0}, {"bits": "gone"}, {"group": "gone"}, {"kept": "gone"}, {"group": 0},
        {"group": 9}, {"group": -3}, {"group": 2}, {"group": 3.0}, {"group": True}, {"group": 10**30},
        {"group": [3]}, {"kept": 46}, {"kept": 49}, {"kept": -1}, {"kept": 10**30}, {"kept": 47.0},
        {"kept": None}, {"axis": "columns"}, {"extra": 1}, {"drop": "_whole"}, {"drop": "_scales"},
        {"drop": "_bitmap"}, {"more": {f"{T}_whole": ("I8", [24])}}, {"more": {f"{T}_whole": ("U8", [25])}},
        {"more": {f"{T}_whole": ("U8", [4, 6])}}, {"more": {f"{T}_scales": ("F16", [12, 3])}},
        {"more": {f"{T}_scales": ("BF16", [36])}}, {"more": {f"{T}_scales": ("BF16", [12, 8])}},
        {"more": {f"{T}_values": ("F32", [47])}}, {"more": {T: ("F32", [12, 8])}},
        {"kept": 97, "more": {f"{T}_whole": ("U8", [49])}},
    ],
    ids=str,
)  # fmt: skip
def test_every_lie_of_a_header_is_refused(lie: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"is no valid sparse file: .*get it again") as error:
        said(**lie)()
    assert len(str(error.value)) < 500


def test_no_other_matrix_needs_the_names() -> None:
    read = said()
    assert read()
    for part in ("_whole", "_scales", "_values", "_bitmap"):
        about = {"llmprune.format_version": "2"}
        plain = {"shape": [12, 8], "dtype": "F32", "pattern": "2:4", "axis": "rows"}
        entries = {T: plain | {"bits": 4, "group": 3, "kept": 47}, T + part: plain}
        about["llmprune.packed"] = json.dumps(entries)
        with pytest.raises(CheckpointError, match="another name needs its place"):
            sparse.specs("model.safetensors", about, {})


@pytest.mark.parametrize(
    ("kind", "part", "byte", "value", "why"),
    [
        ("int8", "_whole", 5, 0x80, "a whole number of 8 bits is below -127"),
        ("int4", "_whole", 5, 0x18, "a whole number of 4 bits is below -7"),
        ("int4", "_whole", 5, 0x81, "a whole number of 4 bits is below -7"),
        ("int4", "_whole", -1, 0x11, "half a byte behind the last whole number is not 0"),
        ("int8", "_scales", 1, 0xBC, "a scale is negative or not finite"),
        ("int8", "_scales", 1, 0x7F, "a scale is negative or not finite"),
        ("int4", "_bitmap", 0, 0x00, "bits are set in a bitmap, and there are"),
        ("int4", "_bitmap", 2, 0x80, "behind the last column"),
    ],
)
def test_contents_that_lie(
    tmp_path: Path, kind: str, part: str, byte: int, value: int, why: str
) -> None:
    weight = on_grid((5, 22), kind, 0)
    weight[0, 0] = 0  # an odd number of them is kept
    dense = tell(folder_of(tmp_path / "dense", {UP.format(0): weight}), recipe(kind, 0, 0.5))
    convert(dense, tmp_path / "sparse", "sparse")
    path = tmp_path / "sparse/model.safetensors"
    begin, end = tensors.header(path).entries[UP.format(0) + part]["data_offsets"]
    content = bytearray(path.read_bytes())
    content[end + byte if byte < 0 else begin + byte] = value
    if part == "_scales":
        content[begin] = 0x80
    path.write_bytes(content)
    stored = tensors.index(find(tmp_path / "sparse"))[UP.format(0)]
    for read in (
        lambda: tensors.load(stored),
        lambda: inspect(path),
        lambda: convert(tmp_path / "sparse", tmp_path / "back", "dense"),
    ):
        with pytest.raises(CheckpointError, match=why):
            read()


@pytest.mark.parametrize(
    ("part", "value", "why"),
    [
        ("_whole", 0x88, "a whole number of 4 bits is below -7"),
        ("_scales", 0xFF, "a scale is negative or not finite"),
        ("_bitmap", 0xFF, "a bitmap keeps|bits are set in a bitmap"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*loading attributes")
def test_a_model_of_lies_is_refused(tmp_path: Path, part: str, value: int, why: str) -> None:
    dense = save_llama(tmp_path / "dense")
    packed = rounded(dense, "rows")
    path = next(
        p for p in sorted(packed.glob("*.safetensors")) if any(part in k for k in load_file(p))
    )
    entries = tensors.header(path).entries
    name = next(k for k in entries if k.endswith(part))
    content = bytearray(path.read_bytes())
    begin = entries[name]["data_offsets"][0]
    content[begin : begin + 2] = bytes([value, value])
    path.write_bytes(content)
    for way in ("transformers", "expanded", "load", "load dense", "to prune"):
        with pytest.raises(llmprune.LLMPruneError, match=why):
            LOADS[way](packed)


def test_another_version_is_refused(tmp_path: Path) -> None:
    dense = tell(
        folder_of(tmp_path / "a", {UP.format(0): made((8, 64), 8, 0, torch.float32)}),
        recipe("int8", 0),
    )
    convert(dense, tmp_path / "b", "sparse")
    config = json.loads((tmp_path / "b/config.json").read_text())
    config["quantization_config"]["format_version"] = 3
    (tmp_path / "b/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"version 3 .*reads versions 1 and 2"):
        llmprune.SparseConfig.from_dict(config["quantization_config"])
    shutil.rmtree(tmp_path / "b")
