"""Sparse checkpoints read as the dense ones they stand for; the writer here is not llmprune's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_files import bits, equal, pack_folder, save_packed
from safetensors.torch import load_file
from streamed import figures, same, save_llama, save_mixtral, timeless, write_text
from test_stream import BUILDS, build
from torch import Tensor

from llmprune import loading
from llmprune.checkpoint import tensors, unpack
from llmprune.checkpoint.files import find
from llmprune.checkpoint.inspect import inspect
from llmprune.checkpoint.skeleton import open_shelf
from llmprune.checkpoint.verify import Expected, verify
from llmprune.errors import CheckpointError
from llmprune.pattern import NM

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [(1, 1), (1, 40), (5, 1), (3, 7), (33, 41), (2, 5, 9), (3, 2, 2, 11), (300, 17)]


def thinned(shape: tuple[int, ...], dtype: torch.dtype, share: float = 0.5) -> Tensor:
    """Random weights, a share of them +0.0; minus zero, infinity and a NaN with a payload among the rest."""
    torch.manual_seed(shape[-1])
    dense = torch.randn(shape).to(dtype)
    kinds = {2: (torch.int16, [-(2**15), 0x7F80, 0x7FC3]), 4: (torch.int32, [-(2**31), 0x7F800001])}
    kind, odd = kinds[dtype.itemsize]
    view = dense.view(kind).reshape(-1)
    view[: len(odd)] = torch.tensor(odd[: view.numel()], dtype=kind)
    dense[torch.rand(shape) < share] = 0
    return dense


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_packed_matrices_read_as_dense_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, share: float
) -> None:
    monkeypatch.setattr(unpack, "WEIGHTS_AT_ONCE", 100)  # many parts even of these
    dense = {str(shape): thinned(shape, dtype, share) for shape in SHAPES}
    plain = {"norm": torch.randn(9), "count": torch.arange(4)}
    path = save_packed(tmp_path / "model.safetensors", dense, plain)
    found = tensors.index(find(tmp_path))
    assert found.keys() == dense.keys() | plain.keys()
    for name, want in (dense | plain).items():
        stored = found[name]
        assert (stored.shape, stored.dtype, stored.file) == (tuple(want.shape), want.dtype, path)
        assert equal(tensors.load(stored), want)
        for most in (1, 64, 2**26):
            whole = [bits(p) for p in tensors.pieces(stored, most)]  # cat alters a NaN
            assert torch.equal(torch.cat(whole), bits(want))
    for shape in SHAPES:
        rows = tensors.rows_of(found[str(shape)])
        tall = dense[str(shape)].reshape(-1, shape[-1])
        assert (rows.count, rows.columns) == tuple(tall.shape)
        for first, count in ((0, 1), (rows.count - 1, 1), (rows.count // 2, rows.count // 3)):
            assert equal(rows.rows(first, count), tall[first : first + count])


def test_rows_of_an_embedding(tmp_path: Path) -> None:
    table = thinned((300, 17), torch.bfloat16)
    save_packed(tmp_path / "model.safetensors", {"packed": table}, {"plain": table})
    found = tensors.index(find(tmp_path))
    rows = torch.tensor([0, 3, 150, 299])
    for stored in found.values():
        assert equal(tensors.read_rows(stored, rows), table[rows])


def test_a_kept_zero_is_read(tmp_path: Path) -> None:
    dense = torch.tensor([[0.0, 1.0, 0.0, 2.0]])
    everything = {
        "a_values": dense[0, :2].clone(),
        "a_bitmap": torch.tensor([[3]], dtype=torch.uint8),
    }
    entries = {"a": {"shape": [1, 4], "dtype": "F32", "pattern": "2:4", "axis": "rows"}}
    path = tmp_path / "model.safetensors"
    save_packed(
        path, {}, everything,
        llmprune__format_version="1", llmprune__packed=json.dumps(entries),
    )  # fmt: skip
    assert equal(tensors.load(tensors.index(find(path))["a"]), torch.tensor([[0.0, 1.0, 0.0, 0.0]]))


def flip(path: Path, name: str, byte: int, value: int) -> None:
    """Change one byte of a tensor of a file."""
    entries = tensors.header(path).entries
    with path.open("r+b") as file:
        file.seek(entries[name]["data_offsets"][0] + byte)
        file.write(bytes([value]))


def test_a_bitmap_that_disagrees_with_its_values(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    dense = {"a": torch.ones(4, 9)}
    for byte, value, why in (
        (0, 0x7F, "35 bits are set in a bitmap, and there are 36 values"),
        (1, 0x03, "behind the last column"),
    ):
        stored = tensors.index(find(save_packed(path, dense, {})))["a"]
        assert equal(tensors.load(stored), dense["a"])
        flip(path, "a_bitmap", byte, value)
        with pytest.raises(CheckpointError, match=why):
            tensors.load(stored)
        with pytest.raises(CheckpointError, match=why):
            next(tensors.pieces(stored))
        with pytest.raises(CheckpointError, match=why):
            inspect(path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = save_packed(tmp_path / "model.safetensors", {"a": torch.ones(64, 64)}, {})
    stored = tensors.index(find(path))["a"]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut short"):
        tensors.load(stored)


def test_a_matrix_in_two_files(tmp_path: Path) -> None:
    save_packed(tmp_path / "a.safetensors", {"w": torch.ones(4, 8)}, {})
    save_packed(tmp_path / "b.safetensors", {}, {"w": torch.ones(4, 8)})
    with pytest.raises(CheckpointError, match=r"w is both packed and dense"):
        tensors.index(find(tmp_path))


def test_another_version(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_packed(path, {"w": torch.ones(4, 8)}, {}, llmprune__format_version="3")
    with pytest.raises(CheckpointError, match=r"version '3' of the sparse format.*update llmprune"):
        tensors.index(find(path))
    folder = save_llama(tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "llmprune", "format_version": 3}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json is in version 3"):
        loading.check(str(folder))


def decoder(name: str, tensor: Tensor) -> bool:
    return ".layers." in name or ".h." in name or "transformer.h" in name


def twin(dense: Path) -> Path:
    """A checkpoint with every second weight of its block matrices gone, dense (in place) and packed."""
    from safetensors.torch import save_file

    for path in dense.glob("*.safetensors"):
        content = load_file(path)
        for name, tensor in content.items():
            if tensor.ndim > 1 and decoder(name, tensor):
                tensor.view(-1)[torch.arange(tensor.numel()) % 4 < 2] = 0
        save_file(content, path, {"format": "pt"})
    return pack_folder(dense, dense.with_name(dense.name + "-packed"), decoder)


@pytest.fixture(scope="module", params=sorted(BUILDS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Path, Path]:
    """A checkpoint of a family, dense and packed."""
    dense = build(request.param, tmp_path_factory.mktemp(request.param) / "dense")
    return dense, twin(dense)


def test_the_model_in_memory_is_the_same(pair: tuple[Path, Path]) -> None:
    one, two = (loading.open_model(loading.check(str(p))) for p in pair)
    assert type(one.model) is type(two.model)
    assert one.stored == two.stored
    assert one.model.generation_config.to_dict() == two.model.generation_config.to_dict()
    left, right = one.model.state_dict(), two.model.state_dict()
    assert left.keys() == right.keys()
    assert all(equal(left[k], right[k]) for k in left)
    ids = torch.arange(12).reshape(1, 12)
    assert torch.equal(one.model(ids).logits, two.model(ids).logits)
    assert not hasattr(two.model.config, "quantization_config")


def test_the_model_on_the_shelf_is_the_same(pair: tuple[Path, Path]) -> None:
    device = torch.device("cpu")
    one, two = (open_shelf(loading.check(str(p)), dtype=torch.float32, device=device) for p in pair)
    assert one.tied == two.tied
    assert {k: (s.dtype, s.shape) for k, s in one.saved().items()} == {
        k: (s.dtype, s.shape) for k, s in two.saved().items()
    }
    for shelf in (one, two):
        shelf.load_rest(torch.arange(8), head=True)
        for index in range(len(shelf.layers)):
            shelf.load(index)
    left, right = one.model.state_dict(), two.model.state_dict()
    assert left.keys() == right.keys()
    assert all(equal(left[k], right[k]) for k in left if not left[k].is_meta)


def test_inspect_says_the_same(pair: tuple[Path, Path]) -> None:
    one, two = (inspect(p).as_dict() for p in pair)
    told = two.pop("sparse")
    assert one.pop("sparse") is None
    packed = [t for t in two["tensors"] if t["packed"]]
    dense = {t["name"]: t["bytes"] for t in one["tensors"]}
    assert told["format_version"] == 1
    assert told["matrices"] == len(packed) > 0
    assert told["dense_bytes"] == sum(dense[t["name"]] for t in packed)
    assert told["packed_bytes"] == sum(t["bytes"] for t in packed)
    assert told["ratio"] == told["packed_bytes"] / told["dense_bytes"] < 0.65
    assert f"{told['matrices']} packed matrices" in inspect(pair[1]).table()

    def bare(plain: Any) -> Any:
        if isinstance(plain, dict):
            drop = ("bytes", "source", "packed")
            return {k: bare(v) for k, v in plain.items() if k not in drop}
        return [bare(v) for v in plain] if isinstance(plain, list) else plain

    assert bare(one) == bare(two)


def test_verification_reads_packed_files(tmp_path: Path) -> None:
    key = "model.layers.0.mlp.up_proj.weight"
    dense = torch.randn(8, 16)
    dense[:, 0::2] = 0
    save_packed(tmp_path / "model.safetensors", {key: dense}, {})
    name = key.removesuffix(".weight")
    verify(tmp_path, [Expected(name, (8, 16), 64, NM(2, 4))])
    with pytest.raises(CheckpointError, match="64 nonzero weights, 63"):
        verify(tmp_path, [Expected(name, (8, 16), 63)])


@pytest.mark.parametrize("make", [save_llama, save_mixtral])
def test_the_command_line_on_both(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Perplexity, in memory and block by block, and pruning further: the same figures and files."""
    dense = make(tmp_path / "dense")
    packed = twin(dense)
    text = write_text(tmp_path / "text.txt", 700)
    evaluated = [
        figures(capsys, "eval", "--model", m, "--dataset", text, "--seqlen", 16)["perplexity"]
        for m in (dense, packed)
    ]
    assert evaluated[0] == evaluated[1]
    common = ("--calibration", text, "--samples", 8, "--seqlen", 16, "--eval-dataset", text)
    recipe = ("--sparsity", "1:4", "--method", "wanda")
    for save in ((), ("--save",)):
        reports = []
        for model in (dense, packed):
            target = (*save, tmp_path / "out" / model.name) if save else ()
            reports.append(figures(capsys, "--model", model, *common, *recipe, *target))
        assert timeless(reports[0]["layers"]) == timeless(reports[1]["layers"])
        before, after = (
            [r["perplexity"][k]["perplexity"] for r in reports] for k in ("dense", "pruned")
        )
        assert before[0] == before[1] == evaluated[0]
        assert after[0] == after[1]
    results = [tmp_path / "out" / m.name for m in (dense, packed)]
    config = json.loads((results[1] / "config.json").read_text())
    assert "quantization_config" not in config
    for folder in results:
        (folder / "llmprune.json").unlink()  # names its source
    same(*results)
