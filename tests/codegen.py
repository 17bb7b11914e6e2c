"""Compile kernels for GPUs that are not here, and count what their main loop does.

    python tests/codegen.py < jobs > found     # a JSON list of jobs a line, and of what was found

In a process of its own, for in that of the tests `triton.jit` interprets. Needs no GPU: ptxas and cuobjdump
come with triton. Works with triton 3.6 to 3.9.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

ARCHITECTURES = (80, 86, 89, 90, 100, 120)


@dataclass(frozen=True)
class Job:
    """One kernel for one GPU.

    Attributes:
        module: name of the module of `llmprune.kernels` that defines it.
        kernel: its name there.
        types: of its arguments that are no constants, in order: `*i32`, `i32`.
        constants: its `tl.constexpr` arguments.
        warps: of a program.
        gluon: whether it is written in Gluon.
        unaligned: integer arguments that need not be multiples of 16.
    """

    module: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, int | bool | str]
    warps: int
    arch: int
    gluon: bool = False
    unaligned: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """What the code of a job holds.

    Attributes:
        shared: bytes of shared memory.
        stack: bytes of a thread that lie in memory: spilled registers, or arrays indexed at run time.
        registers: of a thread.
        loop: instructions of a warp in one turn of the longest loop, by name (`HMMA`, `LDG`).
        names: the full names of the tensor core instructions there.
    """

    shared: int
    stack: int
    registers: int
    loop: dict[str, int]
    names: list[str]

    def per_weight(self, weights: int) -> float:
        """Instruction slots for each dense weight, where a warp goes through `weights` in a turn."""
        return sum(self.loop.values()) * 32 / weights


def tools() -> Path:
    """The folder of the NVIDIA tools that come with triton, found without importing it."""
    spec = find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin"


def can_compile() -> bool:
    """Whether ptxas and cuobjdump run here."""
    try:
        done = [
            subprocess.run([tools() / name, "--version"], capture_output=True).returncode
            for name in ("ptxas", "cuobjdump")
        ]
    except OSError:
        return False
    return done == [0, 0]


def found(jobs: Sequence[Job], root: Path) -> list[Found]:
    """Compile `jobs` in another process, the same one for all calls."""
    process, errors = _compiler(root)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([asdict(job) for job in jobs]) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer.startswith("["):
        _end(process)
        _compiler.cache_clear()
        raise AssertionError(errors.read_text())
    return [Found(**one) for one in json.loads(answer)]


@cache
def _compiler(root: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that answers a line of jobs by a line of what it found, and the file of its messages.

    It ends with this one. Started once, for importing torch takes longer than most kernels.
    """
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"TRITON_CACHE_DIR": folder.name, "PYTHONPATH": os.pathsep.join(path)}
    errors = Path(folder.name) / "errors"
    with errors.open("w") as messages:
        process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            env=environment,
            text=True,
        )
    atexit.register(_end, process)
    return process, errors


def _end(process: subprocess.Popen[str]) -> None:
    """Nothing more to read: it finishes what it is at, and stops."""
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


def compile_one(job: Job) -> Found:
    """Compile, disassemble and count; only where triton compiles."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source_of = ASTSource
    if job.gluon:
        from triton.experimental.gluon._runtime import GluonASTSource as source_of
    kernel = getattr(import_module(f"llmprune.kernels.{job.module}"), job.kernel)
    types = job.types | dict.fromkeys(job.constants, "constexpr")
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name in job.types
        if name not in job.unaligned
    }
    compiled = triton.compile(
        source_of(kernel, types, job.constants, aligned),
        target=GPUTarget("cuda", job.arch, 32),
        options={"num_warps": job.warps},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        sass = _cuobjdump("-sass", cubin)
        usage = _cuobjdump("-res-usage", cubin)
    registers, stack = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0])
    loop = longest_loop(sass)
    names = sorted({name for name in loop if "MMA" in name})
    counts = Counter(name.split(".")[0] for name in loop)
    return Found(compiled.metadata.shared, stack, registers, dict(counts.most_common()), names)


def longest_loop(sass: str) -> list[str]:
    """The names of the instructions of the longest loop of a disassembly."""
    code = re.findall(
        r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^;]*?)\s*;", sass, re.MULTILINE
    )
    addresses = [int(address, 16) for address, _ in code]
    loops: list[list[str]] = [[]]
    for i, (_, text) in enumerate(code):
        target = re.search(
            r"^BRA\b[^?&]*?\b(0x[0-9a-f]+)\b", text
        )  # behind ? and & may be scheduling
        if target and int(target[1], 16) < addresses[i]:
            begin = addresses.index(int(target[1], 16))
            loops.append([line.split()[0] for _, line in code[begin : i + 1]])
    return max(loops, key=len)


def _cuobjdump(option: str, cubin: Path) -> str:
    return subprocess.run(
        [tools() / "cuobjdump", option, cubin], capture_output=True, text=True, check=True
    ).stdout


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps([asdict(compile_one(Job(**job))) for job in json.loads(line)]), flush=True)
