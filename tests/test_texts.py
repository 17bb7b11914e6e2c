"""Text from files, from the demo and from a Hub: what comes back, and one line when it cannot."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from dataset_server import serve

from llmprune.demo.text import documents as stories
from llmprune.errors import ConfigError, DataError
from llmprune.texts import documents, encode, read_ids

ROOT = Path(__file__).resolve().parents[1]


def read(source: object, **options: Any) -> Any:
    return documents(str(source), split="train", **options)


# Files


def test_a_text_file_is_one_text_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(" \n = Ünder = \n\n tail \n".encode())
    found = read(path)
    assert (found.stream, found.name) == (True, str(path))
    assert found.joined() == " \n = Ünder = \n\n tail \n"


def test_a_compressed_file_is_read_like_a_plain_one(tmp_path: Path) -> None:
    path = tmp_path / "c4.json.gz"
    path.write_bytes(gzip.compress(b'{"text": "a", "url": "u"}\n{"text": "b", "url": "v"}\n'))
    assert list(read(path).texts) == ["a", "b"]


def test_records_are_documents_with_blank_lines_between(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\ntwo"}\n\n{"n": 1, "text": "three"}\n')
    found = read(path)
    assert list(found.texts) == ["one\ntwo", "three"]
    assert not found.stream
    assert found.joined() == "one\ntwo\n\nthree"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
class TestColumns:
    def write(self, folder: Path, kind: str, columns: dict[str, list[Any]]) -> Path:
        path = folder / f"data.{kind}"
        if kind == "parquet":
            pq.write_table(pa.table(columns), path)
        else:
            rows = [
                dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
            ]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def test_text_is_preferred(self, tmp_path: Path, kind: str) -> None:
        path = self.write(tmp_path, kind, {"title": ["t"], "text": ["a"]})
        assert list(read(path).texts) == ["a"]

    def test_the_only_string_column_will_do(self, tmp_path: Path, kind: str) -> None:
        path = self.write(tmp_path, kind, {"n": [1, 2], "body": ["a", "b"]})
        assert list(read(path).texts) == ["a", "b"]

    def test_a_column_can_be_named(self, tmp_path: Path, kind: str) -> None:
        path = self.write(tmp_path, kind, {"title": ["t"], "text": ["a"]})
        assert list(read(path, text_column="title").texts) == ["t"]

    def test_a_choice_is_not_guessed(self, tmp_path: Path, kind: str) -> None:
        path = self.write(tmp_path, kind, {"title": ["t"], "body": ["a"], "n": [1]})
        with pytest.raises(DataError, match=r"title, body, n.*--text-column"):
            read(path)

    def test_a_wrong_column_is_answered_with_the_nearest(self, tmp_path: Path, kind: str) -> None:
        path = self.write(tmp_path, kind, {"title": ["t"], "body": ["a"]})
        with pytest.raises(DataError, match="no column 'bdy'; did you mean 'body'"):
            read(path, text_column="bdy")

    def test_numbers_are_not_text(self, tmp_path: Path, kind: str) -> None:
        path = self.write(tmp_path, kind, {"n": [1], "text": ["a"]})
        with pytest.raises(DataError, match="int"):
            read(path, text_column="n")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"line 2 of .*a\.jsonl is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "line 2 .* JSON list"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2 .* no string in 'text'.*body"),
        ("a.txt", b"\xff\xfe\xfa", "not UTF-8"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.parquet", b"PAR?", "not a readable parquet"),
        ("a.txt.gz", b"plain", "not UTF-8 text"),
        ("a.csv", b"a,b", r"cannot read .*a\.csv.*\.jsonl"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_answered_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "calibration.txt").write_text("a")
    with pytest.raises(DataError, match=r"no file .*calibratoin\.txt; did you mean 'calibration"):
        read(tmp_path / "calibratoin.txt")
    with pytest.raises(DataError, match=r"folder .*nowhere does not exist"):
        read(tmp_path / "nowhere" / "a.txt")


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"'wikitxt2'; did you mean 'wikitext2'.*\.jsonl"):
        read("wikitxt2")


def test_the_demo_calibrates_and_evaluates_on_different_stories() -> None:
    train, test = read("demo"), documents("demo", split="test")
    assert train.stream
    assert len(train.joined()) >= 400_000
    assert len(test.joined()) >= 300_000
    assert train.joined().startswith(next(stories("calibration")))
    assert test.joined().startswith(next(stories("test")))


# Token ids


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        encode(None, ["a"])


def test_ids_of_any_integer_type_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([1, 2, 300], dtype=np.int16))
    ids = read_ids(tmp_path / "ids.npy", dimensions=1)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [1, 2, 300]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3), "float64"),
        (np.zeros((2, 2, 2), dtype=int), r"\[2, 2, 2\]"),
        (np.array([{}], dtype=object), "not a plain"),
    ],
)
def test_an_array_that_holds_no_ids_is_refused(
    tmp_path: Path, array: np.ndarray, message: str
) -> None:
    np.save(tmp_path / "ids.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        read_ids(tmp_path / "ids.npy", dimensions=2)


# The Hub: the real client against a server on the loopback, in a process of its own because it
# reads HF_ENDPOINT once.


def _parquet(**columns: list[Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def _shard(rows: list[str]) -> bytes:
    return gzip.compress("".join(json.dumps({"text": r, "url": "u"}) + "\n" for r in rows).encode())


def _card(**configs: dict[str, str]) -> bytes:
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config.replace('_', '-')}", "  data_files:"]
        for split, path in splits.items():
            lines += [f"  - split: {split}", f"    path: {path}"]
    return "\n".join([*lines, "---", ""]).encode()


WIKI = "wikitext-2-raw-v1"
REPOSITORIES = {
    ("Salesforce/wikitext", "main"): {
        "README.md": _card(
            wikitext_2_raw_v1={"train": f"{WIKI}/train-*", "test": f"{WIKI}/test-*"},
            other={"train": "other/train-*"},
        ),
        f"{WIKI}/train-00000-of-00001.parquet": _parquet(text=["a", "", "b"]),
        f"{WIKI}/test-00000-of-00001.parquet": _parquet(text=["", " c \n"]),
        "other/train-0.parquet": _parquet(text=["x"]),
    },
    ("allenai/c4", "main"): {
        "README.md": _card(en={"train": "en/c4-train.*", "validation": "en/c4-validation.*"}),
        "en/c4-train.00000-of-01024.json.gz": _shard(["first", "second"]),
        "en/c4-train.00001-of-01024.json.gz": _shard(["never read"]),
        "en/c4-validation.00000-of-00008.json.gz": _shard([f"doc {i}" for i in range(1200)]),
    },
    ("ptb-text-only/ptb_text_only", "main"): {"ptb_text_only.py": b"raise SystemExit"},
    ("ptb-text-only/ptb_text_only", "refs/convert/parquet"): {
        f"penn_treebank/{split}/0000.parquet": _parquet(sentence=[f"{split} one", "two"])
        for split in ("train", "test")
    },
    ("me/many", "main"): {
        **{f"data/train-{i:05d}-of-00003.parquet": _parquet(body=[f"{i}"]) for i in range(3)},
        "data/validation-00000-of-00001.parquet": _parquet(body=["v", None]),
    },
}
READ = """
import json, sys
from llmprune.errors import LLMPruneError
from llmprune.texts import documents
for line in sys.argv[1:]:
    source, split = line.split("=")
    try:
        found = documents(source, split=split)
        answer = [found.name, len(found.texts), found.joined()[:40], found.stream]
    except LLMPruneError as error:
        answer = str(error)
    print("ANSWER", json.dumps([line, answer]))
"""
KNOWN = [f"{name}={split}" for name in ("wikitext2", "c4", "ptb") for split in ("train", "test")]


def in_a_process(env: dict[str, str], lines: list[str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", READ, *lines],
        env={k: v for k, v in os.environ.items() if not k.startswith("HF_")} | env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answers = [x.removeprefix("ANSWER ") for x in done.stdout.splitlines() if "ANSWER" in x]
    return dict(map(json.loads, answers))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[str]]:
    """What was answered with a network, then offline (`offline:...`); and the files that were sent."""
    home = str(tmp_path_factory.mktemp("home"))
    more = ["me/many=train", "me/many=test", "Salesforce/wikitext:other=train"]
    wrong = ["me/none=train", "Salesforce/wikitext=train", "Salesforce/wikitext:other=test"]
    with serve(REPOSITORIES) as server:
        env = {"HF_ENDPOINT": server.url, "HF_HOME": home}
        answers = in_a_process(env, [*KNOWN, *more, *wrong])
        sent = server.downloads()
        asked = len(server.asked)
        offline = in_a_process({**env, "HF_HUB_OFFLINE": "1"}, [*KNOWN, "me/none=train"])
        assert len(server.asked) == asked
    return answers | {f"offline:{line}": answer for line, answer in offline.items()}, sent


@pytest.mark.parametrize("prefix", ["", "offline:"])
def test_the_known_names_are_joined_as_in_the_papers(
    hub: tuple[dict[str, Any], list[str]], prefix: str
) -> None:
    answers = hub[0]
    expected = {
        "wikitext2=train": ["wikitext2 (train)", 3, "a\n\n\n\nb", True],
        "wikitext2=test": ["wikitext2 (test)", 2, "\n\n c \n", True],
        "c4=train": ["c4 (train)", 2, "first second", False],
        "ptb=train": ["ptb (train)", 2, "train one two", True],
        "ptb=test": ["ptb (test)", 2, "test one two", True],
    }
    for line, answer in expected.items():
        assert answers[prefix + line] == answer
    name, count, start, _ = answers[prefix + "c4=test"]
    assert (name, count) == ("c4 (validation)", 1100)
    assert start.startswith("doc 0 doc 1 ")


def test_other_datasets_give_their_split(hub: tuple[dict[str, Any], list[str]]) -> None:
    answers = hub[0]
    assert answers["me/many=train"] == ["me/many (train)", 1, "0", False]
    assert answers["me/many=test"] == ["me/many (validation)", 2, "v\n\n", False]
    assert answers["Salesforce/wikitext:other=train"][2] == "x"


def test_no_more_is_downloaded_than_is_read(hub: tuple[dict[str, Any], list[str]]) -> None:
    sent = hub[1]
    assert [path for path in sent if "c4-train" in path] == ["en/c4-train.00000-of-01024.json.gz"]
    assert [path for path in sent if "data/train" in path] == ["data/train-00000-of-00003.parquet"]


def test_what_the_hub_does_not_have_is_one_line(hub: tuple[dict[str, Any], list[str]]) -> None:
    answers = hub[0]
    assert "no dataset 'me/none'" in answers["me/none=train"]
    assert "wikitext-2-raw-v1" in answers["Salesforce/wikitext=train"]
    assert "only train" in answers["Salesforce/wikitext:other=test"]
    assert "HF_HUB_OFFLINE" in answers["offline:me/none=train"]
    for answer in answers.values():
        if isinstance(answer, str):
            assert "\n" not in answer
            assert "--calibration FILE.txt" in answer or "a file" in answer


def test_no_network_is_told_at_once(tmp_path: Path) -> None:
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}  # port 9: nobody
    start = time.monotonic()
    answers = in_a_process(env, ["c4=train", "me/x=test"])
    assert time.monotonic() - start < 60  # the client alone retries for 46 s, and says so
    for answer in answers.values():
        assert "out of reach" in answer
        assert "--calibration FILE.txt" in answer


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        read("c4")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    assert list(read(tmp_path / "a.parquet").texts) == ["a"]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        read(tmp_path / "a.parquet")
