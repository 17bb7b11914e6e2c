"""The contract between a method and the walk: weight, statistics and pattern in, weight and mask out.

A method is a frozen dataclass whose fields are its settings on the command line (`--set key=value`),
with a class attribute `stats` that says what it learns of its inputs. It knows no model, no file and
no command line.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from llmprune.methods.grid import Grid
from llmprune.methods.registry import Registry, settled
from llmprune.pattern import Pattern, Within
from llmprune.stats import Gram, InputNorms, NoStats, Stats

S = TypeVar("S", bound=Stats)


@dataclass(frozen=True)
class Pruned:
    """What a method gives back for one matrix.

    Attributes:
        weight: [out, in], in the dtype that was given, zero where `keep` is False.
        keep: [out, in] bool, True for the weights that stay.
        notes: what the reader of the report must know of this matrix, such as raised damping.
        late: [n, 2] int64, rows and columns of kept weights that are zero while later blocks are
            calibrated: a method may correct its last few weights without disturbing what follows.
        grid: on which the kept weights lie, rounded to their dtype; None where they may have any value.
    """

    weight: Tensor
    keep: Tensor
    notes: Mapping[str, float | int | str] = field(default_factory=dict)
    late: Tensor | None = None
    grid: Grid | None = None

    @property
    def passed_on(self) -> Tensor:
        """[out, in], what later blocks are calibrated on."""
        if self.late is None:
            return self.weight
        return self.weight.index_put(tuple(self.late.T), self.weight.new_zeros(()))


class Share:
    """The rows of one matrix that a process prunes; of a process by itself, all of them.

    Attributes:
        count: rows of the matrix.
        own: which of them.
    """

    def __init__(self, count: int, own: slice | None = None) -> None:
        self.count = count
        self.own = own or slice(0, count)

    def whole(self, score: Tensor) -> Tensor:
        """The scores [width, count] of all rows, of which this process has its own: [width, own]."""
        return score

    def mine(self, places: Tensor) -> Tensor:
        """Of `places` [n, 2], rows of the matrix and columns, those in the own rows, from its first on."""
        rows = places[:, 0]
        inside = places[(rows >= self.own.start) & (rows < self.own.stop)]
        return inside - inside.new_tensor([self.own.start, 0])


class Method(ABC, Generic[S]):
    """One pruning method.

    Class attributes:
        name: the name it is registered under.
        stats: the accumulator type that it learns from.
        within: the comparison group it was published with, used unless the user chooses another.
        exact: whether it keeps exactly the counts of the pattern; only a variant may not.
        refits: whether it finds the best values for its mask itself, or can learn nothing to find them by;
            any other takes `--set refit=true`.
        paper: where it comes from.
    """

    name: ClassVar[str]
    stats: ClassVar[type[Any]]
    within: ClassVar[Within]
    paper: ClassVar[str]
    refits: ClassVar[bool] = False

    def settings(self) -> dict[str, Any]:
        """Every setting with its value, defaults too."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    @property
    def called(self) -> str:
        """What messages and reports call it."""
        return self.name

    @property
    def exact(self) -> bool:
        """Whether every comparison group loses exactly the pattern's count."""
        return True

    def resolve(self, pattern: Pattern) -> Pattern:
        """`pattern` with its comparison group decided: the user's choice, else the method's own."""
        return pattern.resolved(self.within)

    def needs_tokens(self, features: int) -> int:
        """Fewest tokens to learn from, for an expert that has `features` inputs; fewer make it fall back."""
        return 1 if self.stats.needs_data else 0

    def fallback(self, stats: S) -> tuple[Method[Any], Stats]:
        """What stands in for this method where there are fewer tokens, and its statistics out of `stats`."""
        return build("magnitude"), NoStats()

    @abstractmethod
    def prune(self, weight: Tensor, stats: S, pattern: Pattern) -> Pruned:
        """Prune `weight` [out, in] of any floating dtype; pure: no argument is changed."""

    def prune_together(
        self, weights: Sequence[Tensor], stats: S, pattern: Pattern
    ) -> Iterator[Pruned]:
        """Prune matrices that read the same input, in order; the result is that of one by one.

        A method that is faster on all of them at once overrides this.
        """
        for weight in weights:
            yield self.prune(weight, stats, pattern)

    def by_rows(self, pattern: Pattern) -> bool:
        """Whether several processes may prune some rows of a matrix each, by `prune_rows`.

        Where not, which is what a new method begins with, they prune some of the matrices each.
        """
        return False

    def prune_rows(
        self, weights: Sequence[Tensor], stats: S, pattern: Pattern, shares: Sequence[Share]
    ) -> Iterator[Pruned]:
        """`prune_together` of the own rows of each matrix; a method that compares rows asks `shares`."""
        return self.prune_together(weights, stats, pattern)


class Scored(Method[S]):
    """A method that ranks weights and leaves the kept ones as they are."""

    @abstractmethod
    def score(self, weight: Tensor, stats: S) -> Tensor:
        """Importance of each weight [out, in] in float32: the lowest goes first."""

    def prune(self, weight: Tensor, stats: S, pattern: Pattern) -> Pruned:
        """Keep the highest scores of each comparison group."""
        keep = pattern.keep(self.score(weight, stats))
        return Pruned(weight.where(keep, 0), keep)


class Around(Method[Gram]):
    """A method around another, whose masks, and values, it goes on from with a Gram matrix.

    Attributes:
        inner: the other method.
    """

    inner: Method[Any]

    stats: ClassVar[type[Gram]] = Gram

    @abstractmethod
    def follow(
        self, weights: Sequence[Tensor], found: list[Pruned], stats: Any, pattern: Pattern
    ) -> Iterator[Pruned]:
        """What becomes of `found`, the other method's result for each of `weights`, in their order.

        All are found before: what they were found with may lie in the memory of the sums. `found` may be
        used up.
        """

    @property
    def exact(self) -> bool:
        """As the method is."""
        return self.inner.exact

    def resolve(self, pattern: Pattern) -> Pattern:
        """As the method does."""
        return self.inner.resolve(pattern)

    def by_rows(self, pattern: Pattern) -> bool:
        """Where the method allows it: what follows knows single rows."""
        return self.inner.by_rows(pattern)

    def prune(self, weight: Tensor, stats: Gram, pattern: Pattern) -> Pruned:
        """The method's mask, and what follows."""
        return next(self.prune_together([weight], stats, pattern))

    def prune_together(
        self, weights: Sequence[Tensor], stats: Gram, pattern: Pattern
    ) -> Iterator[Pruned]:
        """The method's masks of matrices that read one input, and what follows."""
        found = list(self.inner.prune_together(weights, self.inner_stats(stats), pattern))
        return self.follow(weights, found, stats, pattern)

    def prune_rows(
        self, weights: Sequence[Tensor], stats: Gram, pattern: Pattern, shares: Sequence[Share]
    ) -> Iterator[Pruned]:
        """`prune_together` of some rows of each matrix."""
        found = list(self.inner.prune_rows(weights, self.inner_stats(stats), pattern, shares))
        return self.follow(weights, found, stats, pattern)

    def inner_stats(self, stats: Any) -> Any:
        """What the method learns, out of the Gram matrix; what a fallback has learnt is that already."""
        return out_of(stats, self.inner.stats)


def out_of(stats: Any, kind: type[Any]) -> Any:
    """What statistics of the type `kind` know of the same inputs as `stats`, which know at least that."""
    if isinstance(stats, kind):
        return stats
    if kind is InputNorms and isinstance(stats, Gram):
        return stats.norms()
    none = NoStats()
    none.tokens = stats.tokens
    return none


_METHODS: Registry[Method[Any]] = Registry("method")
register, known, get = _METHODS.register, _METHODS.known, _METHODS.get


def offered(name: str) -> dict[str, Any]:
    """The settings of the method called `name` with their defaults; of those that may be refit, `refit` too.

    Raises:
        ConfigError: when there is none, with the nearest name.
    """
    cls = get(name)
    own = {f.name: f.default for f in fields(cls)}  # type: ignore[arg-type]
    return {**own, **({} if cls.refits else _refit().SETTINGS)}


def build(name: str, settings: Mapping[str, Any] | None = None) -> Method[Any]:
    """The method called `name` with `settings`: values, or text as typed after `--set`.

    Raises:
        ConfigError: for a setting that the method does not have, or a value of the wrong type.
    """
    values = settled(name, offered(name), settings)
    cls = get(name)
    if cls.refits:
        return cls(**values)
    built: Method[Any] = _refit().wrapped(cls, values)
    return built


def _refit() -> Any:
    """The module of the refit, whose class is a method itself."""
    from llmprune.methods import refit

    return refit
