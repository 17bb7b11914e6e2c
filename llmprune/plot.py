"""One picture of a run: sparsity, and what the pruning did to each block, by kind of matrix."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.errors import ConfigError
from llmprune.report import LayerReport, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which the colour-blind can tell apart; yellow is too pale on white
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = "osD^vPX*"


def check(path: Path) -> None:
    """Whether `plot` will be able to draw and to write there, before the work.

    Raises:
        ConfigError: matplotlib is not installed, it knows no such file type, or the folder is not
            there or cannot be written.
    """
    _figure_type()
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ConfigError(
            f"a picture cannot be written as {path.name!r}; use one of .{', .'.join(sorted(known))}"
        )
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file in it, such as {path / 'run.png'}")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}; choose another folder"
        ) from error


def plot(report: Report, path: Path) -> None:
    """Draw `report` to `path`; the suffix chooses the format.

    Above, the sparsity of each block, below the mean output error over its matrices of one kind
    (the error of the weights where no data was seen). Matrices outside of the blocks come last.

    Raises:
        ConfigError: as `check` does, or when the report holds no matrix.
    """
    check(path)
    if not report.layers:
        raise ConfigError("there is nothing to draw: the report holds no matrix")
    kinds = _kinds(report)
    figure = _figure_type()(figsize=(10, 6.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    _lines(above, kinds, lambda layer: 100 * layer.sparsity)
    _merge(above, report)
    above.set(ylabel="sparsity, %", ylim=(0, 100), yticks=range(0, 101, 25))
    measured = any(layer.output_error is not None for layer in report.layers)
    _lines(below, kinds, (lambda layer: layer.output_error) if measured else _weight_error)
    below.set(
        xlabel="block",
        ylabel="relative output error\n‖X(W - B)ᵀ‖² / ‖XWᵀ‖²"
        if measured
        else "relative weight error\n‖W - B‖² / ‖W‖²",
    )
    _scale(below)
    _ticks(below, kinds)
    for axes in (above, below):
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = below.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(_title(report), fontsize=11)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}; choose another folder"
        ) from error


def _figure_type() -> Any:
    """The Figure of matplotlib, which draws without pyplot and its global state.

    Raises:
        ConfigError: when matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            'a picture needs matplotlib, which is not installed: pip install "llmprune[plot]"'
        ) from error
    return Figure


def _kinds(report: Report) -> dict[str, dict[int | None, list[LayerReport]]]:
    """By kind of matrix and block (None: outside of them), in the order of the report."""
    kinds: dict[str, dict[int | None, list[LayerReport]]] = {}
    for layer in report.layers:
        inside = re.search(r"\.(\d+)\.(.+)", layer.name)
        kind = re.sub(r"\.\d+(?=\.|$)", "", inside[2] if inside else layer.name)  # all experts
        block = int(inside[1]) if inside else None
        kinds.setdefault(".".join(kind.split(".")[-2:]), {}).setdefault(block, []).append(layer)
    return kinds


def _lines(
    axes: Axes,
    kinds: dict[str, dict[int | None, list[LayerReport]]],
    value: Callable[[LayerReport], float | None],
) -> None:
    """A line per kind over the blocks, of the mean over the kind's matrices in each block."""
    after = _blocks(kinds)
    for index, (kind, blocks) in enumerate(kinds.items()):
        points = []
        for block, layers in blocks.items():
            values = [v for v in map(value, layers) if v is not None]
            if values:
                points.append((after if block is None else block, sum(values) / len(values)))
        alone = len(points) == 1
        axes.plot(
            *zip(*sorted(points), strict=True) if points else ((), ()),
            label=kind,
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)] if alone or after <= 40 else "",
            markersize=7 if alone else 4.5,
            linewidth=1.3,
            linestyle="-" if index < len(_COLOURS) else "--",
            clip_on=False,
        )


def _merge(axes: Axes, report: Report) -> None:
    """One line for all kinds where they would hide each other: the same sparsity everywhere."""
    shares = [100 * layer.sparsity for layer in report.layers]
    if max(shares) - min(shares) > 0.5:
        return
    for line in axes.get_lines():
        line.set(color="#444444", marker="o", markersize=4)
    mean = sum(shares) / len(shares)
    note = f"{mean:.2f}% in every matrix" if max(shares) - min(shares) < 0.01 else "all kinds alike"
    axes.annotate(note, (0.01, mean), xycoords=("axes fraction", "data"), xytext=(0, 4),
                  textcoords="offset points", fontsize=9)  # fmt: skip


def _blocks(kinds: dict[str, dict[int | None, list[LayerReport]]]) -> int:
    """One more than the highest block: where what lies outside of them is drawn."""
    return 1 + max((b for blocks in kinds.values() for b in blocks if b is not None), default=-1)


def _weight_error(layer: LayerReport) -> float:
    return layer.weight_error


def _scale(axes: Axes) -> None:
    """A log scale where the values span more than a factor of ten; from zero otherwise."""
    lines: list[Any] = list(axes.get_lines())
    positive = [y for line in lines for y in line.get_ydata() if y > 0]
    if positive and max(positive) > 10 * min(positive):
        axes.set_yscale("log", nonpositive="mask")
    else:
        axes.set_ylim(0, 1.1 * max(positive, default=1.0))


def _ticks(axes: Axes, kinds: dict[str, dict[int | None, list[LayerReport]]]) -> None:
    """Whole blocks, at most about 16 of them named, and the place after the last for the rest."""
    count = _blocks(kinds)
    step = max(1, -(-count // 16))
    ticks = list(range(0, count, step))
    labels = [str(t) for t in ticks]
    if any(None in blocks for blocks in kinds.values()):
        ticks, labels = [*ticks, count], [*labels, "outside"]
    axes.set_xticks(ticks, labels)
    axes.set_xlim(-0.5, max(ticks[-1], count - 1) + 0.5)


def _title(report: Report) -> str:
    recipe = report.recipe
    name = Path(str(report.model.get("name", "model"))).name
    title = (
        f"{name}: {recipe.get('method', 'pruned')} {recipe.get('sparsity', '')}, "
        f"{report.sparsity:.2%} of {report.weights:,} weights removed"
    )
    if {"dense", "pruned"} <= report.perplexity.keys():
        dense, pruned = (report.perplexity[k] for k in ("dense", "pruned"))
        title += (
            f"\nperplexity {dense.perplexity:.2f} dense, {pruned.perplexity:.2f} pruned "
            f"on {dense.dataset}"
        )
    return title
