"""A result in the sparse format: pruned dense as always, then packed beside it.

So a run can be taken up wherever it ended; the price is that for a moment both lie on the disk.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from llmprune.checkpoint.convert import pack_folder
from llmprune.checkpoint.shelf import Shelf
from llmprune.checkpoint.tensors import size_of
from llmprune.kernels.packed import packed_bytes as size_packed
from llmprune.model import Matrix
from llmprune.notice import ANYWHERE
from llmprune.order import Job
from llmprune.pattern import Pattern
from llmprune.workplace import PACKED, Workplace, layout


def pack(job: Job, work: Workplace, max_shard_size: int) -> None:
    """Pack the finished checkpoint of a run into a folder beside it, compared bit for bit.

    Raises:
        ConfigError: when there is nothing to pack.
        CheckpointError: when the written files are not what was read.
        OSError: when something cannot be written.
    """
    name = job.push_to_hub or ANYWHERE
    quiet = job.voice.quiet
    pack_folder(work.checkpoint, work.folder / PACKED, max_shard_size, name, progress=not quiet)


def tell_fewer_bits(job: Job, target: Path) -> None:
    """Say so where matrices of a result in `target` that were to be rounded are stored as values."""
    if job.format == "dense" or job.prune.quantize is None:
        return
    told = json.loads((target / "sparse.json").read_text(encoding="utf-8"))
    matrices = int(told["matrices"])
    if left := matrices - sum(told.get("fewer_bits", {}).values()):
        job.voice.say(
            f"{left} of {matrices} packed matrices are stored as values: no scales give them bit for bit in "
            f"{job.prune.quantize}, or none that take less"
        )


def room_to_pack(job: Job, shelf: Shelf, chosen: Sequence[Matrix]) -> int:
    """Bytes that the packed files will take of the disk; 0 for a run that writes none."""
    if job.format == "dense":
        return 0
    rows = layout(shelf, job.choice.dtype)
    floats = Counter(dtype for _, dtype, _ in rows if dtype.is_floating_point)
    total = sum(size_of(dtype, shape) for _, dtype, shape in rows)
    _, pattern = job.prune.built()
    return packed_bytes(total, chosen, pattern, floats.most_common(1)[0][0].itemsize)


def packed_bytes(dense: int, matrices: Sequence[Matrix], pattern: Pattern, itemsize: int) -> int:
    """What a checkpoint of `dense` bytes takes in the sparse format, once `matrices` are pruned.

    Args:
        dense: bytes of all tensors.
        matrices: those that will be pruned, in a model without weights or with.
        pattern: of the run.
        itemsize: bytes of a stored weight.
    """
    saved = 0
    for matrix in matrices:
        rows, columns = matrix.shape
        if pattern.fits(columns):
            kept = math.ceil(rows * columns * (1 - pattern.sparsity))
            packed = size_packed((rows, columns), kept, itemsize)
            saved += max(0, rows * columns * itemsize - packed)
    return dense - saved
