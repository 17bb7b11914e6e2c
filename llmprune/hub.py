"""The model card, and the push to the Hub.

`check_push` finds out before the work what would refuse the push after it. Whatever goes wrong with
a push, the folder on disk is complete, and the message says how to try again.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.errors import ConfigError, HubError
from llmprune.notice import ANYWHERE, DENSE_LIMITS
from llmprune.report import PerplexityReport, Report

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DATASETS = {  # the names of llmprune.texts that stand for a dataset of the Hub
    "c4": "allenai/c4",
    "ptb": "ptb-text-only/ptb_text_only",
    "wikitext2": "Salesforce/wikitext",
}
_FILES = (".txt", ".json", ".jsonl", ".parquet", ".npy")

_LIMITS = f"""\
{DENSE_LIMITS}
Training, merging adapters or quantising may fill the zeros again. Pruned without retraining, the model is
less accurate than the dense one, and not equally so on every task: measure it on yours."""


def card(report: Report, *, repo_id: str | None = None, command: str) -> str:
    """The text of README.md: metadata for the Hub, then what was done and how to do it again.

    Args:
        report: of the run.
        repo_id: where it will be pushed to, if anywhere; the loading example names it.
        command: the command line that does the run again.
    """
    from huggingface_hub import ModelCardData

    method, pattern = report.recipe["method"], report.recipe["sparsity"]
    source = str(report.model.get("name", ""))
    base = source if _is_hub_id(source) else None
    data = ModelCardData(
        base_model=base,
        datasets=_datasets(report),
        eval_results=_results(report) or None,
        library_name="transformers",
        model_name=repo_id.split("/")[-1] if repo_id else f"{Path(source).name}-{method}",
        pipeline_tag="text-generation",
        tags=["llmprune", "pruned", "sparse", method],
    )
    title = f"[{base}](https://huggingface.co/{base})" if base else Path(source).name
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {data.model_name}",
        f"{title}, pruned in one shot by llmprune: {report.sparsity:.2%} of the "
        f"{report.weights:,} weights in {len(report.layers)} matrices are zero.",
        _recipe(report, pattern),
        _perplexity(report),
        f"## Load it\n\n```python\n{_loading(repo_id)}\n```",
        f"## Do it again\n\n```sh\n{command}\n```\n\n`llmprune.json` holds every setting, version and "
        "layer.",
        f"## Limits\n\n{_LIMITS}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def check_push(repo_id: str, token: str | None = None) -> None:
    """Whether a push to `repo_id` stands a chance: its form, the token, and whose the token is.

    Raises:
        ConfigError: when `repo_id` does not read user/name.
        HubError: no token, a refused or read-only one, one for another namespace, or no Hub.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if not _REPO.fullmatch(repo_id):
        raise ConfigError(f"{repo_id!r} is no repository of the Hub; those read user/name")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"{repo_id!r} is no name for a repository: {_line(error)}") from error
    with failing(f"cannot push to {repo_id}", "for a local copy only, leave the push out"):
        who = HfApi().whoami(token=token)
    _check_rights(repo_id, who)


def push(folder: Path, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload `folder` to the model repository `repo_id`, which is made if it is not there.

    Returns:
        The address of the repository.

    Raises:
        HubError: whatever goes wrong; names the local copy and the command to try again.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    again = shlex.join(["hf", "upload", repo_id, str(folder), *(["--private"] if private else [])])
    after = f"the local copy at {folder} is complete; to try again: {again}"
    # hf_xet reads its settings when its session starts; by default it retries a server that is gone
    # for up to three minutes, measured on a loopback
    os.environ.setdefault("HF_XET_CLIENT_RETRY_BASE_DELAY", "500ms")
    with failing(f"push to {repo_id} failed", after):
        url = str(api.create_repo(repo_id, private=private, exist_ok=True))
        if (
            private and not api.model_info(repo_id).private
        ):  # of a repository that was there already
            raise HubError(f"push to {repo_id} refused: it exists and is public; {after}")
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Upload a model pruned by llmprune"
        )
    return url


@contextmanager
def failing(what: str, after: str) -> Iterator[None]:
    """Turn what the Hub's client raises into one line that starts with `what` and ends with
    `after`.

    The client of version 1 is built on httpx, that of version 2 on httpx2; the base of its own
    errors is the base of theirs. Its upload threads and hf_xet raise RuntimeError, OSError and
    ValueError.
    """
    from huggingface_hub.errors import HfHubHTTPError

    # HTTPError of the library in use, and OSError
    transport: tuple[Any, ...] = HfHubHTTPError.__bases__
    try:
        yield
    except (*transport, RuntimeError, ValueError) as error:
        if isinstance(error, HubError):
            raise
        raise HubError(f"{what}: {_why(error)}; {after}") from error


def _why(error: BaseException) -> str:
    """The reason in words for who typed the command."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    if isinstance(cause, HfHubHTTPError) and cause.response is not None:
        status = cause.response.status_code
        said = _line(cause.server_message or cause.response.reason_phrase)
        if status == 401:
            return "the Hub does not know this token (401); log in with hf auth login"
        if status == 403:
            return f"the token has no right to write there (403: {said}); use one with write access"
        return f"the Hub answered {status}: {said}"
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token; log in with hf auth login, or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if type(error).__module__.partition(".")[0] in ("httpx", "httpx2"):
        return f"{constants.ENDPOINT} does not answer ({type(error).__name__}: {_line(error)})"
    return f"{_line(error)} ({type(error.__cause__ or error).__name__})"


def _check_rights(repo_id: str, who: dict[str, Any]) -> None:
    """Refuse a token that can only read, or that belongs to none of the namespace's writers."""
    namespace = repo_id.split("/")[0]
    name = str(who.get("name"))
    own = [name, *(str(org.get("name")) for org in who.get("orgs") or [])]
    if namespace.lower() not in [n.lower() for n in own]:
        raise HubError(f"the token is {name}'s, who cannot write to {namespace}; try {name}/...")
    if (who.get("auth") or {}).get("accessToken", {}).get("role") == "read":
        raise HubError(
            f"the token of {name} can only read; make one that can write and hf auth login"
        )


def _is_hub_id(name: str) -> bool:
    return bool(_REPO.fullmatch(name)) and not Path(name).exists() and not name.endswith(_FILES)


def _datasets(report: Report) -> list[str] | None:
    """The Hub datasets that were calibrated on, if any."""
    return [d] if report.calibration and (d := _dataset(report.calibration.source)) else None


def _dataset(source: str) -> str | None:
    """`allenai/c4` for `c4 (train)`; None for a file, a tensor or a text of ours."""
    name = source.split(" (")[0].split(":")[0]
    return _DATASETS.get(name) or (name if _is_hub_id(name) else None)


def _results(report: Report) -> list[EvalResult]:
    """The pruned perplexity as the Hub's index of results takes it."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=_dataset(result.dataset) or "text",
            dataset_name=result.dataset,
            metric_type="perplexity",
            metric_name=f"perplexity, windows of {result.seqlen}",
            metric_value=round(result.perplexity, 4),
        )
        for name, result in report.perplexity.items()
        if name == "pruned"
    ]


def _recipe(report: Report, pattern: str) -> str:
    """What was done, as a table."""
    recipe, data = report.recipe, report.calibration
    meaning = " (kept of neighbours)" if ":" in pattern else " (share removed)"
    rows = [
        ("quality", recipe.get("quality")),
        ("method", recipe["method"]),
        *((f"- {key}", value) for key, value in (recipe.get("settings") or {}).items()),
        ("pattern", f"{pattern}{meaning}"),
        ("compared within", recipe.get("within")),
        ("rounded to", recipe.get("quantize")),
        *((f"- {key}", value) for key, value in (recipe.get("quantize_settings") or {}).items()),
        ("shared out by", report.allocation.get("name")),
        *((f"{part} left out", why) for part, why in report.left_out.items()),
        ("sparsity of the pruned matrices", f"{report.sparsity:.2%}"),
        ("left dense", sum(1 for layer in report.layers if layer.skipped) or None),
        ("calibration", data and f"{data.samples} windows of {data.seqlen} tokens, {data.source}"),
        ("written by the model itself", (data and data.written) or None),
        ("calibration seed", data and data.seed),
        ("calibration sha256", data and f"`{data.fingerprint}`"),
    ]
    lines = [f"| {key} | {value} |" for key, value in rows if value is not None]
    return "\n".join(["## What was done", "", "| setting | value |", "|---|---|", *lines])


def _perplexity(report: Report) -> str:
    """Perplexity before and after, with the protocol, or nothing."""
    if not report.perplexity:
        return ""
    lines = ["## Perplexity", "", "| model | perplexity | standard error |", "|---|---|---|"]
    for name, found in report.perplexity.items():
        lines.append(f"| {name} | {found.perplexity:.3f} | {found.standard_error:.3f} |")
    protocols = dict.fromkeys(_protocol(found) for found in report.perplexity.values())
    return "\n".join([*lines, "", *protocols])


def _protocol(found: PerplexityReport) -> str:
    return (
        f"On {found.dataset}, {found.windows} windows of {found.seqlen} tokens: {found.protocol}."
    )


def _loading(repo_id: str | None) -> str:
    name = repo_id or ANYWHERE
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")'
    )


def _line(text: object) -> str:
    """Text of any length on one line of at most 300 characters."""
    return " ".join(str(text).split())[:300] or type(text).__name__
