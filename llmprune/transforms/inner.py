"""Matrices that face each other inside a block, across an activation or an attention, told by their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from llmprune.transforms.cells import Site

_ATTENTION = (("v_proj", "q_proj"), ("qkv_proj",), ("c_attn",), ("query_key_value",), ("Wqkv",))
_OUT = ("o_proj", "out_proj", "c_proj", "dense", "Wo")
_FEATURES = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("gate_up_proj",), "down_proj"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("fc_in",), "fc_out"),
)


@dataclass(frozen=True)
class Values:
    """The values of an attention: rows of one matrix, columns of another.

    Attributes:
        name: of the attention.
        source: the matrix that makes them.
        first: its first row of values.
        out: the matrix that reads them.
        heads: number of key-value heads.
        group: how many heads of `out` read each.
        width: of a head.
        clipped: whether its config cuts off large values, which a rotation would change.
    """

    name: str
    source: Site
    first: int
    out: Site
    heads: int
    group: int
    width: int
    clipped: bool = False


@dataclass(frozen=True)
class Features:
    """The intermediate features of a feed-forward: rows of some matrices, columns of another.

    Attributes:
        name: of the matrix that reads them.
        sources: matrices with the first row that makes feature 0.
        out: the matrix that reads them.
    """

    name: str
    sources: tuple[tuple[Site, int], ...]
    out: Site


def find_values(root: nn.Module, prefix: str, sites: Mapping[str, Site]) -> Iterator[Values]:
    """The values of the attentions in block `root`, called `prefix`; `sites` are its matrices by name."""
    for name, module in root.named_modules():
        inside = f"{prefix}.{name}" if name else prefix
        have = {child: sites[f"{inside}.{child}"] for child, _ in module.named_children()
                if f"{inside}.{child}" in sites}  # fmt: skip
        out = next((have[o] for o in _OUT if o in have), None)
        names = next((n for n in _ATTENTION if set(n) <= have.keys()), None)
        if out is None or names is None:
            continue
        source, columns = have[names[0]], out.shape[1]
        width = getattr(module, "head_dim", None) or _head(module, columns)
        if not isinstance(width, int) or columns % width:
            continue
        heads = columns // width
        rows = source.shape[0] if len(names) == 2 else (source.shape[0] - columns) // 2
        if rows > 0 and rows % width == 0 and heads % (rows // width) == 0:
            kv = rows // width
            first, group = source.shape[0] - rows, heads // kv
            yield Values(inside, source, first, out, kv, group, width, _clips(module))


def _clips(module: nn.Module) -> bool:
    """Whether the config of an attention asks for values between two bounds."""
    config = getattr(module, "config", None)
    inner = getattr(config, "attn_config", None)
    return any(getattr(c, "clip_qkv", None) is not None for c in (config, inner))


def _head(module: nn.Module, columns: int) -> int:
    """Width of a head where the attention does not say it: its config's."""
    config = getattr(module, "config", None)
    count = getattr(config, "num_attention_heads", None) or getattr(module, "num_heads", None)
    return columns // count if isinstance(count, int) and count else columns + 1


def find_features(root: nn.Module, prefix: str, sites: Mapping[str, Site]) -> Iterator[Features]:
    """The features of the feed-forwards in a block called `prefix`, whose matrices are `sites` by name."""
    for name, module in root.named_modules():
        inside = f"{prefix}.{name}" if name else prefix
        have = {child: sites[f"{inside}.{child}"] for child, _ in module.named_children()
                if f"{inside}.{child}" in sites}  # fmt: skip
        for sources, last in _FEATURES:
            if last not in have or not set(sources) <= have.keys():
                continue
            count = have[last].shape[1]
            rows = [
                (have[s], first) for s in sources for first in range(0, have[s].shape[0], count)
            ]
            if all(s.shape[0] % count == 0 for s, _ in rows):
                yield Features(have[last].name, tuple(rows), have[last])
            break
