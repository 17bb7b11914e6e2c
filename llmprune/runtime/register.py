"""Make transformers know the sparse format, as soon as transformers is there and no sooner.

transformers has no entry points for quantizers. Where its registry is already imported, ours goes in at
once; else a finder waits for that one import, lets it happen as ever, adds ours and is gone. So `import
llmprune` stays quick and needs no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

REGISTRY = "transformers.quantizers.auto"


def install() -> None:
    """Register the format, now or when transformers is imported. May be called again."""
    registry = sys.modules.get(REGISTRY)
    if registry is not None and _complete(registry):
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _complete(registry: ModuleType) -> bool:
    """Whether a module has been executed to its end: it may be waiting for what imported llmprune."""
    return not getattr(registry.__spec__, "_initializing", False)


def _register() -> None:
    import_module("llmprune.runtime.quantizer")  # which does it, at its end


class _Waiting(MetaPathFinder):
    """Notices the import of transformers' registry."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that others give, its loader told to register ours after it has run."""
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        loader: Any = spec and spec.loader
        if loader is None:
            sys.meta_path.insert(0, self)
            return None
        execute = loader.exec_module

        def then_register(module: ModuleType) -> None:
            del loader.exec_module
            try:
                execute(module)
            except BaseException:
                sys.meta_path.insert(0, self)  # whoever imports it again is served then
                raise
            _register()

        loader.exec_module = then_register
        return spec
