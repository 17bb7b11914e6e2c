"""The options of the commands that prune nothing: names, defaults and what `--help` says of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmprune.options import model_options, output_options, parser_for


def eval_parser() -> argparse.ArgumentParser:
    """Options of `python -m llmprune eval`."""
    parser = parser_for(
        "python -m llmprune eval",
        "Perplexity by the papers' protocol (the split joined, tokenised once, disjoint windows, tail "
        "dropped), or with --tasks whatever lm-eval offers.",
    )
    model_options(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--dataset", help="wikitext2, c4, ptb, a dataset id, a file, .npy ids or demo (wikitext2)"
    )
    group.add_argument("--text-column", help="column of the dataset or file that holds the text")
    group.add_argument(
        "--seqlen", type=int, help="tokens per window (min(2048, the model's limit))"
    )
    group.add_argument("--batch-size", type=int, help="windows at once (what suits the device)")
    group.add_argument("--bos", action="store_true", help="begin every window with the BOS token")
    group.add_argument(
        "--tasks",
        action="extend",
        nargs="+",
        metavar="TASK",
        help="tasks of lm-eval (extra [eval])",
    )
    group.add_argument("--limit", type=int, help="examples per task of lm-eval")
    group.add_argument("--num-fewshot", type=int, help="examples in the prompt of lm-eval's tasks")
    output_options(parser)
    return parser


def convert_parser() -> argparse.ArgumentParser:
    """Options of `python -m llmprune convert`."""
    parser = parser_for(
        "python -m llmprune convert",
        "Store a checkpoint without its zeros (--format sparse), or with them again (--format dense): "
        "tensor by tensor, compared bit for bit before it is put in place. A sparse checkpoint needs "
        "`import llmprune` to be loaded.",
    )
    parser.add_argument("source", metavar="IN", help="folder or Hub id")
    parser.add_argument("target", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("--format", required=True, choices=("sparse", "dense"), help="of OUT")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file of OUT (5GB)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT if it is a checkpoint"
    )
    output_options(parser)
    return parser
