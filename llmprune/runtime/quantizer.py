"""Sparse checkpoints (docs/format.md) through transformers' own `from_pretrained` and `save_pretrained`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmprune.checkpoint.sparse import (
    CONFIG_GUARD,
    FEWER_BITS,
    FORMAT_VERSION,
    QUANT_METHOD,
    check_version,
    settings,
)
from llmprune.errors import ConfigError

# This file is read in the middle of importing transformers: it must not need more of it, nor much else.
if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from llmprune.checkpoint.headers import Headers
    from llmprune.runtime.arrival import Arrival


class SparseConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How a sparse checkpoint is loaded; what `config.json` calls `quantization_config`.

    Attributes:
        expand: whether the model is to be an ordinary dense one, unpacked as it is loaded.
        few_bits: whether matrices in whole numbers stay so; else they get values, which can be trained.
        format_version: of what `save_pretrained` writes.
        headers: what the files hold, where transformers is not given the files.
    """

    def __init__(
        self,
        expand: bool = False,
        *,
        few_bits: bool = True,
        format_version: object = FORMAT_VERSION,
    ) -> None:
        check_version("config.json", format_version)
        self.quant_method: Any = QUANT_METHOD
        self.expand, self.few_bits = expand, few_bits
        self.format_version = FORMAT_VERSION  # until something in few bits is there
        self.headers: Headers | None = None

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """From `config.json`, of which the version alone counts."""
        expand, few = bool(kwargs.pop("expand", False)), bool(kwargs.pop("few_bits", True))
        version = config_dict.get("format_version")
        made = cls(expand, few_bits=few, format_version=version)
        return (made, kwargs) if return_unused_kwargs else made

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` says."""
        return settings(self.format_version)

    def get(self, name: str, default: Any = None) -> Any:
        """As of the dictionary in `config.json`, for which transformers may take it."""
        return self.to_dict().get(name, default)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What counts of a config that is passed to `from_pretrained` beside the checkpoint's own."""
        return {"expand": self.expand, "few_bits": self.few_bits}

    @property
    def dequantize(self) -> bool:
        """What transformers calls `expand`."""
        return self.expand


class SparseQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads and saves models that hold packed weights.

    Attributes:
        conversions: what transformers applied to the files' tensors. They are kept here: transformers would
            apply them to packed tensors, too, when the model is saved. None is what it knows by itself.
    """

    requires_calibration = True

    def __init__(self, quantization_config: SparseConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise ConfigError(
                "SparseConfig is for checkpoints in the sparse format, and this one is dense: load it "
                "without, then call llmprune.sparsify(model)"
            )
        super().__init__(quantization_config, **kwargs)
        self.conversions: list[Any] | None = None
        self._loading: tuple[PreTrainedModel, Headers, torch.dtype | None] | None = None
        self._arrival: Arrival | None = None

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the sparse format."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters, biases, norms, and the kept values."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Also without adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """torch.compile takes it."""
        return True

    def update_tp_plan(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Comes before the weights are looked for, in transformers 5.17 to 5.20."""
        return _unguarded(config)

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Comes before the weights are looked for, since transformers 5.18."""
        return _unguarded(config)

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: Sequence[str] | None = None,
        **_: Any,
    ) -> PreTrainedModel:
        """Look into the files; the rest is done when transformers asks for conversions, and names them."""
        from llmprune.checkpoint.headers import read_headers

        given, self.quantization_config.headers = self.quantization_config.headers, None
        headers = given or read_headers([Path(file) for file in checkpoint_files or ()])
        self._loading = model, headers, dtype
        return model

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """Put modules that hold packed weights into the model, and lay every tensor's way to them."""
        if self._loading is None:
            return weight_conversions  # of an adapter that is loaded later
        from llmprune.runtime.arrival import Arrival

        (model, headers, dtype), self._loading = self._loading, None
        keep, few = not self.quantization_config.expand, self.quantization_config.few_bits
        self._arrival = Arrival.prepare(model, weight_conversions, headers, keep, few, dtype)
        return self._arrival.transforms(weight_conversions)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> Any:
        """What a tensor is brought to while it is read, since transformers 5.18: scales stay as they are."""
        from llmprune.runtime.unpacking import Unpacking

        if isinstance(converter, Unpacking) and converter.routes.fewer:
            return None
        return super().get_new_dtype(converter, param, dtype)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        """Whether a tensor may have another shape than the model has room for."""
        return self._arrival is not None and self._arrival.may_vary(param_name)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        """Check what was loaded, and leave the model as any other."""
        from llmprune.runtime.laid_out import prepare, tell_expanded
        from llmprune.runtime.seats import few_weights

        arrival, self._arrival = self._arrival, None
        assert arrival is not None
        used = arrival.finish(model)
        if self.quantization_config.expand:
            model._weight_conversions = used
            return model
        version = FEWER_BITS if few_weights(model) else FORMAT_VERSION
        self.quantization_config.format_version = version
        self.conversions, model._weight_conversions = used, []
        model.is_quantized = False  # `half()` and `float()` refuse a model that says it is
        prepare(model)
        tell_expanded(model)
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """What `save_pretrained` writes."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # an adapter is saved, not the model
        from llmprune.runtime.saving import packed_state

        # transformers writes the config after this
        state, about, self.quantization_config.format_version = packed_state(
            model, self.conversions
        )
        return state, about

    def dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        """The same model with dense weights, as `model.dequantize()` gives."""
        from llmprune.runtime.swap import densify

        densify(model)  # which also detaches the model
        return model if dtype is None else model.to(dtype)


def attach(model: PreTrainedModel) -> None:
    """Have `save_pretrained` write a model in memory, whose weights are packed, in the sparse format.

    Raises:
        ConfigError: for a model that another quantizer saves; it would not know packed weights.
    """
    other = getattr(model, "hf_quantizer", None)
    if isinstance(other, SparseQuantizer):
        return
    if other is not None:
        raise ConfigError(
            f"this model is quantised ({other.quantization_config.quant_method}): sparsify the original"
        )
    config = SparseConfig()
    quantizer = SparseQuantizer(config)
    quantizer.conversions = getattr(model, "_weight_conversions", None)
    model._weight_conversions = []
    model.hf_quantizer, model.config.quantization_config = quantizer, config


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`, once no weight is packed any more."""
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, SparseQuantizer):
        model._weight_conversions = quantizer.conversions
        quantizer.remove_quantization_config(model)


def _unguarded(config: PreTrainedConfig) -> PreTrainedConfig:
    """Take out the name of a file that is not there, which stops who does not know the format."""
    if getattr(config, "transformers_weights", None) == CONFIG_GUARD:
        del config.transformers_weights
    return config


def _register() -> None:
    """Make transformers know the format."""
    if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(SparseConfig)
        auto.register_quantizer(QUANT_METHOD)(SparseQuantizer)
        # else `from_pretrained(..., quantization_config=SparseConfig(expand=True))` would not be heeded
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (SparseConfig,)


_register()
