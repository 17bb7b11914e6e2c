"""Tiny checkpoints on disk, and runs of the command line on them whose results can be compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from llmprune.checkpoint.journal import Journal
from llmprune.cli import main

WORDS = [f"w{i}" for i in range(60)]
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


def add_tokenizer(folder: Path) -> None:
    """Words `w0` ... `w59`."""
    words = {word: i for i, word in enumerate(["<unk>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(folder)


def save_llama(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Four random blocks."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes})).to(dtype).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def save_mixtral(folder: Path) -> Path:
    """Four random blocks of four experts, fused in the model and apart in the files."""
    torch.manual_seed(0)
    config = MixtralConfig(**SHAPE, num_local_experts=4)
    MixtralForCausalLM(config).bfloat16().save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def write_text(path: Path, count: int = 4000) -> Path:
    """Words that the tokenizer knows."""
    path.write_text(" ".join(WORDS[(i * i + 7 * i) % 60] for i in range(count)))
    return path


def content(folder: Path) -> dict[str, Any]:
    """Every file of a checkpoint; the report without what a clock said."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.name == "llmprune.json":
            found[path.name] = timeless(json.loads(path.read_text()))
        elif path.is_file() and path.name != "README.md":  # the card holds the command
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def timeless(plain: Any) -> Any:
    """A report without seconds."""
    if isinstance(plain, dict):
        clocks = ("seconds", "tokens_per_second")
        return {k: timeless(v) for k, v in plain.items() if k not in clocks}
    return [timeless(v) for v in plain] if isinstance(plain, list) else plain


def same(one: Path, two: Path) -> None:
    """Two checkpoints hold the same bytes."""
    left, right = content(one), content(two)
    assert left.keys() == right.keys()
    assert [name for name in left if left[name] != right[name]] == []


def figures(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    """The JSON that a command prints."""
    assert main([*map(str, argv), "--json", "--quiet"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


class Runs:
    """Runs of one command line in a folder; `peace` is the result of one that nothing disturbed."""

    def __init__(self, folder: Path, model: Path, text: Path, options: Sequence[object]) -> None:
        self.folder = folder
        self.model = model
        self.out = folder / "out"
        self.unfinished = folder / ".out.unfinished"
        self.argv = [
            *("--model", model, "--calibration", text, "--samples", 40, "--save", self.out),
            *options,
        ]

    def __call__(self, *more: object) -> int:
        """The same command, with `more` behind it (the last of an option counts)."""
        return main([str(a) for a in (*self.argv, *more)])

    def shards(self) -> list[Path]:
        """Output files of the unfinished run."""
        return sorted((self.unfinished / "checkpoint").glob("*.safetensors"))

    def leftovers(self) -> list[str]:
        """Everything beside the result."""
        return [p.name for p in self.folder.iterdir() if p != self.out]


@contextmanager
def interrupted(step: str) -> Iterator[None]:
    """While open, Ctrl-C comes as soon as `step` is in the journal."""
    add = Journal.add

    def then_stop(self: Journal, name: str, entry: Any) -> None:
        add(self, name, entry)
        if name == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", then_stop)
        yield


def flip(path: Path, at: int) -> None:
    """Change one bit."""
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def peaceful(make: Callable[[Path], Runs], folder: Path) -> Path:
    """The result of an undisturbed run, moved away."""
    runs = make(folder)
    assert runs() == 0
    return Path(shutil.move(runs.out, folder / "peace"))
