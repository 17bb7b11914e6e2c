"""One-shot pruning of Hugging Face language models.

    import llmprune
    report = llmprune.prune(model, tokenizer, calibration="wikitext2", sparsity="2:4", method="wanda")

Importing this package loads neither torch nor transformers; each public name loads what it needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmprune.runtime.register import install as _install

if TYPE_CHECKING:
    from llmprune.calibration import Calibration as Calibration
    from llmprune.errors import LLMPruneError as LLMPruneError
    from llmprune.model import masks as masks
    from llmprune.model import sparsity as sparsity
    from llmprune.pattern import NM as NM
    from llmprune.pattern import Unstructured as Unstructured
    from llmprune.report import Report as Report
    from llmprune.run import PruneConfig as PruneConfig
    from llmprune.run import prune as prune
    from llmprune.runtime.linear import SparseLinear as SparseLinear
    from llmprune.runtime.load import load as load
    from llmprune.runtime.quantizer import SparseConfig as SparseConfig
    from llmprune.runtime.swap import densify as densify
    from llmprune.runtime.swap import sparsify as sparsify

__version__ = "0.1.0"

_HOME = {
    "Calibration": "calibration",
    "LLMPruneError": "errors",
    "NM": "pattern",
    "PruneConfig": "run",
    "Report": "report",
    "SparseConfig": "runtime.quantizer",
    "SparseLinear": "runtime.linear",
    "Unstructured": "pattern",
    "densify": "runtime.swap",
    "load": "runtime.load",
    "masks": "model",
    "prune": "run",
    "sparsify": "runtime.swap",
    "sparsity": "model",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llmprune' has no attribute {name!r}")
    return getattr(import_module(f"llmprune.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


_OF_KERNELS = {
    "explain": "kernels.choice",
    "prefer": "kernels.choice",
    "prepare": "runtime.laid_out",
    "tune": "kernels.tuning",
}


def _of_kernels(name: str) -> Any:
    """`llmprune.kernels.explain`: that folder has no __init__.py to hold it (see CONTRIBUTING.md)."""
    if name not in _OF_KERNELS:
        raise AttributeError(f"module 'llmprune.kernels' has no attribute {name!r}")
    return getattr(import_module(f"llmprune.{_OF_KERNELS[name]}"), name)


vars(import_module("llmprune.kernels"))["__getattr__"] = _of_kernels
_install()  # transformers then knows the sparse format, whichever of the two is imported first
