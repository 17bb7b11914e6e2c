"""Pruning on a GPU: first that it is right, then how long it takes.

Right: a small float32 Llama pruned on the device and on the CPU keeps the same weights (at least 99.9%; the
two round differently). Seconds: a bf16 Llama of two Llama-3-8B-shaped blocks, for each method, against two
plain forward passes over the same windows in the same process, interleaved; medians of `--repeats`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import llmprune
from llmprune.memory import default_batch
from llmprune.provenance import versions

CASES = (("wanda", "0.5"), ("wanda", "2:4"), ("sparsegpt", "0.5"), ("sparsegpt", "2:4"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a rehearsal with tiny shapes")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    agreement = {f"{m} {p}": _agreement(m, p, args.device) for m, p in CASES}
    wrong = {case: share for case, share in agreement.items() if share < 0.999}
    if wrong:
        raise SystemExit(f"masks differ between the CPU and {args.device}: {wrong}")
    rows = _seconds(args)
    result = {
        "versions": versions(torch.device(args.device)),
        "small": args.small,
        "agreement_with_cpu": agreement,
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    for row in rows:
        print(f"{row['case']:<16} {row['seconds']:>8.2f} s   peak {row['peak_gb']:.1f} GB")


def _agreement(method: str, pattern: str, device: str) -> float:
    """Share of weights on which the masks from the CPU and from `device` agree."""
    masks = []
    for where in ("cpu", device):
        torch.manual_seed(0)
        model = _llama(256, 704, 3, 512).to(where)
        ids = torch.randint(0, 512, (16, 128), generator=torch.Generator().manual_seed(1))
        llmprune.prune(model, calibration=ids, method=method, sparsity=pattern, progress=False)
        masks.append({k: v.cpu() for k, v in llmprune.masks(model).items()})
    same = sum(int((masks[0][k] == masks[1][k]).sum()) for k in masks[0])
    return same / sum(m.numel() for m in masks[0].values())


def _seconds(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Median seconds of the floor and of every case, in turn."""
    torch.manual_seed(0)
    shape = (256, 704, 2, 512) if args.small else (4096, 14336, 2, 32000)
    model = _llama(*shape).to(args.device, torch.bfloat16)
    windows, seqlen = (8, 128) if args.small else (128, 2048)
    ids = torch.randint(0, shape[3], (windows, seqlen), generator=torch.Generator().manual_seed(1))
    dense = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
    jobs: dict[str, Callable[[], object]] = {"floor": lambda: _forward_twice(model, ids)}
    for method, pattern in CASES:
        jobs[f"{method} {pattern}"] = lambda m=method, p=pattern: llmprune.prune(
            model, calibration=ids, method=m, sparsity=p, progress=False
        )
    times: dict[str, list[float]] = {name: [] for name in jobs}
    peaks: dict[str, float] = {}
    for _ in range(args.repeats):
        for name, job in jobs.items():
            model.load_state_dict(dense)
            seconds, peaks[name] = _timed(job, args.device)
            times[name].append(seconds)
    return [
        {"case": name, "seconds": statistics.median(t), "all": t, "peak_gb": peaks[name]}
        for name, t in times.items()
    ]


def _timed(job: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds of `job` and the peak of device memory in GB, 0 on a CPU."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    job()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun, torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0


def _forward_twice(model: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        for _ in range(2):
            for batch in ids.split(default_batch(model.device, ids.shape[1])):
                model.model(input_ids=batch.to(model.device), use_cache=False)


def _llama(hidden: int, intermediate: int, blocks: int, vocabulary: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=blocks,
            num_attention_heads=hidden // 32 if hidden < 1024 else hidden // 128,
            num_key_value_heads=4 if hidden < 1024 else 8,
            vocab_size=vocabulary,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    ).eval()


if __name__ == "__main__":
    main()
