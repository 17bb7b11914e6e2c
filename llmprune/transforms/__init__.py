"""Function-preserving changes of a dense model before it is pruned; a file that registers a class is one."""

from importlib import import_module
from pkgutil import iter_modules

from llmprune.transforms.base import Change, Setting, Transform, build, known, register, steps

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["Change", "Setting", "Transform", "build", "known", "register", "steps"]
