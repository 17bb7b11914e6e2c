"""What users install: the wheel is whole, whichever way it is built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 6_000_000  # bytes; the demo model is most of it


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, kind: str, into: Path) -> Path:
    """Build a `wheel` or `sdist` of `source` with the setuptools that is here, off the network."""
    run(
        *(sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--skip-dependency-check"),
        *("--outdir", into),
        cwd=source,
    )
    (made,) = into.iterdir()
    return made


def tracked(root: Path) -> list[str]:
    """What a commit would hold: never a build folder that lies about."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name and os.path.lexists(root / name)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, links kept, so that building leaves nothing behind here."""
    pytest.importorskip("build", reason="comes with the extra dev")
    copy = tmp_path_factory.mktemp("checkout")
    for name in tracked(ROOT):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    table = copy / "kernels" / "measured" / "made-up.json"
    table.parent.mkdir(exist_ok=True)
    table.write_text('{"format": 1, "rows": []}\n')
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(checkout, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(checkout, "sdist", tmp_path_factory.mktemp("sdist"))


def expected() -> set[str]:
    """Every file of the package: Python, the demo model, tables and py.typed, the links followed."""
    names = {"kernels/measured/made-up.json"} | {
        name
        for name in tracked(ROOT)
        if name.endswith((".py", "py.typed")) or "/model/" in name or "/measured/" in name
    }
    inside = {name for name in names if name.startswith("llmprune/")}
    return inside | {f"llmprune/{n}" for n in names if n.startswith(("kernels/", "eval/"))}


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    assert contents(wheel) == expected()
    assert "llmprune/kernels/nm_mask.py" in contents(wheel)
    assert "llmprune/py.typed" in contents(wheel)


def test_the_wheel_holds_files_not_links(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        modes = {i.filename: i.external_attr >> 16 & 0o170000 for i in archive.infolist()}
    assert {name for name, mode in modes.items() if mode == 0o120000} == set()


def test_the_wheel_is_small_and_carries_the_demo_model(wheel: Path) -> None:
    assert wheel.stat().st_size < LIMIT
    model = {Path(n).name for n in contents(wheel) if n.startswith("llmprune/demo/model/")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= model


def test_the_wheel_names_its_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert [n for n in names if n.endswith("licenses/LICENSE")]


def test_the_wheel_works_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", target, wheel, cwd=tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "import llmprune, llmprune.eval, llmprune.kernels;"
        "from llmprune.kernels import nm_mask;"
        "from llmprune import methods;"
        "print(nm_mask.__file__); print(llmprune.__file__)"
    )
    for name in run(sys.executable, "-P", "-c", code, target, cwd=tmp_path).split():
        assert Path(name).is_relative_to(target)


def test_the_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    again = build(source, "wheel", tmp_path / "again")
    assert contents(again) == contents(wheel)


def test_the_sdist_is_small_and_holds_no_cache(sdist: Path) -> None:
    assert sdist.stat().st_size < 2 * LIMIT
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    assert not [n for n in names if "__pycache__" in n or ".venv" in n]
