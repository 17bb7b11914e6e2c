r"""Train a small model of another family than wikillama-5m, so that nothing is tuned to one model.

    python benchmarks/second_family.py --train train.txt --validation validation.txt \
        --minutes 30 --out DIR [--shape gpt2]

`qwen3`: gains on queries and keys, four query heads to a key head, heads wider together than the model, tied
embeddings. `gpt2`: biases, LayerNorm, learnt positions, and fused matrices stored the other way round. Each
has a byte-level BPE of its own, learnt on the training text. The data is WikiText-2 as one article line per
line; windows are drawn anew in every epoch, from `--seed`.

`--minutes` are of one processor: the first steps are timed and the run is laid out to fill them; `--steps`
lays it out instead, and gives the same model again on the same machine. At the end: perplexity on the whole
validation text in disjoint windows. `training.json` beside the weights says how it was made.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llmprune.demo.train import END, byte_level_bpe, schedule, window_loss
from llmprune.eval.perplexity import perplexity
from llmprune.provenance import versions

VOCABULARY = 2048
WINDOW = 256  # tokens
BATCH = 8  # windows
RATE = 5e-3  # that of the demo model, for Muon with its update scaled to AdamW's
TIMED = 20  # steps that are timed before the run is laid out; the first is left out
COMPILED = 300  # steps from which on compiling pays: a minute once, against a fifth of each step


def main() -> None:
    """Train, save, and say how good it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--train", type=Path, required=True, help="text to learn from")
    parser.add_argument("--validation", type=Path, required=True, help="text to be judged on")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3")
    parser.add_argument("--minutes", type=float, default=30, help="of one processor")
    parser.add_argument("--steps", type=int, help="instead of --minutes")
    parser.add_argument("--rate", type=float, default=RATE, help="highest learning rate")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="float32",
        help="to compute in; bfloat16 is faster only where the processor has it, else many times slower",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    tokenizer = new_tokenizer(args.train)
    ids, unseen = encoded(tokenizer, args.train), encoded(tokenizer, args.validation)
    model = SHAPES[args.shape](len(tokenizer))
    begun = time.process_time()
    steps = train(model, ids, args)
    seconds = time.process_time() - begun
    model.eval().to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    found = perplexity(model.float(), unseen, seqlen=WINDOW, dataset="validation")
    about = {
        "shape": args.shape,
        "parameters": model.num_parameters(),
        "steps": steps,
        "tokens": steps * BATCH * WINDOW,
        "epochs": round(steps * BATCH * WINDOW / len(ids), 2),
        "rate": args.rate,
        "dtype": args.dtype,
        "seed": args.seed,
        "processor seconds": round(seconds),
        "validation perplexity": round(found.perplexity, 3),
        "standard error": round(found.standard_error, 3),
        "versions": versions(torch.device("cpu")),
    }
    (args.out / "training.json").write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(about))


def new_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCABULARY` tokens on the lines of a text."""
    tokenizer = byte_level_bpe(path.read_text().splitlines(keepends=True), VOCABULARY)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, clean_up_tokenization_spaces=False
    )


def encoded(tokenizer: PreTrainedTokenizerFast, path: Path) -> Tensor:
    """A text file as one row of ids [tokens] int64."""
    return torch.tensor(tokenizer(path.read_text(), add_special_tokens=False).input_ids)


def qwen3(vocabulary: int) -> nn.Module:
    """A freshly drawn Qwen3 of 1.2 million parameters."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=2 * WINDOW,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="eager",  # faster than sdpa on one core: short windows
        )
    )


def gpt2(vocabulary: int) -> nn.Module:
    """A freshly drawn GPT-2 of 3.2 million parameters."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=2 * WINDOW,
            n_embd=128,
            n_layer=4,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="eager",
        )
    )


SHAPES = {"qwen3": qwen3, "gpt2": gpt2}


def windows(ids: Tensor, seed: int) -> Iterator[Tensor]:
    """Endless int64 [BATCH, WINDOW + 1]: each epoch cuts the text elsewhere and draws in another order."""
    random = torch.Generator().manual_seed(seed)
    while True:
        start = int(torch.randint(WINDOW, (), generator=random))
        cut = ids[start : start + (len(ids) - start - 1) // WINDOW * WINDOW + 1].unfold(
            0, WINDOW + 1, WINDOW
        )
        yield from cut[torch.randperm(len(cut), generator=random)].split(BATCH)


def optimizers(model: nn.Module, rate: float, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """AdamW for embeddings, gains and biases; for the matrices of the blocks Muon, which computes in bfloat16
    whatever it is given, so that AdamW has them too where that is to be avoided.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in tables]
    rest = [p for p in model.parameters() if p.ndim == 1 or id(p) in tables]
    few: dict[str, Any] = {"lr": rate, "betas": (0.9, 0.95), "fused": True}
    opts: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, weight_decay=0.0, **few)]
    if dtype is torch.float32:
        return [*opts, torch.optim.AdamW(matrices, weight_decay=0.1, **few)]
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [*opts, muon]


def train(model: Any, ids: Tensor, args: argparse.Namespace) -> int:
    """Train in place, with float32 weights; gives the number of steps."""
    dtype = getattr(torch, args.dtype)
    opts = optimizers(model, args.rate, dtype)
    model.train()
    steps, begun = args.steps, 0.0
    short = steps is not None and steps < COMPILED
    loss_of = window_loss if short else torch.compile(window_loss, dynamic=False)
    for step, batch in enumerate(windows(ids, args.seed)):
        if step == 1:
            begun = time.process_time()
        if steps is None and step == TIMED + 1:
            each = (time.process_time() - begun) / TIMED
            steps = max(step + 1, int(args.minutes * 60 / each))
            print(f"{each:.3f} s a step, so {steps} steps", flush=True)
        for opt in opts:
            for group in opt.param_groups:  # warming up until the length is known
                group["lr"] = args.rate * schedule((step + 1) / (steps or 100 * TIMED))
        loss = loss_of(model, batch, dtype)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
        if steps is not None and step + 1 >= steps:
            return int(steps)
    raise AssertionError("windows never end")


if __name__ == "__main__":
    main()
