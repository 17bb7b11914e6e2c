"""Give hostile checkpoints to every reader, and hold each to its promise: a result, or one clear line.

    python tests/fuzz.py --inputs 100000 --out benchmarks/results/fuzz.json
    python tests/fuzz.py --only HEX          # one input again, with the traceback

Half of the inputs are random, half follow the coverage of llmprune's own code (atheris), where that is
installed. They run in processes of their own, so that a crash, a hang or memory without end is seen and
attributed to the input.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from guard import GROWTH, MARGIN
from safetensors import SafetensorError

HERE = Path(__file__).resolve().parent
HANG = 60.0  # seconds that one input may take before its process is ended
START = 600.0  # seconds that a process may take to begin
LONG = 5.0  # seconds of its processor that one reader may take
LONGEST = 500  # characters of an error message
BYTES = 96  # of an input
SELDOM = 40  # a slow reader gets one input of so many
_EXPECTED = (OSError, ValueError, RecursionError, SafetensorError)  # of calls into compiled code


class Tally:
    """What came of the inputs, by reader, by spoilt part and by the function that refused.

    Attributes:
        failures: broken promises by what they are, each with the first input that shows it.
    """

    def __init__(self) -> None:
        self.inputs = 0
        self.outcomes: Counter[str] = Counter()
        self.parts: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.failures: dict[str, dict[str, Any]] = {}
        self.slowest = 0.0

    def note(self, reader: str, parts: list[str], kind: str) -> None:
        """One outcome of one reader: `ok`, or the name of an error."""
        self.outcomes[f"{reader}: {kind}"] += 1
        for part in {*parts}:
            self.parts[f"{part}: {'ok' if kind == 'ok' else 'refused'}"] += 1

    def fail(self, what: str, data: bytes, why: str) -> None:
        """A broken promise."""
        known = self.failures.setdefault(
            what, {"count": 0, "input": data.hex(), "why": why[-1500:]}
        )
        known["count"] += 1

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        counts = {
            k: dict(sorted(getattr(self, k).items())) for k in ("outcomes", "parts", "refused")
        }
        return {
            "inputs": self.inputs,
            "slowest_seconds": round(self.slowest, 2),
            **counts,
            "failures": self.failures,
        }

    def add(self, other: dict[str, Any]) -> None:
        """What another process found."""
        self.inputs += other["inputs"]
        self.slowest = max(self.slowest, other["slowest_seconds"])
        for name in ("outcomes", "parts", "refused"):
            getattr(self, name).update(other[name])
        for what, found in other["failures"].items():
            known = self.failures.setdefault(what, {**found, "count": 0})
            known["count"] += found["count"]


class Bench:
    """One process's place of work: a hostile folder, a forbidden one beside it, one to write to."""

    def __init__(self, place: Path) -> None:
        from guard import Guard
        from hostile import finish, outside, valid
        from readers import READERS, SLOW

        self.place, self.readers, self.slow = place, READERS, SLOW
        self.folder, self.scratch = place / "folder", place / "scratch"
        self.guard = Guard(outside(place))
        os.chdir(place)  # so that a path that is not joined with the folder leads outside, too
        self.tally = Tally()
        # so that what is imported or compiled on first use is there
        for dtype, sparse, bits in product(("F32", "BF16"), (False, True), (0, 4)):
            finish(valid(sparse=sparse, shards=2, dtype=dtype, bits=bits)).write(self._clear())
            for reader in (READERS | SLOW).values():
                reader(self.folder, self._fresh())

    def _clear(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.folder

    def _fresh(self) -> Path:
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        return self.scratch

    def run(self, data: bytes) -> None:
        """Give the checkpoint of `data` to every reader."""
        from spoil import spoilt

        draft = spoilt(data)
        draft.write(self._clear())
        self.tally.inputs += 1
        seldom = int.from_bytes(data[-2:], "little") % SELDOM == 0
        for name, reader in (self.readers | self.slow if seldom else self.readers).items():
            self._one(name, reader, draft.parts, data)

    def _one(self, name: str, reader: Any, parts: list[str], data: bytes) -> None:
        from llmprune.errors import LLMPruneError

        begun = time.process_time()
        with self.guard.watching(self.folder, self._fresh()) as broken:
            try:
                reader(self.folder, self.scratch)
                kind = "ok"
            except LLMPruneError as error:
                kind = type(error).__name__
                self.tally.refused[_where(error)] += 1
                broken += _unclear(str(error)) + _hidden(error.__cause__)
            except Exception as error:  # what no reader may raise, whatever it is
                kind = f"{type(error).__name__} in {_where(error)}"
                self.tally.fail(f"{name}: {kind}", data, traceback.format_exc())
        seconds = time.process_time() - begun
        self.tally.slowest = max(self.tally.slowest, seconds)
        if seconds > LONG:
            broken.append(f"takes {seconds:.0f} s")
        for what in broken:
            self.tally.fail(f"{name}: {what}", data, what)
        self.tally.note(name, parts, kind)


def _where(error: BaseException) -> str:
    """The function of llmprune that raised: `sparse._spec`."""
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [code for code in codes if "llmprune" in code.co_filename]
    return f"{Path(ours[-1].co_filename).stem}.{ours[-1].co_name}" if ours else "elsewhere"


def _hidden(cause: BaseException | None) -> list[str]:
    """What an error was made of that must not happen: a fault of ours, or memory that there is not."""
    if cause is None:
        return []
    if isinstance(cause, MemoryError) or "can't allocate memory" in str(cause):
        return [f"asks for more memory than the files explain: {_where(cause)}"]
    code = [frame.f_code for frame, _ in traceback.walk_tb(cause.__traceback__)][-1]
    ours = str(HERE.parent / "llmprune") in code.co_filename and not isinstance(cause, _EXPECTED)
    return [f"hides {type(cause).__name__} in {_where(cause)}"] if ours else []


def _unclear(message: str) -> list[str]:
    """What is wrong with an error message."""
    if len(message) > LONGEST:
        return ["its message is too long"]
    if not message.isprintable():
        return ["its message has signs that a terminal obeys"]
    return [] if message.strip() else ["its message is empty"]


def work(engine: str, seed: int, count: int, place: Path) -> None:
    """The process that reads: `count` inputs, the current one and the tally always in files."""
    current, result = place / "current", place / "tally.json"

    def once(data: bytes) -> None:
        current.write_bytes(data)
        bench.run(data)
        if bench.tally.inputs >= count or bench.tally.inputs % 50 == 0:
            result.with_suffix(".new").write_text(json.dumps(bench.tally.as_dict()))
            result.with_suffix(".new").rename(result)
        if bench.tally.inputs >= count:
            os._exit(0)

    if engine == "coverage":
        import atheris

        with atheris.instrument_imports(include=["llmprune"]):
            importlib.import_module("readers")
        bench = Bench(place)
        options = [
            "-runs=-1",
            f"-max_len={BYTES}",
            f"-seed={seed}",
            "-len_control=0",
            "-rss_limit_mb=0",
        ]
        corpus = place / "corpus"
        corpus.mkdir()
        dice = random.Random(seed)
        for i in range(64):
            (corpus / str(i)).write_bytes(dice.randbytes(BYTES))
        atheris.Setup([sys.argv[0], *options, str(corpus)], once)
        atheris.Fuzz()
    bench = Bench(place)
    dice = random.Random(seed)
    while True:
        once(dice.randbytes(BYTES))


def watch(engine: str, seed: int, count: int, total: Tally) -> None:
    """Run `count` inputs in processes; one that dies or hangs is noted, and another goes on."""
    done = 0
    while done < count:
        with tempfile.TemporaryDirectory(dir=_memory(), prefix="llmprune-fuzz-") as name:
            place = Path(name)
            command = [sys.executable, str(HERE / "fuzz.py"), "--worker", engine]
            command += ["--seed", str(seed), "--inputs", str(count - done), "--place", name]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
            environment |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
            with (place / "log").open("wb") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
                why = _ended(process, place)
            result = place / "tally.json"
            found = json.loads(result.read_text()) if result.is_file() else None
            if found:
                total.add(found)
                done += found["inputs"]
            if why:
                data = (place / "current").read_bytes() if (place / "current").is_file() else b""
                said = (place / "log").read_text(errors="replace")
                total.fail(f"a process {why}", data, said)
                done += 1
                if not found and not data:
                    raise SystemExit(f"no input could be run: {said[-2000:]}")
        seed += 1000


def _ended(process: subprocess.Popen[bytes], place: Path) -> str:
    """Why a process ended; empty when it had done its work."""
    current, begun = place / "current", time.time()
    while (status := process.poll()) is None:
        time.sleep(0.1)
        since = current.stat().st_mtime if current.is_file() else begun + START - HANG
        if time.time() - since > HANG:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return "hangs"
    return "" if status == 0 else f"ends with status {status}"


def _memory() -> str | None:
    """A folder in memory where there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def fuzz(inputs: int, seed: int, processes: int) -> dict[str, Tally]:
    """Run `inputs` inputs, half of them random, half led by coverage, at the same time."""
    found = {"random": Tally(), "coverage": Tally()}
    with ThreadPoolExecutor(processes) as pool:
        runs = []
        for number in range(processes):
            engine, tally = ("random", "coverage")[number % 2], Tally()
            share = inputs // processes + (number < inputs % processes)
            runs.append((engine, tally, pool.submit(watch, engine, seed + number, share, tally)))
        for engine, tally, run in runs:
            run.result()
            found[engine].add(tally.as_dict())
    return found


def report(found: dict[str, Tally], seconds: float) -> dict[str, Any]:
    """What is published."""
    import torch

    from llmprune.provenance import versions

    names = {**versions(torch.device("cpu")), "atheris": version("atheris")}
    return {
        "command": " ".join(["python", *sys.argv]),
        "promise": f"a result or one clear line of at most {LONGEST} characters; no other exception, no "
        f"crash, none above {LONG:.0f} s of a core; address space for {MARGIN} bytes and {GROWTH} times the "
        "files; nothing opened, listed, changed, imported or run outside of the folder",
        "slow_readers": f"one input of {SELDOM}",
        "commit": _commit(),
        "versions": names,
        "machine": platform.platform(),
        "seconds": round(seconds),
        "failures": sum(len(tally.failures) for tally in found.values()),
        "inputs": sum(tally.inputs for tally in found.values()),
        "by_engine": {engine: tally.as_dict() for engine, tally in found.items()},
    }


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fuzz every reader of checkpoints.")
    parser.add_argument("--inputs", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="every second one led by coverage")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", metavar="HEX", help="one input, with tracebacks")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.seed, args.inputs, args.place)
        return
    if args.only is not None:
        with tempfile.TemporaryDirectory() as name:
            bench = Bench(Path(name))
            bench.run(bytes.fromhex(args.only))
            print(json.dumps(bench.tally.as_dict(), indent=2).replace("\\n", "\n"))
        return
    begun = time.monotonic()
    found = fuzz(args.inputs, args.seed, args.processes)
    text = json.dumps(report(found, time.monotonic() - begun), indent=2) + "\n"
    if args.out:
        args.out.write_text(text)
    print(text)
    raise SystemExit(any(tally.failures for tally in found.values()))


if __name__ == "__main__":
    main()
