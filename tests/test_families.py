"""docs/families.md says what becomes of every family, and it is true."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import families
import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
VERSION, LINES = families.written()
SAME = transformers.__version__ == VERSION
AGAIN = "docs/families.md is not true any more; look at the difference, then: make families"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors here are so small that a second thread only costs; and the libraries stay as they were."""
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()


@pytest.mark.parametrize("model_type", families.families())
def test_what_the_table_says_is_true(model_type: str) -> None:
    """Line by line with the transformers of the table; with another, what works must still work."""
    if model_type not in LINES:
        assert not SAME, f"{model_type} is not in the table: make families"
        pytest.skip(f"not in the table, which was made with transformers {VERSION}")
    row = families.examined(model_type)
    if SAME:
        assert row.line() == LINES[model_type], AGAIN
    elif "| yes | yes |" in LINES[model_type]:
        assert row.works, row.line()


def test_the_table_has_every_family_and_no_other() -> None:
    if not SAME:
        pytest.skip(f"the table was made with transformers {VERSION}")
    assert list(LINES) == families.families(), AGAIN


def test_at_least_45_families_work_and_all_others_have_a_reason() -> None:
    works = [line for line in LINES.values() if "| yes | yes |" in line]
    assert len(works) >= 45
    for line in LINES.values():
        assert line in works or not line.endswith(" |  |"), line


def test_the_readme_gives_the_count() -> None:
    works = sum("| yes | yes |" in line for line in LINES.values())
    count = f"{works} of the {len(LINES)} causal language models"
    assert count in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"{works} of {len(LINES)} work" in families.TABLE.read_text(encoding="utf-8")
