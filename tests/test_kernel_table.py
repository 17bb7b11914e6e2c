"""Measurements: the table, its files, what is taken from it, and measuring itself with made-up times."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETED
from kernel_harness import assert_as_good_as_dense, assert_within, nm_matrix, truth
from torch import Tensor

from llmprune.kernels import choice, dense, gpu, held, measure, table, tuning, words
from llmprune.kernels.held import S24_MMA, gemv
from llmprune.kernels.interface import Case
from llmprune.kernels.measure import Way
from llmprune.kernels.packed import pack
from llmprune.kernels.table import Matrix, Table, Timing, read, write

CPU = torch.device("cpu")
MATRIX = Matrix("NVIDIA H200", "9.0", "s24_mma", 1, "2:4", 4096, 14336, "bfloat16")
CASE = Case(
    (64, 128), 4096, torch.bfloat16, torch.device("cuda", 0), "2:4", "rows", False, 1, False
)


def timing(tokens: int, kernel: float | None, dense: float = 10.0, expand: float = 30.0) -> Timing:
    return Timing(tokens, kernel, None, None, expand, dense)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No table but what a test makes, and measuring allowed."""
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "shipped")
    monkeypatch.delenv(measure.SETTING)
    monkeypatch.delenv(table.SETTING, raising=False)
    monkeypatch.setattr(measure, "FAILED", {})
    monkeypatch.setattr(measure, "LEFT_OUT", {})
    words._matrix.cache_clear()
    table.current.cache_clear()
    yield
    words._matrix.cache_clear()
    table.current.cache_clear()


def anew() -> Table:
    """The table as the next process finds it."""
    table.current.cache_clear()
    return table.current()


# The table


def test_a_number_of_tokens_takes_the_next_that_was_measured() -> None:
    known = Table()
    known.add(MATRIX, [timing(32, 3), timing(1, 1), timing(8, 2)])
    found = {tokens: known.at(MATRIX, tokens) for tokens in (1, 2, 8, 9, 32, 33)}
    assert {k: v and v.tokens for k, v in found.items()} == {
        1: 1, 2: 8, 8: 8, 9: 32, 32: 32, 33: None,
    }  # fmt: skip
    assert known.at(replace(MATRIX, revision=2), 1) is None


@pytest.mark.parametrize(
    ("timings", "worst"),
    [
        ([timing(1, 5), timing(8, 10.2)], None),  # 0.98
        ([timing(1, 5), timing(8, 10.3)], 8),
        ([timing(1, 12), timing(8, 11), timing(16, 5)], 1),
        ([timing(1, 11, expand=9)], None),  # then it is expanded
        ([timing(1, 5), timing(16, None)], 16),  # what it does not take is expanded, which is slow
        ([timing(1, 5), timing(65, 50)], None),
        ([], None),
    ],
)
def test_slower_than_dense_anywhere_is_slow(timings: list[Timing], worst: int | None) -> None:
    known = Table()
    known.add(MATRIX, timings)
    slow = known.slow(MATRIX)
    assert (slow and slow.tokens) == worst


def test_the_user_says_up_to_how_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Table()
    known.add(MATRIX, [timing(1, 5), timing(8, 9), timing(16, 20), timing(100, 30)])
    for said, worst in [("8", None), ("15", None), ("16", 16), ("", 16), ("100", 100)]:
        monkeypatch.setenv(table.SETTING, said)
        slow = known.slow(MATRIX)
        assert (slow and slow.tokens) == worst
    for said in ("0", "-1", "many", "1.5"):
        monkeypatch.setenv(table.SETTING, said)
        with pytest.raises(ValueError, match=f"LLMPRUNE_TOKENS is '{said}'"):
            known.slow(MATRIX)


def test_it_is_printed_with_its_losses() -> None:
    known = Table(notes=["left out: this"])
    other = replace(MATRIX, kernel="nm_gemv 4:8", pattern="4:8")
    known.add(MATRIX, [replace(timing(1, 5.04), warps=4, split=2), timing(64, 8)])
    known.add(other, [timing(1, 5), timing(16, None)])
    lines = str(known).splitlines()
    assert lines[0].startswith("NVIDIA H200: microseconds")
    assert lines[2] == "s24_mma 4096 x 14336 bfloat16: used"
    assert lines[4].split() == ["1", "5.0", "30.0", "10.0", "1.98", "4,", "2"]
    assert lines[5].split() == ["64", "8.0", "30.0", "10.0", "1.25", "default,", "default"]
    assert lines[7] == "nm_gemv 4:8 4096 x 14336 bfloat16: dense instead: slower at 16 tokens"
    assert lines[10].split() == ["16", "-", "30.0", "10.0", "0.33"]
    assert lines[-1] == "left out: this"


# Files


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    known = Table()
    known.add(MATRIX, [replace(timing(1, 5.04), warps=4, split=2), timing(64, None)])
    known.add(replace(MATRIX, rows=1), [timing(1, 2)])
    path = tmp_path / "a folder" / "table.json"
    write(known, path)
    assert read(path).timings == known.timings
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]


def row(**change: object) -> dict[str, object]:
    plain = dict.fromkeys(("gpu", "capability", "kernel", "pattern", "dtype"), "a")
    plain |= dict.fromkeys(("revision", "rows", "columns", "tokens", "warps", "split"), 1)
    plain |= dict.fromkeys(("kernel_us", "expand_us", "dense_us"), 1.5)
    return plain | change


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property"),
        ("\x00", "Expecting value"),
        ("[]", "no table of measurements"),
        ('{"format": 1}', "no table of measurements"),
        ('{"format": 2, "rows": []}', "format 2, this version reads 1"),
        ([[]], "not the fields gpu, capability"),
        ([row(more=1)], "not the fields"),
        ([row(dense_us=0)], "dense_us is '0', which is no float"),
        ([row(dense_us=float("nan"))], "dense_us is 'nan'"),
        ([row(expand_us=None)], "expand_us is 'None'"),
        ([row(tokens=1.0)], "tokens is '1.0', which is no int"),
        ([row(tokens=True)], "tokens is 'True'"),
        ([row(gpu="a\nb")], "gpu is"),
        ([row(warps=3)], "warps is 3, which is no power of two"),
    ],
)
def test_a_file_that_is_no_table_is_left_out_and_told(
    text: str | list[object], says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = table.cache_folder() / "a.json"
    path.parent.mkdir(parents=True)
    body = text if isinstance(text, str) else json.dumps({"format": 1, "rows": text})
    path.write_text(body)
    with pytest.raises(ValueError, match=says.split("'")[0]):
        read(path)
    assert anew().timings == {}
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"llmprune: {path} is left out: ")
    assert says in line
    table.keep(MATRIX, [timing(1, 5)])
    assert list(anew().timings) == [MATRIX]


def test_the_cache_goes_before_what_is_shipped() -> None:
    shipped = Table()
    shipped.add(MATRIX, [timing(1, 5), timing(8, 5)])
    shipped.add(replace(MATRIX, rows=1), [timing(1, 6)])
    write(shipped, table.SHIPPED / "h200.json")
    assert anew().timings == shipped.timings
    table.keep(MATRIX, [timing(1, 7)])
    for found in (table.current(), anew()):
        assert found.timings[MATRIX] == {1: timing(1, 7)}
        assert len(found.timings) == 2


def test_a_cache_that_cannot_be_written_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "file"))
    table.keep(MATRIX, [timing(1, 5)])
    assert table.current().at(MATRIX, 1) == timing(1, 5)
    assert capfd.readouterr().err.startswith("llmprune: measurements are not kept: ")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert table.cache_folder() == tmp_path / "cache" / "kernels"
    monkeypatch.delenv("LLMPRUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert table.cache_folder() == tmp_path / "llmprune" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert table.cache_folder() == Path.home() / ".cache" / "llmprune" / "kernels"


def test_processes_that_write_at_once_do_not_meet(root: Path) -> None:
    code = (
        "import sys; from dataclasses import replace; from llmprune.kernels import table;"
        f"m = table.{MATRIX!r}; t = table.{timing(1, 5)!r};"
        "[table.keep(replace(m, rows=r), [t]) for r in range(int(sys.argv[1]), 20)]"
    )
    command = [sys.executable, "-c", code.replace("table.Matrix(", "table.Matrix(")]
    running = [subprocess.Popen([*command, str(first)], cwd=root) for first in (1, 5, 9)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert sorted(m.rows for m in anew().timings) == list(range(1, 20))


# What is taken from it


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were two kinds of GPU on which all kernels pass their trials."""
    monkeypatch.setattr(held.S24, "unavailable", lambda self, device: None)
    monkeypatch.setattr(held.nm_gemv, "unavailable", lambda device, n, m: None)
    monkeypatch.setattr(gpu, "identity", lambda device: (f"GPU {device.index}", "9.0"))
    monkeypatch.setattr(gpu, "missing", lambda device: "no GPU in truth")
    monkeypatch.setattr(gpu, "free", lambda device: (10**9, 10**9))
    monkeypatch.setattr(gpu, "occupied", lambda device: False)
    monkeypatch.setenv(measure.SETTING, "0")


def matrix_of(case: Case, kernel: words.Words = S24_MMA) -> Matrix:
    return kernel.matrix(case.device, case.sides, case.dtype)


@pytest.mark.usefixtures("two_gpus")
def test_what_is_slower_is_held_dense_on_that_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(CASE, device=torch.device("cuda", 1))
    assert choice.choose(CASE).name == "s24_mma"  # not measured
    table.keep(matrix_of(CASE), [timing(1, 5), timing(8, 20)])
    table.keep(matrix_of(CASE, gemv(2, 4)), [timing(1, 5), timing(16, None)])
    assert [choice.choose(c).name for c in (CASE, other)] == ["dense", "s24_mma"]
    assert S24_MMA.refuses(CASE) == "measured slower than dense at 8 tokens (0.50x)"
    told = choice.explain(type("L", (), {"case": lambda _, t: CASE, "kernel": "dense"})(), 1)
    assert told.refused["s24_mma"] == "measured slower than dense at 8 tokens (0.50x)"
    assert told.refused["nm_gemv 2:4"] == "measured slower than dense at 16 tokens (0.33x)"
    table.keep(matrix_of(CASE, gemv(2, 4)), [timing(1, 5), timing(8, 9)])
    assert choice.choose(CASE).name == "nm_gemv 2:4"
    table.keep(matrix_of(CASE, gemv(2, 4)), [timing(1, 11)])
    monkeypatch.setattr(gpu, "free", lambda device: (10**8 + 64 * 128 * 2, 10**9))
    assert choice.choose(CASE).name == "expand"
    assert "a tenth" in str(choice.DENSE.refuses(CASE))
    choice.prefer("s24_mma")
    try:
        assert choice.choose(CASE).name == "s24_mma"
    finally:
        choice.prefer(None)


@pytest.mark.usefixtures("two_gpus")
def test_explain_says_what_was_measured() -> None:
    matrix = matrix_of(CASE)
    assert S24_MMA.route(replace(CASE, tokens=3)) == "by the kernel; not measured"
    measure.LEFT_OUT[matrix] = "CUDA out of memory"
    assert S24_MMA.route(CASE) == "by the kernel; not measured (CUDA out of memory)"
    table.keep(matrix, [timing(4, 5), timing(64, 40)])
    said = "by the kernel; measured: 5.0 us, dense 10.0 us at 4 tokens"
    assert S24_MMA.route(replace(CASE, tokens=3)) == said
    many = S24_MMA.route(replace(CASE, tokens=64))
    assert many.startswith("expanded into scratch memory by plain torch (no GPU in truth), then")
    assert many.endswith("measured: 30.0 us, dense 10.0 us at 64 tokens")
    assert "measured" not in S24_MMA.route(replace(CASE, tokens=257))


@pytest.mark.skipif(not INTERPRETED, reason="made-up times of a CPU")
def test_a_product_goes_the_way_that_was_quickest(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, weight = gemv(2, 4), nm_matrix(40, 128, 2, 4, torch.bfloat16)
    layout, asked = kernel.prepare(pack(weight)), list[object]()
    plain = held.Gemv.product

    def product(self: held.Gemv, x: Tensor, *rest: object) -> Tensor:
        asked.append((len(x), *rest[3:]))
        return plain(self, x, *rest)

    monkeypatch.setattr(held.Gemv, "product", product)
    matrix = kernel.matrix(CPU, (40, 128), torch.bfloat16)
    measured = [replace(timing(2, 5), warps=2, split=2), timing(4, 31), timing(16, None)]
    table.keep(matrix, [*measured, replace(timing(20, 9), warps=1, split=1)])
    for tokens in (1, 2, 3, 5, 9, 18, 21):
        x = torch.randn(tokens, 128).bfloat16()
        y = kernel.matmul(x, layout, None, (40, 128), False)
        assert_within(y, *truth(x, weight))
    # 1 and 2 as measured for 2; 3 as for 4, expanded; 5 by default, as 16 says nothing of the kernel; 9 is
    # more than it takes unmeasured; 18 a piece at a time, as 20; 21 was not measured
    assert asked == [(1, 2, 2), (2, 2, 2), (5, None, None), (8, 1, 1), (8, 1, 1), (2, 1, 1)]


# Measuring


class MadeUp:
    """Times by way, tokens, warps and split; and which were asked for."""

    def __init__(self, micros: Callable[[Way], float]) -> None:
        self.micros, self.asked = micros, list[Way]()

    def __call__(self, device: torch.device, ways: Sequence[Way]) -> list[float]:
        self.asked += ways
        return [self.micros(way) for way in ways]


def usual(way: Way) -> float:
    """Four warps and a split in two are best."""
    if way.name == "kernel":
        return 5.0 + abs((way.warps or 8) - 4) + abs((way.split or 1) - 2)
    return {"expand": 30.0, "dense": 10.0}[way.name]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Case:
    """nm_gemv is allowed on this CPU, where it is interpreted."""
    if not INTERPRETED:
        pytest.skip("made-up times of a CPU")
    monkeypatch.setattr(held.Gemv, "unfit", lambda self, case: self._misfit(case))
    monkeypatch.setattr(measure, "QUICK", (1, 33))
    return replace(CASE, device=CPU, shape=(40, 512))


def test_the_first_layout_of_a_matrix_measures_it(
    on_cpu: Case, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    timer = MadeUp(usual)
    monkeypatch.setattr(measure, "quick_timer", timer)
    assert choice.choose(on_cpu).name == "dense"  # expanded at 33 tokens
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("llmprune: measured nm_gemv 2:4 40 x 512 bfloat16 in ")
    assert "1.00x at 1, 0.33x at 33 tokens, of dense" in line
    asked = [(way.name, way.tokens, way.warps) for way in timer.asked]
    assert asked == [
        ("dense", 1, None),
        ("expand", 1, None),
        ("kernel", 1, None),
        ("dense", 33, None),
        ("expand", 33, None),
    ]
    matrix = gemv(2, 4).matrix(CPU, (40, 512), torch.bfloat16)
    assert anew().timings[matrix] == {1: timing(1, 10.0), 33: timing(33, None)}
    choice.choose(on_cpu)
    assert len(timer.asked) == 5
    assert capfd.readouterr().err == ""


def test_a_first_layout_is_not_held_dense_for_a_bad_guess_of_warps(
    on_cpu: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_by_default = {None: 20.0, 4: 7.0}
    micros = {"expand": 30.0, "dense": 10.0}
    timer = MadeUp(lambda way: micros.get(way.name) or slow_by_default.get(way.warps, 25.0))
    monkeypatch.setattr(measure, "quick_timer", timer)
    monkeypatch.setattr(measure, "QUICK", (1, 128))
    assert choice.choose(on_cpu).name == "nm_gemv 2:4"
    timings = anew().timings[gemv(2, 4).matrix(CPU, (40, 512), torch.bfloat16)]
    assert (timings[1].kernel_us, timings[1].warps) == (7.0, 4)
    assert {way.warps for way in timer.asked if way.tokens == 128} == {None}


@pytest.mark.parametrize("why", ["switched off", "a graph is recorded"])
def test_nothing_is_measured_when_it_must_not_be(
    why: str, on_cpu: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = MadeUp(usual)
    monkeypatch.setattr(measure, "quick_timer", timer)
    if why == "switched off":
        monkeypatch.setenv(measure.SETTING, "0")
    else:
        monkeypatch.setattr(gpu, "occupied", lambda device: True)
    assert choice.choose(on_cpu).name == "nm_gemv 2:4"
    assert not timer.asked
    assert gemv(2, 4).route(on_cpu) == "by the kernel; not measured"


def test_a_kernel_that_is_wrong_on_a_matrix_is_not_used_for_it(
    on_cpu: Case, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    timer, plain = MadeUp(usual), held.Gemv.product
    monkeypatch.setattr(measure, "quick_timer", timer)
    monkeypatch.setattr(held.Gemv, "product", lambda *a: plain(*a) * 1.1)
    assert choice.choose(on_cpu).name == "dense"
    assert not timer.asked
    assert gemv(2, 4).slow(on_cpu) == "gives wrong results for 1 token (kernel)"
    assert "is not used: gives wrong results" in capfd.readouterr().err
    assert anew().timings == {}


def test_a_kernel_that_fails_on_a_matrix_is_not_used_for_it(
    on_cpu: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def product(*args: object) -> Tensor:
        raise RuntimeError("Triton Error [CUDA]: invalid argument\nmore")

    monkeypatch.setattr(held.Gemv, "product", product)
    assert choice.choose(on_cpu).name == "dense"
    why = "does not run: Triton Error [CUDA]: invalid argument"
    assert gemv(2, 4).slow(on_cpu) == why


def test_a_layout_that_does_not_expand_is_not_used(
    on_cpu: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = held.Gemv.dense
    monkeypatch.setattr(held.Gemv, "dense", lambda *a: plain(*a).flip(0))
    assert choice.choose(on_cpu).name == "dense"
    assert "does not expand" in str(gemv(2, 4).slow(on_cpu))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("busy")]
)
def test_what_cannot_be_measured_is_used_unmeasured(
    error: RuntimeError,
    on_cpu: Case,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def timer(device: torch.device, ways: Sequence[Way]) -> list[float]:
        raise error

    monkeypatch.setattr(measure, "quick_timer", timer)
    for _ in range(2):
        assert choice.choose(on_cpu).name == "nm_gemv 2:4"
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith(f"could not be measured: {error}")
    assert gemv(2, 4).route(on_cpu).endswith(f"not measured ({error})")


def test_tune_tries_settings_and_keeps_the_best(
    on_cpu: Case, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "WARPS", (2, 4))
    timer, on_cpu = MadeUp(usual), replace(on_cpu, shape=(32, 256))
    plain, odd = replace(on_cpu), replace(on_cpu, pattern="unstructured", kept=3)
    monkeypatch.setattr(held.S24, "unfit", lambda self, case: "is old")
    found = tuning.measured([plain, plain, odd], [1, 33], 60, timer, lambda: 0.0)
    matrix = gemv(2, 4).matrix(CPU, (32, 256), torch.bfloat16)
    launches = [(w.warps, w.split) for w in timer.asked if w.name == "kernel"]
    assert launches == [
        (None, None), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)
    ]  # fmt: skip
    assert found.timings[matrix][1] == Timing(1, 5.0, 4, 2, 30.0, 10.0)
    assert found.timings[matrix][33].kernel_us is None
    assert anew().timings == found.timings
    assert "dense instead: slower at 33 tokens" in str(found)
    assert "not measured: 32 x 256 unstructured: s24_mma is old" in str(found)


def test_a_bar_tells_of_progress_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for terminal in (False, True):
        monkeypatch.setattr(tuning.sys.stderr, "isatty", lambda terminal=terminal: terminal)
        bar = tuning._Bar(4)
        bar.show(1, "a matrix, 8 tokens")
        bar.done()
        told = capsys.readouterr().err
        assert ("[#####...............] 1/4 a matrix, 8 tokens" in told) == terminal
        assert bool(told) == terminal


@pytest.mark.parametrize(("looks", "tokens"), [(2, [1]), (3, [1, 2]), (4, [1, 2, 4])])
def test_tune_stops_in_time(looks: int, tokens: list[int], on_cpu: Case) -> None:
    """The clock is looked at before a matrix, and before each further number of tokens."""
    now = iter([0.0] * looks + [100.0] * 10)
    small, wide = replace(on_cpu, shape=(32, 64)), replace(on_cpu, shape=(32, 1024))
    found = tuning.measured([small, wide], [1, 2, 4], 10, MadeUp(usual), lambda: next(now))
    (matrix,) = found.timings
    assert (matrix.columns, list(found.timings[matrix])) == (64, tokens)
    assert found.notes[-1] == "left out after 10 s: nm_gemv 2:4 32 x 1024 bfloat16"
    if len(tokens) < 3:
        count = 2 * len(tokens)
        said = f"left out after 10 s: nm_gemv 2:4 32 x 64 bfloat16 from {count} tokens on"
        assert found.notes[0] == said


def test_tune_needs_a_gpu_and_packed_layers() -> None:
    import llmprune
    from llmprune.kernels import tune as asked

    assert asked is tuning.tune
    assert llmprune.kernels.prefer is choice.prefer
    with pytest.raises(ValueError, match="needs packed layers on an NVIDIA GPU"):
        asked(torch.nn.Linear(4, 4))
    layer = llmprune.SparseLinear.from_linear(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match="NVIDIA GPU"):
        asked(torch.nn.Sequential(layer))
    for tokens in ([], [0], [1.5]):
        with pytest.raises(ValueError, match="tokens are"):
            asked(layer, tokens=tokens)


def test_copies_fill_the_cache_as_far_as_there_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Props:
        L2_cache_size = 1000

    class Weight:
        device, nbytes = torch.device("cuda", 0), 300

        def clone(self) -> Weight:
            return self

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Props)
    monkeypatch.setattr(gpu, "free", lambda device: (10**6, 10**6))
    assert len(measure._copies(Weight())) == 1 + 13
    monkeypatch.setattr(gpu, "free", lambda device: (2400, 10**6))
    assert len(measure._copies(Weight())) == 1 + 2


@pytest.mark.parametrize("kernel", [gemv(4, 8), S24_MMA], ids=lambda k: k.name)
def test_a_random_matrix_is_laid_out_as_it_is(
    kernel: words.Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of rows that are repeated, also where rows are left over."""
    monkeypatch.setattr(measure, "_BLOCK", 64 * 64)
    for rows in (1, 32, 33, 64, 150):
        weight, laid = measure._random(kernel, CPU, (rows, 64), torch.float16)
        assert weight.shape == (rows, 64)
        assert laid.shape == kernel.lay(pack(weight)).shape
        assert torch.equal(kernel.dense(laid, (rows, 64), torch.float16, False), weight)
        assert int((weight != 0).sum()) == rows * 32


def test_dense_needs_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "free", lambda device: (1000, 2000))
    small = replace(CASE, shape=(10, 32))
    assert dense._fits(small)
    assert not dense._fits(replace(CASE, shape=(12, 32)))


@pytest.mark.gpu
def test_measuring_on_a_gpu_gives_times() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    kernel = S24_MMA if S24_MMA.unavailable(device) is None else gemv(2, 4)
    begun = torch.cuda.memory_allocated()
    bench = measure.Bench(kernel, device, (4096, 4096), torch.bfloat16)
    found = bench.time(8, bench.launches()[:2], measure.quick_timer)
    assert found.kernel_us is not None
    assert 0 < found.kernel_us < 10_000
    assert found.dense_us < found.expand_us
    del bench
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= begun + 2**27  # what cuBLAS keeps


@pytest.mark.gpu
def test_tune_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a layer that is laid out; then its kernel is used, or dense, as the table says."""
    import llmprune
    from llmprune.kernels import prepare

    weight = nm_matrix(1024, 2048, 2, 4, torch.bfloat16)
    linear = torch.nn.Linear(2048, 1024, bias=False, dtype=torch.bfloat16)
    linear.weight = torch.nn.Parameter(weight)
    model = torch.nn.Sequential(llmprune.SparseLinear.from_linear(linear)).to("cuda")
    found = tuning.tune(model, tokens=[1, 65], seconds=60)
    assert str(found) == capsys.readouterr().out.rstrip("\n")
    assert found.timings == anew().timings
    (kernel,) = prepare(model)
    slow = {matrix.kernel for matrix in found.timings if found.slow(matrix)}
    assert kernel not in slow
    assert kernel != "dense" or slow
    for tokens in (1, 65):
        x = torch.randn(tokens, 2048, device="cuda").bfloat16()
        assert_as_good_as_dense(model(x), x, weight.to("cuda"))
        assert "measured" in choice.explain(model[0], tokens).route or kernel == "dense"


@pytest.mark.gpu
def test_the_first_layout_on_a_gpu_measures(capfd: pytest.CaptureFixture[str]) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    case = replace(CASE, device=device, shape=(1024, 2048))
    kernel = choice.choose(case)
    assert ": measured " in capfd.readouterr().err
    assert table.current().timings
    assert not measure.FAILED
    assert not measure.LEFT_OUT
    assert choice.choose(case) is kernel
    assert capfd.readouterr().err == ""
