"""The house keeps its order: imports point down, two folders are links, importing costs nothing."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llmprune"

# From the ground up. A room may import its own floor and those below. What is not named here stands
# on the floor of `walk`: a room that comes later needs no entry.
FLOORS = (
    {"errors", "report"},
    {"kernels", "factor"},
    {"stats", "pattern"},
    {"methods"},
    {"walk", "hub", "plot", "checkpoint", "eval", "calibration", "model"},
    {"run"},
    {
        "order",
        "allocate",
        "chosen",
        "workplace",
        "packed_result",
        "deliver",
        "stream",
        "by_block",
        "in_memory",
        "generated",
        "informed",
        "to_disk",
        "transformed",
    },
    {"job"},
    {"cli"},
    {"__main__"},
)
MIDDLE = 4
HEAVY = {
    "torch",
    "transformers",
    "triton",
    "datasets",
    "accelerate",
    "numpy",
    "numba",
    "safetensors",
}

LONG_FILE, LONG_FUNCTION = 300, 50  # the proportions of the code this project models itself on
LONG = {
    "llmprune/kernels/bitmap.py:bitmap_gemv": "half of it are its arguments and those of the kernel",
    "llmprune/kernels/bitmap_triton.py:bitmap_kernel": "a third of it are its arguments",
    "llmprune/kernels/n8_gluon.py:n8_kernel": "a third of it are its arguments",
    "llmprune/kernels/n8_mma.py:n8_mma": "half of it are its arguments and those of the kernel",
    "llmprune/kernels/nm_gemv.py:nm_gemv": "half of it are its arguments and those of the kernel",
    "llmprune/kernels/nm_gemv_triton.py:gemv_kernel": "a third of it are its arguments",
    "llmprune/kernels/s24_bits.py:s24_bits": "half of it are its arguments and those of the kernel",
    "llmprune/kernels/s24_bits_gluon.py:bits_kernel": "a third of it are its arguments",
    "llmprune/kernels/s24_gluon.py:s24_kernel": "a third of it are its arguments",
    "llmprune/kernels/experts_gluon.py:experts_kernel": "a third of it are its arguments",
    "llmprune/kernels/experts_gluon.py:_multiply": "a third of it are its arguments",
    "llmprune/kernels/s24_experts.py:s24_experts": "half of it are its arguments and those of the kernel",
    "llmprune/kernels/s24_mma.py:s24_mma": "half of it are its arguments and those of the kernel",
    "llmprune/demo/text.py": "the made-up world: tables of facts and sentences, not logic",
    "llmprune/calibration.py:load": "half of it says what each kind of source gives",
    "llmprune/kernels/packed_numba.py": "numba's cache watches one file: what one loop compiles stays in it",
    "llmprune/eval/perplexity.py:perplexity": "half of it is the docstring of the protocol",
    "llmprune/eval/tasks.py:run_tasks": "half of it says what lm-eval does to the process",
    "llmprune/run.py:prune_with": "the run itself, a line or two for each phase, and its report",
    "llmprune/run.py:prune": "the signature that users call, and a line on each argument",
}


def sources() -> list[Path]:
    """Every Python file of the package, through its two links."""
    here = [p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts]
    linked = [p for name in ("kernels", "eval") for p in (PACKAGE / name).rglob("*.py")]
    return sorted({*here, *linked})


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything that `path` imports, at the top and inside functions."""
    name = module_of(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            base = resolve_name(dots + (node.module or ""), package) if dots else node.module or ""
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def room(name: str) -> str:
    """`methods` for llmprune.methods.wanda, '' for what the package itself defines."""
    first = name.split(".")[1]
    folder = PACKAGE / first
    return first if folder.is_dir() or folder.with_suffix(".py").is_file() else ""


def floor(name: str) -> int:
    return next((i for i, rooms in enumerate(FLOORS) if name in rooms), MIDDLE)


def own(path: Path) -> Iterator[tuple[int, str]]:
    return ((line, name) for line, name in imports(path) if name.startswith("llmprune."))


SOURCES = [p for p in sources() if p != PACKAGE / "__init__.py"]


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=[str(p.relative_to(ROOT)) for p in paths])


@each(SOURCES)
def test_no_import_points_up(path: Path) -> None:
    mine = room(module_of(path))
    up = [
        f"line {line}: {mine} -> {name}"
        for line, name in own(path)
        if floor(room(name) or "errors") > floor(mine)
    ]
    assert not up


@each([p for p in SOURCES if room(module_of(p)) == "kernels"])
def test_kernels_know_torch_and_compilers_only(path: Path) -> None:
    allowed = sys.stdlib_module_names | {"torch", "triton", "numba", "llvmlite"}
    for line, name in imports(path):
        inside = name.startswith("llmprune.kernels.")
        assert inside or name.split(".")[0] in allowed, f"line {line}: {name}"


@each([p for p in SOURCES if room(module_of(p)) == "methods"])
def test_methods_know_no_model(path: Path) -> None:
    for line, name in imports(path):
        assert name.split(".")[0] not in {"transformers", "datasets"}, f"line {line}: {name}"
        if name.startswith("llmprune."):
            known = {"methods", "stats", "pattern", "kernels", "errors"}
            assert room(name) in known, f"line {line}: {name}"


@pytest.mark.parametrize("name", ["errors", "report"])
def test_errors_and_the_report_import_nothing_heavy(name: str) -> None:
    for line, full in imports(PACKAGE / f"{name}.py"):
        assert full.split(".")[0] not in HEAVY, f"line {line}: {full}"


def everything() -> list[Path]:
    folders = [ROOT / name for name in ("tests", "benchmarks")]
    return [*sources(), *(p for folder in folders for p in sorted(folder.rglob("*.py")))]


def test_nobody_imports_the_top_level_folders() -> None:
    """They are llmprune.kernels and llmprune.eval; `kernels` is Hugging Face's package."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in everything()
        for line, name in imports(path)
        if name.split(".")[0] in {"kernels", "eval"}
    ]
    assert not wrong


@pytest.mark.parametrize("name", ["kernels", "eval"])
def test_the_top_level_folders_are_no_packages(name: str) -> None:
    """With an `__init__.py`, top-level kernels/ shadows Hugging Face's `kernels`.

    Where a version of that package that transformers accepts is installed, loading a model class
    from this repository then fails: `cannot import name 'CUDAProperties' from 'kernels'`. A folder
    without `__init__.py` yields to the installed package.
    """
    assert (ROOT / name).is_dir()
    assert not (ROOT / name / "__init__.py").exists()


@pytest.mark.parametrize("name", ["kernels", "eval"])
def test_users_reach_them_through_relative_links(name: str) -> None:
    link = PACKAGE / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "--stage", f"llmprune/{name}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert listed.startswith("120000 "), (
            f"git does not hold llmprune/{name} as a link: {listed}"
        )


def test_transformers_can_be_imported_from_the_root() -> None:
    code = "import transformers; transformers.AutoModelForCausalLM; transformers.PreTrainedModel"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_llmprune_loads_nothing_and_is_quick() -> None:
    code = (
        "import json, sys, time; begun = time.process_time(); import llmprune; "
        "print(json.dumps([time.process_time() - begun, sorted(sys.modules)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("COV")},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, modules = json.loads(done.stdout)
    assert not HEAVY & set(modules)
    assert seconds < 0.5


def exported() -> list[tuple[str, str]]:
    """(name, module) of each public name, as the type checker sees it."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    blocks = [n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    return [
        (alias.asname or alias.name, node.module or "")
        for block in blocks
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]


def test_the_type_checker_sees_the_public_names() -> None:
    import llmprune

    homes = {name: f"llmprune.{module}" for name, module in llmprune._HOME.items()}
    assert dict(exported()) == homes
    assert sorted(homes) == llmprune.__all__


@pytest.mark.parametrize(("name", "module"), exported())
def test_each_public_name_is_there(name: str, module: str) -> None:
    import llmprune

    assert getattr(llmprune, name) is vars(sys.modules[module])[name]


def test_an_unknown_name_is_an_attribute_error() -> None:
    import llmprune

    with pytest.raises(AttributeError, match="no attribute 'wandas'"):
        llmprune.wandas  # noqa: B018


def test_no_room_is_called_utils() -> None:
    names = {"utils", "util", "helpers", "misc", "common"}
    assert not [p for p in sources() if p.stem in names or p.parent.name in names]


def test_long_files_and_functions_give_a_reason() -> None:
    long = set()
    for path in sources():
        name = str(path.relative_to(ROOT))
        text = path.read_text()
        if len(text.splitlines()) > LONG_FILE:
            long.add(name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > LONG_FUNCTION:
                    long.add(f"{name}:{node.name}")
    assert long - LONG.keys() == set(), "shorten it, or give the reason in LONG"
    assert LONG.keys() - long == set(), "no longer long: take it out of LONG"
