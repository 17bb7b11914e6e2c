"""Seeded windows of calibration tokens, from a dataset, a file, texts, token ids or a DataLoader.

One running text is tokenised once and cut at random offsets, as SparseGPT and Wanda do with
WikiText-2. Of separate documents, in a random order, each that is longer than the window gives one
window at a random offset, as they do with C4. Deliberate differences: documents are drawn without
replacement; a seed feeds a generator of its own; and where the papers' loop would never end for
want of long documents, what is left over is joined, parted by the end token, and cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from llmprune.errors import ConfigError, DataError
from llmprune.report import CalibrationReport
from llmprune.texts import Documents, documents, encode, read_ids, suffix

SAMPLES = 128  # windows of text, as in the SparseGPT and Wanda papers
SEQLEN = 2048  # their window too; a model that reads 131072 tokens is not asked for windows of that
DOCUMENT_BATCH = 64  # tokenised at a time: enough for the tokenizer's threads, little to throw away
TRIES = 256  # documents looked at per window; one in about 35 of C4's is longer than 2048 tokens

Source: TypeAlias = "str | Path | Tensor | Iterable[Any] | Calibration"


@dataclass(frozen=True, eq=False)
class Calibration:
    """Windows of tokens that pass through the model while statistics are collected.

    Attributes:
        ids: [samples, seqlen] int64, on the CPU.
        source: what the tokens were read from.
        seed: what chose the windows; without meaning when token ids were given.
        written: so many of them, the last ones, the model has written itself (`llmprune.generate`).
    """

    ids: Tensor
    source: str
    seed: int
    written: int = 0

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the shape and the ids as little-endian int64: equal for equal windows."""
        head = "x".join(map(str, self.ids.shape)).encode()
        return hashlib.sha256(head + self.ids.numpy().astype("<i8").tobytes()).hexdigest()

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """The windows in order, [batch_size or fewer, seqlen] at a time."""
        yield from torch.split(self.ids, batch_size)

    def report(self) -> CalibrationReport:
        """Which tokens these are, for the run's report."""
        samples, seqlen = self.ids.shape
        given = samples - self.written
        return CalibrationReport(
            self.source, given, seqlen, self.seed, self.fingerprint, self.written
        )


def default_seqlen(model_limit: int | None) -> int:
    """The window when none is asked for: 2048 tokens, or fewer where the model reads fewer."""
    return SEQLEN if model_limit is None else min(SEQLEN, model_limit)


def window(asked: int | None, limit: int | None) -> int:
    """Tokens per window: as asked, or min(2048, what the model allows).

    Raises:
        ConfigError: when more is asked than the model allows.
    """
    if asked is not None and limit is not None and asked > limit:
        raise ConfigError(f"seqlen {asked} is beyond the {limit} tokens that the model allows")
    return asked or default_seqlen(limit)


def load(
    source: Source,
    tokenizer: Any,
    *,
    samples: int | None = None,
    seqlen: int | None = None,
    seed: int = 0,
    text_column: str | None = None,
    model_limit: int | None = None,
    progress: bool = False,
) -> Calibration:
    """Windows from `source`, the same ones for the same seed.

    Args:
        source: what `llmprune.texts.documents` reads, a `.npy` file of ids, texts, an integer
            tensor [n, seqlen], a DataLoader or another iterable of id tensors or of mappings with
            `input_ids`, or a `Calibration`, which is returned as it is.
        tokenizer: of the model; None will do when `source` holds token ids.
        samples: number of windows. None: 128 of text; of token ids all, or the first 128 when they
            come from an iterable that has no length.
        seqlen: tokens of a window. None: `default_seqlen(model_limit)`, or the width that ids have.
        seed: chooses the windows of a text; global generators are left alone.
        text_column: see `llmprune.texts.documents`.
        model_limit: how many tokens the model reads.
        progress: show a bar when tokenising takes more than two seconds.

    Raises:
        ConfigError: an impossible number, or text without a tokenizer.
        DataError: the source cannot be read, is too short, or its ids are no windows of one width.
    """
    if isinstance(source, Calibration):
        return source
    for name, value in (("samples", samples), ("seqlen", seqlen)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be 1 or more, got {value}")
    if isinstance(source, str | Path):
        path = Path(source)
        if suffix(path) == ".npy":
            ids = read_ids(path, dimensions=2)
            return Calibration(_checked(ids, str(path), samples, seqlen), str(path), seed)
        found = documents(str(source), split="train", text_column=text_column)
    else:
        given = _from_python(source, samples)
        if isinstance(given, Tensor):
            name = f"token ids ({type(source).__name__})"
            return Calibration(_checked(given, name, samples, seqlen), name, seed)
        found = Documents(f"{len(given)} texts", given, stream=False)
    if seqlen is None:
        seqlen = default_seqlen(model_limit)
    sample = _Sampler(tokenizer, samples or SAMPLES, seqlen, Random(seed), progress)
    return Calibration(sample(found), found.name, seed)


@dataclass(frozen=True)
class _Sampler:
    tokenizer: Any
    samples: int
    seqlen: int
    rng: Random
    progress: bool

    def __call__(self, found: Documents) -> Tensor:
        if found.stream:
            return self._from_text(found)
        return self._from_documents(found)

    def _below(self, limit: int) -> int:
        """A draw from 0 to `limit` - 1; Python keeps the sequence of `random` for a seed."""
        return int(self.rng.random() * limit)

    def _from_text(self, found: Documents) -> Tensor:
        ids = torch.tensor(encode(self.tokenizer, [found.joined()])[0])
        offsets = len(ids) - self.seqlen + 1
        if offsets < 1:
            raise self._too_short(found.name, len(ids), 1)
        starts = [self._below(offsets) for _ in range(self.samples)]
        return torch.stack([ids[start : start + self.seqlen] for start in starts])

    def _from_documents(self, found: Documents) -> Tensor:
        windows: list[list[int]] = []
        rest: list[int] = []
        need = self.samples * self.seqlen
        with tqdm(
            total=self.samples, desc="calibration", delay=2, leave=False, disable=not self.progress
        ) as bar:
            for count, ids in enumerate(self._shuffled(found)):
                enough = len(rest) >= need - len(windows) * self.seqlen
                if len(windows) == self.samples or (enough and count >= TRIES * self.samples):
                    break
                if len(ids) > self.seqlen:
                    start = self._below(len(ids) - self.seqlen + 1)
                    windows.append(ids[start : start + self.seqlen])
                    bar.update()
                    ids = ids[:start] + self._end() + ids[start + self.seqlen :]
                if not enough and ids:
                    rest += ids + self._end()
        missing = self.samples - len(windows)
        if len(rest) < missing * self.seqlen:
            tokens = len(rest) + len(windows) * self.seqlen
            raise self._too_short(found.name, tokens, self.samples)
        starts = range(0, missing * self.seqlen, self.seqlen)
        windows += [rest[start : start + self.seqlen] for start in starts]
        return torch.tensor(windows)

    def _shuffled(self, found: Documents) -> Iterator[list[int]]:
        """Token ids of the documents in random order, tokenised as far as they are asked for."""
        order = sorted(range(len(found.texts)), key=lambda _: self.rng.random())
        for start in range(0, len(order), DOCUMENT_BATCH):
            texts = [found.texts[index] for index in order[start : start + DOCUMENT_BATCH]]
            yield from encode(self.tokenizer, texts)

    def _end(self) -> list[int]:
        """The end token that parts two documents; nothing when the tokenizer has none."""
        end = getattr(self.tokenizer, "eos_token_id", None)
        return [] if end is None else [int(end)]

    def _too_short(self, name: str, tokens: int, samples: int) -> DataError:
        return DataError(
            f"{name} has {tokens:,} tokens, but {samples} window{'s' * (samples > 1)} of "
            f"{self.seqlen} need {samples * self.seqlen:,}; use more text, a shorter --seqlen"
            + (" or fewer --samples" if samples > 1 else "")
        )


def _from_python(source: Any, samples: int | None) -> Tensor | list[str]:
    """Token ids, or texts, from an object in memory."""
    if isinstance(source, Tensor):
        return source
    if not isinstance(source, Iterable):
        raise ConfigError(
            f"calibration cannot be a {type(source).__name__}; pass a dataset name, a file, texts, "
            "token ids [samples, seqlen] or a DataLoader"
        )
    items = iter(source)
    first = next(items, None)
    if first is None:
        raise DataError("the calibration data is empty; pass at least one window")
    items = chain([first], items)
    if isinstance(first, str):
        texts = list(items)
        if not all(isinstance(text, str) for text in texts):
            raise DataError("the calibration data mixes texts with other things; pass texts only")
        return texts
    limit = samples if samples is not None or isinstance(source, Sized) else SAMPLES
    return _collect(items, limit)


def _collect(items: Iterable[Any], limit: int | None) -> Tensor:
    """The first `limit` windows of items that are, or hold, ids [n, seqlen] or [seqlen]."""
    windows: list[Tensor] = []
    for number, item in enumerate(items):
        if limit is not None and len(windows) >= limit:
            break
        ids = _item_ids(item, number)
        if windows and ids.shape[1] != windows[0].shape[0]:
            raise DataError(
                f"calibration item {number} has windows of {ids.shape[1]} tokens, those before "
                f"have {windows[0].shape[0]}; cut them to one length"
            )
        windows.extend(islice(ids, limit))
    return torch.stack(windows)


def _item_ids(item: Any, number: int) -> Tensor:
    values = item
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            raise DataError(
                f"calibration item {number} has no input_ids, only {', '.join(map(str, item))}; "
                "tokenise it first, or pass the texts themselves"
            )
        values = item["input_ids"]
        mask = item.get("attention_mask")
        if mask is not None and not bool(torch.as_tensor(mask).all()):
            raise DataError(
                f"calibration item {number} is padded (its attention_mask has zeros); join the "
                "texts and cut windows of one length instead, or pass the texts themselves"
            )
    elif isinstance(item, tuple | list) and item and isinstance(item[0], Tensor):
        values = item[0]  # what a DataLoader over a TensorDataset gives
    try:
        ids = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"calibration item {number} is a {type(item).__name__} that is no tensor of token ids "
            f"({error}); pass windows of one length"
        ) from error
    return ids.unsqueeze(0) if ids.ndim == 1 else _two_dimensions(ids, f"calibration item {number}")


def _two_dimensions(ids: Tensor, name: str) -> Tensor:
    if ids.ndim != 2:
        raise DataError(f"{name} has shape {list(ids.shape)}; expected windows [samples, seqlen]")
    return ids


def _checked(ids: Tensor, name: str, samples: int | None, seqlen: int | None) -> Tensor:
    """Given windows as int64 on the CPU: the first `samples`, of `seqlen` tokens."""
    _two_dimensions(ids, name)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise DataError(f"{name} are {ids.dtype}; token ids are integers")
    if ids.numel() == 0:
        raise DataError(f"{name} are empty, shape {list(ids.shape)}; pass at least one window")
    if seqlen is not None and seqlen != ids.shape[1]:
        raise DataError(
            f"{name} are windows of {ids.shape[1]} tokens, but seqlen is {seqlen}; "
            f"leave seqlen out or set it to {ids.shape[1]}"
        )
    if int(ids.min()) < 0:
        raise DataError(f"{name} hold the negative id {int(ids.min())}; token ids are 0 or more")
    return ids[:samples].detach().to("cpu", torch.int64).contiguous().clone()
