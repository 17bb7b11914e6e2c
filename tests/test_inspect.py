"""What the files hold, told from the files: against dense brute force, and every way to be damaged."""

import json
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from hub_server import point_at, serving
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llmprune.checkpoint import census
from llmprune.checkpoint.census import take
from llmprune.checkpoint.inspect import inspect
from llmprune.errors import CheckpointError, HubError
from llmprune.pattern import NM, Unstructured, keep_highest

BOTH = ("rows", "columns")


def masked(shape: tuple[int, ...], n: int, m: int) -> Tensor:
    weight = torch.randn(shape).abs() + 0.1
    keep = keep_highest(weight.reshape(-1, m), m - n).reshape(shape)
    return weight * keep


def slow(tensor: Tensor) -> tuple[int, int] | None:
    """Tightest n:m along the rows, group by group."""
    held = []
    for m in (4, 8, 16, 32):
        if tensor.shape[-1] % m:
            continue
        counts = [int((g != 0).sum()) for g in tensor.reshape(-1, m)]
        n = max(counts)
        if 0 < n < m and (m == 4 or sum(c == n for c in counts) * 2 >= len(counts)):
            held.append((n / m, m, n))
    return (min(held)[2], min(held)[1]) if held else None


@pytest.mark.parametrize(
    ("n", "m"), [(1, 4), (2, 4), (3, 4), (4, 8), (5, 8), (8, 16), (7, 16), (16, 32), (9, 32)]
)
def test_the_pattern_is_found(n: int, m: int) -> None:
    torch.manual_seed(n * m)
    tensor = masked((64, 96), n, m)
    found = take(tensor, BOTH)
    assert found == census.Census(int((tensor == 0).sum()), (n, m), "rows")
    assert found.pattern == slow(tensor)
    assert take(tensor.T.contiguous(), BOTH).axis == "columns"
    assert take(tensor.T.contiguous(), ("columns", "rows")).pattern == (n, m)
    assert take(tensor.T.contiguous(), ("rows",)).pattern is None


def test_parts_join_up(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tensor = masked((3, 64, 96), 4, 8)
    flipped = tensor.transpose(1, 2).contiguous()
    whole = take(tensor, BOTH), take(flipped, BOTH)
    for weights in (
        1,
        64 * 96 + 1,
        2 * 64 * 96,
    ):  # pieces of a matrix; one; two, and the third alone
        monkeypatch.setattr(census, "AT_ONCE", weights)
        assert (take(tensor, BOTH), take(flipped, BOTH)) == whole
    assert [w.pattern for w in whole] == [(4, 8), (4, 8)]


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_chance_is_no_pattern(sparsity: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 256)
    assert take(weight * Unstructured(sparsity, "row").keep(weight.abs()), BOTH).pattern is None


def test_one_wrong_group_is_found() -> None:
    tensor = masked((64, 64), 2, 4)
    tensor[63, 60:] = 1
    assert take(tensor, BOTH).pattern is None


@pytest.mark.parametrize(
    ("shape", "dtype"),
    product(
        [(), (0,), (5,), (3, 0), (7, 6), (1, 4)],
        [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2],
    ),
)
def test_every_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.randint(0, 2, shape).float() * torch.tensor([-1.0])
    values = values.reshape(shape)  # holds minus zeros
    assert take(values.to(dtype), BOTH).zeros == int((values == 0).sum())


def test_groups_down_a_single_column() -> None:
    column = masked((8, 4), 2, 4).reshape(-1, 1)
    assert take(column, BOTH) == census.Census(16, (2, 4), "columns")
    assert take(torch.stack([column, column]), BOTH) == census.Census(32, (2, 4), "columns")


def test_very_many_tiny_matrices_are_looked_at_together() -> None:
    tensor = torch.zeros(1_000_000, 1, 1)
    begun = time.process_time()
    assert take(tensor, BOTH).zeros == 1_000_000
    assert time.process_time() - begun < 5  # one at a time takes 50 s


def test_integers_have_no_zeros() -> None:
    assert take(torch.zeros(4, 4, dtype=torch.int32), BOTH) == census.Census(0)


def prune_all(model: torch.nn.Module, pattern: NM) -> None:
    for name, module in model.named_modules():
        conv = type(module).__name__ == "Conv1D"
        if (conv or isinstance(module, torch.nn.Linear)) and name != "lm_head":
            weight = module.weight.data.T if conv else module.weight.data
            result = weight * pattern.keep(weight.abs())
            module.weight.data.copy_(result.T if conv else result)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    prune_all(model, NM(2, 4))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "llama", max_shard_size=20_000)
    return tmp_path / "llama"


def test_a_folder_of_shards(llama: Path) -> None:
    found = inspect(llama)
    assert found.files > 2
    assert found.bytes == sum(p.stat().st_size for p in llama.glob("*.safetensors"))
    assert (found.pattern, found.sparsity, found.model_type) == ("2:4", 0.5, "llama")
    assert len(found.decoder) == 14
    plain = json.loads(json.dumps(found.as_dict()))
    assert plain["decoder"]["patterns"] == {"2:4": 14}
    assert plain["everything"]["tensors"] == len(plain["tensors"]) == 21
    assert plain["everything"]["sparsity"] < 0.5
    assert plain["kinds"]["mlp.up_proj"]["tensors"] == 2
    table = found.table()
    assert "BF16" in table
    assert "50.00%  2:4" in table
    assert all(len(line) < 120 for line in table.splitlines())


def test_one_file(llama: Path, tmp_path: Path) -> None:
    save_file({"a.0.w.weight": masked((8, 8), 1, 4)}, tmp_path / "one.safetensors")
    found = inspect(tmp_path / "one.safetensors")
    assert (found.model_type, found.pattern, found.sparsity) == (None, "1:4", 0.75)


def test_gpt2_is_read_down_the_columns(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )
    prune_all(model, NM(4, 8))
    model.save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert found.pattern == "4:8"
    assert {t.axis for t in found.decoder} == {"columns"}
    assert "4:8 down the columns" in found.table()
    (tmp_path / "config.json").unlink()
    assert {t.axis for t in inspect(tmp_path).decoder} == {"columns"}


def test_an_index_left_by_an_earlier_save_is_not_followed(llama: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llama)
    model.save_pretrained(llama)  # one file now, as transformers reads it; it leaves the old index
    assert inspect(llama).files == 1


def test_some_matrices_dense(llama: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llama)
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1)
    model.save_pretrained(llama)
    found = inspect(llama)
    assert found.pattern is None
    assert "2:4 in 13 of 14, none in 1 of 14" in found.table()


def test_what_is_a_decoder_matrix(tmp_path: Path) -> None:
    weight, expert = torch.ones(4, 4), torch.ones(2, 4, 4)
    tensors = {
        "model.layers.0.mlp.experts.gate_up_proj": expert,
        "model.layers.0.mlp.experts.1.w1.weight": weight,
        "model.layers.0.mlp.gate.weight": weight,
        "model.layers.0.mixer.conv1d.weight": expert,
        "model.layers.0.norm.weight": weight[0],
        "vision_tower.layers.0.mlp.up_proj.weight": weight,
        "model.embed_tokens.weight": weight,
        "model.layers.0.mlp.up_proj.weight_scale": weight,
        "lm_head.weight": weight,
    }
    save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / "model.safetensors")
    decoder = {t.name for t in inspect(tmp_path).decoder}
    assert decoder == set(list(tensors)[:2])


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_no_such_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder or file"):
        inspect(tmp_path / "nothing")


def test_damaged_checkpoints(llama: Path, tmp_path: Path) -> None:
    shard = sorted(llama.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=f"{shard.name}.*cut short") as error:
        inspect(llama)
    one_line(error)
    shard.write_bytes(b"")
    with pytest.raises(CheckpointError, match="cut short") as error:
        inspect(llama)
    one_line(error)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} of .* is missing") as error:
        inspect(llama)
    one_line(error)
    shard.write_bytes(whole)
    index = llama / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    for bad in ("../secret.safetensors", "/etc/secret.safetensors"):
        changed = {"weight_map": {**table["weight_map"], "model.norm.weight": bad}}
        index.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match="outside of the checkpoint") as error:
            inspect(llama)
        one_line(error)
    index.write_text(json.dumps({"weight_map": {**table["weight_map"], "model.extra": shard.name}}))
    with pytest.raises(CheckpointError, match=r"lacks model.extra"):
        inspect(llama)
    for text in ("{", "[]", "{}"):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"index.json of") as error:
            inspect(llama)
        one_line(error)


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    for source in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(CheckpointError, match="only safetensors are read; convert") as error:
            inspect(source)
        one_line(error)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file"):
        inspect(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"is no \.safetensors file; pass a folder"):
        inspect(tmp_path / "notes.txt")


def test_from_the_hub(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {p.name: p.read_bytes() for p in llama.iterdir()}
    with serving(files=files, private=False) as hub:
        point_at(monkeypatch, hub.url, str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        found = inspect("ann/tiny")
        assert found.as_dict() == {**inspect(llama).as_dict(), "source": "ann/tiny"}
        hub.vanish = "/resolve/"
        point_at(monkeypatch, hub.url, str(tmp_path / "other"))
        with pytest.raises(HubError, match="could not be downloaded") as error:
            inspect("ann/tiny")
        one_line(error)
    with pytest.raises(HubError, match=r"no folder 'ann/tiny' here.*does not answer") as error:
        inspect("ann/tiny")
    one_line(error)
    with serving() as hub:
        point_at(monkeypatch, hub.url, str(tmp_path / "cache"))
        with pytest.raises(HubError, match=r"no folder 'ann/none' here.*404") as error:
            inspect("ann/none")
        one_line(error)
