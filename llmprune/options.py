"""The options of a run: names, defaults and what `--help` says of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from llmprune.errors import ConfigError
from llmprune.quality import QUALITIES

_EPILOG = """\
examples:
  python -m llmprune --model demo --sparsity 0.6 --method sparsegpt
  python -m llmprune --model meta-llama/Llama-3.1-8B --sparsity 2:4 --method wanda --save out
  python -m llmprune --model ./my-model --sparsity 0.5 --calibration my.txt --eval-dataset test.txt
  python -m llmprune --model ./my-model --sparsity 0.6 --quality best --save out

other commands:
  python -m llmprune eval --model out        perplexity, or tasks of lm-eval
  python -m llmprune inspect out             what a checkpoint's files really hold
  python -m llmprune convert out small --format sparse
                                             without its zeros, or dense again
  python -m llmprune methods                 every method with its settings
  python -m llmprune allocations             every allocation with its settings
  python -m llmprune qualities               what each --quality is made of
"""


class _Parser(argparse.ArgumentParser):
    """Errors in one line with status 2, like every other error of this program."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def parser_for(prog: str, description: str, epilog: str | None = None) -> _Parser:
    return _Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", required=True, help="folder, Hub id, or demo (embedded, no network)"
    )
    group.add_argument("--revision", help="branch, tag or commit on the Hub")
    group.add_argument(
        "--dtype",
        default="auto",
        help="compute in float32, bfloat16 or float16; auto: float32 on a CPU, else the checkpoint's; "
        "saved is the checkpoint's dtype, or this one where it is narrower",
    )
    group.add_argument("--device", default="auto", help="auto (CUDA if there is), cpu, cuda:N")
    group.add_argument("--attention", help="attention backend of transformers (eager, sdpa, ...)")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="let code from the checkpoint run"
    )


def output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print the report as JSON on stdout")
    group.add_argument("--quiet", action="store_true", help="no progress, no table; errors only")
    group.add_argument("--log-file", type=Path, help="append what is said to this file too")


def prune_parser() -> argparse.ArgumentParser:
    """Options of `python -m llmprune`."""
    parser = parser_for(
        "python -m llmprune",
        "Prune a language model in one shot: calibrate block by block, remove weights, measure "
        "perplexity before and after, save a checkpoint that anything can load.",
        _EPILOG,
    )
    model_options(parser)
    _pruning_options(parser)
    _quality_options(parser)
    _quantize_options(parser)
    _allocation_options(parser)
    _transform_options(parser)
    _calibration_options(parser)
    _result_options(parser)
    output_options(parser)
    return parser


def _pruning_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pruning")
    group.add_argument(
        "--sparsity", required=True, help="share removed (0.5), or kept:group (2:4, 4:8, 1:4, ...)"
    )
    told = ". ".join(f"{name}: {quality.summary}" for name, quality in QUALITIES.items())
    group.add_argument(
        "--quality",
        metavar="NAME",
        help="a combination of method and what goes beyond it; what you set yourself wins, and --no-repair, "
        f"--no-fisher and --transform none leave out. {told}".replace("%", "%%"),
    )
    group.add_argument("--method", help="see `python -m llmprune methods` (wanda)")
    group.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the method"
    )
    group.add_argument(
        "--within",
        choices=("row", "matrix", "columns"),
        help="comparison group of a share: row (wanda), matrix (magnitude), columns: a block of "
        "columns over all rows (sparsegpt); default: the method's own",
    )
    group.add_argument(
        "--ragged",
        choices=("error", "dense"),
        default="error",
        help="rows that n:m does not divide: refuse, or leave such a matrix dense and report it",
    )
    group.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="memory the run may use, such as 16GB, or 0=40GB,cpu=100GB for GPU 0 and main memory: "
        "weights are read block by block, hidden states go to disk (what is free)",
    )
    names = "class name, fnmatch pattern or re:REGEX; of the whole name or its end"
    group.add_argument(
        "--targets",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"prune these instead ({names})",
    )
    group.add_argument(
        "--ignore", action="extend", nargs="+", default=[], metavar="NAME", help="leave these dense"
    )


def _quality_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("beyond the method")
    group.add_argument(
        "--repair",
        action=argparse.BooleanOptionalAction,
        help="after each block is pruned, tune what is left of it towards what the dense block gave",
    )
    group.add_argument(
        "--repair-set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the repair: epochs, rate, tokens, seconds (per block), held_out, patience, tune, "
        "seed",
    )
    group.add_argument(
        "--fisher",
        action=argparse.BooleanOptionalAction,
        help="weigh errors by how much the model's output depends on them: in rows of a matrix that compete, "
        "and in --repair; measured by one pass back through the blocks",
    )
    group.add_argument(
        "--fisher-set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of that: tokens, mix, rows, temperature, seed; also for --allocation fisher",
    )


def _quantize_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("fewer bits")
    group.add_argument(
        "--quantize",
        metavar="NAME",
        help="round what is kept to int8, one scale per row, or int4, one per 128 columns, and let the "
        "columns to the right make up for it; after a repair, what that leaves",
    )
    group.add_argument(
        "--quantize-set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of that: rounding (gptq or nearest), range (search or max), group, damping",
    )


def _allocation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("allocation")
    group.add_argument(
        "--allocation",
        metavar="NAME",
        help="how the sparsity is shared out over blocks or matrices, the total as exact as ever: uniform, "
        "owl, alphapruning, fisher, search; with n:m a mix of levels (uniform)",
    )
    group.add_argument(
        "--allocation-set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the allocation; see `python -m llmprune allocations`",
    )
    group.add_argument(
        "--budget-minutes",
        metavar="MINUTES",
        help="how long --allocation search may search, short for --allocation-set minutes=MINUTES",
    )


def _transform_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("transforms")
    group.add_argument(
        "--transform", action="extend", nargs="+", metavar="NAME",
        help="change the dense model first so that it computes the same and prunes better: fold, rotate, "
        "permute, or none (none)",
    )  # fmt: skip
    group.add_argument(
        "--transform-set", action="append", default=[], metavar="KEY=VALUE", help="of those"
    )


def _calibration_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration",
        help="wikitext2, c4, ptb, a dataset id, a .txt/.jsonl/.parquet file, .npy ids, or demo "
        "(wikitext2; demo for --model demo)",
    )
    group.add_argument("--text-column", help="column of the dataset or file that holds the text")
    group.add_argument("--samples", type=int, help="windows of tokens (128)")
    group.add_argument(
        "--generate",
        type=float,
        metavar="SHARE",
        help="calibrate also on windows that the dense model writes itself, so many for each of those "
        "(0): a long --repair of few windows is better for it",
    )
    group.add_argument(
        "--seqlen",
        type=int,
        help="tokens per window, also for perplexity (min(2048, the model's limit))",
    )
    group.add_argument("--seed", type=int, default=0, help="of the choice of windows (0)")
    group.add_argument("--batch-size", type=int, help="windows at once (what suits the device)")
    group.add_argument(
        "--calibrate-all-experts",
        action="store_true",
        help="mixtures of experts: let every expert learn from all tokens, not only from those that "
        "its router sends it (the model's outputs stay the routed ones)",
    )
    group.add_argument(
        "--sums",
        choices=("float32", "float64"),
        default="float32",
        help="sum statistics in; float64 gives the same masks on any number of processes (float32)",
    )


def _result_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("result")
    group.add_argument("--save", type=Path, metavar="DIR", help="write the checkpoint here")
    group.add_argument(
        "--format",
        choices=("dense", "sparse"),
        default="dense",
        help="dense: an ordinary checkpoint, zeros included, that anything can load; sparse: without the "
        "zeros, for `import llmprune` alone, and both are on the disk for a moment (dense)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace DIR if it is a checkpoint")
    group.add_argument(
        "--max-shard-size", default="5GB", help="largest file of the checkpoint (5GB)"
    )
    group.add_argument(
        "--restart",
        action="store_true",
        help="discard an unfinished run to DIR; without it the same command goes on where it stopped",
    )
    group.add_argument("--push-to-hub", metavar="USER/NAME", help="upload the checkpoint")
    group.add_argument("--private", action="store_true", help="make the pushed repository private")
    group.add_argument(
        "--plot", type=Path, metavar="PNG", help="picture of sparsity and error per layer"
    )
    group.add_argument(
        "--eval-dataset",
        help="perplexity before and after on this (wikitext2; demo for --model demo)",
    )
    group.add_argument("--no-eval", action="store_true", help="measure no perplexity")
