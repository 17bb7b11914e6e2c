"""The command line: argv -> settings -> prune, eval, inspect, convert or methods. No logic lives here."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from llmprune.errors import ConfigError, Echoed, LLMPruneError, Lost, Stopped, nearest
from llmprune.options import parser_for, prune_parser
from llmprune.other_options import convert_parser, eval_parser
from llmprune.parallel import joined, started
from llmprune.stopping import unread

if TYPE_CHECKING:
    from llmprune.choices import ModelChoice, Voice
    from llmprune.config import PruneConfig
    from llmprune.parallel import Ranks

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
UNREAD = 141  # 128 + SIGPIPE
TERMINATED = 143  # 128 + SIGTERM
_COMMANDS = ("prune", "eval", "inspect", "convert", "methods", "allocations", "qualities")


def entry() -> NoReturn:
    """Run the command line and exit with its status."""
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        if not unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        status = UNREAD
    if status == INTERRUPTED:
        # where Ctrl-C met an exec() during an import, Python would still die of the signal at exit
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(argv: Sequence[str]) -> int:
    """Run `argv`; returns 0, 2 for an error of the user's, 130 after Ctrl-C, 143 after SIGTERM."""
    argv = list(argv)
    try:
        if argv and not argv[0].startswith("-") and argv[0] not in _COMMANDS:
            raise ConfigError(f"no command {argv[0]!r}: {nearest(argv[0], _COMMANDS)}")
        command = argv.pop(0) if argv and argv[0] in _COMMANDS else "prune"
        commands = {
            "prune": _prune,
            "eval": _eval,
            "inspect": _inspect,
            "convert": _convert,
            "methods": _methods,
            "allocations": _allocations,
            "qualities": _qualities,
        }
        return commands[command](argv)
    except LLMPruneError as error:
        print(f"llmprune: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Lost as lost:
        print(f"llmprune: error: {lost}; {_left(argv)}", file=sys.stderr)
        return 2
    except Echoed:
        return 2
    except Stopped as stop:
        if started().leads:
            print(f"llmprune: {stop}", file=sys.stderr)
        return TERMINATED
    except KeyboardInterrupt:
        if started().leads:
            print(f"llmprune: interrupted; {_left(argv)}", file=sys.stderr)
        return INTERRUPTED


def _left(argv: Sequence[str]) -> str:
    """What an interrupted command leaves behind."""
    if "--save" in argv or "--push-to-hub" in argv:
        return "if a block was finished, the same command goes on behind it"
    return "nothing half-written is left"


def _choice(args: argparse.Namespace) -> ModelChoice:
    from llmprune.choices import ModelChoice

    return ModelChoice(
        model=args.model,
        revision=args.revision,
        dtype=args.dtype,
        device=args.device,
        attention=args.attention,
        trust_remote_code=args.trust_remote_code,
    )


def _voice(args: argparse.Namespace) -> Voice:
    from llmprune.choices import Voice

    return Voice(as_json=args.json, quiet=args.quiet, log_file=args.log_file)


def _silence() -> Voice:
    from llmprune.choices import Voice

    return Voice(quiet=True)


def _prune(argv: Sequence[str]) -> int:
    with joined() as ranks:
        return prune(argv, ranks)


def prune(argv: Sequence[str], ranks: Ranks) -> int:
    """The run that `argv` asks for, done by `ranks`; errors are raised."""
    args = prune_parser().parse_args(argv)
    from llmprune.job import run
    from llmprune.order import Job

    voice, choice = _voice(args) if ranks.leads else _silence(), _choice(args)

    run(
        Job(
            choice=choice,
            prune=_config(args),
            voice=voice,
            save=args.save,
            overwrite=args.overwrite,
            restart=args.restart,
            max_memory=args.max_memory,
            max_shard_size=args.max_shard_size,
            format=args.format,
            push_to_hub=args.push_to_hub,
            private=args.private,
            plot=args.plot,
            eval_dataset=args.eval_dataset,
            evaluate=not args.no_eval,
            argv=tuple(argv),
            ranks=ranks,
        )
    )
    return 0


def _config(args: argparse.Namespace) -> PruneConfig:
    """What decides the result."""
    from llmprune.config import PruneConfig
    from llmprune.quality import Asked, resolve

    asked = Asked(
        method=args.method,
        settings=_settings(args.set, "--set"),
        repair=args.repair,
        repair_settings=_settings(args.repair_set, "--repair-set"),
        allocation=args.allocation,
        allocation_settings=_allocation_settings(args),
        transforms=[] if args.transform == ["none"] else args.transform,
        transform_settings=_settings(args.transform_set, "--transform-set"),
        fisher=args.fisher,
        fisher_settings=_settings(args.fisher_set, "--fisher-set"),
        generate=args.generate,
    )
    return PruneConfig(
        sparsity=args.sparsity,
        within=args.within,
        ragged=args.ragged,
        targets=args.targets,
        ignore=args.ignore,
        calibration=args.calibration or ("demo" if args.model == "demo" else "wikitext2"),
        text_column=args.text_column,
        samples=args.samples,
        seqlen=args.seqlen,
        seed=args.seed,
        batch_size=args.batch_size,
        calibrate_all_experts=args.calibrate_all_experts,
        sums=args.sums,
        quantize=args.quantize,
        quantize_settings=_settings(args.quantize_set, "--quantize-set"),
        quality=args.quality,
        **vars(resolve(args.quality, args.sparsity, asked)),
    )


def _allocation_settings(args: argparse.Namespace) -> dict[str, str]:
    """What was set of the allocation; `--budget-minutes` is one of them by another name."""
    minutes = {} if args.budget_minutes is None else {"minutes": args.budget_minutes}
    return {**_settings(args.allocation_set, "--allocation-set"), **minutes}


def _settings(pairs: Sequence[str], option: str) -> dict[str, str]:
    """The `key=value` texts after `option` as a mapping."""
    settings: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"{option} takes key=value, got {pair!r}")
        settings[key] = value
    return settings


def _eval(argv: Sequence[str]) -> int:
    args = eval_parser().parse_args(argv)
    from llmprune.evaluate import EvalJob, evaluate

    evaluate(
        EvalJob(
            choice=_choice(args),
            voice=_voice(args),
            dataset=args.dataset or ("demo" if args.model == "demo" else "wikitext2"),
            text_column=args.text_column,
            seqlen=args.seqlen,
            batch_size=args.batch_size,
            bos=args.bos,
            tasks=tuple(t for text in args.tasks or () for t in text.split(",") if t),
            limit=args.limit,
            num_fewshot=args.num_fewshot,
        )
    )
    return 0


def _inspect(argv: Sequence[str]) -> int:
    parser = parser_for(
        "python -m llmprune inspect",
        "Sparsity per layer and overall, the pattern that the files really hold, and their size; reads "
        "any safetensors checkpoint shard by shard and builds no model.",
    )
    parser.add_argument("checkpoint", help="folder, .safetensors file, Hub id, or demo")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.add_argument("--summary", action="store_true", help="no line per layer")
    args = parser.parse_args(argv)
    import json

    from llmprune.checkpoint.inspect import inspect

    name = args.checkpoint
    if name == "demo":
        from llmprune.demo import MODEL_DIR

        name = str(MODEL_DIR)
    found = inspect(name, revision=args.revision, progress=True)
    if args.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        print(found.table() if args.summary else f"{found.layers()}\n\n{found.table()}")
    return 0


def _convert(argv: Sequence[str]) -> int:
    args = convert_parser().parse_args(argv)
    from llmprune.checkpoint.convert import convert
    from llmprune.memory import parse_size

    voice = _voice(args)
    voice.check()
    done = convert(
        args.source,
        args.target,
        args.format,
        revision=args.revision,
        max_shard_size=parse_size(args.max_shard_size, "--max-shard-size"),
        overwrite=args.overwrite,
        progress=not args.quiet,
    )
    voice.result(done.text(), done.as_dict())
    return 0


def _methods(argv: Sequence[str]) -> int:
    return _listing(argv, "methods", "Every one with its settings (--set key=value).")


def _allocations(argv: Sequence[str]) -> int:
    about = "Every one with its settings (--allocation-set key=value)."
    return _listing(argv, "allocations", about)


def _qualities(argv: Sequence[str]) -> int:
    about = "What each --quality is made of, as options of the command line, and what it costs."
    return _listing(argv, "qualities", about)


def _listing(argv: Sequence[str], what: str, about: str) -> int:
    parser = parser_for(f"python -m llmprune {what}", about)
    parser.add_argument("--json", action="store_true", help="print as JSON")
    args = parser.parse_args(argv)
    from llmprune.listing import listed

    print(listed(what, as_json=args.json))
    return 0
