"""What every command shares: which model to open and how, and where to say what."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune import loading
from llmprune.errors import ConfigError
from llmprune.loading import Opened, Source


@dataclass(frozen=True)
class ModelChoice:
    """Which model, and how to open it; see `llmprune.loading.open_model`."""

    model: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attention: str | None = None
    trust_remote_code: bool = False

    def check(self) -> Source:
        """Everything that can be known of the model without its weights."""
        loading.check_choice(self.dtype, self.device)
        return loading.check(
            self.model, trust_remote_code=self.trust_remote_code, revision=self.revision
        )

    def open(self, source: Source, tokenizer: Any) -> Opened:
        """Load the weights."""
        return loading.open_model(
            source,
            tokenizer=tokenizer,
            dtype=self.dtype,
            device=self.device,
            attention=self.attention,
        )


@dataclass(frozen=True)
class Voice:
    """What is said, and where: lines on stderr, results on stdout, both in the log file."""

    as_json: bool = False
    quiet: bool = False
    log_file: Path | None = None

    def check(self) -> None:
        """Refuse a log file that cannot be written; quieten the libraries when quiet is asked for."""
        if self.quiet:
            from huggingface_hub.utils.tqdm import disable_progress_bars
            from transformers.utils import logging

            disable_progress_bars()
            logging.disable_progress_bar()
            logging.set_verbosity_error()
        if self.log_file is not None:
            try:
                with self.log_file.open("a"):
                    pass
            except OSError as error:
                raise ConfigError(
                    f"cannot write the log file {self.log_file}: {error.strerror}"
                ) from error

    def say(self, line: str) -> None:
        """A line of progress."""
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)
        self._log(line)

    def result(self, text: str, plain: dict[str, Any]) -> None:
        """The outcome: text for people, or JSON when asked for."""
        if self.as_json:
            print(json.dumps(plain, indent=2, allow_nan=False), flush=True)
        elif not self.quiet:
            print(text, flush=True)
        self._log(text)

    def _log(self, text: str) -> None:
        if self.log_file is not None:
            with self.log_file.open("a", encoding="utf-8") as file:
                stamp = time.strftime("%Y-%m-%d %H:%M:%S")
                file.writelines(f"{stamp} {line}\n" for line in text.splitlines())
