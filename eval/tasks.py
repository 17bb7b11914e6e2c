"""Benchmark tasks by lm-evaluation-harness, in process, on the model that is in memory.

Nothing is reimplemented: prompts, metrics and data are lm-eval's. Its `wikitext` task counts original
words over whole pages, so its perplexity is not that of `perplexity.py`; the two are never mixed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmprune.errors import ConfigError, DataError, nearest

NAMES_IN_HINT = 8  # lm-eval knows more than ten thousand


def check(tasks: Sequence[str]) -> None:
    """Refuse, before a model is loaded, what `run_tasks` could not do.

    Raises:
        ConfigError: lm-eval is not installed, no task is named, or one is unknown.
    """
    _manager(tasks)


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    batch_size: int = 1,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """Evaluate `model` on tasks of lm-eval.

    lm-eval seeds Python's, NumPy's and torch's global generators while it runs.

    Args:
        model: a transformers causal language model, evaluated on the device it is on.
        tokenizer: of the model.
        tasks: names of tasks, groups or tags, or paths of task files ending in `.yaml`.
        batch_size: requests per forward pass.
        limit: use only the first so many documents of each task; for trials, not for results.
        num_fewshot: examples in the prompt; None for what each task says.

    Returns:
        Plain JSON types: `results` (metrics by task), `n-shot` and `versions` by task, `limit`, and
        the `tool` with its version.

    Raises:
        ConfigError: as `check`.
        DataError: the data of a task cannot be loaded.
    """
    manager = _manager(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    training = [module for module in model.modules() if module.training]
    own = deepcopy(tokenizer)  # it is given a pad token, which must not reach a saved checkpoint
    wrapped = HFLM(pretrained=model, tokenizer=own, batch_size=batch_size)
    try:
        found = simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    except OSError as error:  # every failure to reach or find data, the Hub client's included
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"cannot load the data of {', '.join(tasks)}: {reason}; lm-eval reads it from the "
            "Hub, so a network or a filled cache is needed"
        ) from error
    finally:
        for module in training:
            module.training = True
    return {
        "tool": f"lm-eval {version('lm_eval')}",
        "limit": limit,
        **{key: _plain(found.get(key, {})) for key in ("results", "n-shot", "versions")},
    }


def _manager(tasks: Sequence[str]) -> Any:
    """lm-eval's index of tasks, once all of `tasks` are found in it."""
    if find_spec("lm_eval") is None:
        raise ConfigError(
            'tasks need lm-eval, which is not installed: pip install "llmprune[eval]"'
        )
    if not tasks:
        raise ConfigError("no task is named; name one, such as arc_easy")
    manager = _index()
    known = set(manager.all_tasks)
    for task in tasks:
        is_file = task.endswith((".yaml", ".yml"))
        if task not in known and not (is_file and Path(task).is_file()):
            raise ConfigError(_unknown(task, manager.all_tasks, is_file))
    return manager


@cache
def _index() -> Any:
    """Every task that lm-eval knows; reading their files takes seconds, so it is done once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _unknown(task: str, known: list[str], is_file: bool) -> str:
    if is_file:
        return f"no task file {task}; give the path of a .yaml file, or the name of a task"
    from difflib import get_close_matches

    # The whole list would fill the screen: only what is near.
    near = get_close_matches(task, known, n=NAMES_IN_HINT) or known[:NAMES_IN_HINT]
    return f"unknown task {task!r}; {nearest(task, near)}; all: python -m lm_eval ls tasks"


def _plain(value: Any) -> Any:
    """JSON types only; what is not a finite number, such as a missing error, becomes None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, bool | int | str) or value is None:
        return None if value == "N/A" else value
    number = float(value)
    return number if math.isfinite(number) else None
