"""Perplexity as the pruning papers measure it, so that numbers can be set side by side.

The protocol of GPTQ (arXiv 2210.17323), SparseGPT (2301.00774) and Wanda (2306.11695): the whole
split joined to one text and tokenised once, disjoint windows, the tail dropped, the mean next-token
loss of each window, exp of the mean over windows. Deliberate differences: no special tokens unless
asked for (their Llama tokenizers put one BOS before the whole text), float32 losses whatever the
model's dtype, and a standard error.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from llmprune.errors import ConfigError, DataError, NumericalError
from llmprune.preserve import evaluating
from llmprune.progress import interval
from llmprune.report import PerplexityReport
from llmprune.texts import documents, encode, read_ids, suffix

BATCH_TOKENS = 2048  # tokens a forward pass sees when no batch size is given
CHUNK_VALUES = 2**24  # logits turned into float32 at a time: 64 MiB


Losses = Callable[[Any, Tensor, int, bool], Tensor]
"""(model, windows [n, seqlen], windows at once, whether to show a bar) -> mean loss of each [n]."""


def token_ids(
    source: str | Path, tokenizer: Any, *, text_column: str | None = None
) -> tuple[Tensor, str]:
    """The whole test split of `source` as one row of ids, and the name of what was read.

    Args:
        source: what `llmprune.texts.documents` reads, or a `.npy` file of ids [tokens].
        tokenizer: of the model; None will do for a `.npy` file.
        text_column: see `llmprune.texts.documents`.

    Returns:
        [tokens] int64 on the CPU, without special tokens; and the name.

    Raises:
        DataError: the source cannot be read.
        ConfigError: text without a tokenizer.
    """
    path = Path(source)
    if suffix(path) == ".npy":
        return read_ids(path, dimensions=1), str(path)
    found = documents(str(source), split="test", text_column=text_column)
    return torch.tensor(encode(tokenizer, [found.joined()])[0]), found.name


def perplexity(
    model: Any,
    ids: Tensor,
    *,
    seqlen: int,
    dataset: str,
    batch_size: int | None = None,
    bos: int | None = None,
    limit: int | None = None,
    progress: bool = False,
    losses: Losses | None = None,
) -> PerplexityReport:
    """Perplexity of a causal language model on `ids` [tokens], on the device it is on.

    Args:
        model: gives `logits` [batch, seqlen, vocabulary]; left in the mode it was found in.
        ids: [tokens] of any integer dtype, one running text.
        seqlen: tokens of a window.
        dataset: where the ids came from, for the report.
        batch_size: windows per forward pass; None fits about 2048 tokens. Rounding apart, it does
            not change the result.
        bos: id to put before every window, which then holds one token of text less; None for none.
        limit: use only the first so many windows.
        progress: show a bar after two seconds.
        losses: another way to the mean loss of each window, such as block by block; None runs the model.

    Raises:
        ConfigError: an impossible `seqlen`, `batch_size` or `limit`.
        DataError: less than one window of text, or ids outside the vocabulary.
        NumericalError: a window whose loss is NaN or infinite.
    """
    for name, number, least in (
        ("seqlen", seqlen, 2),
        ("batch_size", batch_size, 1),
        ("limit", limit, 1),
    ):
        if number is not None and number < least:
            raise ConfigError(f"{name} must be {least} or more, got {number}")
    windows = _windows(ids, seqlen, bos, dataset)[:limit]
    _check_vocabulary(model, windows, dataset)
    if batch_size is None:
        batch_size = max(1, BATCH_TOKENS // seqlen)
    start = time.perf_counter()
    found = (losses or model_losses)(model, windows, batch_size, progress)
    seconds = time.perf_counter() - start
    value, error = _mean_and_error(found)
    return PerplexityReport(
        perplexity=value,
        standard_error=error,
        windows=len(windows),
        seqlen=seqlen,
        dataset=dataset,
        protocol=_protocol(seqlen, bos, limit),
        seconds=seconds,
        tokens_per_second=windows.numel() / seconds,
    )


def _windows(ids: Tensor, seqlen: int, bos: int | None, dataset: str) -> Tensor:
    """Disjoint windows [n, seqlen] int64, each after `bos` where that is given."""
    if ids.ndim != 1:
        raise DataError(f"{dataset} has shape {list(ids.shape)}; expected one text [tokens]")
    width = seqlen if bos is None else seqlen - 1
    count = len(ids) // width
    if count == 0:
        raise DataError(
            f"{dataset} has {len(ids):,} tokens, less than one window of {width}; "
            "use more text or a shorter --seqlen"
        )
    windows = ids[: count * width].to(torch.int64).reshape(count, width)
    return windows if bos is None else F.pad(windows, (1, 0), value=bos)


def _check_vocabulary(model: Any, windows: Tensor, dataset: str) -> None:
    size = model.get_input_embeddings().weight.shape[0]
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= size:
        raise DataError(
            f"{dataset} has token ids from {low} to {high}, but the model knows 0 to {size - 1}; "
            "tokenise with the tokenizer of this model"
        )


def model_losses(model: Any, windows: Tensor, batch_size: int, progress: bool) -> Tensor:
    """Mean next-token loss of each window: [n] float32 on the CPU, all finite."""
    device = model.get_input_embeddings().weight.device
    losses: list[Tensor] = []
    bar = tqdm(
        total=windows.numel(), desc="perplexity", unit="tok", unit_scale=True, delay=2, leave=False,
        disable=not progress, mininterval=interval(),
    )  # fmt: skip
    with bar, evaluating(model), torch.inference_mode():
        for batch in torch.split(windows, batch_size):
            inputs = batch.to(device)
            logits = model(input_ids=inputs, use_cache=False).logits
            losses.append(window_losses(logits, inputs.to(logits.device)).cpu())
            check_losses(losses[-1], len(losses[:-1]) * batch_size)
            bar.update(batch.numel())
    return torch.cat(losses)


def check_losses(losses: Tensor, first: int) -> None:
    """Refuse losses [n] that are not numbers; `first` is the number of the first window among them.

    Raises:
        NumericalError: naming the window.
    """
    if not bool(losses.isfinite().all()):
        bad = int((~losses.isfinite()).nonzero()[0])
        raise NumericalError(
            f"the loss of window {first + bad} is {losses[bad].item()}; "
            "try --dtype float32 or bfloat16, and check the weights for NaN"
        )


def window_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean over positions of -log p(next token), in float32, a slice of the logits at a time.

    Args:
        logits: [batch, seqlen, vocabulary] of any floating dtype.
        ids: [batch, seqlen] int64.
    """
    batch, seqlen, vocabulary = logits.shape
    step = max(1, CHUNK_VALUES // (batch * vocabulary))
    total = torch.zeros(batch, device=logits.device)
    for start in range(0, seqlen - 1, step):
        end = min(start + step, seqlen - 1)
        chunk = logits[:, start:end].float().flatten(0, 1)
        targets = ids[:, start + 1 : end + 1].flatten()
        total += F.cross_entropy(chunk, targets, reduction="none").view(batch, -1).sum(1)
    return total / (seqlen - 1)


def _mean_and_error(losses: Tensor) -> tuple[float, float]:
    """Perplexity and its standard error to first order; that is 0 when there is only one window."""
    values = losses.double()
    result = math.exp(values.mean().item())
    spread = values.std().item() if len(values) > 1 else 0.0
    return result, result * spread / math.sqrt(len(values))


def _protocol(seqlen: int, bos: int | None, limit: int | None) -> str:
    rule = "no special tokens" if bos is None else f"BOS {bos} before every window"
    first = "" if limit is None else f"first {limit} of the "
    return (
        f"one text tokenised once, {first}disjoint windows of {seqlen}, tail dropped, {rule}, "
        "exp of the mean window loss"
    )
