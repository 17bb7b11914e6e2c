"""What the rows of few_tokens.py say together: means, losses, the targets, the first questions of the design.

Whatever was not measured is called so: a mean says over how many shapes it was taken, and a target or a
question without rows has no answer.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import geometric_mean, median
from typing import Any

Row = dict[str, Any]

DENSE = "dense"
LARGE = 100e6  # bytes of a dense layer from which on the target is higher
LOSS = 0.98
FAMILIES = ("Llama-3-8B", "Llama-3-70B")
MANY = 10**9  # behind every number of tokens
FEW = 16  # tokens that the targets are about
BEYOND = {"s24_bits int8": 2.4, "s24_bits int4": 3.3, "n8_mma 4:8": 1.35, "n8_mma 3:8": 1.65}
"""Targets for an H200, 1 to 16 tokens, layers of 100 MB and more."""


def tally(rows: list[Row], hot: dict[str, Any] | None, result: dict[str, Any]) -> dict[str, Any]:
    """Means, losses, targets and answers, from `rows` and what `result` says beside them."""
    of_2_4 = result.get("pattern", "2:4") == "2:4"
    return {
        "geometric_means": means(rows),
        "losses": losses(rows),
        "targets": {**(targets(rows) if of_2_4 else {}), **targets_beyond(rows)},
        "questions": questions(rows, hot, result),
    }


def means(rows: list[Row]) -> dict[str, Row]:
    """Geometric mean of the gain over dense, by kernel and tokens and over all tokens: losses among them.

    Over the Llama shapes, which the targets name; in a rehearsal over all.
    """
    groups = defaultdict[str, list[Row]](list)
    for row in _llama(rows):
        if row["kernel"] != DENSE:
            groups[f"{row['kernel']}, {row['tokens']} tokens"].append(row)
            groups[f"{row['kernel']}, all tokens"].append(row)
    return {
        name: {
            "mean": geometric_mean(row["against_dense"] for row in of),
            "shapes": len({row["shape"] for row in of}),
        }
        for name, of in groups.items()
    }


def losses(rows: list[Row]) -> Row:
    """Products below 0.98 of dense through the dispatch."""
    through = [row for row in rows if row["kernel"] == "dispatch"]
    lost = [
        f"{row['shape']}, {row['tokens']} tokens: {row['against_dense']:.3f} ({row['held']})"
        for row in through
        if row["against_dense"] < LOSS
    ]
    return {
        "of": len(through),
        "share": len(lost) / len(through) if through else None,
        "where": lost,
    }


def targets(rows: list[Row]) -> dict[str, Row]:
    """The targets for an H200, each with what was measured through the dispatch."""
    through = [row for row in rows if row["kernel"] == "dispatch"]
    few = [row for row in _llama(through) if row["tokens"] <= FEW]
    large = [row for row in few if 2 * row["size"][0] * row["size"][1] >= LARGE]
    worst = min((row["against_dense"] for row in through), default=None)
    least = min((row["against_dense"] for row in large), default=None)
    mean = geometric_mean(row["against_dense"] for row in few) if few else None
    return {
        "1 to 16 tokens, layers of 100 MB and more, each": _target(1.5, least),
        "1 to 16 tokens, geometric mean over the Llama shapes": _target(1.35, mean),
        "any shape and number of tokens": _target(LOSS, worst),
    }


def targets_beyond(rows: list[Row]) -> dict[str, Row]:
    """The targets for an H200 of fewer bits and of other patterns, of those that were measured."""
    few = [row for row in _llama(rows) if row["tokens"] <= FEW]
    large = [row for row in few if 2 * row["size"][0] * row["size"][1] >= LARGE]
    found = {}
    for kernel, wanted in BEYOND.items():
        gains = [row["against_dense"] for row in large if row["kernel"] == kernel]
        if gains:
            name = f"{kernel}, 1 to 16 tokens, layers of 100 MB and more, each"
            found[name] = _target(wanted, min(gains))
    return found


def _target(wanted: float, measured: float | None) -> Row:
    return {
        "wanted": wanted,
        "measured": measured,
        "met": None if measured is None else measured >= wanted,
    }


def questions(rows: list[Row], hot: Row | None, result: Row) -> dict[str, str]:
    """What was to be found out first on a GPU, in a sentence each."""
    refused = result["not_here"].get("s24_mma")
    mine = [row for row in rows if row["kernel"] == "s24_mma"]
    if refused or not mine:
        why = f"not measured: {refused or 'no shape was'}"
        return dict.fromkeys(("correctness", "rate of mma.sp at 64 tokens", "bandwidth"), why)
    return {
        "correctness": _correctness(mine, result),
        "rate of mma.sp at 64 tokens": _rate(mine, hot, result),
        "bandwidth": _bandwidth(mine),
    }


def _correctness(mine: list[Row], result: Row) -> str:
    """What correct.py found, if it ran, and the check before timing."""
    wrong = [line for line in result["wrong"] if line.startswith("s24_mma")]
    if wrong:
        return f"wrong: {'; '.join(wrong)}"
    found = f"as good as dense in all {len(mine)} products that were timed"
    if result["correct"] is None:
        return f"{found}; correct.py did not run"
    parts = [p for name, p in result["correct"]["parts"].items() if name.startswith("s24_mma")]
    cases, worst = sum(p["cases"] for p in parts), max(p["worst"][0] for p in parts)
    return f"{found}, and in {cases} cases of correct.py (error at most {worst:.2f} x dense, of 2)"


def _rate(mine: list[Row], hot: Row | None, result: Row) -> str:
    """TFLOP/s at 64 tokens, dense multiplications counted, from memory and from the L2 cache."""
    many = [row for row in mine if row["tokens"] == 64]
    if not many or hot is None:
        return "not measured: no shape was at 64 tokens"
    best = max(2 * row["size"][0] * row["size"][1] * 64 / row["us"][1] / 1e6 for row in many)
    us = hot["us"]["64"][1]
    rate = 2 * hot["size"][0] * hot["size"][1] * 64 / us / 1e6
    reading = hot["bytes"] / result["copy_gb_per_s"] / 1e3
    bound = "computing" if us > reading else "reading"
    return (
        f"{best:.0f} TFLOP/s from memory, {rate:.0f} from the L2 cache ({us:.1f} us; to read the weights "
        f"from memory takes {reading:.1f}: {bound} is the bound); a large dense product of cuBLAS reaches "
        f"{result['matmul_tflops']:.0f}"
    )


def _bandwidth(mine: list[Row]) -> str:
    """Share of a copy that one token reaches on large layers, by direct loads."""
    shares = [
        row["of_copy"]
        for row in mine
        if row["tokens"] == 1 and 2 * row["size"][0] * row["size"][1] >= LARGE
    ]
    if not shares:
        return "not measured: no layer of 100 MB was"
    enough = "above 75%: no staging needed" if min(shares) > 0.75 else "not above 75%: try cp.async"
    return (
        f"direct loads reach {min(shares):.0%} to {max(shares):.0%} of a copy at 1 token on layers of 100 MB "
        f"and more, {median(shares):.0%} in the middle; {enough}"
    )


def told(result: Row) -> str:
    """The short table, for the end of the output."""
    lines = ["a rehearsal: no figure of it means anything"] if result["small"] else []
    lines += _table(result.get("geometric_means", {}))
    for name, target in result.get("targets", {}).items():
        measured = target["measured"]
        found = "not measured" if measured is None else f"{measured:.3f}, met: {target['met']}"
        lines.append(f"target {target['wanted']} x dense, {name}: {found}")
    lost = result.get("losses", {})
    if lost.get("of"):
        lines.append(f"below {LOSS} through dispatch: {len(lost['where'])} of {lost['of']}")
        lines += [f"    {line}" for line in lost["where"]]
    lines += [f"{name}: {answer}" for name, answer in result.get("questions", {}).items()]
    lines += [f"not here: {name}: {why}" for name, why in result["not_here"].items()]
    lines += [f"lost: {name}: {why}" for name, why in result["lost"].items()]
    return "\n".join(lines)


def _table(means: dict[str, Row]) -> list[str]:
    """Geometric means, a line for each kernel, a column for each number of tokens."""
    tokens = list(dict.fromkeys(name.split(", ")[1] for name in means))
    tokens.sort(key=lambda name: int(name.split()[0]) if name[0].isdigit() else MANY)
    lines = ["x dense, mean (shapes)".ljust(24) + "".join(f"{name:>15}" for name in tokens)]
    for kernel in dict.fromkeys(name.split(", ")[0] for name in means):
        cells = [means.get(f"{kernel}, {name}") for name in tokens]
        told = (f"{one['mean']:.3f} ({one['shapes']})" if one else "-" for one in cells)
        lines.append(kernel.ljust(24) + "".join(f"{cell:>15}" for cell in told))
    return lines if means else []


def _llama(rows: list[Row]) -> list[Row]:
    """Rows of the shapes that means are taken over; all where there are none, as in a rehearsal."""
    return [row for row in rows if row["shape"].startswith(FAMILIES)] or rows
