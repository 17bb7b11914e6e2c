"""How much sparsity each matrix gets: a file here that defines a `@register`-ed class is an allocation."""

from importlib import import_module
from pkgutil import iter_modules

from llmprune.allocation.base import Allocation, Measured, build, known, offered_settings, register

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["Allocation", "Measured", "build", "known", "offered_settings", "register"]
