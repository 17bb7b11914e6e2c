r"""Side by side: llmprune, llm-compressor and the floor, same model, same windows, one run.

    python benchmarks/compare.py --other-python VENV/bin/python --model DIR --windows ids.npy \
        --test test_ids.npy --out benchmarks/results/NAME.json

Every contender runs in a process of its own, in turn, `--repeats` times; per contender the median of the
seconds is shown. *seconds* is pruning alone: from a loaded model and token windows in memory to a pruned
model in memory. *peak* is the resident memory of the whole process up to then. *perplexity* is
measured afterwards by `llmprune.eval` on what each contender saved, in float32. *floor* is two plain
forward passes over the windows, which any method that passes pruned outputs on must make.

The other virtual environment holds llm-compressor: `pip install torch==2.13.0 llmcompressor==0.14.0.1`.
`--random 110m` makes a random Llama of that size instead of `--model`.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CASES = (("wanda", "0.5"), ("wanda", "2:4"), ("sparsegpt", "0.5"), ("sparsegpt", "2:4"))


def main() -> None:
    args = _arguments()
    if args.worker:
        return _work(args)
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or _random_model(Path(scratch) / "random")
        rows = _measure(args, model, Path(scratch))
    import torch

    from llmprune.provenance import versions

    result = {
        "model": args.random or str(args.model.name),
        "windows": args.count or "all",
        "seqlen": args.seqlen or "all",
        "threads": args.threads,
        "versions": versions(torch.device("cpu")),
        "other": _other_versions(args.other_python),
        "commit": _commit(),
        "rows": rows,
    }
    print(_table(rows))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, help="local checkpoint")
    parser.add_argument("--random", choices=("110m",), help="a random Llama instead")
    parser.add_argument("--windows", type=Path, required=True, help=".npy of ids [n, seqlen]")
    parser.add_argument("--count", type=int, help="use only the first windows")
    parser.add_argument("--seqlen", type=int, help="cut windows to this length")
    parser.add_argument("--test", type=Path, help=".npy of ids [tokens]; none: no perplexity")
    parser.add_argument("--other-python", default=None, help="python of the llm-compressor venv")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="JSON with everything")
    parser.add_argument("--worker", choices=("floor", "llmprune", "llm-compressor"))
    parser.add_argument("--method")
    parser.add_argument("--pattern")
    parser.add_argument("--save", type=Path)
    return parser.parse_args()


def _measure(args: argparse.Namespace, model: Path, scratch: Path) -> list[dict[str, Any]]:
    """All contenders in turn, `repeats` rounds; perplexity from the last round's checkpoints."""
    contenders = [("floor", "", "")]
    contenders += [("llmprune", m, p) for m, p in CASES]
    if args.other_python:
        contenders += [("llm-compressor", m, p) for m, p in CASES]
    runs: dict[tuple[str, str, str], list[dict[str, Any]]] = {c: [] for c in contenders}
    for _ in range(args.repeats):
        for contender in contenders:
            runs[contender].append(_spawn(args, model, contender, scratch))
            print(contender, runs[contender][-1], file=sys.stderr, flush=True)
    rows = []
    for contender, measured in runs.items():
        seconds = [m["seconds"] for m in measured]
        rows.append(
            {
                "contender": contender[0],
                "method": contender[1],
                "pattern": contender[2],
                "seconds": round(statistics.median(seconds), 2),
                "seconds_all": [round(s, 2) for s in seconds],
                "peak_mb": max(m["peak_mb"] for m in measured),
                **_quality(args, scratch / "-".join(contender), contender[0]),
            }
        )
    return rows


def _spawn(
    args: argparse.Namespace, model: Path, contender: tuple[str, str, str], scratch: Path
) -> dict[str, Any]:
    """One contender in a fresh process; its last line of output is its result."""
    python = args.other_python if contender[0] == "llm-compressor" else sys.executable
    command = [python, __file__, "--worker", contender[0], "--model", str(model)]
    command += ["--windows", str(args.windows), "--threads", str(args.threads)]
    command += ["--dtype", args.dtype, "--save", str(scratch / "-".join(contender))]
    if args.count:
        command += ["--count", str(args.count)]
    if args.seqlen:
        command += ["--seqlen", str(args.seqlen)]
    if contender[1]:
        command += ["--method", contender[1], "--pattern", contender[2]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(contender)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _quality(args: argparse.Namespace, folder: Path, contender: str) -> dict[str, Any]:
    """Perplexity and true sparsity of a saved checkpoint."""
    if contender == "floor":
        return {}
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    import llmprune
    from llmprune.eval.perplexity import perplexity

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: dict[str, Any] = {"sparsity": round(llmprune.sparsity(model), 5)}
    if args.test:
        ids = torch.from_numpy(np.load(args.test)).long().flatten()
        width = args.seqlen or np.load(args.windows).shape[1]
        measured = perplexity(model, ids, seqlen=width, dataset=str(args.test.name))
        found["perplexity"] = round(measured.perplexity, 3)
        found["standard_error"] = round(measured.standard_error, 3)
    return found


def _work(args: argparse.Namespace) -> None:
    """One contender, in this process; prints seconds and peak memory as one line of JSON."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    ids = torch.from_numpy(np.load(args.windows)).long()[: args.count, : args.seqlen]
    ids = ids % model.config.vocab_size  # random models may know fewer ids
    run = {"floor": _floor, "llmprune": _llmprune, "llm-compressor": _llm_compressor}[args.worker]
    begun = time.perf_counter()
    run(model, ids, args.method, args.pattern)
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if args.worker != "floor":
        model.save_pretrained(args.save)
    print(json.dumps({"seconds": seconds, "peak_mb": peak}))


def _floor(model: Any, ids: Any, method: str, pattern: str) -> None:
    """Two plain forward passes over the windows, at the batch size that llmprune uses."""
    import torch

    from llmprune.memory import default_batch

    with torch.no_grad():
        for _ in range(2):
            for batch in ids.split(default_batch(model.device, ids.shape[1])):
                model(input_ids=batch, use_cache=False)


def _llmprune(model: Any, ids: Any, method: str, pattern: str) -> None:
    import llmprune

    llmprune.prune(model, calibration=ids, method=method, sparsity=pattern, progress=False)


def _llm_compressor(model: Any, ids: Any, method: str, pattern: str) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    kind = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
    structured = ":" in pattern
    share = 0.5 if structured else float(pattern)
    modifier = kind(
        sparsity=share,
        mask_structure=pattern if structured else "0:0",
        targets=["Linear"],
        ignore=["re:.*lm_head"],
    )
    rows = {"input_ids": ids.tolist(), "attention_mask": [[1] * ids.shape[1]] * len(ids)}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=modifier,
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
    )


def _random_model(folder: Path) -> Path:
    """A random Llama of 110 million parameters in float32, with seeded weights."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from llmprune.demo import MODEL_DIR

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder)  # llm-compressor wants one
    return folder


def _other_versions(python: str | None) -> dict[str, str]:
    if python is None:
        return {}
    code = (
        "import json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in "
        "('llmcompressor', 'transformers', 'torch')}))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def _commit() -> str:
    """The commit of the code, and whether it was changed since; results being written do not count."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    code = ["--", ":/", ":(top,exclude)benchmarks/results"]
    dirty = subprocess.run(
        ["git", "status", "--porcelain", *code], capture_output=True, text=True
    ).stdout
    return done.stdout.strip()[:12] + (" + changes" if dirty.strip() else "")


def _table(rows: list[dict[str, Any]]) -> str:
    floor = next(r["seconds"] for r in rows if r["contender"] == "floor")
    lines = [
        "| contender | method | pattern | seconds | of floor | peak MB | sparsity | perplexity |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for r in rows:
        cells = [r["contender"], r["method"], r["pattern"], f"{r['seconds']:.2f}"]
        cells += [f"{r['seconds'] / floor:.2f}", str(r["peak_mb"])]
        cells += [str(r.get("sparsity", "")), str(r.get("perplexity", ""))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
