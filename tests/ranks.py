"""What a process started by torchrun does in tests: several runs in one group, or one that dies.

torchrun ... tests/ranks.py runs commands.json      every command line in the file, one after the other
torchrun ... tests/ranks.py killed STEP ARGV...     rank 1 is killed once it knows of STEP
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from llmprune import cli
from llmprune.checkpoint.journal import Followed
from llmprune.parallel import joined

torch.set_num_threads(1)


def runs(path: str) -> int:
    """Do every command line in `path`, a JSON list of lists."""
    with joined() as ranks:
        return max(cli.prune(argv, ranks) for argv in json.loads(Path(path).read_text()))


def killed(step: str, argv: list[str]) -> int:
    """A run whose rank 1 is killed, as hard as can be, behind `step`."""
    add = Followed.add

    def then_die(self: Followed, name: str, content: Any) -> None:
        add(self, name, content)
        if name == step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    Followed.add = then_die  # type: ignore[method-assign]
    return cli.main(argv)


if __name__ == "__main__":
    what, first, *rest = sys.argv[1:]
    sys.exit(runs(first) if what == "runs" else killed(first, rest))
