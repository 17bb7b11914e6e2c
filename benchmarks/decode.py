"""A Llama's greedy decoding as a serving stack does it: static cache, one CUDA graph for a step.

The linear layers, norms and embeddings are those of a transformers model, whatever stands in their place;
what lies between them is here, the same for every contender: the cache is written where it lies, rotation and
SiLU-mul are compiled on a GPU, attention is torch's. Logits are held against the model's own forward
(tests/test_benchmarks.py, and end_to_end.py before it measures).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

# Not cuDNN's: which masks it takes differs from version to version.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def rotate(
    q: Tensor,  # [batch, tokens, heads, features]
    k: Tensor,  # [batch, tokens, kv_heads, features]
    cos: Tensor,  # [tokens, features]
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """Rotary positions, halves of the features against each other."""
    cos, sin = cos[:, None], sin[:, None]
    turned = []
    for part in (q, k):
        first, second = part.chunk(2, -1)
        turned.append(part * cos + torch.cat((-second, first), -1) * sin)
    return turned[0], turned[1]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up."""
    return functional.silu(gate) * up


Between = tuple[Callable[..., Any], Callable[..., Any]]
"""`rotate` and `swiglu`, compiled or not."""


class Decoder:
    """Greedy decoding of one batch of equally long prompts."""

    def __init__(
        self, model: Any, batch: int, length: int, between: Between = (rotate, swiglu)
    ) -> None:
        """A cache for `batch` sequences of `length` tokens, prompt and all."""
        self.model, self.rotate, self.swiglu = model, *between
        config, weight = model.config, model.lm_head.weight
        self.kv_heads = config.num_key_value_heads
        self.features = config.head_dim
        shape = (config.num_hidden_layers, 2, batch, self.kv_heads, length, self.features)
        self.cache = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
        positions = torch.arange(length, device=weight.device)
        cos, sin = model.model.rotary_emb(self.cache, positions[None])
        self.cos, self.sin, self.positions = cos[0], sin[0], positions
        self.token = torch.zeros(batch, 1, device=weight.device, dtype=torch.long)
        self.at = torch.zeros(1, device=weight.device, dtype=torch.long)

    @torch.no_grad()
    def prefill(
        self,
        ids: Tensor,  # [batch, tokens]
    ) -> Tensor:
        """Fill the cache with a prompt; logits [batch, vocabulary] of what follows, the best taken."""
        tokens = ids.shape[1]
        logits = self._forward(ids, self.positions[:tokens], None)
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.at.fill_(tokens)
        return logits

    @torch.no_grad()
    def step(self) -> Tensor:
        """The logits behind `token` at position `at`; takes the best and moves on. Waits for nothing."""
        mask = torch.zeros(
            1, 1, 1, len(self.positions), device=self.at.device, dtype=self.cache.dtype
        )
        mask = mask.masked_fill(self.positions > self.at, float("-inf"))
        heads = self.model.config.num_attention_heads // self.kv_heads
        mask = mask.repeat(len(self.token), self.kv_heads, heads, 1)
        logits = self._forward(self.token, self.at, mask)
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.at.add_(1)
        return logits

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Logits of the last token; without a mask, of a prompt from position 0 on."""
        with sdpa_kernel(BACKENDS):
            return self._logits(ids, positions, mask)

    def _logits(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        model = self.model.model
        cos, sin = self.cos[positions], self.sin[positions]
        hidden = functional.embedding(ids, model.embed_tokens.weight)
        for layer, cache in zip(model.layers, self.cache, strict=True):
            hidden = hidden + self._attention(
                layer.self_attn,
                _norm(layer.input_layernorm, hidden),
                cos,
                sin,
                cache,
                positions,
                mask,
            )
            inside = _norm(layer.post_attention_layernorm, hidden)
            mlp = layer.mlp
            hidden = hidden + mlp.down_proj(self.swiglu(mlp.gate_proj(inside), mlp.up_proj(inside)))
        logits: Tensor = self.model.lm_head(_norm(model.norm, hidden[:, -1]))
        return logits

    def _attention(
        self,
        attention: nn.Module,
        inside: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,  # [2, batch, kv_heads, length, features]
        positions: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        layers: Any = attention
        batch, tokens = inside.shape[:2]
        shape = (batch, tokens, -1, self.features)
        q, k = self.rotate(
            layers.q_proj(inside).view(shape), layers.k_proj(inside).view(shape), cos, sin
        )
        v = layers.v_proj(inside).view(shape)
        for into, part in zip(cache, (k, v), strict=True):
            into.index_copy_(2, positions, part.transpose(1, 2))
        attend = functional.scaled_dot_product_attention
        if mask is None:
            k, v = (part.transpose(1, 2) for part in (k, v))
            groups = q.shape[2] // self.kv_heads
            k, v = (part.repeat_interleave(groups, 1) for part in (k, v))
            out = attend(q.transpose(1, 2), k, v, is_causal=True).transpose(1, 2)
        else:  # one token: the heads that share keys are as tokens that see the same
            q = q.view(batch, self.kv_heads, -1, self.features)
            out = attend(q, cache[0], cache[1], attn_mask=mask)
        projected: Tensor = layers.o_proj(out.reshape(batch, tokens, -1))
        return projected


def _norm(norm: Any, hidden: Tensor) -> Tensor:
    return functional.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def record(decoder: Decoder) -> Callable[[], object]:
    """What makes a step: on a GPU, the replay of a graph, recorded at the position where decoding is.

    Raises:
        RuntimeError: when something cannot be captured.
    """
    if decoder.cache.device.type == "cpu":
        return decoder.step
    at, token = decoder.at.clone(), decoder.token.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and reserves what libraries want
        for _ in range(2):
            decoder.step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.step()
    decoder.at.copy_(at)
    decoder.token.copy_(token)
    return graph.replay
