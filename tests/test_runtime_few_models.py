"""Models in few bits: loaded, saved, converted, adapted, and the dense model all along."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from packed_files import equal
from safetensors.torch import load_file
from streamed import save_llama
from test_fewer_bits import IDS, rounded
from test_stream import build
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmprune
from llmprune.checkpoint import tensors
from llmprune.checkpoint.convert import convert
from llmprune.checkpoint.files import find
from llmprune.checkpoint.inspect import inspect
from llmprune.errors import ConfigError
from llmprune.runtime.few_bits import FewBitsLinear
from llmprune.runtime.seats import few_weights, packed_weights


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Path, Path]:
    """A checkpoint, dense and in fewer bits: int4, and int8 stored [in, out]."""
    place = tmp_path_factory.mktemp(request.param) / "dense"
    if request.param == "llama":
        return save_llama(place), rounded(place, "rows")
    return build("gpt2", place), rounded(place, "columns", "int8", 8)


def loaded(packed: Path, **options: Any) -> Any:
    return llmprune.load(packed, "cpu", progress=False, **options)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def files(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder but the guards, of which a writer may put more."""
    found = (load_file(path) for path in sorted(folder.glob("*.safetensors")))
    return {key: tensor for file in found for key, tensor in file.items() if tensor.numel()}


def alike(one: Path, two: Path) -> bool:
    left, right = files(one), files(two)
    return left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)


def test_it_is_held_in_its_few_bits_and_computes_what_values_do(pair: tuple[Path, Path]) -> None:
    model, values = loaded(pair[1]), loaded(pair[1], few_bits=False)
    held = few_weights(model)
    assert held
    assert not packed_weights(model)
    assert packed_weights(values).keys() == held.keys()
    assert not few_weights(values)
    told = inspect(pair[1])
    stored = {t.name: t.bytes for t in told.tensors if t.bits}
    assert {name: layer.bytes for name, layer in held.items()} == stored
    assert sum(layer.bytes for layer in held.values()) < sum(
        w.values.nbytes + w.bitmap.nbytes for w in packed_weights(values).values()
    )
    assert torch.equal(logits(model), logits(values))
    dense = AutoModelForCausalLM.from_pretrained(pair[0]).eval()
    torch.testing.assert_close(logits(model), logits(dense))
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(values))
    if model.config.model_type == "gpt2":  # once is enough: it takes long
        compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(logits(compiled), logits(values))


def test_saved_it_is_the_file_that_it_came_from(pair: tuple[Path, Path], tmp_path: Path) -> None:
    by_transformers = AutoModelForCausalLM.from_pretrained(pair[1])
    for name, model in (("one", loaded(pair[1])), ("two", by_transformers)):
        model.save_pretrained(tmp_path / name)
        assert alike(tmp_path / name, pair[1])
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["quantization_config"]["format_version"] == 2
        assert inspect(tmp_path / name).sparse == inspect(pair[1]).sparse
        assert torch.equal(logits(loaded(tmp_path / name)), logits(model))
    convert(tmp_path / "one", tmp_path / "dense", "dense")
    one, two = (tensors.index(find(p)) for p in (pair[0], tmp_path / "dense"))
    shared = one.keys() & two.keys()
    assert {k for k, s in one.items() if len(s.shape) > 1} <= shared
    assert all(equal(tensors.load(one[k]), tensors.load(two[k])) for k in shared)


def test_from_a_disk_it_computes_and_is_saved(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pair[1]).eval()
    truth = logits(model)
    accelerate.disk_offload(model, tmp_path / "offload", execution_device="cpu")
    assert all(layer.weight_whole.is_meta for layer in few_weights(model).values())
    assert torch.equal(logits(model), truth)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that weights on a disk are read to be saved
        model.save_pretrained(tmp_path / "saved")
    left, right = files(tmp_path / "saved"), files(pair[1])
    assert left.keys() - right.keys() <= {"lm_head.weight"}  # accelerate unties it
    assert all(equal(left[k], right[k]) for k in right)


def test_in_another_dtype_it_is_the_dense_model_in_that(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    half = loaded(pair[1], dtype="float16")
    assert {layer.dtype for layer in few_weights(half).values()} == {torch.float16}
    assert torch.equal(logits(half), logits(loaded(pair[1], dtype="float16", few_bits=False)))
    moved = loaded(pair[1]).half()
    half.save_pretrained(tmp_path / "half")
    truth = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float16)
    for model in (half, moved, loaded(tmp_path / "half")):
        assert model.dtype == torch.float16
        assert few_weights(model)
        llmprune.densify(model)
        left, right = truth.state_dict(), model.state_dict()
        assert left.keys() == right.keys()
        assert [k for k in left if not equal(left[k], right[k])] == []


def test_densified_and_packed_again_it_has_values(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model = loaded(pair[1])
    truth, size = logits(model), sum(layer.bytes for layer in few_weights(model).values())
    done = llmprune.densify(model)
    assert done.packed_bytes == size
    assert not any(isinstance(m, FewBitsLinear) for m in model.modules())
    llmprune.sparsify(model)
    assert not few_weights(model)
    assert torch.equal(logits(model), truth)
    model.save_pretrained(tmp_path / "values")
    assert not [t for t in inspect(tmp_path / "values").tensors if t.bits]
    config = json.loads((tmp_path / "values/config.json").read_text())
    assert config["quantization_config"]["format_version"] == 1
    with pytest.raises(llmprune.LLMPruneError, match="packed already"):
        llmprune.sparsify(loaded(pair[1]))


@pytest.mark.filterwarnings("ignore:.*loading attributes")
def test_training_the_weights_themselves_says_what_to_do(pair: tuple[Path, Path]) -> None:
    model = loaded(pair[1])
    with pytest.raises(ConfigError, match="few_bits=False"):
        model.requires_grad_(True)
    config = llmprune.SparseConfig(few_bits=False)
    trained = AutoModelForCausalLM.from_pretrained(pair[1], quantization_config=config)
    for module in trained.modules():
        if isinstance(module, llmprune.SparseLinear):
            module.weight_values.requires_grad_()
    trained(input_ids=IDS, labels=IDS).loss.backward()


def test_adapters_train_beside_it_and_are_not_merged(pair: tuple[Path, Path]) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = loaded(pair[1])
    plain = logits(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert torch.equal(logits(adapted.eval()), plain)  # an adapter begins at nothing
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, 0.05)
    losses = []
    for _ in range(3):
        loss = adapted.train()(input_ids=IDS, labels=IDS, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = {n.replace(".base_layer", ""): t for n, t in model.state_dict().items()}
    assert [n for n, t in before.items() if not torch.equal(after[n], t)] == []
    with pytest.raises(ConfigError, match=r"adapter is merged into: load .*few_bits=False"):
        adapted.merge_and_unload()
