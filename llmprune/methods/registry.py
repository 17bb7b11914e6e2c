"""Classes that are known by a name, and the settings of one: for methods, allocations and transforms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

from llmprune.errors import ConfigError, nearest


class Named(Protocol):
    """What has the name it is registered under."""

    name: ClassVar[str]


T = TypeVar("T", bound=Named)
C = TypeVar("C", bound=type[Named])


class Registry(Generic[T]):
    """The classes of one kind.

    Attributes:
        kind: what they are, for messages: "method".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator that makes a class known under `name`."""

        def add(cls: C) -> C:
            if name in self._classes:
                first = self._classes[name].__qualname__
                raise ValueError(
                    f"two {self.kind}s are called {name!r}: {first} and {cls.__qualname__}"
                )
            cls.name = name
            self._classes[name] = cast(type[T], cls)
            return cls

        return add

    def known(self) -> dict[str, type[T]]:
        """Every class by name, in alphabetical order."""
        return dict(sorted(self._classes.items()))

    def get(self, name: str) -> type[T]:
        """The class called `name`.

        Raises:
            ConfigError: when there is none, with the nearest name.
        """
        if name not in self._classes:
            raise ConfigError(f"no {self.kind} {name!r}: {nearest(name, list(self._classes))}")
        return self._classes[name]


def settled(
    owner: str, defaults: Mapping[str, Any], given: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The settings `given`, as values or as text that was typed, each of the type of its default.

    Args:
        owner: whose they are, for messages.
        defaults: of every setting that there is.
        given: some of them.

    Raises:
        ConfigError: for a setting that there is not, or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    for key, value in (given or {}).items():
        if key not in defaults:
            have = nearest(key, list(defaults)) if defaults else "it has none"
            raise ConfigError(f"{owner} has no setting {key!r}: {have}")
        values[key] = _typed(owner, key, value, type(defaults[key]))
    return values


def _typed(owner: str, key: str, value: Any, kind: type[Any]) -> Any:
    """`value` as `kind`, from text or from a value that already fits."""
    booleans = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    text = str(value).strip().lower()
    try:
        if kind is bool:
            return booleans[text]
        return kind(text) if kind in (int, float) else kind(value)
    except (KeyError, ValueError):
        want = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise ConfigError(f"setting {key} of {owner} takes {want}, got {value!r}") from None
