"""The `eval` command: perplexity by the papers' protocol, or the tasks of lm-eval."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from llmprune import loading
from llmprune.calibration import window
from llmprune.choices import ModelChoice, Voice
from llmprune.errors import ConfigError
from llmprune.eval import perplexity as measure
from llmprune.eval import tasks as lm_eval
from llmprune.loading import Source
from llmprune.model import max_seqlen
from llmprune.provenance import versions


@dataclass(frozen=True)
class EvalJob:
    """One evaluation; the fields are the options of `python -m llmprune eval`."""

    choice: ModelChoice
    voice: Voice
    dataset: str
    text_column: str | None = None
    seqlen: int | None = None
    batch_size: int | None = None
    bos: bool = False
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    num_fewshot: int | None = None


def evaluate(job: EvalJob) -> dict[str, Any]:
    """Do `job`, printing as it asks for; returns the result as plain JSON types."""
    job.voice.check()
    source = job.choice.check()
    tokenizer = loading.tokenizer(source)
    plain = _tasks(job, source, tokenizer) if job.tasks else _perplexity(job, source, tokenizer)
    return plain


def _perplexity(job: EvalJob, source: Source, tokenizer: Any) -> dict[str, Any]:
    seqlen = window(job.seqlen, max_seqlen(source.config))
    bos = _bos(tokenizer) if job.bos else None
    ids, name = measure.token_ids(job.dataset, tokenizer, text_column=job.text_column)
    model = job.choice.open(source, tokenizer).model
    found = measure.perplexity(
        model,
        ids,
        seqlen=seqlen,
        dataset=name,
        batch_size=job.batch_size,
        bos=bos,
        progress=not job.voice.quiet,
    )
    plain = {
        "model": job.choice.model,
        **asdict(found),
        "versions": versions(model.device),
    }
    job.voice.result(
        f"perplexity {found.perplexity:.3f} +- {found.standard_error:.3f} on {found.dataset}\n"
        f"protocol: {found.windows} windows; {found.protocol}\n"
        f"{found.tokens_per_second:,.0f} tokens/s",
        plain,
    )
    return plain


def _bos(tokenizer: Any) -> int:
    token = getattr(tokenizer, "bos_token_id", None)
    if token is None:
        raise ConfigError("--bos: this tokenizer has no BOS token")
    return int(token)


def _tasks(job: EvalJob, source: Source, tokenizer: Any) -> dict[str, Any]:
    lm_eval.check(job.tasks)
    model = job.choice.open(source, tokenizer).model
    plain: dict[str, Any] = lm_eval.run_tasks(
        model,
        tokenizer,
        list(job.tasks),
        batch_size=job.batch_size or 1,
        limit=job.limit,
        num_fewshot=job.num_fewshot,
    )
    lines = [
        f"{task:<24} {metric:<28} {value:.4f}"
        for task, metrics in plain["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    ]
    job.voice.result("\n".join(lines), plain)
    return plain
