r"""What a quality costs beside SparseGPT, by how many windows there are and how wide the model is.

    python benchmarks/quality_cost.py --model DIR --windows ids.npy --counts 16 32 64 128 \
        --width 1024 --out benchmarks/results/quality-cost.json

For each number of windows and pattern the qualities are run in turn on the same model, each after SparseGPT
alone, on one thread, by the processor's clock: a pair is told by its ratio, as machines are noisy. What grows
with the windows (forward passes, a repair) and what does not (ALPS) are told apart by `--counts`. `--width`
adds a Llama of random weights and two blocks, with windows of random ids: its perplexity means nothing, its
time does. Rows that `--out` holds already stay.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import llmprune
from llmprune.provenance import versions

BLOCKS, VOCABULARY = 2, 512  # of a random model: its head is to weigh little
HEAD = 64  # features


def main() -> None:
    """Measure every pair that is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, nargs="*", default=[], help="local checkpoints")
    parser.add_argument("--windows", type=Path, help=".npy of ids [n, seqlen] for --model")
    parser.add_argument("--width", type=int, nargs="*", default=[], help="of random models")
    parser.add_argument("--seqlen", type=int, default=256, help="of a random model's windows")
    parser.add_argument("--counts", type=int, nargs="+", default=[32, 128], help="of windows")
    parser.add_argument("--patterns", nargs="+", default=["0.7", "2:4"])
    parser.add_argument("--qualities", nargs="+", default=["balanced"])
    parser.add_argument("--out", type=Path, required=True, help="JSON with everything")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    for name, make, windows in models(args):
        for quality in args.qualities:  # once unmeasured: what is loaded late is loaded then
            seconds(make(), windows[:2], args.patterns[0], quality=quality)
        for count in sorted({min(count, len(windows)) for count in args.counts}):
            for pattern in args.patterns:
                for quality in args.qualities:
                    key = {"model": name, "windows": count, "seqlen": windows.shape[1]}
                    key |= {"pattern": pattern, "quality": quality}
                    if any(row.items() >= key.items() for row in rows):
                        continue
                    plain = seconds(make(), windows[:count], pattern, method="sparsegpt")
                    whole = seconds(make(), windows[:count], pattern, quality=quality)
                    found = {"sparsegpt": round(plain, 2), "seconds": round(whole, 2)}
                    rows.append({**key, **found, "times": round(whole / plain, 2)})
                    print(json.dumps(rows[-1]), flush=True)
                    args.out.write_text(text(rows))


def models(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any], Tensor]]:
    """The name of each model, how to make it, and all of its windows [n, seqlen] int64."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    for path in args.model:
        ids = torch.from_numpy(np.load(args.windows)).long()
        yield (
            path.name,
            lambda p=path: AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32),
            ids,
        )
    for width in args.width:
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=width * 11 // 4,
            num_hidden_layers=BLOCKS,
            num_attention_heads=max(1, width // HEAD),
            num_key_value_heads=max(1, width // HEAD // 4),
            vocab_size=VOCABULARY,
            max_position_embeddings=args.seqlen,
        )
        torch.manual_seed(0)
        ids = torch.randint(0, VOCABULARY, (max(args.counts), args.seqlen))
        yield f"random, width {width}", lambda c=config: LlamaForCausalLM(c).float(), ids


def seconds(model: Any, windows: Tensor, pattern: str, **how: Any) -> float:
    """The processor's seconds for pruning a model that is there already."""
    torch.manual_seed(0)
    begun = time.process_time()
    llmprune.prune(model.eval(), calibration=windows, sparsity=pattern, progress=False, **how)
    return time.process_time() - begun


def text(rows: list[dict[str, Any]]) -> str:
    """The file: what the figures depend on, then a line for each row."""
    from compare import _commit

    about = {
        "clock": "processor, one thread",
        "load": [round(load, 1) for load in os.getloadavg()],
        "versions": versions(torch.device("cpu")),
        "commit": _commit(),
        "command": "benchmarks/quality_cost.py",
    }
    lines = ",\n".join(map(json.dumps, rows))
    return f'{json.dumps(about)[:-1]}, "rows": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    main()
