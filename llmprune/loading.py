"""Open a model by path or Hub id; everything that can be refused is refused before a weight loads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmprune.checkpoint import sparse, tensors
from llmprune.checkpoint.expanded import load_expanded
from llmprune.checkpoint.files import check_folder, find
from llmprune.checkpoint.promise import build_empty
from llmprune.checkpoint.quiet import quiet
from llmprune.errors import ConfigError, LLMPruneError, ModelError, nearest, short

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A checkpoint that has passed the checks that need no weights.

    Attributes:
        name: as the user gave it.
        path: local folder, or Hub id.
        config: transformers config.
        trust_remote_code: whether code from the checkpoint may run.
        revision: branch, tag or commit on the Hub.
        packed: whether it is in the sparse format (docs/format.md); `config` no longer says so, as a model
            that is loaded from it is dense.
    """

    name: str
    path: str
    config: Any
    trust_remote_code: bool = False
    revision: str | None = None
    packed: bool = False

    @property
    def folder(self) -> Path | None:
        """The local folder, or None for a Hub id."""
        return Path(self.path) if Path(self.path).is_dir() else None

    @property
    def bytes(self) -> int:
        """Size of the local safetensors files, 0 when they are not here."""
        return (
            sum(f.stat().st_size for f in self.folder.glob("*.safetensors")) if self.folder else 0
        )


@dataclass(frozen=True)
class Opened:
    """A model ready to be pruned.

    Attributes:
        model: transformers model in eval mode, on its device, in its compute dtype.
        tokenizer: None when the checkpoint has none.
        stored: dtype that every parameter is saved in, by name.
    """

    model: Any
    tokenizer: Any
    stored: Mapping[str, torch.dtype]


def check(name: str, *, trust_remote_code: bool = False, revision: str | None = None) -> Source:
    """Read the config of `name` (folder, Hub id or `demo`) and refuse what cannot be pruned.

    Raises:
        ModelError: not found, not a causal language model, or quantised.
        CheckpointError: for a folder that leads out of itself, or holds no safetensors.
    """
    from transformers import AutoConfig

    path = name
    if name == "demo":
        from llmprune.demo import MODEL_DIR

        path = str(MODEL_DIR)
    local = Path(path)
    if local.is_file():
        raise ModelError(f"{name} is a file; --model takes a folder with config.json, or a Hub id")
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ModelError(f"{name} has no config.json; --model takes a transformers checkpoint")
        check_folder(local)
    elif not _HUB_ID.fullmatch(path):
        raise ModelError(f"no folder {name!r}, and no Hub id either (those read user/name)")
    try:
        config = AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, revision=revision
        )
    except Exception as error:  # a config may hold anything, and each class reads it its own way
        raise ModelError(_why_unreadable(name, error)) from error
    packed = sparse.take_from(config)
    _refuse_config(name, config)
    return Source(name, path, config, trust_remote_code, revision, packed)


def _why_unreadable(name: str, error: Exception) -> str:
    """One line for whatever transformers or the Hub client said."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return f"{name} brings its own code; read it, then allow it with --trust-remote-code"
    if "gated" in text.lower() or "401" in text or "403" in text:
        return (
            f"{name} is private or gated: accept its licence on the Hub and log in (hf auth login)"
        )
    if "model_type" in text or "does not recognize" in text:
        return f"{name} is of no family that this transformers knows: {short(text, 160)}"
    if Path(name).is_dir():
        return f"config.json of {name} is not usable: {type(error).__name__}, {short(text, 160)}"
    return (
        f"model {name!r} was not found: no such folder, and the Hub did not give it "
        f"({type(error.__cause__ or error).__name__}); check the spelling and the network, or pass a folder"
    )


def _refuse_config(name: str, config: Any) -> None:
    """Refuse quantised models, encoders and everything that is not a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = getattr(config, "architectures", None) or []
    if not isinstance(named, list) or not all(isinstance(c, str) for c in named):
        raise ModelError(
            f"{name} names {short(named)} as its architectures; that is a list of names"
        )
    if (quantised := getattr(config, "quantization_config", None)) is not None:
        how = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ModelError(
            f"{name} is already quantised ({short(how)}); prune the original, then quantise"
        )
    if (weights := getattr(config, "transformers_weights", None)) is not None:
        raise ModelError(
            f"{name} names {short(weights)} as its weights; put it in the place of model.safetensors"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder ({config.model_type}), not a causal LM")
    families = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    code = getattr(config, "auto_map", None)
    remote = isinstance(code, dict) and "AutoModelForCausalLM" in code
    if config.model_type not in families and not remote:
        raise ModelError(f"{name} is no causal language model (model type {config.model_type})")
    classes = {c for v in families.values() for c in (v if isinstance(v, tuple | list) else (v,))}
    encoder = config.model_type in families and not getattr(config, "is_decoder", True)
    causal = any(c in classes or c.endswith(("ForCausalLM", "LMHeadModel")) for c in named)
    if named and not causal and not remote and not _is_bare(named):
        raise ModelError(f"{name} is a {short(named[0])}, not a causal language model")
    if encoder and _has_encoder_twin(config.model_type) and not causal:
        raise ModelError(
            f"{name} is an encoder ({short(named[0]) if named else config.model_type})"
        )


def _is_bare(architectures: list[str]) -> bool:
    """A backbone saved without its head, such as `LlamaModel`: the head may be tied."""
    return all(a.endswith("Model") for a in architectures)


def _has_encoder_twin(model_type: str) -> bool:
    """Families such as BERT, which are encoders unless told otherwise."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def open_model(
    source: Source,
    *,
    tokenizer: Any = None,
    dtype: str = "auto",
    device: str = "auto",
    attention: str | None = None,
) -> Opened:
    """Load the weights.

    Args:
        source: what `check` gave.
        tokenizer: goes into the result.
        dtype: `float32`, `bfloat16` or `float16` to compute in; `auto` is float32 on a CPU and the
            checkpoint's own elsewhere. Weights are saved in the checkpoint's dtype, or in this one where
            it is narrower.
        device: torch device, or `auto` for CUDA where there is one.
        attention: transformers attention backend; None leaves the choice to transformers.

    Raises:
        ModelError: when weights are missing or do not fit the config.
        ConfigError: for an unknown dtype or a device that is not there.
    """
    where = check_choice(dtype, device)
    device_map = {"": str(where)} if where.type == "cuda" else None
    load = load_expanded if source.packed else _load
    try:
        with quiet():
            model, info = load(source, device_map, attention)
    except LLMPruneError:
        raise
    except Exception as error:  # what does not fit the config fails anywhere inside of transformers
        raise ModelError(_why_unloadable(source.name, error)) from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{source.name} lacks {len(missing)} of the weights its config asks for, such as {missing[0]}; "
            "they would be random"
        )
    model.eval()
    stored = _cast(model, compute_dtype(dtype, where))
    return Opened(model, tokenizer, stored)


def _load(
    source: Source, device_map: dict[str, str] | None, attention: str | None
) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    build_empty(source, tensors.index(find(source.path, source.revision)))
    model, info = AutoModelForCausalLM.from_pretrained(
        source.path,
        config=source.config,
        dtype="auto",
        use_safetensors=True,
        output_loading_info=True,
        trust_remote_code=source.trust_remote_code,
        revision=source.revision,
        attn_implementation=attention,
        device_map=device_map,
    )
    return model, info


def _why_unloadable(name: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "safetensors" in text and ("not found" in text or "does not appear" in text):
        return f"{name} has no safetensors weights; llmprune does not read pickle files, which can run code"
    return f"{name} could not be loaded: {type(error).__name__}, {short(text, 240)}"


def check_choice(dtype: str, device: str) -> torch.device:
    """`device` as a torch device (`auto` is CUDA where there is one), once both names make sense.

    Raises:
        ConfigError: for an unknown dtype, or a device that is not there.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"no dtype {dtype!r}: {nearest(dtype, ['auto', *DTYPES])}")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"no device {device!r}; use auto, cpu, cuda or cuda:N") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device} asked for, and torch sees no GPU; use --device cpu")
    return where


def compute_dtype(dtype: str, device: torch.device) -> torch.dtype | None:
    """What `--dtype` means on a device; None keeps what `from_pretrained` chooses."""
    return None if dtype == "auto" and device.type != "cpu" else DTYPES.get(dtype, torch.float32)


def _cast(model: Any, wanted: torch.dtype | None) -> dict[str, torch.dtype]:
    """Put parameters into the compute dtype; returns the dtype each is to be saved in."""
    stored: dict[str, torch.dtype] = {}
    for name, parameter in model.named_parameters():
        before = parameter.dtype
        if wanted is not None and before.is_floating_point:
            parameter.data = parameter.data.to(wanted)
        narrower = parameter.dtype.itemsize < before.itemsize
        stored[name] = parameter.dtype if narrower else before
    return stored


def tokenizer(source: Source) -> Any:
    """The checkpoint's tokenizer, or None where it has none.

    Raises:
        ModelError: for one that cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            source.path, trust_remote_code=source.trust_remote_code, revision=source.revision
        )
    except (OSError, ValueError, KeyError, ImportError, TypeError):  # TypeError: no vocabulary file
        return None  # calibration text then asks for one by name; ids need none
    except (
        Exception
    ) as error:  # its files hold what their author likes; tokenizers raises a bare one
        raise ModelError(
            f"the tokenizer of {source.name} is not usable: {type(error).__name__}, {short(error, 160)}"
        ) from error
