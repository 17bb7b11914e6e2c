"""Write a model as dense safetensors: whole and verified, or not at all.

The checkpoint is an ordinary one: no `quantization_config`, no `sparsity_config`, so that
everything that reads the source model reads it too. What was done stands in `llmprune.json` and the
model card.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from llmprune.checkpoint.convert import pack_folder
from llmprune.checkpoint.quiet import quiet
from llmprune.checkpoint.target import check_target as check_target
from llmprune.checkpoint.target import staged
from llmprune.checkpoint.verify import Expected as Expected
from llmprune.checkpoint.verify import check_matrix, verify_zeros
from llmprune.checkpoint.verify import expectations as expectations
from llmprune.checkpoint.verify import verify as verify
from llmprune.errors import CheckpointError, ModelError
from llmprune.memory import parse_size
from llmprune.model import every_matrix
from llmprune.report import Report

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WRITTEN = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
)  # fp8 needs scales beside it


def check_saveable(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Whether `save` will be able to write `model` and to find its matrices `names` again.

    Costs no weight: it writes the config to a temporary folder and follows the names on empty
    tensors.

    Raises:
        ModelError: for a model that is still quantized, a config that transformers refuses to
            write, or a matrix that its file format merges with others.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(
            f"{type(model).__name__} is quantized; load it dequantized, such as in bfloat16"
        )
    before = dict(vars(model.config))
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.config.save_pretrained(folder)
    except ValueError as error:
        raise ModelError(f"transformers will not save this config: {_line(error)}") from error
    finally:
        vars(model.config).update(before)
    fused = {m.name: m.parameter_name for m in every_matrix(model) if m.expert is not None}
    names = list(names)
    for parameter in dict.fromkeys(fused[name] for name in names if name in fused):
        _written_as(
            model, parameter, torch.empty(model.get_parameter(parameter).shape, device="meta")
        )
    for name in names:
        if name not in fused and _file_key(model, name) is None:
            raise ModelError(
                f"transformers merges {name} with other weights in the file, so it cannot be "
                "verified there; leave it out with --ignore"
            )


def save(
    model: PreTrainedModel,
    tokenizer: Any,
    target: Path,
    report: Report,
    *,
    card: str,
    stored: Mapping[str, torch.dtype] | None = None,
    expected: Sequence[Expected] = (),
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    sparse: str | None = None,
) -> None:
    """Write model, tokenizer, generation config, report and card to `target`, in one step.

    Everything is written beside the target, flushed, read back (`expected`) and renamed. Whatever goes wrong
    before that, Ctrl-C included, leaves the target, the model and its config as they were.

    Args:
        model: on any device, in any compute dtype.
        tokenizer: or processor; None when there is none.
        target: folder to write; its parents are made.
        report: becomes `llmprune.json`.
        card: text of `README.md`.
        stored: dtype of each parameter in the file, by name; those not named keep the one they have.
        expected: what to verify in the written files before they are put in place.
        max_shard_size: as transformers takes it, `"5GB"` or bytes.
        overwrite: whether to replace a checkpoint that is there.
        sparse: name to load it by, which has it stored in the sparse format; None stores it dense.

    Raises:
        ConfigError: when the target is not free.
        CheckpointError: when it cannot be written, or the files are not what was decided.
    """
    most = parse_size(max_shard_size, "max_shard_size")
    try:
        with staged(target, overwrite) as staging:
            dense = staging if sparse is None else staging / "dense"
            dense.mkdir(exist_ok=True)
            _write_words(dense, tokenizer, card, report)
            _write_dense(model, dense, stored or {}, most)
            _verify(dense, model, expected)
            if sparse is not None:
                pack_folder(dense, staging, most, sparse)
                shutil.rmtree(dense)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{target} could not be written: {_line(error)}; nothing is left of it"
        ) from error


def _write_dense(
    model: PreTrainedModel, folder: Path, stored: Mapping[str, torch.dtype], max_shard_size: int
) -> None:
    with _stored_dtypes(model, stored) as dtype:
        _write_model(model, folder, max_shard_size)
    _settle_config(folder / "config.json", dtype)


def _write_words(folder: Path, tokenizer: Any, card: str, report: Report) -> None:
    """Tokenizer, card and report."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "llmprune.json").write_text(report.to_json() + "\n", encoding="utf-8")


@contextmanager
def _stored_dtypes(model: nn.Module, stored: Mapping[str, torch.dtype]) -> Iterator[torch.dtype]:
    """While open, each parameter has the dtype that it is stored in; gives the most common one.

    Tensor by tensor, so that the model is never there twice. Where the stored dtype cannot hold a
    value exactly, the original is kept and comes back; buffers are not touched.
    """
    changed: list[tuple[nn.Parameter, torch.dtype, Tensor | None]] = []
    weights: Counter[torch.dtype] = Counter()
    try:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            want = stored.get(name, parameter.dtype)
            if want in _WRITTEN and want != parameter.dtype and not parameter.is_meta:
                wide = parameter.data
                narrow = wide.to(want)
                exact = torch.equal(narrow.to(wide.dtype), wide)
                changed.append((parameter, wide.dtype, None if exact else wide))
                parameter.data = narrow
            if parameter.is_floating_point():
                weights[parameter.dtype] += parameter.numel()
        yield weights.most_common(1)[0][0]
    finally:
        for parameter, dtype, original in changed:
            parameter.data = parameter.data.to(dtype) if original is None else original


def write_side_files(
    model: PreTrainedModel, tokenizer: Any, folder: Path, dtype: torch.dtype
) -> None:
    """Everything of a checkpoint but its weights: config, generation config, tokenizer, custom code.

    Args:
        model: may be without weights.
        tokenizer: or processor; None when there is none.
        folder: that holds the weights.
        dtype: that most of them are stored in.

    Raises:
        CheckpointError: when transformers will not save the config.
        OSError: when something cannot be written.
    """
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="config-") as place:
        beside = Path(place)
        with quiet():
            _write_model(model, beside, "5GB", {})
        _settle_config(beside / "config.json", dtype)
        for path in beside.iterdir():
            shutil.move(path, folder / path.name)


def _write_model(
    model: PreTrainedModel,
    staging: Path,
    max_shard_size: int | str,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """`save_pretrained` (of `weights` instead of the model's own), the generation config as it was.

    transformers refuses to save a generation config that contradicts itself (a temperature without
    sampling), though it loads it; that must not cost the run, so it is written past the refusal.
    """
    from transformers import GenerationConfig

    config, generation = dict(vars(model.config)), getattr(model, "generation_config", None)
    try:
        if generation is not None:
            model.generation_config = GenerationConfig()
        model.save_pretrained(staging, state_dict=weights, max_shard_size=max_shard_size)
    except ValueError as error:
        raise CheckpointError(f"transformers will not save the model: {_line(error)}") from error
    finally:
        vars(model.config).update(config)
        if generation is not None:
            model.generation_config = generation
    if generation is not None and model.can_generate():
        path = staging / "generation_config.json"
        generation.to_json_file(path, use_diff=True, keys_to_pop=["compile_config"])
    for file in staging.glob("*.safetensors"):  # safetensors 0.8 lets the owner alone read
        file.chmod((staging / "config.json").stat().st_mode)


def _settle_config(path: Path, dtype: torch.dtype) -> None:
    """Let config.json name the stored dtype, in its parts too, and no compressed format."""
    config = json.loads(path.read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        for key in ("quantization_config", "sparsity_config", "compression_config"):
            part.pop(key, None)
        if part.pop("torch_dtype", None) or "dtype" in part or part is config:
            part["dtype"] = name
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + os.linesep, encoding="utf-8")


def _verify(folder: Path, model: PreTrainedModel, expected: Sequence[Expected]) -> None:
    """Hold the files against `expected`.

    A file may hold fused experts as one tensor, as one per expert or cut otherwise. So an expert is held
    against what was decided in the model, and the files against the model: they must be zero wherever
    the mask of the whole parameter is, once that is rearranged as transformers rearranges the weights.
    """
    fused = {m.name: m for m in every_matrix(model) if m.expert is not None}
    dense = [e for e in expected if e.name not in fused]
    verify(folder, [replace(e, key=e.key or _file_key(model, e.name)) for e in dense])
    parameters: dict[str, Tensor] = {}
    for entry in expected:
        if matrix := fused.get(entry.name):
            check_matrix(replace(entry, transposed=False), matrix.weight)
            parameters[matrix.parameter_name] = matrix.parameter
    for name, parameter in parameters.items():
        keep = (parameter.detach() != 0).to(torch.uint8)
        verify_zeros(folder, name, _written_as(model, name, keep))


def _written_as(model: PreTrainedModel, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What transformers writes `tensor` as, in the place of the parameter `name`: file key to tensor.

    Raises:
        ModelError: when it cannot.
    """
    from transformers.core_model_loading import revert_weight_conversion

    try:
        return dict(revert_weight_conversion(model, {name: tensor}))
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise ModelError(
            f"transformers cannot write {name} in its file format ({_line(error)}); leave it out with "
            "--ignore"
        ) from error


def _file_key(model: PreTrainedModel, name: str) -> str | None:
    """The key that transformers stores `name`'s weight under; None where it merges weights."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        empty = torch.empty(model.get_parameter(f"{name}.weight").shape, device="meta")
        written = revert_weight_conversion(model, {f"{name}.weight": empty})
    except (RuntimeError, ValueError, KeyError, IndexError, AttributeError):
        return None
    fits = [key for key, tensor in written.items() if tensor.shape == empty.shape]
    return fits[0] if len(fits) == 1 and len(written) == 1 else None


def _line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__
