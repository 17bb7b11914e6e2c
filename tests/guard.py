"""What a reader does while it reads: which files it opens, what it runs, how much memory it asks for.

Python's own calls are seen by an audit hook, those of compiled code by inotify on a folder that nobody
may open. Memory is bounded by the system (RLIMIT_AS), so that a reservation counts that is never touched.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MARGIN = 64 * 2**20  # bytes that a reader may take beside what follows from the files
GROWTH = (
    40  # times their size: a bitmap byte stands for 8 weights of 4 bytes, and JSON grows as objects
)

_NEVER = (
    "subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "socket.connect", "socket.bind",
    "socket.getaddrinfo", "socket.sendto", "pickle.find_class", "webbrowser.open",
)  # fmt: skip
_CHANGES = (
    "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.chown", "os.truncate",
    "os.utime", "shutil.rmtree", "tempfile.mkstemp",
)  # fmt: skip
_LISTS = ("os.listdir", "os.scandir")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_SEEN = 0x3E7  # inotify: everything but closing


class Guard:
    """Watches what happens between `watching` and its end.

    Attributes:
        forbidden: a folder whose files nobody may open.
    """

    def __init__(self, forbidden: Path) -> None:
        self.forbidden = forbidden
        self._on = False
        self._found: list[str] = []
        self._read: tuple[str, ...] = ()
        self._written: tuple[str, ...] = ()
        python = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()}
        package = str(Path(__file__).resolve().parents[1])
        self._compiled_to = _real(
            f"{package}/llmprune/kernels/__pycache__"
        )  # numba keeps loops there
        self._own = tuple(_real(p) for p in (*python, package, "/dev/null", "/dev/urandom", "/sys"))
        self._own += (
            "/proc/self",
            f"/proc/{os.getpid()}",
            "/proc/cpuinfo",
            "/proc/meminfo",
            "/etc/localtime",
        )
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._notify = self._libc.inotify_init1(os.O_NONBLOCK)
        if self._notify < 0 or self._watch(forbidden) < 0:
            raise OSError(ctypes.get_errno(), "inotify does not work here")
        sys.addaudithook(self._hook)

    def _watch(self, folder: Path) -> int:
        return int(self._libc.inotify_add_watch(self._notify, os.fsencode(folder), _SEEN))

    @contextmanager
    def watching(self, folder: Path, scratch: Path) -> Iterator[list[str]]:
        """Gives what was done that may not be done; the list is whole when the body has ended.

        Args:
            folder: may be read.
            scratch: may be read and written.
        """
        self._found = found = []
        self._written = (_real(scratch), _real(tempfile.gettempdir()) + "/tmp", self._compiled_to)
        self._read = (_real(folder), *self._written, *self._own)
        before, size = len(sys.modules), _size(folder)
        self._compiled()  # what making the folder has touched is nobody's fault
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_mapped() + MARGIN + GROWTH * size, hard))
        self._on = True
        try:
            yield found
        finally:
            self._on = False
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
            found += self._compiled()
            found += [f"imports {name}" for name in self._foreign([*sys.modules][before:])]

    def _foreign(self, modules: list[str]) -> list[str]:
        files = {name: getattr(sys.modules[name], "__file__", None) for name in modules}
        return [n for n, f in files.items() if f and not _real(f).startswith(self._own)]

    def _compiled(self) -> list[str]:
        """The files that inotify has seen touched.

        The folder itself does not count: whoever looks through the machine's folders opens it.
        """
        found, at = [], 0
        with suppress(BlockingIOError):
            events = os.read(self._notify, 1 << 16)
            while at < len(events):
                *_, length = struct.unpack_from("iIII", events, at)
                name = events[at + 16 : at + 16 + length].rstrip(b"\x00").decode(errors="replace")
                found += [f"touches {self.forbidden.name}/{name}"] if name else []
                at += 16 + length
        return found

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event in _NEVER:
            self._found.append(f"{event} {str(args)[:100]}")
        elif event == "open":
            path, _, flags = args
            if not isinstance(path, int):
                allowed = self._written if (flags or 0) & _WRITES else self._read
                self._path(event, path, allowed)
        elif event in _LISTS:
            self._path(event, args[0] or ".", self._read)
        elif event in ("os.rename", "shutil.move"):
            for path, place in zip(args[:2], (*args[2:], -1, -1), strict=False):
                self._path(event, _at(path, place), self._written)
        elif event == "shutil.copyfile":
            self._path(event, args[0], self._read)
            self._path(event, args[1], self._written)
        elif event in _CHANGES:
            place = args[1] if event in ("os.remove", "os.rmdir") else -1
            self._path(
                event, _at(args[0], args[2] if event == "os.mkdir" else place), self._written
            )
        elif event == "exec":
            name = getattr(args[0], "co_filename", "<string>")
            if name.startswith(os.sep) and not _real(name).startswith(self._own):
                self._found.append(f"runs {name}")

    def _path(self, event: str, path: Any, allowed: tuple[str, ...]) -> None:
        if isinstance(path, int):
            return
        real = _real(path)
        if not real.startswith(allowed) or real.startswith(str(self.forbidden)):
            self._found.append(f"{event} {real[:100]}")


def _at(path: Any, place: Any) -> Any:
    """A path that is relative to an open folder."""
    if not isinstance(place, int) or place < 0 or isinstance(path, int):
        return path
    return os.path.join(os.readlink(f"/proc/self/fd/{place}"), os.fsdecode(path))  # noqa: PTH115, PTH118


def _real(path: Any) -> str:
    return os.path.realpath(os.fsdecode(path))


def _mapped() -> int:
    """Bytes of address space that this process has now."""
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123
        return int(file.read().split()[0]) * resource.getpagesize()


def _size(folder: Path) -> int:
    return sum(e.stat(follow_symlinks=False).st_size for e in os.scandir(folder))
