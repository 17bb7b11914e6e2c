r"""The accuracy frontier: perplexity of every recipe on every model and pattern, over calibration seeds.

    python benchmarks/frontier.py --models DIR demo DIR2 --train train.txt --test test.txt \
        --windows wikillama-5m=calibration_ids.npy --out benchmarks/results/frontier.json

`RECIPES` names what is compared: the fields of `llmprune.prune`. Seeds draw other windows of the training
text; a model with `--windows` has those for seed 0. Perplexity is on the whole test text, its standard error
over seeds. Beside it: the excess, ln(perplexity / dense perplexity), and its share of SparseGPT's on the same
seeds; the layer error, the share of the energy of what a matrix gives that is lost on test text, mean over
matrices (none where a recipe turns the weights); seconds of the processor and of the clock for pruning a
loaded model; and the peak memory of the process by then.

Each cell runs in a process of its own and is written when it is done, so that the run may be stopped, or cut
in parts by `--models`, `--patterns`, `--recipes`, `--seeds` and `--minutes`. What `--out` holds of the same
weights and settings, under whatever name, is not measured again; cells of another commit stay, and are told
of, until `--again`. The table is printed at the end, alone by `--minutes 0`; `--plot` draws it.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from frontier_figures import DENSE, draw, judged, told

from llmprune.quality import Asked, Parts, resolve

PATTERNS = ("0.7", "2:4", "0.6", "0.5", "4:8")
RECIPES: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "ria": {"method": "ria"},
    "dsnot": {"method": "dsnot"},
    "sparsegpt": {"method": "sparsegpt"},
    "wanda + refit": {"method": "wanda", "settings": {"refit": True}},
    "sparsegpt + refit": {"method": "sparsegpt", "settings": {"refit": True}},
    "alps": {"method": "alps"},
    "wanda + swaps": {"method": "wanda", "settings": {"refit": True, "refit_swaps": 1}},
    "sparsegpt + swaps": {"method": "sparsegpt", "settings": {"refit": True, "refit_swaps": 1}},
    "sparsegpt + repair": {"method": "sparsegpt", "settings": {"refit": True}, "repair": True},
    "alps + repair": {"method": "alps", "repair": True},
    "sparsegpt + owl": {"method": "sparsegpt", "allocation": "owl"},
    "sparsegpt + alphapruning": {"method": "sparsegpt", "allocation": "alphapruning"},
    "sparsegpt + fisher": {"method": "sparsegpt", "allocation": "fisher", "fisher": True},
    "alps + fisher": {"method": "alps", "allocation": "fisher", "fisher": True},
    "balanced": {"quality": "balanced"},
    "balanced by sparsegpt": {
        "quality": "balanced",
        "method": "sparsegpt",
        "settings": {"refit": True},
    },
    "balanced, refit to the end": {"quality": "balanced", "settings": {"tolerance": 1e-5}},
    "balanced without repair": {"quality": "balanced", "repair": False},
    "balanced without fisher": {"quality": "balanced", "fisher": False, "allocation": "uniform"},
    "best": {"quality": "best"},
    "best by sparsegpt": {"quality": "best", "method": "sparsegpt", "settings": {"refit": True}},
    "best untransformed": {"quality": "best", "transforms": ()},
    "best rotated": {
        "quality": "best",
        "transforms": ("rotate",),
        "transform_settings": {"stream": "learned"},
    },
    "best without fisher": {"quality": "best", "fisher": False, "allocation": "uniform"},
    "best, uniform": {"quality": "best", "allocation": "uniform"},
    "best without own text": {"quality": "best", "generate": 0.0},
    "best on given text": {"quality": "best", "generate": 0.0, "repair_settings": {"epochs": 8.0}},
}
FIRST = (
    "sparsegpt",
    "best",
    "balanced",
)  # every other is told against SparseGPT, which is `fast` too
HELD = 32  # windows of the test text that the layer error is measured on
KEY = (
    "model",
    "pattern",
    "seed",
    "weights",
    "recipe",
    "windows",
)  # what a cell is of, but its name


def main() -> None:
    """Measure the cells that are missing, most useful first, then print what there is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", nargs="+", required=True, help="local checkpoints, or demo")
    parser.add_argument("--train", type=Path, help="text to calibrate on; demo has its own")
    parser.add_argument("--test", type=Path, help="text to be judged on; demo has its own")
    parser.add_argument("--windows", nargs="*", default=[], metavar="MODEL=IDS.npy")
    parser.add_argument("--patterns", nargs="*", default=PATTERNS)
    parser.add_argument("--recipes", nargs="*", help="names; all by default")
    parser.add_argument("--add", nargs=2, action="append", default=[], metavar=("NAME", "JSON"))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--limit", type=int, help="only so many windows of the test text")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after that")
    parser.add_argument("--again", action="store_true", help="also what another commit measured")
    parser.add_argument("--plot", type=Path, help="picture of perplexity against sparsity")
    parser.add_argument("--out", type=Path, required=True, help="JSON with everything")
    args = parser.parse_args()
    known = {**RECIPES, **{name: json.loads(text) for name, text in args.add}}
    if wrong := set(args.recipes or ()) - set(known):
        parser.error(f"no recipe {', '.join(sorted(wrong))}; there are {', '.join(known)}")
    chosen = {name: known[name] for name in (args.recipes or known)}
    failed = run(args, chosen)
    rows = read(args.out)
    print(told(rows, commit()))
    if args.plot:
        draw(rows, args.plot)
    if failed:
        raise SystemExit(f"{len(failed)} cells failed: {'; '.join(failed)}")


def run(args: argparse.Namespace, recipes: dict[str, dict[str, Any]]) -> list[str]:
    """Every cell that is missing, in a process of its own; gives what failed."""
    begun, failed = time.monotonic(), []
    with tempfile.TemporaryDirectory() as scratch:
        texts = Texts(args, Path(scratch))
        for cell in cells(args, recipes):
            if time.monotonic() - begun >= args.minutes * 60:
                break
            done = [r for r in read(args.out) if all(r[k] == cell[k] for k in KEY)]
            done = [r for r in done if not args.again or r["commit"] == commit()]
            if any(place(r) == place(cell) for r in done):
                continue
            if done:  # one recipe may have two names, such as what a quality has come to be made of
                add(args.out, {**done[0], "name": cell["name"]})
                continue
            path = folder(cell["model"], args.models)
            task = {**cell, "path": str(path), **texts.of(cell["model"], path, cell["seed"])}
            try:
                found = apart(task)
            except Exception as error:  # also that of a process that was killed
                label = " ".join([cell["model"], cell["pattern"], cell["name"], str(cell["seed"])])
                failed.append(f"{label}: {type(error).__name__}: {error}")
                print(failed[-1], flush=True)
                continue
            row = {**cell, **found, "commit": commit()}
            print(json.dumps(row), flush=True)
            add(args.out, row)
    return failed


def cells(args: argparse.Namespace, recipes: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What is to be measured: the dense models, then seed by seed, what the others are told against first."""
    paths = {("demo" if m == "demo" else Path(m).name): folder(m, args.models) for m in args.models}
    given = dict(pair.split("=", 1) for pair in args.windows)
    shape = f"{args.samples} x {args.seqlen}" + (f", {args.limit}" if args.limit else "")
    order = sorted(recipes, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))

    def cell(model: str, pattern: str, name: str, recipe: Any, seed: int) -> dict[str, Any]:
        drawn = "given" if model in given and seed == 0 and name != DENSE else "drawn"
        return {
            "model": model,
            "weights": fingerprint(paths[model]),
            "pattern": pattern,
            "name": name,
            "recipe": recipe,
            "seed": seed,
            "windows": f"{drawn}, {shape}",
        }

    for model in paths:
        yield cell(model, "", DENSE, None, 0)
    for seed in args.seeds:
        for pattern in args.patterns:
            for model in paths:
                for name in order:
                    yield cell(model, pattern, name, spelled(recipes[name], pattern), seed)


def spelled(recipe: dict[str, Any], pattern: str) -> dict[str, Any]:
    """`recipe` with the parts that its quality, and what it asks for besides, stand for under `pattern`."""
    if "quality" not in recipe:
        return recipe
    asked = {key: value for key, value in recipe.items() if key != "quality"}
    parts = asdict(resolve(recipe["quality"], pattern, Asked(**asked)))
    plain = asdict(Parts())
    said = {key: value for key, value in parts.items() if key == "method" or value != plain[key]}
    read_back: dict[str, Any] = json.loads(json.dumps(said))  # lists, as cells of a file have them
    return read_back


def folder(model: str, given: list[str]) -> Path:
    """Where a model of the command line, or one by its name, lies."""
    if model == "demo":
        from llmprune.demo import MODEL_DIR

        return MODEL_DIR
    return next(Path(g) for g in given if model in (g, Path(g).name))


@cache
def fingerprint(path: Path) -> str:
    """What tells two trainings of one name apart."""
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


@cache
def commit() -> str:
    """Of the working tree when the run began."""
    from compare import _commit

    return _commit()


class Texts:
    """Token ids of the test text and of the windows of each seed, made once for each model."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch = args, scratch

    def of(self, model: str, path: Path, seed: int) -> dict[str, Any]:
        """Files of ids and how many test windows of them to use."""
        given = dict(pair.split("=", 1) for pair in self.args.windows)
        ids = self.scratch / f"{model}-{seed}.npy"
        if model in given and seed == 0:
            ids = Path(given[model])
        elif not ids.exists():
            np.save(ids, self._windows(model, path, seed).numpy())
        test = self.scratch / f"{model}-test.npy"
        if not test.exists():
            np.save(test, self._test(model, path).numpy())
        return {
            "ids": str(ids),
            "test": str(test),
            "seqlen": self.args.seqlen,
            "limit": self.args.limit,
        }

    def _windows(self, model: str, path: Path, seed: int) -> torch.Tensor:
        from transformers import AutoTokenizer

        from llmprune import calibration

        source = "demo" if model == "demo" else self._named("train")
        tokenizer = AutoTokenizer.from_pretrained(path)
        size = {"samples": self.args.samples, "seqlen": self.args.seqlen}
        return calibration.load(source, tokenizer, seed=seed, **size).ids

    def _test(self, model: str, path: Path) -> torch.Tensor:
        from transformers import AutoTokenizer

        from llmprune.eval.perplexity import token_ids

        source = "demo" if model == "demo" else self._named("test")
        return token_ids(source, AutoTokenizer.from_pretrained(path))[0]

    def _named(self, name: str) -> Path:
        path: Path | None = getattr(self.args, name)
        if path is None:
            raise SystemExit(f"--{name} names the text that a model other than demo needs")
        return path


def apart(task: dict[str, Any]) -> dict[str, Any]:
    """`measured` in a process of its own, begun from one that has imported the libraries and nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llmprune.run", "llmprune.eval.perplexity"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measured, task).result()


def measured(task: dict[str, Any]) -> dict[str, Any]:
    """One cell, in this process."""
    from transformers import AutoModelForCausalLM

    import llmprune
    from llmprune.eval.perplexity import perplexity

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(task["path"], dtype=torch.float32).eval()
    found: dict[str, Any] = {}
    turned = task["recipe"] is None
    if task["recipe"] is not None:
        windows = torch.from_numpy(np.load(task["ids"])).long()
        wall, own = time.perf_counter(), time.process_time()
        report = llmprune.prune(
            model, calibration=windows, sparsity=task["pattern"], progress=False, **task["recipe"]
        )
        found["seconds"] = round(time.process_time() - own, 2)
        found["wall"] = round(time.perf_counter() - wall, 2)
        found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        found["sparsity"] = round(report.sparsity, 6)
        turned = bool(report.recipe.get("transforms"))
        if (
            report.repair
        ):  # what is left of each block's error, on windows learnt from and on others
            found["learnt"] = round(fmean(r.after for r in report.repair), 6)
            found["held_out"] = round(fmean(r.held_out_after for r in report.repair), 6)
    test = torch.from_numpy(np.load(task["test"])).long()
    result = perplexity(model, test, seqlen=task["seqlen"], dataset="test", limit=task["limit"])
    found["perplexity"] = round(result.perplexity, 4)
    if not turned:
        held = test[: HELD * task["seqlen"]].view(-1, task["seqlen"])
        found["layer_error"] = round(layer_error(model, task["path"], held), 6)
    return found


@torch.no_grad()
def layer_error(pruned: Any, path: str, held: torch.Tensor) -> float:
    """The share of the energy of what a matrix gives that is lost, on what the dense one reads; the mean."""
    from damping import grams, lost
    from transformers import AutoModelForCausalLM

    from llmprune.model import matrices

    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    before = matrices(dense)
    after = {m.name: m.weight for m in matrices(pruned)}
    known = grams(dense, before, held)
    return fmean(lost(m.weight, after[m.name], known[m.name]) for m in before)


def read(path: Path) -> list[dict[str, Any]]:
    """The cells that are there."""
    return list(json.loads(path.read_text())["rows"]) if path.exists() else []


def place(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a cell is alone in: measured anew it takes the old one's place, on other test text a new one."""
    return judged(row), row["pattern"], row["name"], row["seed"]


def add(path: Path, row: dict[str, Any]) -> None:
    """Put a cell among those of `path`, which other runs may be writing to."""
    from llmprune.provenance import versions

    lock = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = [r for r in read(path) if place(r) != place(row)] + [row]
        about = {"versions": versions(torch.device("cpu")), "command": "benchmarks/frontier.py"}
        lines = ",\n".join(json.dumps(r) for r in rows)
        fresh = path.with_suffix(".new")
        fresh.write_text(f'{json.dumps(about)[:-1]}, "rows": [\n{lines}\n]}}\n')
        fresh.replace(path)
    finally:
        os.close(lock)


if __name__ == "__main__":
    main()
