"""Write the cells of benchmarks/frontier.py into docs/frontier.md, below its heading `Cells`.

    python benchmarks/frontier_page.py

What stands above that heading is written by hand. tests/test_benchmarks.py holds that the page and
benchmarks/results/frontier.json say the same.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from frontier import RECIPES
from frontier_figures import DENSE, judged

ROOT = Path(__file__).resolve().parents[1]
CELLS, PAGE = ROOT / "benchmarks" / "results" / "frontier.json", ROOT / "docs" / "frontier.md"
HEADING = "## Cells\n"
PATTERNS = ("0.5", "0.6", "0.7", "2:4", "4:8")
WHOLES = ("balanced", "best")  # what the recipes whose names begin with theirs are set beside

Rows = list[dict[str, Any]]


def main() -> None:
    """Write the page anew."""
    rows = json.loads(CELLS.read_text())["rows"]
    above, _, _ = PAGE.read_text().partition(HEADING)
    PAGE.write_text(above + HEADING + cells(rows))


def cells(rows: Rows) -> str:
    """For every model the perplexities of its recipes, then what each part of a quality is good for."""
    models = list(dict.fromkeys(judged(r) for r in rows))
    return "".join(_of_model(model, [r for r in rows if judged(r) == model]) for model in models)


def _of_model(model: str, rows: Rows) -> str:
    dense = [r["perplexity"] for r in rows if r["name"] == DENSE]
    names = [name for name in RECIPES if any(r["name"] == name for r in rows)]
    by = {name: {p: _seeds(rows, name, p) for p in PATTERNS} for name in names}
    lines = [f"\n### {model}: dense {dense[0]:.3f}\n", _head("recipe", "seconds")]
    parts: dict[str, list[str]] = {whole: [] for whole in WHOLES}
    for name in names:
        if whole := next((w for w in WHOLES if name.startswith(w) and name != w), None):
            parts[whole].append(name)
            continue
        seconds = median(r["seconds"] for r in rows if r["name"] == name)
        shown = [_shown(list(by[name][p].values()), "{:.3f}") for p in PATTERNS]
        lines.append(f"| {name} | {' | '.join(shown)} | {seconds:.0f} |")
    for whole, some in parts.items():
        if some:
            lines += [f"\nPerplexity above that of `{whole}` on the same draws:\n", _head("recipe")]
        for name in some:
            shown = [_shown(_above(by[name][p], by[whole][p]), "{:+.4f}") for p in PATTERNS]
            lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def _head(first: str, *last: str) -> str:
    names = [first, *(p if ":" in p else f"{float(p):.0%}" for p in PATTERNS), *last]
    return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"


def _seeds(rows: Rows, name: str, pattern: str) -> dict[int, float]:
    return {
        r["seed"]: r["perplexity"] for r in rows if r["name"] == name and r["pattern"] == pattern
    }


def _above(mine: dict[int, float], theirs: dict[int, float]) -> list[float]:
    return [mine[seed] - theirs[seed] for seed in mine if seed in theirs]


def _shown(values: list[float], form: str) -> str:
    """Mean and its standard error; of fewer draws than three, how many."""
    if not values:
        return ""
    error = f" ± {stdev(values) / math.sqrt(len(values)):.4f}" if len(values) > 1 else ""
    few = f" ({len(values)})" if len(values) < 3 else ""
    return form.format(fmean(values)) + error + few


if __name__ == "__main__":
    main()
