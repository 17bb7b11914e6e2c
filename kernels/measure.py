"""Measuring a kernel, expanding and the dense product, on a matrix of the shape that a layer has.

On the layer's own GPU: weights from memory and not from the L2 cache, by going through copies of them; many
calls in a CUDA graph, so that launching costs what it costs in one; the ways in turn, and medians. Values
are random; what a kernel gives is compared with the dense product before its time counts.

State: the logic is tested on a CPU with made-up times. **What takes the time has not run on a GPU.**
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from llmprune.kernels import gpu
from llmprune.kernels.packed import pack
from llmprune.kernels.product import times
from llmprune.kernels.table import FAIR, Matrix, Timing, counted, current, keep, most, tell

if TYPE_CHECKING:
    from llmprune.kernels.words import Measured, Words

SETTING = "LLMPRUNE_MEASURE"  # environment variable: 0 measures nothing but when `tune` is called
QUICK = (1, 8, 16, 64, 128)  # tokens that are measured of a matrix when it is first laid out
WARPS = (8, 4, 16)
_CACHES = 4  # times the L2 cache that the copies of a weight fill
_BLOCK = 2**22  # random weights, repeated to the size of the matrix
FAILED: dict[Matrix, str] = {}
"""Matrices for which a kernel must not be used in this process, and why."""
LEFT_OUT: dict[Matrix, str] = {}
"""Matrices that could not be measured in this process, and why."""


@dataclass(frozen=True, eq=False)
class Way:
    """One way to multiply."""

    name: str  # kernel, expand or dense
    tokens: int
    runs: Sequence[Callable[[], Tensor]]  # for each copy of the weight
    warps: int | None = None
    split: int | None = None


Timer = Callable[[torch.device, Sequence[Way]], list[float]]
"""Microseconds of a call of each way."""
Launch = tuple[int | None, int | None]


class Unusable(RuntimeError):
    """A kernel fails on a matrix, or gives wrong results."""


def quick_timer(device: torch.device, ways: Sequence[Way]) -> list[float]:
    """In a part of a second, for layers that are laid out without having been measured."""
    return _on_gpu(device, ways, calls=10, rounds=7)


def slow_timer(device: torch.device, ways: Sequence[Way]) -> list[float]:
    """As for a benchmark."""
    return _on_gpu(device, ways, calls=20, rounds=30)


def first(
    kernel: Measured[Any], device: torch.device, sides: tuple[int, int], dtype: torch.dtype
) -> None:
    """Measure a matrix (out, in) quickly if that has not been done, and may be now; keep it, and say so."""
    matrix = kernel.matrix(device, sides, dtype)
    if matrix in current().timings or matrix in FAILED or matrix in LEFT_OUT:
        return
    if os.environ.get(SETTING) == "0" or gpu.occupied(device):
        return
    begun = time.perf_counter()
    found = attempt(matrix, lambda: _first(kernel, device, sides, dtype))
    if found is None:
        return
    keep(matrix, found)
    gains = ", ".join(f"{t.gain:.2f}x at {t.tokens}" for t in found)
    seconds = time.perf_counter() - begun
    tell(
        f"measured {matrix} in {seconds:.1f} s: {gains} tokens, of dense ({SETTING}=0 forbids this)"
    )


def _first(
    kernel: Measured[Any], device: torch.device, sides: tuple[int, int], dtype: torch.dtype
) -> list[Timing]:
    """By the kernel's own choice of warps and split; only what would be held dense is given the others."""
    bench, found = Bench(kernel, device, sides, dtype), list[Timing]()
    for tokens in QUICK:
        timing = bench.time(tokens, [(None, None)], quick_timer)
        if tokens <= most() and timing.gain < FAIR and timing.kernel_us is not None:
            timing = bench.time(tokens, bench.launches(), quick_timer)
        found.append(timing)
    return found


def attempt(matrix: Matrix, job: Callable[[], list[Timing]]) -> list[Timing] | None:
    """What `job` measures; where it cannot, None, and the reason is kept and told."""
    try:
        return job()
    except Unusable as error:
        FAILED[matrix] = str(error)
        tell(f"{matrix} is not used: {error}")
    except RuntimeError as error:
        LEFT_OUT[matrix] = gpu.said(error)
        tell(f"{matrix} could not be measured: {gpu.said(error)}")
    finally:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()  # graphs and copies were large
    return None


def left_out(matrix: Matrix) -> str:
    """Why a matrix could not be measured, to be put behind "not measured"."""
    return f" ({LEFT_OUT[matrix]})" if matrix in LEFT_OUT else ""


class Bench:
    """Copies of a random matrix, dense and laid out, on a device."""

    def __init__(
        self,
        kernel: Measured[Any],
        device: torch.device,
        sides: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        """As many as do not fit in the L2 cache, if there is memory for them.

        Raises:
            Unusable: when the layout does not expand to the matrix.
        """
        self.kernel, self.device, self.sides, self.dtype = kernel, device, sides, dtype
        with gpu.plainly(device):
            dense, words = kernel.sample(device, sides, dtype)
            given = _tried(lambda: kernel.dense(words, sides, dtype, False))
            if not torch.equal(given, dense):
                raise Unusable("its layout does not expand to what was laid out")
            del given
            self.dense, self.words = _copies(dense), _copies(words)

    def launches(self) -> list[Launch]:
        """All that may be worth trying, the kernel's own choice first."""
        tries = [(w, s) for w in WARPS for s in self.kernel.splits(self.sides, w)]
        return [(None, None), *tries]

    def time(self, tokens: int, launches: Sequence[Launch], timer: Timer) -> Timing:
        """Measure so many tokens, the kernel by the best of `launches`.

        Raises:
            Unusable: when a result is not that of the dense product, or the first of `launches` fails.
        """
        with gpu.plainly(self.device):
            random = torch.Generator(self.device).manual_seed(tokens)
            x = torch.randn(tokens, self.sides[1], generator=random, device=self.device)
            ways = list(self._ways(x.to(self.dtype), launches))
            micros = timer(self.device, ways)
        found = dict(zip(ways, micros, strict=True))
        best = min(
            (way for way in ways if way.name == "kernel"), key=found.__getitem__, default=None
        )
        (expand,), (dense,) = (
            [us for way, us in found.items() if way.name == name] for name in ("expand", "dense")
        )
        if best is None:
            return Timing(tokens, None, None, None, expand, dense)
        return Timing(tokens, found[best], best.warps, best.split, expand, dense)

    def _ways(self, x: Tensor, launches: Sequence[Launch]) -> Iterator[Way]:
        """All ways to multiply by x that give what the dense product gives."""
        kernel, sides, tokens = self.kernel, self.sides, len(x)
        dense = Way("dense", tokens, [partial(linear, x, weight) for weight in self.dense])
        expected = dense.runs[0]()
        yield dense
        whole = [partial(kernel.dense, words, sides, self.dtype, False) for words in self.words]
        expand = Way("expand", tokens, [partial(times, x, w, None, sides, False) for w in whole])
        yield _checked(expand, expected)
        for i, (warps, split) in enumerate(launches if tokens <= kernel.most else ()):
            more = None, sides, warps, split
            runs = [partial(kernel.pieces, x, words, *more) for words in self.words]
            try:
                way = _checked(Way("kernel", tokens, runs, warps, split), expected)
            except Refused:
                if i == 0:
                    raise
                continue
            yield way


class Refused(Unusable):
    """A launch fails: it asks for more than the GPU has, or does not compile."""


def _tried(run: Callable[[], Tensor]) -> Tensor:
    try:
        return run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if type(error).__module__.startswith("triton") or isinstance(error, RuntimeError):
            raise Refused(f"does not run: {gpu.said(error)}") from error
        raise


def _checked(way: Way, expected: Tensor) -> Way:
    """The same, once its result is that of the dense product to a few roundings."""
    y, wide = _tried(way.runs[0]).float(), expected.float()
    allowed = wide.abs() * 4 * torch.finfo(expected.dtype).eps + 4e-3 * wide.abs().max()
    if y.shape != wide.shape or not bool(((y - wide).abs() <= allowed).all()):
        raise Unusable(f"gives wrong results for {counted(way.tokens)} ({way.name})")
    return way


def random_words(
    kernel: Words, device: torch.device, sides: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Dense [out, in] and its words: a block of rows, over and over."""
    rows, columns = sides
    step = 32 * max(1, min(-(-rows // 32), _BLOCK // columns // 32))
    random = torch.Generator(device).manual_seed(0)
    shape = (step, columns // kernel.m, kernel.m)
    groups = torch.randn(shape, generator=random, device=device)
    least = groups.abs().topk(kernel.m - kernel.n, dim=-1, largest=False).indices
    block = groups.scatter_(-1, least, 0).reshape(step, columns).to(dtype)
    words = kernel.lay(pack(block))
    repeats, of_rows = -(-rows // step), len(words) * 32 // step
    ones = (1,) * (words.dim() - 1)
    words = words.repeat(repeats, *ones)[: -(-rows // 32) * of_rows]
    return block.repeat(repeats, 1)[:rows], words


def _copies(held: Any) -> list[Any]:
    """Tensor or list, and as many copies as fill the L2 cache, or a fourth of the free memory."""
    parts = held if isinstance(held, list) else [held]
    device, size = parts[0].device, sum(part.nbytes for part in parts)
    if device.type != "cuda":
        return [held]
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    room = min(_CACHES * cache, gpu.free(device)[0] // 4)
    again = ([part.clone() for part in parts] for _ in range(room // size))
    return [held, *(more if isinstance(held, list) else more[0] for more in again)]


def _on_gpu(device: torch.device, ways: Sequence[Way], calls: int, rounds: int) -> list[float]:
    """The median of so many replays of a graph of each way, in turn."""
    here, aside = torch.cuda.current_stream(device), _aside(device)
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        replays = [_recorded(way, max(calls, len(way.runs))) for way in ways]
        times: list[list[float]] = [[] for _ in ways]
        for _ in range(rounds):
            for found, replay in zip(times, replays, strict=True):
                found.append(replay())
    here.wait_stream(aside)
    return [statistics.median(found) for found in times]


@cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """One stream for all that is measured on a device: cuBLAS keeps memory for each that it has seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _recorded(way: Way, calls: int) -> Callable[[], float]:
    """A function that replays a graph of so many calls; gives the microseconds of one."""
    for run in way.runs[:2]:
        run()
    graph = torch.cuda.CUDAGraph()
    # torch's own stream for this is of the GPU that was first to need one; other threads may go on meanwhile
    stream = torch.cuda.current_stream()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for i in range(calls):
            way.runs[i % len(way.runs)]()
    begin, end = (_event() for _ in range(2))

    def replay() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / calls

    replay()
    return replay


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
