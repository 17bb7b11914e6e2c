"""Text to calibrate and to evaluate on: a known dataset, any dataset of the Hub, a file, the demo.

| source | what is read | parts |
|---|---|---|
| `wikitext2` | Salesforce/wikitext, wikitext-2-raw-v1 | one text, rows joined by an empty line |
| `c4` | allenai/c4 en, the first shard of the split | documents; to evaluate, the first 1100 |
| `ptb` | Penn Treebank, one sentence per row | one text, joined by a space |
| `user/name`, `user/name:config` | the split of that dataset | documents |
| `FILE.txt` | the file as it stands | one text |
| `FILE.jsonl`, `.json` (a record per line), `.parquet` | one column | documents |
| `demo` | the generated stories of `llmprune.demo` | one text |

A file ending in `.gz` is decompressed while it is read. WikiText-2, C4 and PTB are joined and cut
as in the code of SparseGPT (arXiv 2301.00774), so that perplexities can be compared.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from llmprune.errors import ConfigError, DataError, nearest

Split = Literal["train", "test"]
KNOWN = ("c4", "demo", "ptb", "wikitext2")
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".npy")
# Calibration: three times 128 windows of 256 tokens. Test: 600 windows, so that the methods' perplexities
# at 60% are well over three standard errors apart.
DEMO_CHARACTERS = {"train": 400_000, "test": 600_000}


@dataclass(frozen=True)
class Documents:
    """What a source holds.

    Attributes:
        name: what was read, for reports.
        texts: the parts in their order; may be read from disk on access.
        stream: whether the parts are one running text rather than separate documents.
        separator: what stands between two parts when they are joined.
    """

    name: str
    texts: Sequence[str]
    stream: bool
    separator: str = "\n\n"

    def joined(self) -> str:
        """All parts as one text."""
        return self.separator.join(self.texts)


def documents(source: str, *, split: Split, text_column: str | None = None) -> Documents:
    """Read `source`; the module docstring lists what it may be.

    Args:
        source: a known name, a file, or a dataset of the Hub as `user/name` or `user/name:config`.
        split: `train` to calibrate, `test` to evaluate; a file has only one.
        text_column: the field that holds the text; by default `text`, or the only string column.

    Raises:
        DataError: the source is unknown, missing, out of reach, malformed or empty.
    """
    if is_file(source):
        found = _file(Path(source), text_column)
    elif source == "demo":
        found = _demo(split)
    else:
        # Hub access has its own file: it is the one part that needs `datasets` and a network.
        from llmprune.hub_texts import hub_documents

        found = hub_documents(source, split, text_column)
    if not any(text.strip() for text in found.texts):
        raise DataError(f"{found.name} holds no text; pass a source with at least one window of it")
    return found


def is_file(source: str) -> bool:
    """Whether `source` names a file, there or not, rather than a dataset."""
    return suffix(Path(source)) in SUFFIXES or Path(source).is_file()


def suffix(path: Path) -> str:
    """The suffix that tells the format, in small letters and without a final `.gz`."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text, without special tokens and without a warning about their length.

    Raises:
        ConfigError: without a tokenizer.
    """
    if tokenizer is None:
        raise ConfigError("text needs a tokenizer, got None; pass one, or give token ids instead")
    plain = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [list(ids) for ids in plain["input_ids"]]


def read_ids(path: Path, dimensions: int) -> Tensor:
    """Token ids of a `.npy` file as int64 with `dimensions` dimensions.

    Raises:
        DataError: no such file, not an array of integers, or of other dimensions.
    """
    _require(path)
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} is not a plain .npy array; save one with numpy.save") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        kind = getattr(array, "dtype", "several arrays")
        raise DataError(f"{path} holds {kind}; token ids are integers")
    if array.ndim != dimensions:
        wanted = {1: "one running text [tokens]", 2: "windows [samples, seqlen]"}[dimensions]
        raise DataError(f"{path} has shape {list(array.shape)}; expected {wanted}")
    return torch.from_numpy(array.astype(np.int64))


def pick_column(name: str, wanted: str | None, columns: Sequence[str], strings: list[str]) -> str:
    """The column to read: `wanted`, else `text`, else the only one of `strings`.

    Raises:
        DataError: it is not there, or there is a choice.
    """
    if wanted is not None:
        if wanted in columns:
            return wanted
        raise DataError(f"{name} has no column {wanted!r}; {nearest(wanted, list(columns))}")
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise DataError(
        f"{name} has no column 'text', and {len(strings)} columns hold strings "
        f"(all columns: {', '.join(columns)}); name one with --text-column"
    )


def _demo(split: Split) -> Documents:
    from llmprune.demo.text import text

    part = {"train": "calibration", "test": "test"}[split]
    return Documents(f"demo ({part})", [text(part, DEMO_CHARACTERS[split])], stream=True)


def _file(path: Path, text_column: str | None) -> Documents:
    _require(path)
    kind = suffix(path)
    if kind == ".parquet":
        return Documents(str(path), _parquet(path, text_column), stream=False)
    if kind not in (".txt", ".jsonl", ".json"):
        raise DataError(
            f"cannot read {path} as text; files may end in {', '.join(SUFFIXES[:-1])}, "
            "or in .npy for token ids"
        )
    try:
        text = _read(path)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    if kind == ".txt":
        return Documents(str(path), [text], stream=True)
    return Documents(str(path), _json_lines(path, text, text_column), stream=False)


def _read(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix.lower() == ".gz":
        data = gzip.decompress(data)
    return data.decode("utf-8-sig")


def _json_lines(path: Path, text: str, text_column: str | None) -> list[str]:
    texts: list[str] = []
    column = text_column
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"line {number} of {path} is not JSON ({error.msg}); "
                'expected one record per line, such as {"text": "..."}'
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"line {number} of {path} is a JSON {type(row).__name__}; expected a record "
                'such as {"text": "..."}'
            )
        if not texts:
            strings = [key for key, value in row.items() if isinstance(value, str)]
            column = pick_column(str(path), text_column, list(row), strings)
        value = row.get(column)
        if not isinstance(value, str):
            raise DataError(
                f"line {number} of {path} has no string in {column!r} but "
                f"{type(value).__name__}; its fields: {', '.join(row) or 'none'} (--text-column)"
            )
        texts.append(value)
    return texts


def _parquet(path: Path, text_column: str | None) -> list[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(
            f"reading {path} needs pyarrow: pip install pyarrow, or pass a .txt or .jsonl file"
        ) from error
    try:
        schema = pq.read_schema(path)
        strings = [
            f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)
        ]
        column = pick_column(str(path), text_column, schema.names, strings)
        if column not in strings:
            kind = schema.field(column).type
            raise DataError(f"column {column!r} of {path} is {kind}, not text (--text-column)")
        values = pq.read_table(path, columns=[column]).column(column).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from error
    return [value or "" for value in values]


def _require(path: Path) -> None:
    if path.is_file():
        return
    if path.is_dir():
        raise DataError(f"{path} is a folder; pass one file ({', '.join(SUFFIXES)})")
    folder = path.parent
    if not folder.is_dir():
        raise DataError(f"no file {path}: the folder {folder} does not exist")
    there = [p.name for p in folder.iterdir() if p.is_file() and suffix(p) in SUFFIXES]
    hint = nearest(path.name, there[:50]) if there else "that folder has no file of a known kind"
    raise DataError(f"no file {path}; {hint}")
