"""Write the cells of benchmarks/frontier.py into docs/frontier.md, below its heading `Cells`.

    python benchmarks/frontier_page.py

What stands above that heading is written by hand. It also draws methods and qualities for the README, on the
models of `DRAWN`, and prints the figures of its table of qualities. tests/test_benchmarks.py holds page and
table against benchmarks/results/frontier.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, median
from typing import Any

from frontier import RECIPES
from frontier_figures import BASE, DENSE, draw, error, judged, summed

ROOT = Path(__file__).resolve().parents[1]
CELLS, PAGE = ROOT / "benchmarks" / "results" / "frontier.json", ROOT / "docs" / "frontier.md"
HEADING = "## Cells\n"
PATTERNS = ("0.5", "0.6", "0.7", "2:4", "4:8")
WHOLES = (
    "balanced by sparsegpt",
    "balanced, refit to the end",
    "balanced",
    "best rotated",
    "best untransformed",
    "best before",
    "best",
)
"""What recipes whose names begin so are set beside; the first that fits counts."""

README = ("wikillama-5m", "qwen3-1m, 300 windows", "demo, 300 windows")  # in its table
DRAWN = ("wikillama-5m, 300 windows", *README[1:])  # on the part of the text that has every method

Rows = list[dict[str, Any]]


def main() -> None:
    """Write the page anew, and draw."""
    rows = json.loads(CELLS.read_text())["rows"]
    drawn = [r for r in rows if judged(r) in DRAWN and whole_of(r["name"]) is None]
    draw(drawn, CELLS.with_suffix(".png"))
    above, _, _ = PAGE.read_text().partition(HEADING)
    PAGE.write_text(above + HEADING + cells(rows))
    for quality in ("balanced", "best"):
        print(
            quality, multiple(rows, quality), "times the seconds of sparsegpt:", left(rows, quality)
        )
        print(f"  on {DRAWN[0]}:", left(rows, quality, DRAWN[:1]))


def left(rows: Rows, quality: str, models: tuple[str, ...] = README) -> str:
    """What it leaves of SparseGPT's excess, a cell per pattern with a share per model, as in the README."""
    found = {(s["model"], s["pattern"]): s for s in summed(rows) if s["name"] == quality}
    shares = [[found.get((m, p), {}).get("share") for m in models] for p in PATTERNS]
    return " | ".join(
        " / ".join("-" if share is None else f"{share:.2f}" for share in some) for some in shares
    )


def multiple(rows: Rows, quality: str) -> str:
    """The least and the greatest multiple of SparseGPT's seconds, of medians over all cells of a model."""
    times = []
    for model in README:
        here = [
            [r["seconds"] for r in rows if judged(r) == model and r["name"] == n]
            for n in (quality, BASE)
        ]
        times += [median(here[0]) / median(here[1])] if all(here) else []
    digits = 1 if max(times) < 10 else 0
    return f"{min(times):.{digits}f} to {max(times):.{digits}f}"


def cells(rows: Rows) -> str:
    """For every model the perplexities of its recipes, then what each part of a quality is good for."""
    models = list(dict.fromkeys(judged(r) for r in rows))
    return "".join(_of_model(model, [r for r in rows if judged(r) == model]) for model in models)


def _of_model(model: str, rows: Rows) -> str:
    dense = [r["perplexity"] for r in rows if r["name"] == DENSE]
    there = {r["name"]: None for r in rows if r["name"] != DENSE}  # in the order of the file
    names = [*(name for name in RECIPES if name in there), *(n for n in there if n not in RECIPES)]
    by = {name: {p: _seeds(rows, name, p) for p in PATTERNS} for name in names}
    lines = [f"\n### {model}: dense {dense[0]:.3f}\n", _head("recipe", "seconds")]
    parts: dict[str, list[str]] = {whole: [] for whole in WHOLES}
    for name in names:
        whole = whole_of(name)
        if whole in by:
            parts[whole].append(name)
        seconds = median(r["seconds"] for r in rows if r["name"] == name)
        shown = [_shown(list(by[name][p].values()), "{:.3f}") for p in PATTERNS]
        lines.append(f"| {name} | {' | '.join(shown)} | {seconds:.0f} |")
    for whole, some in parts.items():
        beside = [
            f"| {name} | {' | '.join(shown)} |"
            for name in some
            if any(shown := [_beside(by[name][p], by[whole][p]) for p in PATTERNS])
        ]
        if beside:
            lines += [f"\nPerplexity above that of `{whole}` on the same draws:\n", _head("recipe")]
        lines += beside
    return "\n".join(lines) + "\n"


def whole_of(name: str) -> str | None:
    """Which recipe one that leaves something out of it is set beside; None for what stands alone."""
    return next((w for w in WHOLES if name.startswith(w) and name != w), None)


def _head(first: str, *last: str) -> str:
    names = [first, *(p if ":" in p else f"{float(p):.0%}" for p in PATTERNS), *last]
    return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"


def _seeds(rows: Rows, name: str, pattern: str) -> dict[int, float]:
    return {
        r["seed"]: r["perplexity"] for r in rows if r["name"] == name and r["pattern"] == pattern
    }


def _beside(mine: dict[int, float], theirs: dict[int, float]) -> str:
    return _shown([mine[seed] - theirs[seed] for seed in mine if seed in theirs], "{:+.4f}")


def _shown(values: list[float], form: str) -> str:
    """Mean and its standard error; of fewer draws than three, how many."""
    if not values:
        return ""
    spread = error(values)
    told = "" if spread is None else f" ± {spread:.4f}"
    few = f" ({len(values)})" if len(values) < 3 else ""
    return form.format(fmean(values)) + told + few


if __name__ == "__main__":
    main()
