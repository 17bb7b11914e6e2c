"""Peak memory and seconds of whole runs on checkpoints that are larger than memory should be.

    python benchmarks/big.py make DIR --shape 8b
    python benchmarks/big.py run DIR --method wanda --sparsity 2:4 --out benchmarks/results/big-8b.json
    python benchmarks/big.py grow --out benchmarks/results/growth.json

`make` writes a random bfloat16 Llama of a known shape, shard by shard. `run` prunes it from the command
line in a process of its own (8 windows of 256 random tokens by default) and notes peak resident memory (of
the whole process, as the system counts it), wall-clock seconds and what the formula of the README allows:
float32 weights of one block, its Gram matrices, activations, 1 GiB. Results are added to `--out`.

`grow` measures seconds and bytes per block at three hidden sizes, three token counts and three depths, fits
    seconds = a (tokens x weights) + b (out x in^2 + in^3, summed) + c weights + d
by least squares, and predicts 70B and 405B on this machine from the fit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256},
    "405b": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
             "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip


def main() -> None:
    args = _arguments()
    if args.what == "make":
        shape = dict(SHAPES[args.shape])
        shape["num_hidden_layers"] = args.blocks or shape["num_hidden_layers"]
        return make(args.folder, shape)
    if args.what == "run":
        return _add(args.out, run(args))
    return _add(args.out, grow(args))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("make", "run", "grow"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="8b")
    parser.add_argument("--blocks", type=int, help="fewer blocks than the shape has")
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--sparsity", default="2:4")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-memory")
    parser.add_argument("--save", type=Path, help="keep the result here")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def make(folder: Path, shape: dict[str, int]) -> None:
    """Write a random Llama with weights of standard deviation 0.02, one shard per block."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(**shape, max_position_embeddings=8192, dtype="bfloat16")  # type: ignore[arg-type]
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    depth = shape["num_hidden_layers"]
    files = [f"model-{i + 1:05d}-of-{depth + 1:05d}.safetensors" for i in range(depth + 1)]
    index: dict[str, str] = {}
    for i, name in enumerate(files):
        tensors = _block(shape, generator, i) if i < depth else _ends(shape, generator)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        print(f"{name}", file=sys.stderr)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index}, indent=1)
    )


def _random(generator: Any, *size: int) -> Any:
    import torch

    out = torch.empty(size, dtype=torch.bfloat16)
    for row in out.split(1024):
        row.copy_(torch.randn(row.shape, generator=generator) * 0.02)
    return out


def _block(shape: dict[str, int], generator: Any, i: int) -> dict[str, Any]:
    import torch

    width, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = width // shape["num_attention_heads"] * shape["num_key_value_heads"]
    sizes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    norms = ("input_layernorm", "post_attention_layernorm")
    return {
        **{f"model.layers.{i}.{n}.weight": _random(generator, *s) for n, s in sizes.items()},
        **{f"model.layers.{i}.{n}.weight": torch.ones(width, dtype=torch.bfloat16) for n in norms},
    }


def _ends(shape: dict[str, int], generator: Any) -> dict[str, Any]:
    import torch

    width, words = shape["hidden_size"], shape["vocab_size"]
    return {
        "model.embed_tokens.weight": _random(generator, words, width),
        "model.norm.weight": torch.ones(width, dtype=torch.bfloat16),
        "lm_head.weight": _random(generator, words, width),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One run from the command line; returns what it needed."""
    import numpy as np

    config = json.loads((args.folder / "config.json").read_text())
    with tempfile.TemporaryDirectory(dir=args.folder.parent) as place:
        ids = Path(place) / "ids.npy"
        words = min(config["vocab_size"], 128256)
        rng = np.random.default_rng(0)
        np.save(ids, rng.integers(0, words, (args.windows, args.seqlen)))
        save = args.save or Path(place) / "pruned"
        command = [
            args.python, "-m", "llmprune", "--model", str(args.folder), "--sparsity", args.sparsity,
            "--method", args.method, "--calibration", str(ids), "--no-eval", "--save", str(save),
            "--json", *(["--max-memory", args.max_memory] if args.max_memory else []),
        ]  # fmt: skip
        begun = time.perf_counter()
        peak, disk, out = _watched(command, args.threads, save)
        seconds = time.perf_counter() - begun
    report = json.loads(out)
    return {
        "what": "run",
        "shape": {k: config[k] for k in SHAPES["8b"]},
        "method": args.method,
        "sparsity": args.sparsity,
        "windows": args.windows,
        "seqlen": args.seqlen,
        "threads": args.threads,
        "max_memory": args.max_memory,
        "seconds": seconds,
        "prune_seconds": report["seconds"]["prune"],
        "peak_bytes": peak,
        "peak_disk_bytes": disk,
        "allowed_bytes": allowed(config, args.windows * args.seqlen, args.method),
        "removed": report["sparsity"],
        "versions": report["versions"],
        "commit": _commit(),
    }


def _watched(command: list[str], threads: int, save: Path) -> tuple[int, int, str]:
    """Run `command`; its peak resident bytes, the most it had on disk, and what it printed."""
    import os

    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done, disk = threading.Event(), [0]
    folder = save.parent / f".{save.name}.unfinished"

    def look() -> None:
        while not done.wait(2):
            used = sum(f.stat().st_blocks * 512 for f in folder.rglob("*") if f.is_file())
            disk[0] = max(disk[0], used)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, usage = os.wait4(
        process.pid, 0
    )  # this child's own peak, not the largest of all so far
    done.set()
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss * 1024, disk[0], out


def allowed(config: dict[str, Any], tokens: int, method: str) -> int:
    """Float32 weights of one block, its Gram matrices, activations, and 1 GiB."""
    weights, grams = _counts(config)
    gram = 4 * grams if method == "sparsegpt" else 0
    return 4 * weights + gram + 4 * tokens * int(config["hidden_size"]) + 2**30


def _counts(config: dict[str, Any]) -> tuple[int, int]:
    """Weights of one block, and numbers in the Gram matrices of its four inputs."""
    width, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    keys = width // int(config["num_attention_heads"]) * int(config["num_key_value_heads"])
    weights = 2 * width * width + 2 * keys * width + 3 * width * inner
    return weights, 3 * width * width + inner * inner


def _solve(config: dict[str, Any]) -> int:
    """Multiplications of solving one block: out x in^2 for each matrix, in^3 for each input."""
    width, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    keys = width // int(config["num_attention_heads"]) * int(config["num_key_value_heads"])
    rows = (2 * width + 2 * keys + 2 * inner) * width * width + width * inner * inner
    return rows + 3 * width**3 + inner**3


def grow(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and bytes at three sizes of each thing that grows, a fit, and what it predicts."""
    base = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 4,
            "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000}  # fmt: skip
    cases = [(base, 8)]
    for width in (512, 2048):
        cases.append(({**base, "hidden_size": width, "intermediate_size": width * 7 // 2}, 8))
    cases += [(base, 16), (base, 32)]
    cases += [({**base, "num_hidden_layers": n}, 8) for n in (2, 8)]
    rows: list[dict[str, Any]] = []
    for method in ("wanda", "sparsegpt"):
        for shape, windows in cases:
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place) / "model"
                make(folder, shape)
                args.folder, args.method, args.windows, args.save = folder, method, windows, None
                rows.append(run(args))
                print(method, shape, windows, rows[-1]["prune_seconds"], file=sys.stderr)
    return {
        "what": "growth",
        "rows": rows,
        "fit": {m: _fit(rows, m) for m in ("wanda", "sparsegpt")},
    }


def _features(row: dict[str, Any]) -> list[float]:
    """What a run's seconds are a sum of: token passes, solving, weights read and written, blocks."""
    shape, tokens = row["shape"], row["windows"] * row["seqlen"]
    depth, (weights, _) = shape["num_hidden_layers"], _counts(shape)
    solve = _solve(shape) if row["method"] == "sparsegpt" else 0
    return [depth * tokens * weights, depth * solve, depth * weights, depth]


def _fit(rows: list[dict[str, Any]], method: str) -> dict[str, Any]:
    """Least squares with no negative coefficient, its largest error, and two predictions."""
    import numpy as np

    mine = [r for r in rows if r["method"] == method]
    x = np.array([_features(r) for r in mine])
    y = np.array([r["prune_seconds"] for r in mine])
    scale = x.max(0).clip(min=1)
    keep = [i for i in range(x.shape[1]) if x[:, i].any()]
    while True:
        found, *_ = np.linalg.lstsq(
            x[:, keep] / scale[keep] / y[:, None], np.ones(len(y)), rcond=None
        )
        if (found >= 0).all():
            break
        keep.pop(int(found.argmin()))
    coefficients = np.zeros(x.shape[1])
    coefficients[keep] = found / scale[keep]
    errors = x @ coefficients / y - 1
    names = ("token_weight", "solve_multiplication", "weight", "block")
    return {
        "seconds_per": dict(zip(names, coefficients.tolist(), strict=True)),
        "largest_relative_error": float(abs(errors).max()),
        "predicted": {
            n: _predicted(SHAPES[n], method, coefficients.tolist()) for n in ("70b", "405b")
        },
    }


def _predicted(shape: dict[str, int], method: str, coefficients: list[float]) -> dict[str, float]:
    """128 windows of 2048 tokens on this machine's CPU, and the memory and disk of any machine."""
    row = {"shape": shape, "windows": 128, "seqlen": 2048, "method": method}
    tokens = 128 * 2048
    weights, _ = _counts(shape)
    stored = 2 * (
        shape["num_hidden_layers"] * weights + 2 * shape["vocab_size"] * shape["hidden_size"]
    )
    seconds = sum(c * f for c, f in zip(coefficients, _features(row), strict=True))
    hidden = 4 * tokens * shape["hidden_size"]
    return {
        "cpu_hours_here": seconds / 3600,
        "memory_bytes_hidden_states_on_disk": allowed(shape, 0, method),
        "hidden_state_bytes": hidden,
        "disk_bytes": stored + 2 * hidden,
    }


def _commit() -> str:
    def git(*words: str) -> str:
        found = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
        return found.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (" + changes" if git("status", "--short") else "")


def _add(out: Path | None, result: dict[str, Any]) -> None:
    """Print a result; put it beside those that a file already holds."""
    print(json.dumps({k: v for k, v in result.items() if k not in ("rows", "versions")}, indent=1))
    if out is None:
        return
    found = json.loads(out.read_text()) if out.is_file() else []
    out.write_text(json.dumps([*found, result], indent=2) + "\n")


if __name__ == "__main__":
    main()
