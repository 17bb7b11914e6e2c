"""What was done to a model: per matrix, and as a whole; as dataclass, JSON and table.

A report is plain data. `Report.as_dict()` is what `llmprune.json`, `--json` and the model card show.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = 1  # raised when a reader of llmprune.json would have to change


@dataclass(frozen=True)
class LayerReport:
    """What happened to one matrix.

    Attributes:
        name: full module name, such as `model.layers.0.self_attn.q_proj`.
        shape: (out, in).
        kept: number of weights that stay.
        sparsity: share removed.
        weight_error: ||W - B||^2 / ||W||^2, as pruned: a repair comes later.
        output_error: ||X (W - B)^T||^2 / ||X W^T||^2 on a sample of the calibration tokens that reach
            it; None when no data passed through (magnitude).
        tokens: calibration tokens behind its statistics.
        seconds: time spent in the method.
        skipped: why the matrix was left dense, or None.
        notes: what the method has to say, such as raised damping, or what it fell back to.
        expert: number of the expert it belongs to, or None for a matrix that every token reaches.
        pattern: what it was pruned to, such as `0.5` or `2:4`; None where it was left dense.
    """

    name: str
    shape: tuple[int, int]
    kept: int
    sparsity: float
    weight_error: float
    output_error: float | None
    tokens: int
    seconds: float
    skipped: str | None = None
    notes: dict[str, float | int | str] = field(default_factory=dict)
    expert: int | None = None
    pattern: str | None = None

    @classmethod
    def read(cls, entry: dict[str, Any]) -> LayerReport:
        """What `asdict` and JSON have made of one."""
        return cls(**{**entry, "shape": tuple(entry["shape"])})


@dataclass(frozen=True)
class RepairReport:
    """What the repair of one block did. Errors are ||given - wanted||^2 / ||wanted||^2 of its output.

    With `fisher` both norms are those that its metric gives, so that errors with and without do not compare.

    Attributes:
        block: its index.
        before: error on windows that it learns from, as many as are held out.
        after: the same after the repair.
        held_out_before: error on windows that are held out.
        held_out_after: the same after the repair; never more than before.
        epochs: how often it went through the windows.
        best_epoch: the one whose result was kept; 0 where none was better than no repair.
        windows: that it learnt from.
        held_out_windows: that it did not.
        seconds: wall clock.
    """

    block: int
    before: float
    after: float
    held_out_before: float
    held_out_after: float
    epochs: int
    best_epoch: int
    windows: int
    held_out_windows: int
    seconds: float


@dataclass(frozen=True)
class PerplexityReport:
    """One perplexity and everything needed to measure it again.

    Attributes:
        perplexity: exp of the mean over windows of the mean next-token loss in nats.
        standard_error: of the perplexity, from the spread over windows.
        windows: number of disjoint windows of `seqlen` tokens.
        dataset: where the text came from.
        protocol: one line that says how windows were made, with the BOS rule.
        tokens_per_second: evaluated tokens over wall-clock seconds.
    """

    perplexity: float
    standard_error: float
    windows: int
    seqlen: int
    dataset: str
    protocol: str
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class CalibrationReport:
    """Which tokens were used.

    Attributes:
        source: what the windows were read from.
        samples: how many of them.
        seqlen: tokens of each.
        seed: that chose them.
        fingerprint: the sha256 of all windows.
        written: how many more the model has written itself.
    """

    source: str
    samples: int
    seqlen: int
    seed: int
    fingerprint: str
    written: int = 0


@dataclass
class Report:
    """The whole run.

    Attributes:
        recipe: the settings that decide the result, as typed or by default.
        model: what was pruned: name or path, class, parameters.
        layers: one entry per matrix that was in reach.
        walk: what the run of a block started from: `blocks`, the stored output of the block before;
            `whole model`, the tokens, in a family that keeps state outside its blocks; None when the
            method needs no data.
        repair: one entry per block that was repaired.
        calibration: None when no data was needed.
        allocation: what decided how much of each matrix goes, with what it found; empty for uniform.
        transforms: by name what was done to the dense model before: its parts `done`, those `refused` with
            the reason, and `notes`. Where a part was done, weights do not compare with those of the original.
        left_out: of a run with `--quality`, parts of it that the model cannot take, and why: `repair`,
            `fisher`, `allocation` or `generate`. The recipe is without them.
        perplexity: by name, `dense` and `pruned`, when measured.
        seconds: wall clock by phase: `load`, `calibration`, `generate`, `fisher`, `prune`, ...
        versions: of python and the packages, the platform and the device.
    """

    recipe: dict[str, Any]
    model: dict[str, Any]
    layers: list[LayerReport]
    walk: str | None = None
    repair: list[RepairReport] = field(default_factory=list)
    calibration: CalibrationReport | None = None
    allocation: dict[str, Any] = field(default_factory=dict)
    transforms: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    perplexity: dict[str, PerplexityReport] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Weights in the matrices that were in reach, left dense or not."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Share removed of all weights in reach."""
        return 1 - sum(layer.kept for layer in self.layers) / max(1, self.weights)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types, with the totals."""
        plain = asdict(self)
        return {"schema": SCHEMA, "sparsity": self.sparsity, "weights": self.weights, **plain}

    def to_json(self) -> str:
        """`as_dict` as indented JSON text."""
        return json.dumps(self.as_dict(), indent=2, allow_nan=False)

    def table(self) -> str:
        """The run in a few lines for a terminal: one row per kind of matrix, then the totals."""
        rows: dict[str, list[LayerReport]] = {}
        for layer in self.layers:
            rows.setdefault(_kind(layer.name), []).append(layer)
        lines = [f"{'matrix':<28} {'count':>5} {'shape':>14} {'sparsity':>9} {'output error':>13}"]
        for kind, layers in rows.items():
            errors = [e for e in (layer.output_error for layer in layers) if e is not None]
            error = f"{sum(errors) / len(errors):.4f}" if errors else "-"
            size = sum(layer.shape[0] * layer.shape[1] for layer in layers)
            share = 1 - sum(layer.kept for layer in layers) / size
            shape = "x".join(map(str, layers[0].shape))
            lines.append(f"{kind:<28} {len(layers):>5} {shape:>14} {share:>9.2%} {error:>13}")
        lines.append(f"{'all':<28} {len(self.layers):>5} {self.weights:>14,} {self.sparsity:>9.2%}")
        if self.allocation:
            held = [layer.sparsity for layer in self.layers]
            lines.append(
                f"shared out by {self.allocation['name']}: {min(held):.2%} to {max(held):.2%}"
            )
        if skipped := [layer for layer in self.layers if layer.skipped]:
            lines.append(f"left dense: {len(skipped)} ({skipped[0].name}: {skipped[0].skipped})")
        lines += self._experts()
        if raised := [layer for layer in self.layers if "damping" in layer.notes]:
            most = max(raised, key=lambda layer: float(layer.notes["damping"]))
            lines.append(
                f"damping raised: {len(raised)} (most at {most.name}, to {most.notes['damping']:g})"
            )
        lines += self._rounded()
        lines += self._transformed()
        lines += [f"{part} left out: {why}" for part, why in self.left_out.items()]
        lines += self._weighed()
        lines += self._repaired()
        for name, result in self.perplexity.items():
            lines.append(
                f"perplexity {name:<8} {result.perplexity:>10.3f} +- {result.standard_error:.3f}"
                f"   ({result.dataset}, {result.windows} windows of {result.seqlen})"
            )
        return "\n".join(lines)

    def _rounded(self) -> list[str]:
        """What kept weights were rounded to, and how many matrices only to the nearest of it."""
        kind = self.recipe.get("quantize")
        if kind is None:
            return []
        how = self.recipe["quantize_settings"]["rounding"]
        done = [layer for layer in self.layers if "quantize" in layer.notes]
        near = sum(layer.notes.get("rounding") == "nearest" for layer in done)
        few = (
            f", {near} of them to the nearest for want of tokens"
            if near and how != "nearest"
            else ""
        )
        return [f"rounded to {kind} ({how}): {len(done)} of {len(self.layers)} matrices{few}"]

    def _transformed(self) -> list[str]:
        """What was done to the dense model before, and what was left out."""
        lines = []
        for name, what in self.transforms.items():
            left = [f"{part} left out: {why}" for part, why in what["refused"].items()]
            lines.append(
                f"{name}: " + "; ".join([", ".join(what["done"]) or "nothing done", *left])
            )
        return lines

    def _weighed(self) -> list[str]:
        """What Fisher information has weighed, in a line."""
        if not self.recipe.get("fisher"):
            return []
        settings = self.recipe.get("fisher_settings", {})
        uses = {"rows": "rows that compete", "mix": "the error that a repair lowers"}
        what = " and ".join(use for key, use in uses.items() if settings.get(key))
        return [
            f"weighed by Fisher information: {what or 'nothing, as no rows compete and no repair uses it'}"
        ]

    def _repaired(self) -> list[str]:
        """What the repair of all blocks did, in a line."""
        if not self.repair:
            return []
        before, after = (
            sum(getattr(block, f"held_out_{when}") for block in self.repair) / len(self.repair)
            for when in ("before", "after")
        )
        seconds = sum(block.seconds for block in self.repair)
        return [
            f"repaired: {len(self.repair)} blocks, error of their output on held-out windows "
            f"{before:.4f} -> {after:.4f}, {seconds:.0f} s"
        ]

    def _experts(self) -> list[str]:
        """How many tokens the experts saw, and which were too few for the method."""
        experts = [layer for layer in self.layers if layer.expert is not None]
        if not experts or self.calibration is None:
            return []
        ordered = sorted(experts, key=lambda layer: layer.tokens)
        least, most = ordered[0], ordered[-1]
        lines = [
            f"tokens per expert: {least.tokens:,} ({least.name}) to {most.tokens:,} ({most.name})"
        ]
        fell = [layer for layer in ordered if "fallback" in layer.notes]
        for method in dict.fromkeys(layer.notes["fallback"] for layer in fell):
            some = [layer for layer in fell if layer.notes["fallback"] == method]
            lines.append(
                f"too few tokens, pruned by {method}: {len(some)} of {len(experts)} expert matrices "
                f"(up to {some[-1].tokens:,} tokens)"
            )
        return lines


def _kind(name: str) -> str:
    """What a matrix is called in every block and every expert: `mlp.up_proj`."""
    return ".".join([part for part in name.split(".") if not part.isdigit()][-2:])
