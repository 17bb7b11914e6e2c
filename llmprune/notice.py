"""What a model card says of the sparse format, put in when a checkpoint is packed and taken out again."""

from __future__ import annotations

import re

ANYWHERE = "path/to/this/folder"
_BEGIN = "> **This checkpoint needs `import llmprune`.**"
_TAG = "- llmprune-sparse-format\n"
_SIZES = "\n## Size\n\n| weights | dense | stored here |\n"
_DENSE_LOAD = re.compile(
    r"from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    r"model = AutoModelForCausalLM\.from_pretrained\((.*)\)\n"
)
_SPARSE_LOAD = re.compile(
    r"import llmprune\nfrom transformers import AutoTokenizer\n\nmodel = llmprune\.load\((.*)\)\n"
)
DENSE_LIMITS = """\
The zeros are stored like any other weight: the files are as large as the dense model's, and dense
kernels run as fast as before. Speed and memory are gained only by a runtime that makes use of the
zeros."""
SPARSE_LIMITS = """\
The zeros are not stored, and `llmprune.load` keeps them out of memory too. Expanded to a dense
checkpoint, the model is as large as before, and dense kernels run as fast as before."""


def to_sparse(card: str, name: str, sizes: str) -> str:
    """A card of a dense checkpoint as that of the same one in the sparse format.

    Args:
        card: text of README.md, which may be empty.
        name: Hub id or folder to load it from.
        sizes: rows of a table of weights, bytes dense and bytes stored.
    """
    card = to_dense(card)
    card = _DENSE_LOAD.sub(
        r"import llmprune\nfrom transformers import AutoTokenizer\n\nmodel = llmprune.load(\1)\n",
        card,
    )
    card = card.replace(DENSE_LIMITS, SPARSE_LIMITS).replace("\ntags:\n", f"\ntags:\n{_TAG}", 1)
    line = (
        f"{_BEGIN} Its pruned matrices are stored packed, which transformers alone cannot read and would "
        f'replace by random weights. Load it with `llmprune.load("{name}")`, or expand it into an '
        f"ordinary checkpoint with `python -m llmprune convert {name} DIR --format dense`."
    )
    front = re.match(r"---\n.*?\n---\n", card, re.DOTALL)
    table = f"{_SIZES}|---|---|---|\n{sizes}\n"
    if front is None:
        return f"{line}\n\n{card}{table}"
    return f"{front[0]}\n{line}\n{card[front.end() :]}{table}"


def to_dense(card: str) -> str:
    """The inverse of `to_sparse`; a card without its texts stays as it is."""
    mark = re.escape(_BEGIN)
    card = re.sub(rf"\A{mark}[^\n]*\n\n|\n{mark}[^\n]*\n", "", card, count=1)
    card = re.sub(rf"{re.escape(_SIZES)}(\|[^\n]*\n)*", "", card, count=1)
    card = card.replace(SPARSE_LIMITS, DENSE_LIMITS).replace(f"\ntags:\n{_TAG}", "\ntags:\n", 1)
    return _SPARSE_LOAD.sub(
        r"from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        r"model = AutoModelForCausalLM.from_pretrained(\1)\n",
        card,
    )
