"""Datasets of the Hub as text: the one part that needs the `datasets` package and a network.

What is downloaded stays bounded: C4 is read from the first shard of the split, as in the papers,
and any other dataset made of several files from the first file of its train split. The known names
are found again in the cache, without a network, under HF_HUB_OFFLINE=1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ssl import SSLError
from typing import TYPE_CHECKING, Any, Literal, overload
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from llmprune.errors import DataError, nearest

if TYPE_CHECKING:
    from llmprune.texts import Documents, Split

PROBE_SECONDS = 10.0  # the Hub client itself retries for 23 s, with a line of warning each time
C4_TEST_DOCUMENTS = 1100  # what GPTQ, SparseGPT and Wanda evaluate on: 256 windows of 2048 tokens
TEST_SPLITS = ("test", "validation", "valid", "dev", "eval")


@dataclass(frozen=True)
class _Dataset:
    """How a known name is loaded: a configuration, or one file for each split."""

    path: str
    config: str | None
    splits: dict[str, str]  # our split -> theirs
    column: str = "text"
    files: dict[str, str] | None = None
    revision: str | None = None
    stream: bool = True
    separator: str = "\n\n"


_KNOWN = {
    "wikitext2": _Dataset(
        "Salesforce/wikitext", "wikitext-2-raw-v1", {"train": "train", "test": "test"}
    ),
    "c4": _Dataset(
        "allenai/c4",
        None,
        {"train": "train", "test": "validation"},
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        stream=False,
        separator=" ",
    ),
    # This repository holds only a script, which datasets >= 4 refuses to run; the Hub keeps a
    # converted copy of the tables on a branch of its own.
    "ptb": _Dataset(
        "ptb-text-only/ptb_text_only",
        None,
        {"train": "train", "test": "test"},
        column="sentence",
        files={
            "train": "penn_treebank/train/0000.parquet",
            "test": "penn_treebank/test/0000.parquet",
        },
        revision="refs/convert/parquet",
        separator=" ",
    ),
}


class Column(Sequence[str]):
    """A text column whose rows are read when they are asked for; an empty field is ''."""

    def __init__(self, dataset: Any, column: str) -> None:
        self._dataset = dataset.select_columns([column])
        self._column = column

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[str]:
        for row in self._dataset:
            yield row[self._column] or ""

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        values = self._dataset[index][self._column]
        return [value or "" for value in values] if isinstance(index, slice) else values or ""


def hub_documents(source: str, split: Split, text_column: str | None) -> Documents:
    """A known name, `user/name` or `user/name:config`, as `llmprune.texts.documents` gives it.

    Raises:
        DataError: no such dataset, configuration, split or column; no network; no `datasets`.
    """
    from llmprune.texts import KNOWN, Documents

    known = _KNOWN.get(source)
    if known is None and "/" not in source:
        raise DataError(
            f"unknown data {source!r}; {nearest(source, KNOWN)}; "
            "or a dataset as user/name, or a .txt, .jsonl, .parquet or .npy file"
        )
    with _Reading(source):
        if known is not None:
            part = known.splits[split]
            rows = _load_known(known, part)
            text_column = text_column or known.column
        else:
            rows, part = _load_any(source, split)
    name = f"{source} ({part})"
    found = _column(name, rows, text_column)
    if known is None:
        return Documents(name, found, stream=False)
    if source == "c4" and split == "test":
        found = found[:C4_TEST_DOCUMENTS]
    return Documents(name, found, known.stream, known.separator)


def _load_known(known: _Dataset, part: str) -> Any:
    import datasets

    if known.files is None:
        return datasets.load_dataset(known.path, known.config, split=part)
    from huggingface_hub import hf_hub_download

    # load_dataset(path, data_files=...) would do, but finds nothing in its cache without a network.
    file = hf_hub_download(
        known.path, known.files[part], repo_type="dataset", revision=known.revision
    )
    kind = "parquet" if file.endswith(".parquet") else "json"
    return datasets.load_dataset(kind, data_files={part: file}, split=part)


def _load_any(source: str, split: Split) -> tuple[Any, str]:
    """The rows of a dataset without a name here, and which of its splits they are."""
    import datasets

    path, _, config = source.partition(":")
    builder = datasets.load_dataset_builder(path, config or None)
    files = builder.config.data_files or {}
    there = [str(name) for name in (files or builder.info.splits or {})]
    part = _choose_split(source, split, there)
    chosen = list(files.get(part, ()))
    options: dict[str, Any] = {}
    if chosen and (len(there) > 1 or len(chosen) > 1):
        # Only what is read is downloaded; the sizes that the dataset card promises then do not hold.
        few = chosen[:1] if split == "train" else chosen
        options = {"data_files": {part: few}, "verification_mode": "no_checks"}
    return datasets.load_dataset(path, config or None, split=part, **options), part


def _choose_split(source: str, split: Split, there: list[str]) -> str:
    wanted: tuple[str, ...] = ("train",) if split == "train" else TEST_SPLITS
    for name in wanted:
        if name in there:
            return name
    if split == "train" and len(there) == 1:
        return there[0]
    raise DataError(
        f"{source} has no split {' or '.join(wanted)}, only {', '.join(there) or 'none'}; "
        "pass another dataset or a file"
    )


def _column(name: str, rows: Any, wanted: str | None) -> Sequence[str]:
    from llmprune.texts import pick_column

    kinds = {key: getattr(kind, "dtype", "") for key, kind in (rows.features or {}).items()}
    strings = [key for key, kind in kinds.items() if kind in ("string", "large_string")]
    column = pick_column(name, wanted, list(rows.column_names), strings)
    if column not in strings:
        raise DataError(f"column {column!r} of {name} is {kinds.get(column)}, not text")
    return Column(rows, column)


class _Reading:
    """Turns what goes wrong inside `datasets` into one line that says what would work."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.instead = "pass a file of text instead, such as --calibration FILE.txt"

    def __enter__(self) -> None:
        try:
            import datasets  # noqa: F401
        except ImportError as error:
            raise DataError(
                f"reading {self.source!r} needs the datasets package: pip install datasets; "
                f"or {self.instead}"
            ) from error
        if not _offline():
            self._probe()

    def _probe(self) -> None:
        """Fail at once when the Hub is out of reach, before its client starts to retry."""
        from huggingface_hub import constants

        request = Request(constants.ENDPOINT, method="HEAD")
        try:
            urlopen(request, timeout=PROBE_SECONDS).close()
        except HTTPError:
            return  # it answers, if only to refuse this
        except OSError as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, SSLError):
                return  # the client may know certificates that Python does not
            raise DataError(
                f"cannot read {self.source!r}: {constants.ENDPOINT} is out of reach ({reason}); "
                f"{self.instead}, or set HF_HUB_OFFLINE=1 to use what was downloaded before"
            ) from error

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> Literal[False]:
        from datasets.exceptions import DatasetNotFoundError, DatasetsError
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        if isinstance(error, DatasetNotFoundError):
            raise DataError(
                f"no dataset {self.source!r} on the Hub, or it is private or gated "
                f"(hf auth login); check the name, or {self.instead}"
            ) from error
        if isinstance(error, ConnectionError | LocalEntryNotFoundError):
            why = "HF_HUB_OFFLINE is set and it is not in the cache" if _offline() else _line(error)
            raise DataError(f"cannot read {self.source!r}: {why}; {self.instead}") from error
        if isinstance(error, DataError) or error is None:
            return False
        expected = (DatasetsError, HfHubHTTPError, HFValidationError, OSError, ValueError)
        if isinstance(error, (*expected, RuntimeError)):
            raise DataError(
                f"cannot read {self.source!r}: {_line(error)}; check user/name:config, or "
                f"{self.instead}"
            ) from error
        return False


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE) or os.environ.get("HF_DATASETS_OFFLINE", "0") == "1"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
