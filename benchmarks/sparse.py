"""Sparse checkpoints beside dense ones: disk, seconds to load, memory, tokens a second.

    python benchmarks/sparse.py --out benchmarks/results/sparse-cpu.json

`wikillama-5m` (from shared/models; left out where that is absent) and a Llama of 1.1 billion random weights
are pruned by magnitude, shard by shard, and converted by `python -m llmprune convert`. Then, for 50% and 70%:

1. Logits of the sparse model are held against the dense one's; nothing is printed if they differ by more
   than rounding.
2. Three forms are loaded, each in a process of its own, in turn and `--repeats` times, medians: `dense` (the
   pruned checkpoint, by transformers), `sparse` and `expanded` (the sparse checkpoint by `llmprune.load`,
   with sparse=True and False). Files were read shortly before, so that disks do not count. Memory is what
   the system counts for the process: when everything is imported, once loaded, at its peak until then, and
   after a forward. `bound` is what loading sparsely may take: packed size, one shard and 0.5 GiB.
3. Tokens a second: a prompt in one forward, then greedy decoding with a cache, one token at a time.

Last, one product each: `SparseLinear` against `F.linear`, whose results are compared first, in turn, medians,
for the shapes of a Llama of a billion parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import big
from compare import _commit

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("wikillama-5m", "random-1b")
SMALLEST_LINEAR = [64, 96]
FORMS = ("dense", "sparse", "expanded")
RANDOM = {
    "random-1b": {**big.SHAPES["1b"], "vocab_size": 32000},
    "random-tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256},
}  # fmt: skip
LINEARS = ([2048, 2048], [512, 2048], [8192, 2048], [2048, 8192])
ROUNDING = {"bfloat16": 2e-2, "float32": 1e-4}  # of the norm; other weights differ by more than 1


def main() -> None:
    args = _arguments()
    if args.child:
        print(json.dumps(CHILDREN[args.child](json.loads(args.settings))))
        return
    import torch

    from llmprune.provenance import versions

    torch.set_num_threads(args.threads)
    cases = []
    for name in args.models:
        with tempfile.TemporaryDirectory(dir=args.folder) as place:
            if (source := _source(name, Path(place))) is None:
                print(f"{name}: shared/models is not here, left out", file=sys.stderr)
                continue
            for sparsity in args.sparsities:
                cases.append(_case(name, source, sparsity, args))
                print(_table(cases[-1]), flush=True)
    products = _child(
        "products", _settings(args, linears=[SMALLEST_LINEAR] if args.small else LINEARS)
    )
    print(_products_table(products["rows"]), flush=True)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "commit": _commit(),
        "versions": versions(torch.device("cpu")),
        "repeats": args.repeats,
        "load_average": os.getloadavg(),
        "cases": cases,
        "products": products["rows"],
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--sparsities", nargs="+", default=["0.5", "0.7"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the first forward")
    parser.add_argument("--decode", type=int, default=32, help="tokens decoded after it")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--folder", type=Path, help="where checkpoints are made, then removed")
    parser.add_argument("--small", action="store_true", help="a rehearsal with a tiny random model")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.small:
        args.models, args.sparsities, args.repeats = ["random-tiny"], ["0.5"], 1
        args.prompt, args.decode, args.tokens = 16, 4, [1, 8]
    return args


def _source(name: str, place: Path) -> Path | None:
    """Folder of the dense model before pruning, made in `place` if it is random."""
    if name == "wikillama-5m":
        homes = [ROOT.parent / "shared", ROOT / "shared"]
        found = [home / "models" / name for home in homes if (home / "models" / name).is_dir()]
        return found[0] if found else None
    big.make(place / "random", RANDOM[name])
    return place / "random"


def _case(name: str, source: Path, sparsity: str, args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one model at one sparsity."""
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        dense, sparse = Path(place) / "dense", Path(place) / "sparse"
        _prune_files(source, dense, sparsity)
        command = [sys.executable, "-m", "llmprune", "convert", str(dense), str(sparse)]
        begun = time.perf_counter()
        subprocess.run([*command, "--format", "sparse"], check=True, capture_output=True, cwd=ROOT)
        seconds = time.perf_counter() - begun
        folders = {"dense": str(dense), "sparse": str(sparse), "expanded": str(sparse)}
        agreement = _child("agree", _settings(args, **folders))
        if agreement["difference"] > ROUNDING[agreement["dtype"]]:
            raise SystemExit(f"{name} at {sparsity}: logits differ: {agreement}")
        runs: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
        for _ in range(args.repeats):
            for form in FORMS:
                runs[form].append(_child("use", _settings(args, form=form, folder=folders[form])))
        shards = [f.stat().st_size for f in sparse.glob("*.safetensors")]
        about = json.loads((sparse / "sparse.json").read_text())
        return {
            "model": name,
            "sparsity": sparsity,
            "parameters": agreement["parameters"],
            "dtype": agreement["dtype"],
            "logits": agreement,
            "disk_bytes": {"dense": _size(dense), "sparse": _size(sparse)},
            "matrices_bytes": {"dense": about["dense_bytes"], "sparse": about["packed_bytes"]},
            "convert_seconds": seconds,
            "bound_bytes": sum(shards) + max(shards) + 2**29,
            "forms": {form: _median(found) for form, found in runs.items()},
        }


def _prune_files(source: Path, target: Path, sparsity: str) -> None:
    """Copy a checkpoint file by file, the smallest weights of each row of each projection zeroed."""
    from safetensors.torch import load_file, save_file

    from llmprune.pattern import parse

    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in sorted(source.glob("*.safetensors")):
        tensors = load_file(file)
        for key, weight in tensors.items():
            if key.endswith("_proj.weight"):
                weight.masked_fill_(~parse(sparsity).keep(weight.float().abs()), 0)
        save_file(tensors, target / file.name, metadata={"format": "pt"})


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return {**middle, "runs": runs}


def _settings(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    names = ("threads", "prompt", "decode", "tokens", "sparsities", "repeats")
    return {**{name: getattr(args, name) for name in names}, **more}


def _child(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What the function of that name returns in a process of its own."""
    command = [sys.executable, __file__, "--child", name, "--settings", json.dumps(settings)]
    threads = {"OMP_NUM_THREADS": str(settings["threads"])}
    environment = {**os.environ, **threads, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _loaded(form: str, folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    import llmprune

    if form == "dense":
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return llmprune.load(folder, sparse=form == "sparse").eval()


def _ids(model: Any, tokens: int) -> Any:
    import torch

    torch.manual_seed(0)
    most = min(tokens, model.config.max_position_embeddings // 2)
    return torch.randint(3, model.config.vocab_size, (1, most))


def agree(settings: dict[str, Any]) -> dict[str, Any]:
    """How far logits of the sparse model are from the dense one's, as a share of their norm."""
    import torch

    torch.set_num_threads(settings["threads"])
    found = {}
    with torch.no_grad():
        for form in FORMS:
            model = _loaded(form, settings[form])
            found[form] = model(_ids(model, settings["prompt"])).logits.double()
            dtype = str(model.dtype).removeprefix("torch.")
            if form == "dense":
                parameters = sum(p.numel() for p in model.parameters())
            del model
    dense = found["dense"]
    return {
        "parameters": parameters,
        "dtype": dtype,
        "tokens": dense.shape[1],
        "difference": float((found["sparse"] - dense).norm() / dense.norm()),
        "difference_expanded": float((found["expanded"] - dense).norm() / dense.norm()),
        "same_best_token": float((found["sparse"].argmax(-1) == dense.argmax(-1)).double().mean()),
    }


def use(settings: dict[str, Any]) -> dict[str, Any]:
    """Load one form, run it, and say what that took."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  # not part of loading

    import llmprune

    if settings["form"] != "dense":
        llmprune.load  # noqa: B018  # imported when it is first looked up
    torch.set_num_threads(settings["threads"])
    imported = _memory()["VmRSS"]
    begun = time.perf_counter()
    model = _loaded(settings["form"], settings["folder"])
    seconds = time.perf_counter() - begun
    loaded = _memory()
    ids = _ids(model, settings["prompt"])
    with torch.no_grad():
        model(ids)  # files that were only mapped are read, loops are compiled
        used = _memory()
        begun = time.perf_counter()
        out = model(ids, use_cache=True)
        prompt = time.perf_counter() - begun
        begun = time.perf_counter()
        for _ in range(settings["decode"]):
            best = out.logits[:, -1:].argmax(-1)
            out = model(best, past_key_values=out.past_key_values, use_cache=True)
        decode = time.perf_counter() - begun
    return {
        "load_seconds": seconds,
        "rss_imported": imported,
        "rss_loaded": loaded["VmRSS"],
        "rss_peak_loading": loaded["VmHWM"],
        "rss_used": used["VmRSS"],
        "rss_peak_used": used["VmHWM"],
        "prompt_tokens_s": ids.shape[1] / prompt,
        "decode_tokens_s": settings["decode"] / decode,
    }


def _memory() -> dict[str, int]:
    """Bytes that the system counts for this process: now, and at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines if line.startswith(("VmRSS", "VmHWM")))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def products(settings: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of one product, sparse and dense in turn."""
    import torch

    torch.set_num_threads(settings["threads"])
    cases = product(("bfloat16", "float32"), settings["sparsities"], settings["linears"])
    with torch.no_grad():
        return {"rows": [row for case in cases for row in _product(*case, settings)]}


def _product(
    dtype: str, sparsity: str, shape: list[int], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    import torch

    from llmprune import SparseLinear
    from llmprune.pattern import parse

    torch.manual_seed(0)
    dense = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=getattr(torch, dtype))
    dense.weight.masked_fill_(~parse(sparsity).keep(dense.weight.float().abs()), 0)
    sparse = SparseLinear.from_linear(dense)
    rows = []
    for tokens in settings["tokens"]:
        x = torch.randn(tokens, shape[1], dtype=dense.weight.dtype)
        expected = dense(x).double()
        difference = float((sparse(x).double() - expected).norm() / expected.norm())
        if difference > ROUNDING[dtype]:
            raise SystemExit(f"{dtype} {shape} at {sparsity}: products differ by {difference}")
        took = _in_turn({"dense": lambda x=x: dense(x), "sparse": lambda x=x: sparse(x)})  # type: ignore[misc]
        row = {"dtype": dtype, "sparsity": sparsity, "shape": shape, "tokens": tokens}
        rows.append({**row, "difference": difference, "milliseconds": took})
    return rows


def _in_turn(jobs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each job: for half a second, but at least five times."""
    took: dict[str, list[float]] = {name: [] for name in jobs}
    until = time.perf_counter() + 0.5
    while time.perf_counter() < until or len(took["dense"]) < 5:
        for name, job in jobs.items():
            begun = time.perf_counter()
            job()
            took[name].append(1e3 * (time.perf_counter() - begun))
    return {name: statistics.median(found) for name, found in took.items()}


CHILDREN = {"agree": agree, "use": use, "products": products}


def _table(case: dict[str, Any]) -> str:
    logits, disk, matrices = case["logits"], case["disk_bytes"], case["matrices_bytes"]
    share = matrices["sparse"] / matrices["dense"]
    lines = [
        f"{case['model']} at {case['sparsity']}: {case['parameters']:,} weights in {case['dtype']}; logits "
        f"differ by {logits['difference']:.1e} of their norm, expanded {logits['difference_expanded']:.1e}",
        f"  files {disk['dense'] / 1e6:.1f} MB dense, {disk['sparse'] / 1e6:.1f} MB sparse; pruned matrices "
        f"{share:.4f} of dense; converted in {case['convert_seconds']:.1f} s",
        f"  {'form':<9} load s  MB: imported   loaded     peak     used   tokens/s: prompt   decode",
    ]
    for form, run in case["forms"].items():
        names = ("rss_imported", "rss_loaded", "rss_peak_loading", "rss_used")
        memory = " ".join(f"{run[name] / 1e6:8.0f}" for name in names)
        rates = f"{run['prompt_tokens_s']:8.1f} {run['decode_tokens_s']:8.2f}"
        lines.append(f"  {form:<9} {run['load_seconds']:6.2f}      {memory}          {rates}")
    peak, bound = case["forms"]["sparse"]["rss_peak_loading"], case["bound_bytes"]
    lines.append(
        f"  peak while loading sparse: {peak / 1e6:.0f} MB, bound {bound / 1e6:.0f} MB"
        f" ({'kept' if peak <= bound else 'MISSED'})"
    )
    return "\n".join(lines)


def _products_table(rows: list[dict[str, Any]]) -> str:
    lines = ["one product, milliseconds: dense, sparse, times as long"]
    for row in rows:
        took, shape = row["milliseconds"], "x".join(map(str, row["shape"]))
        lines.append(
            f"  {row['dtype']:<9}{row['sparsity']:<5}{shape:<11}{row['tokens']:4} tokens "
            f"{took['dense']:9.3f} {took['sparse']:9.3f} {took['sparse'] / took['dense']:7.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
