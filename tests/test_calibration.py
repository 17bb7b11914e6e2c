"""Calibration windows: the same for a seed, whole, from where they should be, and never for ever."""

from __future__ import annotations

import hashlib
import logging
import random
import struct
from collections.abc import Iterator
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import EOS, WORDS, word_tokenizer, words
from torch.utils.data import DataLoader, TensorDataset

from llmprune import calibration
from llmprune.calibration import Calibration, default_seqlen, load
from llmprune.errors import ConfigError, DataError

TOKENIZER = word_tokenizer()


def counts_on(window: list[int]) -> bool:
    """Whether a window is a piece of `words`: each id one more than the last, in a circle."""
    return all((b - a - 1) % WORDS == 0 for a, b in pairwise(window))


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(words(0, 500))
    return path


# One running text


def test_windows_are_pieces_of_the_text(book: Path) -> None:
    found = load(book, TOKENIZER, samples=20, seqlen=16)
    assert found.ids.shape == (20, 16)
    assert found.ids.dtype == torch.int64
    assert all(counts_on(window) for window in found.ids.tolist())
    assert len({tuple(w) for w in found.ids.tolist()}) > 10
    assert found.source == str(book)


def test_a_seed_gives_the_same_windows_and_leaves_global_generators_alone(book: Path) -> None:
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = load(book, TOKENIZER, samples=8, seqlen=16, seed=3)
    torch.manual_seed(99)
    random.seed(99)
    again = load(book, TOKENIZER, samples=8, seqlen=16, seed=3)
    other = load(book, TOKENIZER, samples=8, seqlen=16, seed=4)
    assert torch.equal(first.ids, again.ids)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    torch.random.set_rng_state(before[0])
    random.setstate(before[1])
    load([words(0, 50)] * 9, TOKENIZER, samples=8, seqlen=16)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002


def test_the_first_and_the_last_offset_can_be_drawn(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(words(0, 18))
    found = load(tmp_path / "a.txt", TOKENIZER, samples=100, seqlen=16)
    assert {window[0] for window in found.ids.tolist()} == {3, 4, 5}


def test_a_text_of_one_window_will_do_and_a_shorter_one_will_not(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(words(0, 16))
    assert load(path, TOKENIZER, samples=2, seqlen=16).ids.tolist() == [list(range(3, 19))] * 2
    with pytest.raises(DataError, match=r"16 tokens, but 1 window of 17 need.* shorter --seqlen"):
        load(path, TOKENIZER, samples=2, seqlen=17)


def test_a_long_text_brings_no_warning(
    book: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = word_tokenizer()  # a fresh one: it warns only once
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        load(book, tokenizer, samples=1, seqlen=16)
        assert not caplog.records
        tokenizer(words(0, 9))
        assert caplog.records


# Separate documents


def test_each_long_document_gives_one_window() -> None:
    texts = [f"w{i} " * 40 for i in range(30)]
    found = load(texts, TOKENIZER, samples=30, seqlen=16)
    assert all(len(set(window)) == 1 for window in found.ids.tolist())
    assert sorted(window[0] for window in found.ids.tolist()) == list(range(3, 33))
    assert [w[0] for w in found.ids.tolist()] != list(range(3, 33))


def test_short_documents_are_packed_with_the_end_token_between() -> None:
    texts = [words(0, 10) for _ in range(100)]
    found = load(texts, TOKENIZER, samples=16, seqlen=22)
    document = [*range(3, 13), EOS]
    assert found.ids.tolist() == [document * 2] * 16


def test_without_an_end_token_documents_are_simply_joined() -> None:
    found = load([words(0, 10)] * 9, word_tokenizer(eos=False), samples=2, seqlen=20)
    assert found.ids.tolist() == [[*range(3, 13)] * 2] * 2


def test_one_long_document_fills_all_windows_and_no_token_is_used_twice() -> None:
    text = " ".join(f"w{i % WORDS}" for i in range(60))
    found = load([text], TOKENIZER, samples=5, seqlen=12)
    used = [token for token in found.ids.flatten().tolist() if token != EOS]
    assert len(used) == len(set(used)) >= 58


def test_too_few_documents_end_with_an_error() -> None:
    with pytest.raises(DataError, match=r"22 tokens, but 3 windows of 16 need 48.*--samples"):
        load([words(0, 10)] * 2, TOKENIZER, samples=3, seqlen=16)
    with pytest.raises(DataError, match="0 tokens"):
        load(["", ""], TOKENIZER, samples=1, seqlen=16)


class Counting:
    """A tokenizer that counts the texts it sees."""

    eos_token_id = EOS

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.seen += len(texts)
        return TOKENIZER(texts, **options)


def test_no_more_is_tokenised_than_is_needed() -> None:
    tokenizer = Counting()
    load([words(i, 40) for i in range(5000)], tokenizer, samples=10, seqlen=16)
    assert tokenizer.seen == calibration.DOCUMENT_BATCH


def test_the_search_for_long_documents_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "TRIES", 20)
    tokenizer = Counting()
    found = load([words(0, 10)] * 5000, tokenizer, samples=10, seqlen=16)
    assert found.ids.shape == (10, 16)
    assert 200 <= tokenizer.seen < 200 + 2 * calibration.DOCUMENT_BATCH


# Defaults


def test_the_default_window_is_bounded() -> None:
    assert [default_seqlen(x) for x in (None, 131072, 512)] == [2048, 2048, 512]
    found = load([words(0, 500)] * 9, TOKENIZER, model_limit=32)
    assert found.ids.shape == (128, 32)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"seqlen": 0}, {"samples": -1}])
def test_impossible_numbers_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be 1 or more"):
        load([words(0, 50)], TOKENIZER, **wrong)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        load([words(0, 50)], None, seqlen=8)


# Token ids

IDS = torch.arange(24, dtype=torch.int32).reshape(6, 4)


def padded() -> dict[str, torch.Tensor]:
    return {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 0]] * 6)}


@pytest.mark.parametrize(
    "source",
    [
        IDS,
        list(IDS),
        IDS.tolist(),
        [IDS[:4], IDS[4:]],
        DataLoader(TensorDataset(IDS), batch_size=4),
        DataLoader([{"input_ids": row, "attention_mask": torch.ones(4)} for row in IDS]),
        (row for row in IDS),
    ],
    ids=["tensor", "rows", "lists", "batches", "loader", "dicts", "generator"],
)
def test_ids_are_taken_as_they_are(source: Any) -> None:
    found = load(source, None)
    assert torch.equal(found.ids, IDS.long())
    assert found.ids.dtype == torch.int64


def test_ids_come_from_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", IDS.numpy().astype(np.uint16))
    assert torch.equal(load(tmp_path / "ids.npy", None, samples=5).ids, IDS[:5].long())


def test_samples_bounds_given_ids() -> None:
    assert torch.equal(load(IDS, None, samples=2).ids, IDS[:2].long())
    assert torch.equal(load([IDS[:4], IDS[4:]], None, samples=5).ids, IDS[:5].long())
    assert load(IDS, None, samples=100).ids.shape == (6, 4)


def test_an_endless_iterable_is_cut() -> None:
    def endless() -> Iterator[torch.Tensor]:
        for i in count():
            yield torch.full((4,), i)

    assert load(endless(), None).ids.shape == (128, 4)
    assert load(endless(), None, samples=3).ids.shape == (3, 4)


def test_given_ids_are_copied() -> None:
    ids = torch.zeros(2, 4, dtype=torch.int64)
    found = load(ids, None)
    ids += 1
    assert int(found.ids.sum()) == 0


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (IDS, {"seqlen": 8}, "windows of 4 tokens, but seqlen is 8"),
        ([padded()], {}, "attention_mask has zeros.*join"),
        ([IDS[0], IDS[0, :3]], {}, "windows of 3 tokens.* have 4"),
        ([[[1, 2], [3]]], {}, "item 0 is a list"),
        ([{"labels": IDS}], {}, "no input_ids, only labels"),
        (torch.rand(2, 3), {}, "float32"),
        (torch.zeros(2, 2, 2).long(), {}, r"\[2, 2, 2\]"),
        (torch.zeros(0, 4).long(), {}, "empty"),
        (torch.full((1, 4), -100), {}, "negative id -100"),
        ([], {}, "empty"),
        (["a", 1], {}, "mixes"),
    ],
)
def test_ids_that_are_no_windows_are_refused(
    source: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(source, None, **options)


def test_something_else_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be a int"):
        load(7, None)  # type: ignore[arg-type]


# The object


def test_the_fingerprint_is_the_hash_of_shape_and_ids() -> None:
    found = load(IDS, None)
    expected = hashlib.sha256(b"6x4" + struct.pack("<24q", *range(24))).hexdigest()
    assert found.fingerprint == expected
    assert load(IDS.reshape(4, 6), None).fingerprint != expected


def test_batches_and_report() -> None:
    found = Calibration(IDS.long(), "here", 5)
    assert load(found, None) is found
    assert [len(batch) for batch in found.batches(4)] == [4, 2]
    assert torch.equal(torch.cat(list(found.batches(4))), found.ids)
    report = found.report()
    assert (report.source, report.samples, report.seqlen, report.seed) == ("here", 6, 4, 5)
    assert report.fingerprint == found.fingerprint
