"""Train the demo model from nothing: `python -m llmprune.demo.train OUT`.

The weights in `model/` are one run of the defaults (6,500 steps of 8 windows of 256 tokens, 13.3
million tokens, seed 0, one thread): 1,947 s on a shared two-core AMD EPYC virtual machine, torch 2.13.
Held-out perplexity 2.573 with a standard error of 0.007 (603 windows of the test split); pruned to 60%:
SparseGPT 2.849, Wanda 3.149, magnitude 3.896. Another machine or torch version rounds differently, so
it reproduces the quality, not the bits.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmprune.demo.text import documents, text

VOCABULARY = 1280
WINDOW = 256  # tokens
BATCH = 8  # windows; 16 looked slower per token early on, not run to the end
UNEVEN = 0.7  # standard deviation of the logarithm of a norm's first gains
END = "<|endoftext|>"


def byte_level_bpe(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE of `vocabulary` tokens, `END` among them, learnt from texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCABULARY` tokens on four million characters of training text."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(islice(documents("train"), 2000), VOCABULARY),
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def new_model() -> LlamaForCausalLM:
    """A freshly drawn Llama of 0.95 million parameters.

    The gains of the norms inside the blocks are drawn unevenly (log-normal, mean square one), to
    stand in for the features of very uneven size that large models grow. One run without this (six
    blocks, width 192, 1,300 steps) had Wanda no better than magnitude at 60%: 3.060 to 3.040, each
    with a standard error of 0.02. Size changed too, so how much is due to the gains is not known.
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        use_cache=True,
    )
    config._attn_implementation = "eager"  # faster than sdpa here: short windows, one CPU core
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, gain in model.named_parameters():
            if "layers" in name and gain.ndim == 1:
                gain.copy_(torch.exp(UNEVEN * torch.randn_like(gain) - UNEVEN**2))
    return model


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Tensor]:
    """Endless int64 [BATCH, WINDOW + 1] of training stories, never the same story twice.

    Stories are parted by an empty line as in `text`; every fourth by the end token instead, so
    that the model knows it.
    """
    need = BATCH * (WINDOW + 1)
    stock: list[int] = []
    stories = documents("train", seed)
    while True:
        while len(stock) < need:
            some = [story + "\n\n" for story in islice(stories, 64)]
            some = [s.rstrip("\n") + END if i % 4 == 3 else s for i, s in enumerate(some)]
            for ids in tokenizer(some)["input_ids"]:
                stock += ids
        yield torch.tensor(stock[:need]).view(BATCH, WINDOW + 1)
        del stock[:need]


def optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def schedule(done: float) -> float:
    """Learning-rate factor at a share `done` of the run: 2% warm-up, then a cosine to zero."""
    return min(done / 0.02, 1.0) * 0.5 * (1 + math.cos(math.pi * done))


def window_loss(
    model: LlamaForCausalLM, ids: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Mean cross-entropy of int64 windows [n, WINDOW + 1], computed in bfloat16 or as it is told."""
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, rate: float, seed: int
) -> None:
    """Train `model` in place, in bfloat16 with float32 weights."""
    opts = optimizers(model, rate)
    model.train()
    loss_of = torch.compile(window_loss, dynamic=False)  # measured a fifth faster than eager
    bar = tqdm(islice(batches(tokenizer, seed), steps), total=steps, unit="step")
    for step, ids in enumerate(bar):
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = rate * schedule((step + 1) / steps)
        loss = loss_of(model, ids)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.inference_mode()
def perplexity(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, windows: int = 200
) -> tuple[float, float]:
    """Perplexity on held-out text in windows of `WINDOW` tokens, and its standard error."""
    ids = torch.tensor(tokenizer(text("test", windows * WINDOW * 8))["input_ids"])
    ids = ids[: windows * WINDOW].view(windows, WINDOW)
    model.eval()
    losses = []
    for part in torch.split(ids, 20):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), part[:, 1:], reduction="none"
        )
        losses.append(loss.mean(1))
    nll = torch.cat(losses)
    value = math.exp(nll.mean().item())
    return value, value * nll.std().item() / math.sqrt(windows)


def main() -> None:
    """Parse the command line, train, save and say how good the model is."""
    parser = argparse.ArgumentParser(
        prog="python -m llmprune.demo.train", description="Train the demo model from nothing."
    )
    parser.add_argument("out", type=Path, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--rate", type=float, default=5e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    tokenizer = train_tokenizer()
    model = new_model()
    train(model, tokenizer, args.steps, args.rate, args.seed)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    seconds = time.perf_counter() - start
    value, error = perplexity(model.float(), tokenizer)
    print(f"{args.steps} steps, {seconds:.0f} s, held-out perplexity {value:.3f} ± {error:.3f}")


if __name__ == "__main__":
    main()
