"""The census of every tensor in one file; a packed matrix is counted as the dense one it stands for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmprune.checkpoint import tensors
from llmprune.checkpoint.census import take
from llmprune.checkpoint.decoder import axes, is_decoder
from llmprune.checkpoint.tensors import Header, Stored
from llmprune.errors import CheckpointError, short


@dataclass(frozen=True)
class TensorCensus:
    """One tensor of the files.

    Attributes:
        name: its key.
        file: the shard that holds it.
        shape: as it is stored.
        dtype: as safetensors names it: BF16, F32, F8_E4M3.
        bytes: its size in the file.
        packed: whether it is stored as docs/format.md says; shape and dtype are the dense ones.
        zeros: weights that are zero; always 0 for integers.
        pattern: `2:4` where every group of the tensor holds it, else None.
        axis: `rows` when the groups lie along the last dimension, `columns` when along the one
            before.
        decoder: whether it is a matrix of a decoder block, which is what llmprune prunes by
            default.
        bits: of the whole numbers that stand for the kept weights of a packed matrix; None where values do.
        group: neighbours that share a scale; None without whole numbers.
    """

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    zeros: int
    pattern: str | None
    axis: str | None
    decoder: bool
    packed: bool = False
    bits: int | None = None
    group: int | None = None

    @property
    def weights(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def kept_as(self) -> str:
        """How the kept weights of a packed matrix are stored: `values`, or `int4 in groups of 128`."""
        return "values" if self.bits is None else f"int{self.bits} in groups of {self.group}"

    @property
    def stored(self) -> str:
        """Of a packed matrix what it takes and how; nothing of a dense one."""
        return f"  {8 * self.bytes / self.weights:.3f} bits, {self.kept_as}" if self.packed else ""

    @property
    def kind(self) -> str:
        """What is the same in every block: `mlp.up_proj`."""
        parts = [p for p in self.name.split(".") if not p.isdigit() and p != "weight"]
        return ".".join(parts[-2:])


def read(
    source: str,
    head: Header,
    packed: Mapping[str, Stored],
    keys: Iterable[str] | None,
    model_type: str | None,
) -> Iterator[TensorCensus]:
    """The census of the tensors in one file, of those that the index promises or of all.

    Args:
        source: the checkpoint, for messages.
        head: header of the file.
        packed: the packed matrices of the whole checkpoint; one belongs to the file of its values.
        keys: what the index promises; None for all that is there.
        model_type: from config.json.
    """
    shard, there = head.file.name, set(head.entries)
    for name in sorted(keys or ()):
        if name not in there:
            raise CheckpointError(
                f"{short(shard)} of {source} lacks {short(name)}, which the index expects in it"
            )
    parts = {part for name, stored in packed.items() for part in tensors.names_of(name, stored)}
    mine = {name for name, stored in packed.items() if stored.file == head.file}
    try:
        with safe_open(head.file, framework="pt", device="cpu") as file:
            for name in sorted(((there if keys is None else set(keys)) - parts) | mine):
                if name in mine:
                    yield _packed(name, shard, packed[name], model_type)
                else:
                    dtype = str(head.entries[name]["dtype"])
                    yield _described(name, shard, file.get_tensor(name), dtype, model_type)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{short(shard)} of {source} is damaged or cut short ({short(error, 160)}); copy or download "
            "it again"
        ) from error


def _packed(name: str, file: str, stored: Stored, model_type: str | None) -> TensorCensus:
    """What a packed matrix holds once it is unpacked."""
    assert stored.packed is not None
    spec = stored.packed.spec
    found = _described(name, file, tensors.load(stored), spec.dtype, model_type)
    size = stored.bytes_in_file
    return replace(found, bytes=size, packed=True, bits=spec.bits, group=spec.group)


def _described(
    name: str, file: str, tensor: Tensor, dtype: str, model_type: str | None
) -> TensorCensus:
    shape = tuple(tensor.shape)
    decoder = is_decoder(name, shape, tensor.is_floating_point())
    census = take(tensor, axes(model_type, decoder))
    pattern = f"{census.pattern[0]}:{census.pattern[1]}" if census.pattern else None
    return TensorCensus(
        name, file, shape, dtype, tensor.nbytes, census.zeros, pattern, census.axis, decoder
    )
