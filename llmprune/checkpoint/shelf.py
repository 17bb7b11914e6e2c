"""A model whose weights stay in their files until their block's turn.

The model is built without weights (accelerate), and what a block needs is read, renamed and converted by
the same function of transformers that `from_pretrained` uses, a block at a time. What transformers'
own offloading could not do here: it reads a block again for every batch, writes a second copy of all
weights that it converts (fused experts), and has no way to give a changed block back to a file.

The token embedding is never read whole while blocks are run: only the rows of the tokens in use are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmprune.checkpoint import tensors
from llmprune.checkpoint.quiet import quiet
from llmprune.checkpoint.tensors import Later, Stored
from llmprune.errors import ModelError, WalkError, short
from llmprune.memory import trim
from llmprune.model import blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Shelf:
    """A model without weights, and the files that hold them.

    Attributes:
        model: on the meta device but for buffers, in eval mode.
        layers: its decoder blocks.
        stored: every tensor of the checkpoint by its key in the files.
        device: where blocks are loaded to.
        tied: parameter names that are another parameter, to the name of that one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stored: Mapping[str, Stored],
        device: torch.device,
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        self.model = model
        self.stored = stored
        self.device = device
        self.prefix, self.layers = blocks(model)
        self._dtypes = dtypes
        self._shapes = {n: p.shape for n, p in model.named_parameters(remove_duplicate=False)}
        self._names = dict(model.state_dict())
        self._mapping = _mapping(model)
        self._transforms = _sorted_out(self._mapping)
        self._targets = self._resolve()
        self._keys = self._by_block()
        self.tied = self._ties()
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)

    def _resolve(self) -> dict[str, str]:
        """File key to the parameter (the first of several) that it becomes, in a trial on no data.

        Raises:
            ModelError: when weights are missing or do not fit the config.
        """
        empty = {
            key: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            for key, entry in self.stored.items()
        }
        info = self._convert(empty, torch.device("meta"))
        self._conversions = getattr(self.model, "_weight_conversions", None)
        if wrong := sorted(info.mismatched_keys):
            name, got, want = wrong[0]
            raise ModelError(
                f"{short(name)} has shape {short(list(got))}, its config asks for {list(want)}"
            )
        ignored = getattr(self.model, "_keys_to_ignore_on_load_missing", None) or ()
        missing = {k for k in info.missing_keys if not any(re.search(p, k) for p in ignored)}
        have = set(self._names) - missing
        for _ in range(2):  # twice: two targets of one source may reach each other through it
            for pair in getattr(self.model, "all_tied_weights_keys", {}).items():
                if have & set(pair):
                    have.update(pair)
        if lost := missing - have:
            raise ModelError(
                f"the checkpoint lacks {len(lost)} of the weights its config asks for, such as "
                f"{min(lost)}; they would be random"
            )
        self._missing = missing
        targets = {key: self._resolved(key) for key in self.stored}
        return {key: target for key, target in targets.items() if target}

    def _resolved(self, key: str) -> str:
        """The parameter or buffer that file key `key` goes to, empty where none does."""
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        target, _ = rename_source_key(key, *self._transforms, prefix, self._names)
        if target not in self._names and key in self._names:
            target, _ = rename_source_key(key, [], [], prefix, self._names)
        return str(target) if target in self._names else ""

    def _ties(self) -> dict[str, str]:
        """Which parameters are another one, decided as transformers does: by config and by content."""
        found: dict[str, str] = {}
        for target, source in getattr(self.model, "all_tied_weights_keys", {}).items():
            if target in self._missing:
                found[target] = source
            elif source in self._missing:
                found[source] = target
            elif self._equal(target, source):
                found[target] = source
        return found

    def _equal(self, left: str, right: str) -> bool:
        keys = {t: k for k, t in self._targets.items()}
        if left not in keys or right not in keys:
            return False
        a, b = keys[left], keys[right]
        return tensors.same(self.stored[a], self.stored[b])

    def target(self, key: str) -> str:
        """The parameter or buffer (the first of several) that a file key of the model becomes."""
        return self._targets[key]

    def saved(self) -> dict[str, Stored]:
        """What an output holds: every tensor of the files, those that are another one left out."""
        return {k: v for k, v in self.stored.items() if self._targets.get(k) not in self.tied}

    def keys(self, block: int | None) -> list[str]:
        """File keys of one block; None for everything that is in no block and yet in the model."""
        return self._keys.get(block, [])

    def _by_block(self) -> dict[int | None, list[str]]:
        inside = re.compile(rf"{re.escape(self.prefix)}\.(\d+)\.")
        found: dict[int | None, list[str]] = {}
        for key, target in self._targets.items():
            match = inside.match(target)
            found.setdefault(int(match[1]) if match else None, []).append(key)
        return found

    def load(self, block: int, stored: Mapping[str, Stored] | None = None) -> None:
        """Read one block, from this checkpoint or from `stored`, which has the same keys.

        Raises:
            ModelError: when transformers cannot convert what the files hold.
        """
        files = stored or self.stored
        self._read([key for key in self.keys(block) if key in files], files)
        left = [n for n, p in self.layers[block].named_parameters() if p.is_meta]
        if left:
            raise ModelError(f"{self.prefix}.{block}.{left[0]} is in no file of the checkpoint")

    def release(self, block: int) -> None:
        """Give the memory of one block back."""
        _empty(self.layers[block])
        trim()

    def load_rest(self, ids: Tensor | None, *, head: bool) -> None:
        """Read what is in no block.

        Args:
            ids: the token ids that will be used, any shape: only their embeddings are kept, unless they
                are the head too. None for the whole embedding.
            head: whether the output head is needed.
        """
        names = {key: self._targets[key] for key in self.keys(None)}
        table = self._real(self.model.get_input_embeddings())
        out = self._real(self.model.get_output_embeddings())
        part = ids is not None and not (head and out == table)
        few = [k for k, n in names.items() if n == table] if part else []
        if len(few) != 1 or not self._plain(few[0]):
            few = []
        skip = {out} if not head and out != table else set()
        self._read([k for k, n in names.items() if n not in skip and k not in few], self.stored)
        if ids is not None and few:
            self._load_rows(few[0], ids)
        for target, source in self.tied.items():
            if not self.model.get_parameter(source).is_meta:
                _assign(self.model, target, self.model.get_parameter(source))

    def _plain(self, key: str) -> bool:
        """Whether a tensor reaches the model as it is stored, with nothing but its name changed."""
        embedding = self.model.get_input_embeddings()
        weight = getattr(embedding, "weight", None)
        fits = weight is not None and self.stored[key].shape == tuple(weight.shape)
        return fits and isinstance(embedding, nn.Embedding) and embedding.max_norm is None

    def _load_rows(self, key: str, ids: Tensor) -> None:
        """Keep the embeddings of `ids` only, and translate ids on their way in."""
        embedding: Any = self.model.get_input_embeddings()
        used = torch.unique(ids)
        rows = tensors.read_rows(self.stored[key], used)
        dtype = self._dtypes.get(self._targets[key], rows.dtype)
        weight = nn.Parameter(rows.to(self.device, dtype), requires_grad=False)
        embedding.weight = weight
        table = used.to(self.device)

        def translate(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            ids = args[0].to(table.device)
            rows = torch.searchsorted(table, ids).clamp_(max=len(table) - 1)
            if not torch.equal(table[rows], ids):
                raise WalkError(
                    f"{type(self.model).__name__} looks up embeddings of ids that are not in the windows"
                )
            return (rows, *args[1:])

        self._hook = embedding.register_forward_pre_hook(translate)

    def release_rest(self) -> None:
        """Give the memory of everything outside the blocks back."""
        if hasattr(self, "_hook"):
            self._hook.remove()
            del self._hook
        inside = {id(p) for p in self.layers.parameters()}
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in inside:
                    _forget(module, name, parameter)
        for name, shape in self._shapes.items():  # the few rows of an embedding leave a small shape
            if self.model.get_parameter(name).shape != shape:
                dtype = self.model.get_parameter(name).dtype
                _assign(
                    self.model, name, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
                )

    def _real(self, module: Any) -> str | None:
        """Name of the parameter that the weight of `module` really is, ties followed."""
        for name, candidate in self.model.named_modules():
            if candidate is module and getattr(module, "weight", None) is not None:
                return self.tied.get(f"{name}.weight", f"{name}.weight")
        return None

    def _read(self, keys: Iterable[str], stored: Mapping[str, Stored]) -> None:
        values = {k: Later(stored[k], self._dtypes.get(self._targets[k])) for k in keys}
        self._convert(values, self.device)
        self.model._weight_conversions = self._conversions

    def _convert(self, values: Mapping[str, Tensor | Later], device: torch.device) -> Any:
        """Hand `values` (file key to tensor) to transformers, which puts them into the model."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        config = LoadStateDictConfig(
            device_map={"": str(device)},
            dtype=torch.float32,
            weight_mapping=self._mapping,
        )
        with quiet():
            info, _ = convert_and_load_state_dict_in_model(self.model, dict(values), config)
        if info.conversion_errors:
            name, error = next(iter(info.conversion_errors.items()))
            raise ModelError(f"transformers cannot convert {short(name)}: {short(error, 160)}")
        for name, parameter in self.model.named_parameters():
            if not parameter.is_meta or device.type == "meta":
                parameter.requires_grad_(False)
                want = self._dtypes.get(name, parameter.dtype)
                if want != parameter.dtype:
                    parameter.data = parameter.data.to(want)
        return info


def _mapping(model: PreTrainedModel) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model))


def _sorted_out(mapping: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """What renames keys, and what changes tensors."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    return renamings, [m for m in mapping if isinstance(m, WeightConverter)]


def _empty(root: nn.Module) -> None:
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                _forget(module, name, parameter)


def _forget(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    bare = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    module._parameters[name] = nn.Parameter(bare, requires_grad=False)


def _assign(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, attribute = name.rpartition(".")
    model.get_submodule(path)._parameters[attribute] = parameter
