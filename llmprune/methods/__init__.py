"""The pruning methods: a file in this folder that defines a `@register`-ed class is a method."""

from importlib import import_module
from pkgutil import iter_modules

from llmprune.methods.base import Method, Pruned, Scored, build, get, known, offered, register

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["Method", "Pruned", "Scored", "build", "get", "known", "offered", "register"]
