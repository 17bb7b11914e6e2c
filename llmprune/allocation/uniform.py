"""Uniform: every matrix loses what was asked for, as the papers of the methods do it."""

from dataclasses import dataclass
from typing import ClassVar

from llmprune.allocation.base import Allocation, register


@register("uniform")
@dataclass(frozen=True)
class Uniform(Allocation):
    """The same for every matrix."""

    paper: ClassVar[str] = "Frantar and Alistarh 2023, arXiv 2301.00774"
