"""Load a model one tensor at a time, its pruned matrices packed or expanded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmprune import loading
from llmprune.checkpoint import tensors
from llmprune.checkpoint.expanded import assemble
from llmprune.checkpoint.files import find
from llmprune.checkpoint.headers import Headers
from llmprune.checkpoint.quiet import quiet
from llmprune.checkpoint.sparse import BITMAP, SCALES, VALUES, WHOLE, Spec
from llmprune.checkpoint.stored import DTYPES, read
from llmprune.checkpoint.tensors import Later, Stored
from llmprune.checkpoint.unpack import Unpacker
from llmprune.errors import CheckpointError, ConfigError, LLMPruneError, ModelError, nearest, short
from llmprune.kernels.packed import Packed, bitmap_shape
from llmprune.memory import trim
from llmprune.progress import Bar
from llmprune.runtime.fit import check_packed

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from llmprune.loading import Source


def load(
    model: str | Path,
    device: str | torch.device = "auto",
    *,
    sparse: bool = True,
    few_bits: bool = True,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attention: str | None = None,
    progress: bool = True,
) -> PreTrainedModel:
    """A causal language model from a folder or the Hub, in eval mode, with its generation config.

    Tensors are read one at a time into memory of their own, so that loading takes hardly more memory than
    the loaded model. Of a checkpoint in the sparse format (docs/format.md), matrices stay packed; a dense
    checkpoint is loaded as it is.

    Args:
        model: folder, Hub id, or `demo`.
        device: torch device; `auto` is CUDA where there is one, else the CPU.
        sparse: whether packed matrices stay packed; else each is expanded as it is read.
        few_bits: whether packed whole numbers stay so; else they get values, which can be trained.
        dtype: `float32`, `bfloat16` or `float16`, or as of torch; `auto` is the checkpoint's own.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: whether code from the checkpoint may run.
        attention: transformers attention backend; None leaves the choice to transformers.
        progress: whether to show a bar when it takes long.

    Raises:
        ModelError: not found, no causal language model, or weights that are missing or do not fit.
        CheckpointError: for files that cannot be read, or do not hold what they promise.
        ConfigError: for an unknown dtype, or a device that is not there.
    """
    where, wanted = loading.check_choice("auto", str(device)), _dtype(dtype)
    source = loading.check(str(model), trust_remote_code=trust_remote_code, revision=revision)
    stored = tensors.index(find(source.path, source.revision))
    keep = sparse and source.packed
    device_map = {"": str(where)} if where.type != "cpu" else None
    with quiet(), Bar(len(stored), "loading", unit="tensor", enabled=progress) as bar:
        state = _state(stored, keep, few_bits, bar)
        config = _quantization(stored, few_bits) if keep else None
        loaded = _assembled(source, stored, state, wanted, device_map, attention, config)
    trim()
    return loaded


def _assembled(source: Source, *rest: Any) -> PreTrainedModel:
    """`assemble`, with what transformers says in one line, and nothing missing."""
    try:
        loaded, info = assemble(source, *rest)
    except LLMPruneError:
        raise
    except Exception as error:  # what does not fit the config fails anywhere inside of transformers
        line = f"{type(error).__name__}, {short(error, 240)}"
        raise ModelError(f"{source.name} could not be loaded: {line}") from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{source.name} lacks {len(missing)} of the weights its config asks for, such as "
            f"{missing[0]}; they would be random"
        )
    return loaded


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """None for the checkpoint's own."""
    if isinstance(dtype, str) and dtype not in ("auto", *loading.DTYPES):
        raise ConfigError(f"no dtype {dtype!r}: {nearest(dtype, ['auto', *loading.DTYPES])}")
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
        raise ConfigError(f"no model computes in {dtype}; use {', '.join(loading.DTYPES)}")
    return loading.DTYPES.get(dtype) if isinstance(dtype, str) else dtype


def _quantization(stored: dict[str, Stored], few_bits: bool) -> Any:
    """What tells transformers of our quantizer, and it of the files."""
    from llmprune.runtime.quantizer import SparseConfig

    config = SparseConfig(few_bits=few_bits)
    packed = {name: s.packed.spec for name, s in stored.items() if s.packed is not None}
    if not few_bits:  # whole numbers become values while they are read
        packed = {name: replace(spec, bits=None, group=None) for name, spec in packed.items()}
    config.headers = Headers(packed, frozenset(stored.keys() - packed.keys()))
    return config


def _state(stored: dict[str, Stored], keep: bool, few_bits: bool, bar: Bar) -> dict[str, Later]:
    """What transformers takes tensors from, by key in the files."""
    counted = count()

    def step() -> None:
        bar.step(next(counted), len(stored), "")

    state: dict[str, Later] = {}
    for name, entry in stored.items():
        if entry.packed is None or not keep:
            state[name] = _Read(entry, step)
            continue
        spec = entry.packed.spec
        file, start = entry.packed.values
        if spec.bits is None:
            state[name + VALUES] = _Read(Stored(file, entry.dtype, (spec.kept,), start), step)
        elif few_bits:
            dtype, shape = DTYPES[spec.numbers[0]], tuple(spec.numbers[1])
            state[name + WHOLE] = _Read(Stored(file, dtype, shape, start), step)
            assert entry.packed.scales is not None
            file, start = entry.packed.scales
            scales = Stored(file, torch.bfloat16, spec.scales_shape, start)
            state[name + SCALES] = _Read(scales, None)
        else:
            state[name + VALUES] = _Products(entry, step)
        file, start = entry.packed.bitmap
        bitmap = Stored(file, torch.uint8, bitmap_shape(spec.shape), start)
        state[name + BITMAP] = _Bitmap(bitmap, name, spec)
    return state


class _Read(Later):
    """A tensor that tells when it has been read."""

    def __init__(self, stored: Stored, step: Callable[[], None] | None) -> None:
        super().__init__(stored)
        self._step = step

    def get_dtype(self) -> str:
        """As of safetensors' slices, of which transformers asks whether they are floats."""
        return "F" if self.stored.dtype.is_floating_point else "U"

    def __getitem__(self, everything: Any) -> Tensor:
        """A copy, on the CPU."""
        stored = self.stored
        if stored.packed is None:  # read where it is to stay
            with self._one:
                count = math.prod(stored.shape)
                found = read(stored.file, stored.start, count, stored.dtype).reshape(stored.shape)
        else:
            found = super().__getitem__(everything)
        if self._step is not None:
            self._step()
        return found


class _Products(_Read):
    """The kept weights of a matrix in fewer bits."""

    def __getitem__(self, everything: Any) -> Tensor:
        """[kept], on the CPU.

        Raises:
            CheckpointError: when its parts do not fit each other.
        """
        with self._one:
            found = Unpacker(self.stored).values()
        if self._step is not None:
            self._step()
        return found


class _Bitmap(_Read):
    """A bitmap, held against its header when it is read: transformers hides an error that comes later."""

    def __init__(self, stored: Stored, name: str, spec: Spec) -> None:
        super().__init__(stored, None)
        self._name, self._spec = name, spec

    def __getitem__(self, everything: Any) -> Tensor:
        """A copy, on the CPU.

        Raises:
            CheckpointError: when it does not fit its header.
        """
        found = super().__getitem__(everything)
        values = torch.zeros(()).expand(self._spec.kept)  # of that length, and no memory
        try:
            check_packed(Packed(values, found, self._spec.shape))
        except CheckpointError as error:
            where = short(self.stored.file.name)
            raise CheckpointError(
                f"{short(self._name)} in {where}: {error}; copy or download it again"
            ) from None
        return found
