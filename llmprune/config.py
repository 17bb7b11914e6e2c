"""Every setting of a run that decides its result, checked as it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from llmprune import allocation as allocations
from llmprune import methods
from llmprune import quality as qualities
from llmprune.allocation import Allocation
from llmprune.errors import ConfigError
from llmprune.fisher import settings as fishers
from llmprune.fisher.settings import Fisher
from llmprune.fisher.weigh import compete
from llmprune.kernels import solver
from llmprune.methods import quantized
from llmprune.methods.base import Method
from llmprune.methods.quantized import Kept, Quantize, Quantized
from llmprune.pattern import Pattern, Within, parse
from llmprune.prune_matrix import Task
from llmprune.quality import Parts
from llmprune.refine import settings as repairs
from llmprune.refine.settings import Repair
from llmprune.transforms import Transform, build

MOST_GENERATED = 100


@dataclass(frozen=True)
class PruneConfig:
    """Every setting that decides the result; all of it goes into the report.

    A quality is resolved before this is made (`llmprune.quality.resolve`): its parts are in the other fields.

    Attributes:
        sparsity: share removed (0.5) or kept:group ("2:4").
        method: name of a file in `llmprune.methods`.
        settings: the method's own fields.
        within: comparison group of a share; None is the method's own.
        ragged: `error` refuses a matrix whose rows n:m does not divide, `dense` leaves it alone.
        targets: which matrices; none given means all of the decoder blocks but routers.
        ignore: which of them not.
        calibration: dataset, file, `demo`, list of texts, ids [n, seqlen], or DataLoader.
        text_column: column of the dataset that holds the text.
        samples: number of windows; None is 128 for text and all that are given for ids.
        seqlen: tokens per window; None is min(2048, what the model allows).
        seed: of the choice of windows.
        batch_size: windows at once; None fits the device. Does not change results beyond rounding.
        calibrate_all_experts: every expert learns from all tokens, not from those routed to it.
        sums: float32, or float64 at three times the memory, rounded once: see `--help`.
        repair: tune each block, once it is pruned, towards what it gave before.
        repair_settings: the fields of `llmprune.refine.settings.Repair`.
        allocation: how the sparsity is shared out over matrices: a file in `llmprune.allocation`.
        allocation_settings: the allocation's own fields.
        transforms: names of files in `llmprune.transforms`, what is done to the dense model first.
        transform_settings: their own fields; each goes to those that have it.
        generate: windows to calibrate on that the dense model writes, for each one that is read.
        fisher: weigh errors by how much the model's output depends on them.
        fisher_settings: the fields of `llmprune.fisher.settings.Fisher`.
        quantize: `int8` or `int4`, what kept weights are rounded to; None leaves them as they are.
        quantize_settings: the fields of `llmprune.methods.quantized.Quantize`.
        quality: the name in `llmprune.quality` that parts came from; the run goes on without one of those
            that the model cannot take.
    """

    sparsity: float | str | Pattern = 0.5
    method: str = "wanda"
    settings: Mapping[str, Any] = field(default_factory=dict)
    within: Within | None = None
    ragged: Literal["error", "dense"] = "error"
    targets: Sequence[str] = ()
    ignore: Sequence[str] = ()
    calibration: Any = "wikitext2"
    text_column: str | None = None
    samples: int | None = None
    seqlen: int | None = None
    seed: int = 0
    batch_size: int | None = None
    calibrate_all_experts: bool = False
    sums: Literal["float32", "float64"] = "float32"
    repair: bool = False
    repair_settings: Mapping[str, Any] = field(default_factory=dict)
    allocation: str = "uniform"
    allocation_settings: Mapping[str, Any] = field(default_factory=dict)
    transforms: Sequence[str] = ()
    transform_settings: Mapping[str, Any] = field(default_factory=dict)
    generate: float = 0.0
    fisher: bool = False
    fisher_settings: Mapping[str, Any] = field(default_factory=dict)
    quantize: str | None = None
    quantize_settings: Mapping[str, Any] = field(default_factory=dict)
    quality: str | None = None

    def __post_init__(self) -> None:
        method, pattern = self.built()
        self.repairing()
        self.allocated().check(method, pattern)
        self.transformations()
        self.weighing()
        self._check_grid(pattern)
        try:
            solver.asked()  # decides no result, but is best said before a weight is read
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if self.quality is not None:
            qualities.get(self.quality)
        if self.ragged not in ("error", "dense"):
            raise ConfigError(f"ragged is error or dense, got {self.ragged!r}")
        if self.sums not in ("float32", "float64"):
            raise ConfigError(f"sums is float32 or float64, got {self.sums!r}")
        for name in ("samples", "seqlen", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < (2 if name == "seqlen" else 1):
                raise ConfigError(f"{name} must be a positive number, got {value}")
        self._check_generate()
        if isinstance(self.targets, str) or isinstance(self.ignore, str):
            raise ConfigError("targets and ignore are lists of names, not one text")

    def _check_generate(self) -> None:
        if not 0 <= self.generate <= MOST_GENERATED:
            raise ConfigError(
                f"generate is how many windows are written for each that is read, from 0 to "
                f"{MOST_GENERATED}, got {self.generate:g}"
            )
        if self.generate and not self.needs_data and not self.optional("generate"):
            raise ConfigError(
                f"generate writes windows to calibrate on, and {self.method} looks at the weights alone; "
                "leave it out"
            )

    def built(self) -> tuple[Method[Any], Pattern]:
        """The method and the pattern these settings stand for.

        Raises:
            ConfigError: when a name or value makes no sense.
        """
        method, how = methods.build(self.method, self.settings), self.rounding()
        rounded = (
            Quantized(method, how) if how else method
        )  # refuses a method that it cannot follow
        method = method if self.repair else rounded
        pattern = method.resolve(parse(self.sparsity, self.within))
        return method, pattern

    def rounding(self) -> Quantize | None:
        """What kept weights are rounded to, and how; None where they are not.

        Raises:
            ConfigError: when a name or value makes no sense, or there are settings for nothing.
        """
        if self.quantize is None:
            if self.quantize_settings:
                given = ", ".join(self.quantize_settings)
                raise ConfigError(
                    f"{given} is of fewer bits: add --quantize int8 (quantize='int8')"
                )
            return None
        return quantized.build(self.quantize, self.quantize_settings)

    def _check_grid(self, pattern: Pattern) -> None:
        """Refuse what would move weights off their grid once they are rounded."""
        if self.quantize is None or self.repair:  # what is repaired is rounded after that
            return
        known = self.weighing()
        if known is not None and known.rows and compete(pattern):
            raise ConfigError(
                f"rows that --fisher has weighed lie on no grid of {self.quantize}; add --fisher-set "
                "rows=false, or use n:m or --within row, where rows do not compete"
            )

    def repairing(self) -> Repair | None:
        """How blocks are repaired; None where they are not.

        Raises:
            ConfigError: when a setting makes no sense, or there are some without a repair.
        """
        if self.repair_settings and not self.repair:
            given = ", ".join(self.repair_settings)
            raise ConfigError(f"{given} is of a repair: add --repair (repair=True)")
        return repairs.build(self.repair_settings) if self.repair else None

    def allocated(self) -> Allocation:
        """The allocation these settings stand for.

        Raises:
            ConfigError: when a name or value makes no sense.
        """
        return allocations.build(self.allocation, self.allocation_settings)

    def transformations(self) -> tuple[Transform, ...]:
        """The transforms these settings stand for.

        Raises:
            ConfigError: when a name or value makes no sense.
        """
        return build(self.transforms, self.transform_settings)

    def weighing(self) -> Fisher | None:
        """How Fisher information is measured, and what it weighs; None where nothing asks for it.

        Rows are weighed where they compete, and directions where blocks are repaired.

        Raises:
            ConfigError: when a setting makes no sense, or there are some for nothing.
        """
        shared = self.allocation == "fisher"
        if not self.fisher and not shared:
            if self.fisher_settings:
                given = ", ".join(self.fisher_settings)
                raise ConfigError(f"{given} is of Fisher information: add --fisher (fisher=True)")
            return None
        asked = fishers.build(self.fisher_settings)
        rows = self.fisher and asked.rows and compete(self.built()[1])
        mix = asked.mix if self.fisher and self.repair else 0.0
        return replace(asked, rows=rows, mix=mix) if rows or mix or shared else None

    def optional(self, part: str) -> bool:
        """Whether the run goes on without `part` where the model cannot take it: its quality brings it."""
        if self.quality is None:
            return False
        own = qualities.get(self.quality).parts(self.built()[1])
        asked = getattr(self, part)
        return bool(asked == getattr(own, part) != getattr(Parts(), part))

    def without(self, *parts: str) -> PruneConfig:
        """The same without these parts."""
        left: dict[str, Any] = {part: getattr(Parts(), part) for part in parts}
        left |= {f"{part}_settings": {} for part in parts if part not in ("fisher", "generate")}
        now = {"fisher": self.fisher, "allocation": self.allocation, **left}
        if not now["fisher"] and now["allocation"] != "fisher":
            left["fisher_settings"] = {}
        return replace(self, **left)

    @property
    def needs_data(self) -> bool:
        """Whether calibration windows are read: to prune, or for what is decided before."""
        before = self.allocated().needs_data or bool(self.transforms) or self.weighing() is not None
        return self.task().needs_data or before

    def task(self) -> Task:
        """What these settings do to every matrix."""
        flood, wide = self.calibrate_all_experts, self.sums == "float64"
        repair, how = self.repairing(), self.rounding()
        last = Quantized(Kept(), how) if how and repair else None
        ragged = self.ragged == "dense"
        return Task(*self.built(), ragged, flood, wide, repair=repair, rounding=last)

    def recipe(self) -> dict[str, Any]:
        """The settings as plain JSON types, with defaults spelled out."""
        method, pattern = self.built()
        repair, weighing, rounding = self.repairing(), self.weighing(), self.rounding()
        return {
            "quality": self.quality,
            "method": self.method,
            "settings": method.settings(),
            "sparsity": str(pattern),
            "within": getattr(pattern, "within", f"{pattern} neighbours"),
            "ragged": self.ragged,
            "targets": list(self.targets),
            "ignore": list(self.ignore),
            "text_column": self.text_column,
            "batch_size": self.batch_size,
            "calibrate_all_experts": self.calibrate_all_experts,
            "sums": self.sums,
            "repair": repair is not None,
            "repair_settings": repair.as_dict() if repair else {},
            "allocation": self.allocation,
            "allocation_settings": self.allocated().settings(),
            "transforms": list(self.transforms),
            "transform_settings": {t.name: t.settings() for t in self.transformations()},
            "generate": self.generate,
            "fisher": self.fisher,
            "fisher_settings": weighing.as_dict() if weighing else {},
            "quantize": self.quantize,
            "quantize_settings": rounding.as_dict() if rounding else {},
        }
