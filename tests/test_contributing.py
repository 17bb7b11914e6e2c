"""CONTRIBUTING.md shows a method and its test; here both are put where it says, and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path


def test_the_example_is_a_method_once_its_file_is_there(root: Path, tmp_path: Path) -> None:
    text = (root / "CONTRIBUTING.md").read_text()
    method, test = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    ignore = shutil.ignore_patterns("__pycache__", "model")
    shutil.copytree(root / "llmprune", tmp_path / "llmprune", ignore=ignore)
    (tmp_path / "llmprune" / "methods" / "tempered.py").write_text(method)
    (tmp_path / "test_method_tempered.py").write_text(test)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir=."],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout

    ruff = [sys.executable, "-m", "ruff", "check", "--config", str(root / "pyproject.toml")]
    for name in ("llmprune/methods/tempered.py", "test_method_tempered.py"):
        lint = subprocess.run([*ruff, name], cwd=tmp_path, capture_output=True, text=True)
        assert lint.returncode == 0, lint.stdout
