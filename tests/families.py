"""Every causal language model that transformers builds from a config, made tiny, pruned and reloaded.

Run as a script (`make families`) it writes docs/families.md anew; `test_families.py` holds that page
against what happens.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmprune import job, loading
from llmprune.checkpoint.save import check_saveable, expectations, save
from llmprune.choices import ModelChoice, Voice
from llmprune.errors import LLMPruneError
from llmprune.model import blocks, matrices
from llmprune.order import Job
from llmprune.report import Report
from llmprune.run import PruneConfig, prune_with
from llmprune.whole import checked_walker

VOCABULARY = 64
DEPTH = 3

# What a size is set to, by the name of the attribute; a config gets those that it has.
WIDTH = 32
SIZES: tuple[tuple[int, str], ...] = (
    (
        WIDTH,
        "hidden_size d_model n_embd emb_dim embedding_dim embedding_size input_embedding_size "
        "output_embedding_size word_embed_proj_dim attention_hidden_size lru_width backbone_hidden_size "
        "moe_intermediate_size moe_shared_expert_intermediate_size shared_expert_intermediate_size "
        "shared_experts_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
        "router_hidden_size pronunciation_embed_dim shape_embed_dim embed_dim",
    ),
    (
        2 * WIDTH,
        "intermediate_size intermediate_size_mlp ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner dff "
        "dim_ff feed_forward_size ffn_hidden_size dense_intermediate_size mamba_d_ssm",
    ),
    (
        8,
        "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num "
        "head_dim dim_head d_head attention_head_size qk_nope_head_dim qk_rope_head_dim v_head_dim "
        "kv_channels linear_head_dim linear_key_head_dim linear_value_head_dim swa_head_dim "
        "index_head_dim query_pre_attn_scalar rotary_dim mamba_d_head mamba_head_dim mamba_d_state "
        "state_size ssm_state_size mamba_n_heads mamba_num_heads sliding_window sliding_window_size "
        "attention_window_size window_size local_attention mamba_dt_rank time_step_rank adapter_rank "
        "laurel_rank index_topk",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "attention_heads num_decoder_attention_heads num_encoder_attention_heads linear_num_heads "
        "linear_num_value_heads linear_num_key_heads index_n_heads swa_num_attention_heads",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok "
        "num_experts_per_token moe_topk moe_k n_mamba_heads n_group num_expert_group",
    ),
    (
        1,
        "topk_group n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace "
        "num_dense_layers mamba_n_groups n_groups mamba_ngroups",
    ),
    (
        16,
        "q_lora_rank kv_lora_rank qk_head_dim o_lora_rank chunk_size mamba_chunk_size "
        "hidden_size_per_layer_input",
    ),
    (
        DEPTH,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
        "num_decoder_layers num_encoder_layers num_blocks depth",
    ),
    (
        VOCABULARY,
        "vocab_size vocab_size_per_layer_input max_position_embeddings n_positions n_ctx max_seq_len "
        "context_length max_target_positions decoder_vocab_size pronunciation_vocab_size "
        "shape_vocab_size",
    ),
)
TINY = {name: size for size, names in SIZES for name in names.split()}
DEPTHS = next(names.split() for size, names in SIZES if size == DEPTH)

NEEDED = ("head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok")  # if None
PER_LAYER = ("types", "type")

# What the rules do not know: where sizes hang together in a way of the family's own.
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = ROPE | {"mrope_section": [2, 1, 1]}
SHARING = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
HYBRID = ["linear_attention", "hybrid", "hybrid"]
QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 16,
}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": MROPE, "sliding_attention": MROPE}
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_qk_rope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "dots3_note_vision_encoder": {"adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
    "dots3_note_audio_encoder": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    "gemma3n_text": SHARING | {"activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]},
    "gemma4_text": SHARING,
    "gemma4_unified_text": SHARING,
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "inkling_text": {"moe_intermediate_size": 2 * WIDTH},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": QWEN4,
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": HYBRID,
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "layers_block_type": HYBRID,
        "hybrid_layer_ids": [1, 2],
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 16,
    },
}

# What the model does not multiply by in a plain forward has to be left out by the user.
CROSS = ["encoder_attn.*"]
IGNORED: dict[str, list[str]] = {
    "bart": CROSS,
    "bigbird_pegasus": CROSS,
    "blenderbot": CROSS,
    "blenderbot-small": CROSS,
    "falcon_mamba": ["dt_proj"],
    "jamba": ["dt_proj"],
    "mamba": ["dt_proj"],
    "marian": CROSS,
    "mbart": CROSS,
    "mvp": CROSS,
    "pegasus": CROSS,
    "plbart": CROSS,
    "prophetnet": ["cross_attn.*"],
    "trocr": CROSS,
    "whisper": CROSS,
    "zamba2": ["*_adapter_list.*"],
}


# Why some cannot be pruned, in words: the test holds that they cannot.
WHY: dict[str, str] = {
    "blt": "bytes in patches: three stacks of blocks and a patcher, no one decoder",
    "dbrx": "its experts lie side by side in one matrix each",
    "emu3": "saved as `emu3_text_model`, which transformers' Auto classes do not load",
    "gemma3n": "its vision tower needs the package timm; `gemma3n_text` works",
    "gemma4_assistant": "a drafter: its blocks read keys and values of the model it assists",
    "gemma4_unified_assistant": "a drafter: its blocks read keys and values of the model it assists",
    "hrm_text": "two stacks of blocks that are run in turn, many times, no one decoder",
    "inkling_text": "nothing in its shared experts tells which side of a weight the inputs are on",
    "mllama": "saved as `mllama_text_model`, which transformers' Auto classes do not load",
    "musicgen": "writes audio codes; its decoder is not built from this config",
    "musicgen_melody": "writes audio codes; its decoder is not built from this config",
    "zaya": "two matrices read one tensor in one batch and two in another, so statistics cannot be shared",
}


def families() -> list[str]:
    """Every model type that transformers has a causal language model for."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _shrunk(kind: Any, model_type: str) -> Any:
    """The default config of a class with every size brought down, parts within it too."""
    exceptions = dict(EXCEPTIONS.get(model_type, {}))
    default = kind()
    values = vars(default)
    deep = next((v for k, v in values.items() if k in DEPTHS and isinstance(v, int)), None)
    depth = exceptions.get("num_hidden_layers", DEPTH)
    sizes: dict[str, Any] = {}
    for name, value in values.items():
        if name in NEEDED and value is None:
            sizes[name] = TINY[name]
        elif name in TINY and isinstance(value, int) and value:
            sizes[name] = min(value, TINY[name])
        elif name in TINY and isinstance(value, list):
            sizes[name] = [TINY[name]] * depth
        elif isinstance(value, list) and deep and len(value) == deep and name.endswith(PER_LAYER):
            kinds = list(dict.fromkeys(value))
            sizes[name] = (kinds * depth)[:depth]
        elif name.endswith("token_id") and isinstance(value, int):
            sizes[name] = min(value, 3)
    heads = values.get("num_attention_heads")
    if heads and values.get("num_key_value_heads") == heads:
        sizes["num_key_value_heads"] = TINY["num_attention_heads"]
    if "is_decoder" in values:
        sizes["is_decoder"] = True
    for name, part in kind.sub_configs.items():
        if (value := getattr(default, name, None)) is not None:
            known = type(value) if part.__name__ == "AutoConfig" else part
            inner = _shrunk(known, known.model_type).to_dict()
            sizes[name] = inner | exceptions.pop(name, {})
    return kind(**(sizes | exceptions))


def tiny(model_type: str) -> Any:
    """A tiny model of this type, seeded weights, float32, in eval mode."""
    torch.manual_seed(0)
    config = _shrunk(CONFIG_MAPPING[model_type], model_type)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def kept_for_backward(model: Any, run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What `run` gives, and the bytes that autograd keeps for it beside the parameters of `model`."""
    own = {p.data_ptr() for p in model.parameters()}
    kept: dict[tuple[int, int], int] = {}

    def see(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr(), tensor.numel()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        out = run()
    return out, sum(kept.values())


WINDOWS = torch.randint(0, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(1))
NO = "no"
IN_MEMORY = (
    "the whole model is loaded"  # what the command line says when it cannot go block by block
)


@dataclass(frozen=True)
class Row:
    """What became of one family: a line of the table.

    Attributes:
        model_type: as in `config.json`.
        kind: class of the model.
        blocks: how many the tiny model has.
        walk: what the run of a block starts from; see `llmprune.report.Report.walk`.
        wanda: whether Wanda 2:4, run as by the command line, gave after reloading, bit for bit, the
            logits of the model that was pruned in memory.
        sparsegpt: whether SparseGPT 0.5, saved from memory, was reloaded with the same logits.
        memory: what the command line holds in memory: one block, or the whole model.
        note: what the user has to do, or why it does not work.
    """

    model_type: str
    kind: str
    blocks: str = "-"
    walk: str = "-"
    wanda: str = NO
    sparsegpt: str = NO
    memory: str = "-"
    note: str = ""

    @property
    def works(self) -> bool:
        """Whether all of it does."""
        return self.wanda == self.sparsegpt == "yes"

    def line(self) -> str:
        """The row in Markdown."""
        return "| " + " | ".join(getattr(self, f.name) for f in fields(self)) + " |"


def examine(model_type: str, folder: Path) -> Row:
    """Build, prune and save in both ways, reload and compare: the row of one family.

    What transformers cannot build and what llmprune refuses is told in the row; anything else that
    goes wrong is an error.
    """
    row = Row(model_type, str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]))
    try:
        model = tiny(model_type)
        logits(model)
    except Exception as error:  # whatever a family's own code raises
        return replace(row, note=WHY.get(model_type) or f"cannot be built: {_line(error)}")
    row = replace(row, kind=type(model).__name__)
    dense = folder / "dense"
    model.save_pretrained(dense)
    try:
        return _pruned(row, dense, folder)
    except LLMPruneError as error:
        reason = _line(error).replace(str(dense), "the checkpoint")
        return replace(row, note=WHY.get(model_type, reason))


def _pruned(row: Row, dense: Path, folder: Path) -> Row:
    ignore = IGNORED.get(row.model_type, ())
    wanda = PruneConfig("2:4", "wanda", calibration=WINDOWS, ignore=ignore, batch_size=2)
    sparsegpt = replace(wanda, sparsity=0.5, method="sparsegpt")

    opened = loading.open_model(loading.check(str(dense)), device="cpu")
    depth = check_exact(opened.model)
    report = prune_with(sparsegpt, opened.model, progress=False)
    check_counts(opened.model, report)
    method, pattern = sparsegpt.built()
    names = [layer.name for layer in report.layers]
    check_saveable(opened.model, names)
    flipped = {m.name for m in matrices(opened.model, (), ignore) if m.transposed}
    expected = expectations(report.layers, pattern, transposed=flipped, exact=method.exact)
    target = folder / "sparsegpt"
    save(opened.model, None, target, report, card="", stored=opened.stored, expected=expected)
    assert torch.equal(reloaded(target), realigned(opened.model)), "SparseGPT: other logits"

    opened = loading.open_model(loading.check(str(dense)), device="cpu")
    report = prune_with(wanda, opened.model, progress=False)
    check_counts(opened.model, report)
    target, log = folder / "wanda", folder / "log"
    choice, voice = ModelChoice(str(dense), device="cpu"), Voice(quiet=True, log_file=log)
    job.run(Job(choice, wanda, voice, save=target, evaluate=False))
    assert torch.equal(reloaded(target), realigned(opened.model)), "Wanda: other logits"
    return replace(
        row,
        blocks=str(depth),
        walk=str(report.walk),
        wanda="yes",
        sparsegpt="yes",
        memory="whole model" if IN_MEMORY in log.read_text() else "one block",
        note=f"with `--ignore {' '.join(map(repr, ignore))}`" if ignore else "",
    )


@torch.no_grad()
def check_exact(model: Any) -> int:
    """Hold what the walk gives for every block and batch against plain forwards; returns the depth."""
    layers = blocks(model)[1]
    batches = list(WINDOWS.split(2))
    walker = checked_walker(model, layers, batches, lambda line: None)
    hidden: list[Any] = [None] * len(batches)
    for i, block in enumerate(layers):
        for b, batch in enumerate(batches):
            plain: list[Tensor] = []
            hook = block.register_forward_hook(
                lambda module, args, out, plain=plain: plain.append(
                    out if isinstance(out, Tensor) else out[0]
                )
            )
            logits(model, batch)
            hook.remove()
            hidden[b] = walker.run(i, b, hidden[b])
            assert torch.equal(hidden[b], plain[-1]), f"block {i}, batch {b}"
    return len(layers)


def check_counts(model: Any, report: Report) -> None:
    """Hold the zeros of the model against the report: half of every matrix."""
    found = {m.name: m.weight for m in matrices(model)}
    for layer in report.layers:
        weight = found[layer.name]
        assert layer.kept == weight.numel() - weight.numel() // 2, layer.name
        assert weight.count_nonzero() <= layer.kept, layer.name  # some families start from zeros


@torch.no_grad()
def logits(model: Any, ids: Tensor = WINDOWS) -> Tensor:
    """Logits [windows, seqlen, vocabulary] float32."""
    out: Tensor = model(input_ids=ids, use_cache=False).logits
    return out


def reloaded(folder: Path) -> Tensor:
    """Logits of the checkpoint in `folder`."""
    return realigned(AutoModelForCausalLM.from_pretrained(folder).eval())


def realigned(model: Any) -> Tensor:
    """Logits of `model` once its weights lie in memory of their own.

    A weight that is a piece of a file in memory may begin anywhere, and with small inputs a product
    then rounds otherwise in the last bit: seen in the experts of Inkling 2, their weights equal.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return logits(model)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()).replace("|", "/")
    name = "" if isinstance(error, LLMPruneError) else f"{type(error).__name__}: "
    return (name + text)[:240]


# The table


TABLE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
HEAD = """# Families

What became of every causal language model that transformers {version} knows, made tiny from its config
with random weights (three or four blocks, a few experts): {works} of {all} work. `make families` makes this
page, and `tests/test_families.py` fails when it is not true.

- **walk**: what the run of a block starts from: `blocks`, the stored output of the block before it, or
  `whole model`, the tokens, where a family keeps state outside its blocks. Either way what each block gives
  was compared with the model's plain forward, bit for bit.
- **Wanda 2:4**: from the checkpoint, as the command line does it, saved, and reloaded by transformers: the
  logits are, bit for bit, those of the model pruned in memory.
- **SparseGPT 0.5**: pruned in memory, saved and reloaded likewise. Half of every matrix is zero in both.
- **in memory**: what the command line holds in memory at a time. `whole model`: blocks could not be read
  and run one at a time, and the run cannot be taken up again.

| model type | class | blocks | walk | Wanda 2:4 | SparseGPT 0.5 | in memory | note |
|---|---|---|---|---|---|---|---|
"""


def page(rows: list[Row]) -> str:
    """The table as a page of the documentation."""
    works = sum(row.works for row in rows)
    head = HEAD.format(version=transformers.__version__, works=works, all=len(rows))
    return head + "".join(row.line() + "\n" for row in rows)


def written() -> tuple[str, dict[str, str]]:
    """The version of transformers that the page was made with, and its lines by model type."""
    text = TABLE.read_text(encoding="utf-8")
    version = text.split("that transformers ")[1].split(" knows")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    return version, {line.split(" | ")[0].removeprefix("| "): line for line in lines}


def examined(model_type: str) -> Row:
    """`examine` in a folder that is gone afterwards, on one thread and without a word."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return examine(model_type, Path(folder))


def main() -> None:
    """Make the page anew."""
    torch.set_num_threads(1)
    rows = []
    for model_type in families():
        rows.append(examined(model_type))
        print(rows[-1].line(), flush=True)
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
