"""A Llama-3-8B of random weights, pruned 2:4: greedy decoding, memory and prefill against dense weights.

    python benchmarks/end_to_end.py --out FILE [--seconds 140] [--layers 32]     on a machine with CUDA
    python benchmarks/end_to_end.py --out FILE --device cpu --small    a rehearsal with a tiny model

The model is made and pruned by magnitude on the device. Contenders: `dense` in bfloat16; `sparse`, the same
weights after llmprune.sparsify; dense weights in int8 and int4 (groups of 128), see `baselines.py`.
Embeddings and output head stay bfloat16 in all. All decode by `decode.py`: a static cache and a CUDA graph
for each step, recorded once. Tokens a second are taken in turn, all contenders resident, `--rounds` times;
prefill of one prompt without a graph. Peak memory is that of a contender's weights and of its own prefill
and decoding. Logits are compared before a figure is taken: those of `decode.py` with the model's own
forward, those of `sparse` with `dense`. With fewer `--layers` the figures are of that model, and nothing is
scaled up.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from baselines import OTHERS, refused, replaced
from decode import Between, Decoder, record, rotate, swiglu
from few_tokens import two_of_four
from timing import circumstances, clock, quartiles, write
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import llmprune
from llmprune.kernels.choice import explain

DENSE, SPARSE = "dense", "sparse"
BATCHES, PROMPTS = (1, 8, 32), (512, 2048)
PROMPT, STEPS = 128, 64  # tokens before the first step, steps of a round
SHARE = 0.05  # of the norm of the logits: what rounding may make of them over 32 blocks of random weights


@dataclass
class Bench:
    """What goes with every measurement.

    Attributes:
        device: where all of it runs.
        models: by contender, and the GB that each takes.
        between: what lies between the linear layers, compiled on a GPU.
        until: when nothing more is begun, by time.monotonic().
        rounds: how often each is timed.
        small: whether it is a rehearsal.
        lost: what was not measured, and why.
    """

    device: torch.device
    models: dict[str, tuple[Any, float]]
    between: Between
    until: float
    rounds: int
    small: bool
    lost: dict[str, str] = field(default_factory=dict)

    def ended(self, what: str) -> bool:
        """Whether there is no time left for `what`, which is then written down."""
        if time.monotonic() < self.until:
            return False
        self.lost[what] = "no time was left"
        return True


def main() -> None:
    """Measure, write the JSON file after each part, print the table."""
    args = _arguments()
    device, until = torch.device(args.device), time.monotonic() + args.seconds
    between, how = _between(device)
    bench = Bench(device, {}, between, until, args.rounds, args.small)
    result: dict[str, Any] = {
        **circumstances(device, args.small),
        "model": {
            "shape": "Llama-3-8B",
            "layers": args.layers,
            "of_layers": 32,
            "weights": "random",
        },
        "between_linear_layers": how,
        "prompt": _prompt(args.small),
        "steps": _steps(args.small),
        "lost": bench.lost,
        "decode": [],
        "prefill": [],
    }
    dense = _model(args.layers, device, args.small)
    result["logits"] = {"decode.py and the model's forward": _own(bench, dense)}
    found = json.loads(args.tried.read_text()) if args.tried and args.tried.is_file() else None
    _contenders(bench, dense, result, refused(device) if found is None else found["not_here"])
    write(args.out, result)
    for batch in (1, 3) if args.small else BATCHES:
        if not bench.ended(f"batch {batch}"):
            result["decode"] += _decode(bench, batch)
            write(args.out, result)
    for tokens in (16, 32) if args.small else PROMPTS:
        if not bench.ended(f"prefill of {tokens} tokens"):
            result["prefill"] += _prefill(bench, tokens)
            write(args.out, result)
    write(args.out, result)
    print(table(result))
    if SPARSE not in bench.models:
        raise SystemExit(f"sparse was not measured: {bench.lost.get(SPARSE)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a rehearsal with a tiny model")
    parser.add_argument("--seconds", type=float, default=140, help="when to begin nothing more")
    parser.add_argument("--layers", type=int, default=32, help="decoder blocks; Llama-3-8B has 32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tried", type=Path, help="what few_tokens.py wrote: which baselines run")
    return parser.parse_args()


def _between(device: torch.device) -> tuple[Between, str]:
    """What lies between the linear layers, and how it runs."""
    if device.type == "cpu":
        return (rotate, swiglu), "eager"
    compiled = tuple(torch.compile(f, dynamic=True) for f in (rotate, swiglu))
    q, k = (torch.ones(2, 3, heads, 8, device=device).bfloat16() for heads in (4, 2))
    cos, sin = (torch.ones(3, 8, device=device).bfloat16() for _ in range(2))
    try:
        with torch.no_grad():
            compiled[0](q, k, cos, sin)
            compiled[1](q, q.clone())
    except (RuntimeError, OSError) as error:
        return (rotate, swiglu), f"eager: torch.compile failed: {str(error).splitlines()[0]}"
    return (compiled[0], compiled[1]), "torch.compile"


def _model(layers: int, device: torch.device, small: bool) -> Any:
    """Random weights on the device, those of the decoder's linear layers 2:4."""
    hidden, intermediate, heads, vocabulary = (
        (256, 512, 4, 512) if small else (4096, 14336, 32, 128256)
    )
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4 if not small else 2,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for linear in _linears(model):
        linear.weight.requires_grad_(False).copy_(two_of_four(linear.weight))
    return model.requires_grad_(False)


def _linears(model: Any) -> list[nn.Linear]:
    return [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]


def _contenders(
    bench: Bench, dense: Any, result: dict[str, Any], against: Mapping[str, str | None]
) -> None:
    """Fill `bench.models`; say in `result` what the sparse one is and how far its logits are."""
    bench.models[DENSE] = (dense, _bytes(dense) / 1e9)
    expected = _logits(bench, dense)
    against = {name: against.get(name) for name in OTHERS}
    against["cusparselt"] = "has one layout for prefill, none for decoding"
    result["not_here"] = {name: why for name, why in against.items() if why}
    for name in (SPARSE, *(other for other in OTHERS if against[other] is None)):
        if name != SPARSE and bench.ended(name):
            continue
        before = _allocated(bench.device)
        try:
            model = _converted(dense, name, result)
            off = float((_logits(bench, model) - expected).norm() / expected.norm())
        except (RuntimeError, llmprune.LLMPruneError) as error:
            bench.lost[name] = str(error).splitlines()[0][:300]
            continue
        result["logits"][f"{name} and {DENSE}"] = off
        if name == SPARSE and not off < SHARE:
            bench.lost[name] = f"wrong: logits are off by {off:.3g} of their norm"
            continue
        gc.collect()
        taken = _allocated(bench.device) - before
        bench.models[name] = (model, (taken or _bytes(model)) / 1e9)


def _converted(dense: Any, name: str, result: dict[str, Any]) -> Any:
    """A copy of the model with other linear layers in its blocks."""
    model = deepcopy(dense)
    if name == SPARSE:
        result["sparsified"] = str(llmprune.sparsify(model))
        first = model.model.layers[0]
        layers = {"q_proj": first.self_attn.q_proj, "down_proj": first.mlp.down_proj}
        result["explained"] = {
            f"{which}, {tokens} tokens": str(explain(layer, tokens))
            for which, layer in layers.items()
            for tokens in (*BATCHES, *PROMPTS)
        }
        return model
    for parent in list(model.model.layers.modules()):
        for child, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(parent, child, replaced(linear, name))
    return model


def _ids(bench: Bench, batch: int, tokens: int) -> Tensor:
    random = torch.Generator().manual_seed(batch)
    most = bench.models[DENSE][0].config.vocab_size
    return torch.randint(0, most, (batch, tokens), generator=random).to(bench.device)


def _logits(bench: Bench, model: Any) -> Tensor:
    """Of a prompt of 16 tokens and of one step behind it, [2, vocabulary] float64, through decode.py."""
    decoder = Decoder(model, 1, 64, bench.between)
    first = decoder.prefill(_ids(bench, 1, 16))
    decoder.token.fill_(7)
    return torch.cat([first, decoder.step()]).double()


def _own(bench: Bench, dense: Any) -> float:
    """How far decode.py is from the model's own forward, as a share of the norm of the logits.

    Ends the run where it is too far.
    """
    bench.models[DENSE] = (dense, 0.0)
    ids = torch.cat([_ids(bench, 1, 16), torch.full((1, 1), 7, device=bench.device)], 1)
    with torch.no_grad():
        theirs = dense(ids, use_cache=False).logits[0, -2:].double()
    off = float((_logits(bench, dense) - theirs).norm() / theirs.norm())
    if not off < SHARE:
        raise SystemExit(f"wrong: decode.py is off by {off:.3g} of the logits' norm")
    return off


def _decode(bench: Bench, batch: int) -> list[dict[str, Any]]:
    """Tokens a second of every contender, in turn."""
    prompt, steps = _prompt(bench.small), _steps(bench.small)
    runs, peaks, decoders = dict[str, Any](), dict[str, float](), dict[str, Decoder]()
    for name, (model, taken) in bench.models.items():
        before = _allocated(bench.device)
        if before:
            torch.cuda.reset_peak_memory_stats(bench.device)
        try:
            decoder = Decoder(model, batch, prompt + steps, bench.between)
            decoder.prefill(_ids(bench, batch, prompt))
            runs[name], decoders[name] = record(decoder), decoder
        except RuntimeError as error:
            bench.lost[f"{name}, batch {batch}"] = str(error).splitlines()[0][:300]
            continue
        if before:
            peaks[name] = taken + (torch.cuda.max_memory_allocated(bench.device) - before) / 1e9

    def round_of(name: str) -> Callable[[], None]:
        def go() -> None:
            for _ in range(steps):
                runs[name]()

        return go

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(bench.rounds + 1):
        for name in runs:
            decoders[name].at.fill_(prompt)
            seconds[name].append(_seconds(round_of(name), bench.device))
    rates = {name: quartiles([batch * steps / s for s in of[1:]]) for name, of in seconds.items()}
    return [
        {
            "contender": name,
            "batch": batch,
            "tokens_per_s": rate,
            "against_dense": rate[1] / rates[DENSE][1] if DENSE in rates else None,
            "weights_gb": bench.models[name][1],
            "peak_gb": peaks.get(name),
        }
        for name, rate in rates.items()
    ]


def _prefill(bench: Bench, tokens: int) -> list[dict[str, Any]]:
    """Milliseconds of one prompt for every contender, in turn."""
    ids = _ids(bench, 1, tokens)
    times: dict[str, list[float]] = {name: [] for name in bench.models}
    decoders = {
        name: Decoder(model, 1, tokens, bench.between) for name, (model, _) in bench.models.items()
    }
    for _ in range(bench.rounds + 1):
        for name in [name for name in times if f"{name}, prefill" not in bench.lost]:
            try:
                times[name].append(
                    _seconds(lambda n=name: decoders[n].prefill(ids), bench.device) * 1e3
                )
            except RuntimeError as error:
                bench.lost[f"{name}, prefill"] = str(error).splitlines()[0][:300]
                times[name] = []
    middle = {name: quartiles(of[1:]) for name, of in times.items() if len(of) > 1}
    return [
        {
            "contender": name,
            "tokens": tokens,
            "ms": ms,
            "against_dense": middle[DENSE][1] / ms[1] if DENSE in middle else None,
        }
        for name, ms in middle.items()
    ]


def _seconds(job: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        return clock(job) / 1e6
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    job()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def _allocated(device: torch.device) -> int:
    """Bytes of device memory in use; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _prompt(small: bool) -> int:
    return 8 if small else PROMPT


def _steps(small: bool) -> int:
    return 4 if small else STEPS


def table(result: dict[str, Any]) -> str:
    """A line for each contender: tokens a second, GB, milliseconds of prefill, each against dense."""
    lines = list[str]()
    for row in result["decode"]:
        peak = "" if row["peak_gb"] is None else f", peak {row['peak_gb']:.1f} GB"
        lines.append(
            f"{row['contender']:<14} batch {row['batch']:>4}  {row['tokens_per_s'][1]:>10.1f} tokens/s  "
            f"{_gain(row)}  weights {row['weights_gb']:.1f} GB{peak}"
        )
    for row in result["prefill"]:
        lines.append(
            f"{row['contender']:<14} prefill {row['tokens']:>5}  {row['ms'][1]:>10.2f} ms  "
            f"{_gain(row)}"
        )
    model = result["model"]
    lines.append(
        f"{model['layers']} of {model['of_layers']} layers; {result['between_linear_layers']}"
    )
    lines += [f"not here: {name}: {why}" for name, why in result.get("not_here", {}).items()]
    lines += [f"lost: {name}: {why}" for name, why in result["lost"].items()]
    return "\n".join(lines)


def _gain(row: dict[str, Any]) -> str:
    gain = row["against_dense"]
    return "dense was not measured" if gain is None else f"{gain:.2f} x dense"


if __name__ == "__main__":
    main()
