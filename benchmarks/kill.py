r"""Kill a run with SIGKILL at random moments, give the same command again, and compare every byte.

    python benchmarks/kill.py --model DIR --kills 50 --out benchmarks/results/kill-9.json \
        -- --method wanda --sparsity 2:4 --calibration demo --samples 32 --eval-dataset demo

What follows `--` is one command line of llmprune without `--model` and `--save`; `--and` begins another.
Each is run in peace, twice. Then, for each trial, it is begun anew, killed after a share of the seconds
that took, killed once more in every second trial, and given again until it ends. The share is drawn at
random, or the kills are spread evenly with `--even`. Every file has to hold the same bytes as that of
the run in peace (of llmprune.json all but seconds), and nothing else may be left beside it.

Runs are forked from one process that has imported everything, so that a kill falls into the run and
not into the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REFUSED = 2  # exit status


def main() -> int:
    args, commands = _arguments()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        for number, command in enumerate(commands):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            rows.append(_Trials(args, command, folder).run())
            print(json.dumps(rows[-1]), flush=True)
    import torch

    from llmprune.provenance import versions

    result = {
        "command": "python benchmarks/kill.py " + " ".join(sys.argv[1:]),
        "model": args.model.name,
        "seed": args.seed,
        "commit": _commit(),
        "versions": versions(torch.device("cpu")),
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if any(row["different"] for row in rows) else 0


def _arguments() -> tuple[argparse.Namespace, list[list[str]]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="local checkpoint")
    parser.add_argument("--kills", type=int, default=50, help="trials of each command")
    parser.add_argument("--even", action="store_true", help="spread kills instead of drawing them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="folder for the results; the system's")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    own, _, rest = " ".join(sys.argv[1:]).partition(" -- ")
    commands = [part.split() for part in rest.split(" --and ")]
    return parser.parse_args(own.split()), commands


@dataclass
class _Trials:
    """One command line, run in peace and then with kills."""

    args: argparse.Namespace
    command: list[str]
    folder: Path
    moments: Counter[str] = field(default_factory=Counter)
    different: list[str] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        _import_everything(self.args.model)
        for _ in range(2):  # the first one warms the system's file cache
            shutil.rmtree(self.folder / "peace", ignore_errors=True)
            begun = time.monotonic()
            if status := self._wait(self._start("peace")):
                raise SystemExit(f"{self.command} ends with {status}: {self._log()}")
            seconds = time.monotonic() - begun
        wanted = _content(self.folder / "peace")
        chance = random.Random(self.args.seed)
        for trial in range(self.args.kills):
            even = (trial + 0.5) / self.args.kills
            shares = [even if self.args.even else chance.random()]
            shares += [chance.random()] if trial % 2 else []
            name = f"trial-{trial}"
            self._killed(name, [share * seconds for share in shares])
            if (found := _content(self.folder / name)) != wanted:
                files = found.keys() | wanted.keys()
                bad = sorted(n for n in files if found.get(n) != wanted.get(n))
                self.different.append(f"{name} at {shares}: {bad}")
            shutil.rmtree(self.folder / name, ignore_errors=True)
            if left := [p.name for p in self.folder.iterdir() if p.name not in ("peace", "log")]:
                self.different.append(f"{name} at {shares} leaves {left}")
        return {
            "command": " ".join(self.command),
            "seconds": round(seconds, 2),
            "kills": sum(self.moments.values()),
            "last finished step at the kill": dict(sorted(self.moments.items())),
            "different": self.different,
        }

    def _killed(self, name: str, delays: list[float]) -> None:
        """Begin, kill after each delay, and let the last run end.

        Where the result was in place before the kill, that one is refused, and tidies up.
        """
        there = False
        for delay in delays:
            child = self._start(name)
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            there = (self.folder / name).exists()
            self.moments["all" if there else self._last_step(name)] += 1
            if there:
                break
        status = self._wait(self._start(name))
        if status != (REFUSED if there else 0):
            self.different.append(f"{name} ends with {status}: {self._log()}")

    def _last_step(self, name: str) -> str:
        journal = self.folder / f".{name}.unfinished" / "journal.jsonl"
        lines = journal.read_text().splitlines() if journal.exists() else []
        steps = [json.loads(line.partition(" ")[2]).get("step") for line in lines]
        return " ".join((steps[-1] or "begun").split()[:2]) if steps else "nothing"

    def _start(self, name: str) -> int:
        child = os.fork()
        if child:
            return child
        from llmprune.cli import main as llmprune

        log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        save = ["--model", str(self.args.model), "--save", str(self.folder / name)]
        try:
            status = llmprune([*self.command, *save])
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def _wait(self, child: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _log(self) -> str:
        return (self.folder / "log").read_text()[-600:]


def _content(folder: Path) -> dict[str, Any]:
    """Every file of a checkpoint; of the report and the card what two runs have in common."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")) if folder.exists() else ():
        if path.name == "llmprune.json":
            found[path.name] = _timeless(json.loads(path.read_text()))
        elif path.name == "README.md":
            text = path.read_text().replace(str(folder), "")
            found[path.name] = text.split("<!--")[0]
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def _timeless(plain: Any) -> Any:
    """A report without what a clock said."""
    if isinstance(plain, dict):
        clocks = ("seconds", "tokens_per_second")
        return {k: _timeless(v) for k, v in plain.items() if k not in clocks}
    return [_timeless(v) for v in plain] if isinstance(plain, list) else plain


def _commit() -> str:
    line = ["git", "rev-parse", "--short", "HEAD"]
    here = Path(__file__).parent
    return subprocess.run(line, capture_output=True, text=True, cwd=here).stdout.strip()


def _import_everything(model: Path) -> None:
    """Whatever a run imports; no tensor is computed here, so that forks are safe."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    import llmprune.demo
    import llmprune.job  # noqa: F401

    with init_empty_weights():
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))


if __name__ == "__main__":
    sys.exit(main())
