"""The whole run on one page: calibrate, check the walk, prune block by block, report.

`prune` does it to a model in memory, in place; `job.run` wraps it for the command line with loading,
perplexity, saving and pushing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmprune.allocation.decide import decide
from llmprune.calibrate import windows_of
from llmprune.config import PruneConfig as PruneConfig
from llmprune.errors import ConfigError
from llmprune.fisher.measure import known_in_memory
from llmprune.model import Matrix, unwrapped
from llmprune.pattern import Pattern, Within
from llmprune.preserve import evaluating, random_state
from llmprune.progress import Bar, timed
from llmprune.provenance import describe, versions
from llmprune.prune_matrix import Task, prune_matrix
from llmprune.quality import Asked, going_on, resolve
from llmprune.ready import able, batches_of, chosen_of, walker_on, with_written
from llmprune.report import LayerReport, RepairReport, Report
from llmprune.sweep import prune_blocks
from llmprune.transforms.apply import in_memory
from llmprune.walk import Walker


def prune(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    calibration: Any = "wikitext2",
    sparsity: float | str | Pattern = 0.5,
    quality: str | None = None,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    within: Within | None = None,
    ragged: Literal["error", "dense"] = "error",
    targets: Sequence[str] = (),
    ignore: Sequence[str] = (),
    text_column: str | None = None,
    samples: int | None = None,
    seqlen: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    calibrate_all_experts: bool = False,
    sums: Literal["float32", "float64"] = "float32",
    repair: bool | None = None,
    repair_settings: Mapping[str, Any] | None = None,
    allocation: str | None = None,
    allocation_settings: Mapping[str, Any] | None = None,
    transforms: Sequence[str] | None = None,
    transform_settings: Mapping[str, Any] | None = None,
    fisher: bool | None = None,
    fisher_settings: Mapping[str, Any] | None = None,
    generate: float | None = None,
    quantize: str | None = None,
    quantize_settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Report:
    """Prune a causal language model of transformers, in place.

    Safe in the middle of a training script: train or eval mode, gradients, hooks, cache setting and
    random state are as before afterwards, also after an exception (matrices pruned by then stay
    pruned). Weights are written into the existing parameters, so optimizers keep working.

    Args:
        model: on CPU or CUDA, in float32, bfloat16 or float16; statistics are summed in float32.
        tokenizer: needed when `calibration` is text.
        calibration: dataset, file, `demo`, texts, ids [n, seqlen], or DataLoader.
        sparsity: share removed (0.5) or kept:group ("2:4").
        quality: `fast`, `balanced` or `best` (`llmprune.quality`): the parts that are not given here; None is
            Wanda alone. A part of it that the model cannot take is left out, and the report says so; False,
            or no transforms, leaves one out in any case.
        method: name of a method.
        settings: the method's own fields.
        within: comparison group of a share; None is the method's own.
        ragged: what to do with rows that n:m does not divide.
        targets: which matrices; none given means all of the decoder blocks.
        ignore: which of them not.
        text_column: column of the dataset that holds the text.
        samples: number of windows.
        seqlen: tokens per window.
        seed: of the choice of windows.
        batch_size: windows at once.
        calibrate_all_experts: every expert learns from all tokens.
        sums: float32 or float64, which statistics are summed in.
        repair: tune each block, once it is pruned, towards what it gave before.
        repair_settings: how; the fields of `llmprune.refine.settings.Repair`.
        allocation: name of an allocation, how the sparsity is shared out over matrices.
        allocation_settings: the allocation's own fields.
        transforms: names of transforms, done to the dense model first: it computes the same with other
            weights. An output head that is tied to the embedding may get weights of its own.
        transform_settings: their own fields.
        fisher: weigh errors by how much the model's output depends on them, measured by one pass back
            through its blocks.
        fisher_settings: how; the fields of `llmprune.fisher.settings.Fisher`.
        generate: calibrate also on windows that the model writes itself, so many for each that is read.
        quantize: `int8` or `int4`, what kept weights are rounded to.
        quantize_settings: how; the fields of `llmprune.methods.quantized.Quantize`.
        progress: show a progress bar on stderr.

    Returns:
        What was done to every matrix. `Report.perplexity` is empty: measure it with
        `llmprune.eval.perplexity`.

    Raises:
        LLMPruneError: one of its kinds, with a message that says what would work.
    """
    asked = Asked(
        method, settings, repair, repair_settings, allocation, allocation_settings,
        transforms, transform_settings, fisher, fisher_settings, generate,
    )  # fmt: skip
    config = PruneConfig(
        sparsity=sparsity,
        within=within,
        ragged=ragged,
        targets=targets,
        ignore=ignore,
        calibration=calibration,
        text_column=text_column,
        samples=samples,
        seqlen=seqlen,
        seed=seed,
        batch_size=batch_size,
        calibrate_all_experts=calibrate_all_experts,
        sums=sums,
        quantize=quantize,
        quantize_settings=quantize_settings or {},
        quality=quality,
        **vars(resolve(quality, sparsity, asked)),
    )
    return prune_with(config, model, tokenizer, progress=progress)


def prune_with(
    config: PruneConfig,
    model: nn.Module,
    tokenizer: Any = None,
    *,
    progress: bool = True,
    stored: Mapping[str, torch.dtype] | None = None,
    say: Callable[[str], None] = lambda line: None,
    on_mask: Callable[[Matrix, LayerReport, Tensor], None] = lambda matrix, report, keep: None,
) -> Report:
    """`prune` with its settings in one object; `on_mask` sees every keep mask, bool [out, in].

    What transforms change is rounded to the dtype in `stored` that a parameter of this name is saved in.
    """
    model = unwrapped(model)
    task = config.task()
    chosen = chosen_of(config, model, task)
    seconds: dict[str, float] = {}
    with timed(seconds, "calibration"):
        data = windows_of(config, model, tokenizer, progress, say)
    layers: dict[str, LayerReport] = {}
    repaired: list[RepairReport] = []
    begun = time.perf_counter()
    with evaluating(model), random_state(model):
        walker = walker_on(model, data, config, say) if data is not None else None
        config, left_out = able(config, walker, say)
        task = config.task()
        with timed(seconds, "generate"):
            if data is not None:
                data, unwritten = with_written(config, model, data, say, progress)
                left_out |= unwritten
        with timed(seconds, "transforms"):
            transformed = _transformed(walker, config, stored or {}, say, progress)
        if walker is not None and data is not None:
            walker.batches = batches_of(config, model, data)
        with timed(seconds, "fisher"):
            if walker is not None and (how := config.weighing()) is not None:
                task = replace(task, fisher=known_in_memory(walker, chosen, how, progress))
        with timed(seconds, "allocation"):
            optional = config.optional("allocation")
            decision = decide(config.allocated(), chosen, walker, task, progress, optional)
        for why in decision.left_out.values():
            say(going_on(config.quality, "allocation", why))
        left_out |= decision.left_out
        task = replace(task, levels=decision.levels)
        for matrix, report, keep in _pruned(walker, chosen, task, progress, repaired.append):
            layers[matrix.name] = report
            on_mask(matrix, report, keep)
        parts = ("generate", "transforms", "fisher", "allocation")
        before = sum(seconds[part] for part in parts)
        seconds["prune"] = time.perf_counter() - begun - before
    for phase, used in (
        ("calibration", data),
        ("generate", data and data.written),
        ("transforms", transformed),
        ("fisher", task.fisher),
        ("allocation", decision.found),
    ):
        if not used:
            del seconds[phase]
    result = Report(
        recipe=config.without(*left_out).recipe(),
        model=describe(model),
        layers=[layers[matrix.name] for matrix in chosen],
        walk=walker.kind if walker else None,
        repair=repaired,
        calibration=data.report() if data else None,
        allocation=decision.found,
        transforms=transformed,
        left_out=left_out,
        seconds=seconds,
        versions=versions(next(model.parameters()).device),
    )
    if result.sparsity == 0:
        raise ConfigError(f"{task.pattern} removes no weight of any matrix; raise the sparsity")
    return result


def _transformed(
    walker: Walker | None,
    config: PruneConfig,
    stored: Mapping[str, torch.dtype],
    say: Callable[[str], None],
    progress: bool,
) -> dict[str, Any]:
    """Do the transforms of `config` to the dense model; what was done."""
    if walker is None or not config.transforms:
        return {}
    return in_memory(walker, config.transformations(), config.task(), stored, say, progress)


def _pruned(
    walker: Walker | None,
    chosen: Sequence[Matrix],
    task: Task,
    progress: bool,
    repaired: Callable[[RepairReport], None],
) -> Iterable[tuple[Matrix, LayerReport, Tensor]]:
    """Prune every chosen matrix, with calibration data or from the weights alone."""
    if walker is None or not task.needs_data:
        with Bar(len(chosen), "pruning", unit="matrix", enabled=progress) as bar:
            for index, matrix in enumerate(chosen):
                bar.step(index, len(chosen), matrix.name)
                done = prune_matrix(matrix, task.method.stats(), None, task)
                done.settle()
                yield matrix, done.report, done.keep
        return
    seqlen = walker.batches[0].shape[1]
    more = task.repair.steps(sum(map(len, walker.batches)), seqlen) if task.repair else None
    with Bar(walker.steps(chosen, more), "pruning", enabled=progress) as bar:
        yield from prune_blocks(walker, chosen, task, bar.step, repaired)
