"""A tokenizer of whole words and a Llama of a few thousand weights, made on the spot."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 60
BOS, EOS, UNK = 0, 1, 2


def word_tokenizer(eos: bool = True) -> Any:
    """`w0` ... `w59` are ids 3 to 62; special tokens, when asked for, put BOS first."""
    vocabulary = {"<s>": BOS, "</s>": EOS, "<unk>": UNK}
    vocabulary |= {f"w{i}": i + 3 for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    special = {"eos_token": "</s>"} if eos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        unk_token="<unk>",
        model_max_length=8,
        **special,
    )


def words(start: int, count: int) -> str:
    """`count` words that go on counting from `start`, so that every window shows its place."""
    return " ".join(f"w{i % WORDS}" for i in range(start, start + count))


def llama(seed: int = 0) -> Any:
    """Two random blocks of width 16, in float32, in training mode with dropout."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS + 3,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        attention_dropout=0.5,
        initializer_range=0.5,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)
