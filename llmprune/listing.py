"""The methods, the allocations and the qualities that there are, with their settings."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from llmprune import allocation
from llmprune import methods as all_methods
from llmprune.quality import QUALITIES


@dataclass(frozen=True)
class Entry:
    """One of them.

    Attributes:
        name: as typed.
        summary: one line.
        paper: where it comes from.
        settings: by name, with their defaults.
        more: what else is said of it.
    """

    name: str
    summary: str
    paper: str
    settings: dict[str, Any]
    more: dict[str, str]


def listed(what: str, *, as_json: bool) -> str:
    """The `methods`, `allocations` or `qualities`: lines for a terminal, or JSON text."""
    if what == "qualities":
        return _qualities_json() if as_json else _qualities_text()
    if what == "methods":
        return _json(methods()) if as_json else _text(methods(), "--set")
    return _json(allocations()) if as_json else _text(allocations(), "--allocation-set")


def methods() -> list[Entry]:
    """Every method."""
    return [
        Entry(name, _first(cls), cls.paper, all_methods.offered(name), {"within": str(cls.within)})
        for name, cls in all_methods.known().items()
    ]


def allocations() -> list[Entry]:
    """Every allocation."""
    return [
        Entry(name, _first(cls), cls.paper, allocation.offered_settings(name), {})
        for name, cls in allocation.known().items()
    ]


def _first(cls: type[Any]) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _json(entries: Iterable[Entry]) -> str:
    """Indented JSON text, by name."""
    plain = {e.name: {"paper": e.paper, **e.more, "settings": e.settings} for e in entries}
    return json.dumps(plain, indent=2)


def _text(entries: Iterable[Entry], option: str) -> str:
    """Lines for a terminal; `option` is what settings are typed after."""
    lines = []
    for entry in entries:
        more = "".join(f"; compares {key} {value}" for key, value in entry.more.items())
        lines += [f"{entry.name}: {entry.summary}", f"    {entry.paper}{more}"]
        lines += [
            f"    {option} {key}={str(value).lower()}" for key, value in entry.settings.items()
        ]
    return "\n".join(lines)


def _qualities_json() -> str:
    """Indented JSON text, by name."""
    return json.dumps({name: asdict(quality) for name, quality in QUALITIES.items()}, indent=2)


def _qualities_text() -> str:
    """Lines for a terminal, with what each is made of as it would be typed."""
    lines = []
    for name, quality in QUALITIES.items():
        lines += [f"{name}: {quality.summary}"]
        share, nm = quality.share.options(), quality.nm.options()
        if share == nm:
            lines += [f"    {share}"]
        else:
            lines += [f"    a share: {share}", f"    n:m:     {nm}"]
        lines += [f"    costs {quality.cost}"] if quality.cost else []
    return "\n".join(lines)
