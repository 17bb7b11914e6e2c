"""The table and the picture of benchmarks/frontier.py, from its cells."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

DENSE, BASE = "dense", "sparsegpt"  # what every recipe is told against
DASHES = ("-", "--", ":")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def judged(row: dict[str, Any]) -> str:
    """The model of a cell, and how much of the test text it was judged on, unless all."""
    *_, last = row["windows"].split(", ")
    return f"{row['model']}, {last} windows" if last.isdecimal() else row["model"]


def error(values: list[float]) -> float | None:
    """The standard error of their mean; None of a single one."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def summed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line per model and test text, pattern and recipe, over its seeds."""
    dense = {judged(r): math.log(r["perplexity"]) for r in rows if r["name"] == DENSE}
    groups: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for r in rows:
        if r["name"] != DENSE and judged(r) in dense:
            groups.setdefault((judged(r), r["pattern"], r["name"]), {})[r["seed"]] = r
    found = []
    for (model, pattern, name), seeds in groups.items():
        some = list(seeds.values())
        values = [r["perplexity"] for r in some]
        base = groups.get((model, pattern, BASE), {})
        both = [(seeds[s], base[s]) for s in seeds if s in base]
        mine, theirs = (
            sum(math.log(pair[i]["perplexity"]) - dense[model] for pair in both) for i in (0, 1)
        )
        errors = [r["layer_error"] for r in some if "layer_error" in r]
        found.append(
            {
                "model": model,
                "pattern": pattern,
                "name": name,
                "seeds": len(some),
                "perplexity": fmean(values),
                "error": error(values),
                "excess": fmean(math.log(v) - dense[model] for v in values),
                "share": mine / theirs if both else None,
                "layer error": fmean(errors) if errors else None,
                "seconds": fmean(r["seconds"] for r in some),
                "peak": max(r["peak_mb"] for r in some),
            }
        )
    return found


def told(rows: list[dict[str, Any]], commit: str) -> str:
    """The table, per model and pattern the best last."""
    lines = []
    for r in rows:
        if r["name"] == DENSE:
            lines.append(f"{judged(r)} ({r['weights']}): dense perplexity {r['perplexity']:.3f}")
    lines += ["", "| model | pattern | recipe | perplexity | seeds | excess | of SparseGPT's |"]
    lines[-1] += " layer error | seconds | peak MB |"
    lines.append("|---" * 10 + "|")
    for s in sorted(summed(rows), key=lambda s: (s["model"], s["pattern"], -s["perplexity"])):
        spread = "" if s["error"] is None else f" ± {s['error']:.3f}"
        share = "" if s["share"] is None else f"{s['share']:.2f}"
        layer = "" if s["layer error"] is None else f"{s['layer error']:.4f}"
        cells = [s["model"], s["pattern"], s["name"], f"{s['perplexity']:.3f}{spread}"]
        cells += [str(s["seeds"]), f"{s['excess']:.4f}", share, layer]
        lines.append(f"| {' | '.join(cells)} | {s['seconds']:.1f} | {s['peak']} |")
    commits = sorted({r["commit"] for r in rows})
    if len(commits) > 1 or (commits and commits[0] != commit):
        counts = (f"{sum(r['commit'] == c for r in rows)} of {c}" for c in commits)
        lines.append(f"cells by commit: {', '.join(counts)}; this is {commit}")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """What perplexity exceeds the dense one by, against sparsity: per model a picture, per recipe a line.

    Marks for n:m. On a logarithmic scale of ln(perplexity / dense): the best recipes differ by thousandths.
    """
    from matplotlib.figure import Figure

    lines = summed(rows)
    models = list(dict.fromkeys(s["model"] for s in lines))
    names = list(dict.fromkeys(s["name"] for s in lines))
    figure = Figure(figsize=(5.5 * len(models), 4.6), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        here = [s for s in lines if s["model"] == model]
        ticks = sorted({s["pattern"] for s in here}, key=_place)
        for index, name in enumerate(names):
            mine = {s["pattern"]: s for s in here if s["name"] == name}
            look = {"color": COLOURS[index % len(COLOURS)], "capsize": 2}
            turn = index // len(COLOURS) % len(DASHES)
            dash, dots, diamonds = DASHES[turn], "os^"[turn], "DPX"[turn]
            for kind, style in ((False, dash), (True, "")):
                some = [mine[t] for t in ticks if t in mine and (":" in t) is kind]
                axes.errorbar(
                    [ticks.index(s["pattern"]) for s in some],
                    [s["excess"] for s in some],
                    [(s["error"] or 0) / s["perplexity"] for s in some],
                    linestyle=style, marker=diamonds if kind else dots, markersize=4,
                    label=name if not kind else None, **look,
                )  # fmt: skip
        axes.set_yscale("log")
        axes.set_xticks(range(len(ticks)), [t if ":" in t else f"{float(t):.0%}" for t in ticks])
        axes.set(
            title=model,
            xlabel="weights removed, or kept of a group",
            ylabel="ln(perplexity / dense)",
        )
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _place(pattern: str) -> tuple[bool, float]:
    """Shares in their order, then n:m, the wider groups first."""
    return (":" in pattern, -float(pattern.split(":")[1]) if ":" in pattern else float(pattern))
