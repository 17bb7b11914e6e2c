"""What was asked for: one pruning run from the command line, and the text to measure it on."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune.checkpoint.convert import Format
from llmprune.choices import ModelChoice, Voice
from llmprune.eval import perplexity as measure
from llmprune.parallel import ALONE, Ranks
from llmprune.report import PerplexityReport
from llmprune.run import PruneConfig


@dataclass(frozen=True)
class Job:
    """One pruning run; the fields are the options of `python -m llmprune`, and the processes that do it."""

    choice: ModelChoice
    prune: PruneConfig
    voice: Voice
    save: Path | None = None
    overwrite: bool = False
    restart: bool = False
    max_shard_size: str = "5GB"
    max_memory: str | None = None
    format: Format = "dense"
    push_to_hub: str | None = None
    private: bool = False
    plot: Path | None = None
    eval_dataset: str | None = None
    evaluate: bool = True
    argv: tuple[str, ...] = ()
    ranks: Ranks = ALONE

    def command(self) -> str:
        """The command line that does this run again, the way the user typed it."""
        return shlex.join(["python", "-m", "llmprune", *self.argv])


@dataclass(frozen=True)
class Text:
    """Text to measure perplexity on, as token ids [tokens]."""

    ids: Tensor
    name: str
    seqlen: int

    def measure(
        self,
        model: Any,
        batch_size: int | None,
        progress: bool,
        losses: measure.Losses | None = None,
    ) -> PerplexityReport:
        """Perplexity of `model` on it."""
        return measure.perplexity(
            model,
            self.ids,
            seqlen=self.seqlen,
            dataset=self.name,
            batch_size=batch_size,
            progress=progress,
            losses=losses,
        )
