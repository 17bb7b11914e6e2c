"""The walk: any family block by block equals its plain forward, and leaves all else as it was."""

from __future__ import annotations

import copy
import functools
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import llmprune
from llmprune import methods
from llmprune.errors import ConfigError, DataError, ModelError, NumericalError, WalkError
from llmprune.model import blocks, matrices, unwrapped
from llmprune.pattern import NM
from llmprune.prune_matrix import Task
from llmprune.stats import Gram
from llmprune.sweep import prune_blocks
from llmprune.walk import Walker

pytestmark = pytest.mark.usefixtures("one_thread")


VOCABULARY = 128
BLOCKS = 3
ATTENTION = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
}
GROUPED = ATTENTION | {
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
OLDER = ATTENTION | {"intermediate_size": 64, "max_position_embeddings": 64}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64}
OPT = ATTENTION | {"ffn_dim": 64, "max_position_embeddings": 64}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "mistral, window of 8": ("MistralConfig", GROUPED | {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen2, window from block 1": (
        "Qwen2Config",
        GROUPED | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", GROUPED),
    "gemma2": ("Gemma2Config", GROUPED | {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        GROUPED
        | {
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("Phi3Config", GROUPED | {"pad_token_id": 0}),
    "olmo2": ("Olmo2Config", GROUPED),
    "gpt2": ("GPT2Config", GPT2),
    "opt": ("OPTConfig", OPT | {"word_embed_proj_dim": 32}),
    "opt, projected embedding": ("OPTConfig", OPT | {"word_embed_proj_dim": 16}),
    "opt, norm after": (
        "OPTConfig",
        OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "gpt_neox": ("GPTNeoXConfig", OLDER),
    "falcon, one key head": ("FalconConfig", ATTENTION | {"multi_query": True}),
    "falcon, grouped": (
        "FalconConfig",
        ATTENTION | {"num_kv_heads": 2, "new_decoder_architecture": True},
    ),
    "falcon, alibi": (
        "FalconConfig",
        ATTENTION | {"alibi": True, "parallel_attn": False, "multi_query": False},
    ),
    "bloom": (
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    ),
    "bamba": (
        "BambaConfig",
        GROUPED
        | {
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 16,
        },
    ),
    "phi": ("PhiConfig", OLDER),
    "stablelm": ("StableLmConfig", GROUPED),
    "cohere": ("CohereConfig", GROUPED),
    "granite": (
        "GraniteConfig",
        GROUPED | {"residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    ),
    "starcoder2": ("Starcoder2Config", GROUPED),
    "smollm3": ("SmolLM3Config", GROUPED | {"pad_token_id": 0}),
    "glm4": ("Glm4Config", GROUPED | {"pad_token_id": 0}),
    "mamba": (
        "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "state_size": 4, "num_hidden_layers": BLOCKS},
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        GROUPED
        | {
            "lru_width": 32,
            "attention_window_size": 8,
            "block_types": ["recurrent", "recurrent", "attention"],
        },
    ),
}


def tiny(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of `family` with seeded weights, in eval mode; `changes` go into its config."""
    name, settings = FAMILIES[family]
    tokens = {"bos_token_id": 0, "eos_token_id": 1}
    config = getattr(transformers, name)(**(tokens | settings | changes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for module in model.modules():  # initialised alike, features would all matter alike
            if isinstance(module, nn.Embedding):
                module.weight *= torch.logspace(0, 1.5, module.weight.shape[1])
    return model.to(dtype).eval()


def tokens(samples: int = 5, seqlen: int = 24, seed: int = 0) -> Tensor:
    """Random windows of token ids, [samples, seqlen] int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (samples, seqlen), generator=generator)


class Spy:
    """Records what reaches a method: statistics by matrix name, in the order of pruning."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: nn.Module, name: str) -> None:
        self.stats: dict[str, Any] = {}
        names = {m.weight.data_ptr(): n for n, m in model.named_modules() if is_matrix(m)}
        method = methods.get(name)
        plain = method.prune_together

        def prune(it: Any, weights: Any, stats: Any, pattern: Any) -> Any:
            self.stats |= {names[weight.data_ptr()]: stats for weight in weights}
            return plain(it, weights, stats, pattern)

        monkeypatch.setattr(method, "prune_together", prune)


def is_matrix(module: nn.Module) -> bool:
    """Independent of `llmprune.model`: what these families multiply hidden states by."""
    return type(module).__name__ in ("Linear", "FalconLinear", "Conv1D")


def decoder_matrices(model: Any) -> dict[str, Tensor]:
    """Weights [out, in] of the matrices inside the decoder blocks, by name, in module order."""
    return {
        name: module.weight.detach().T
        if type(module).__name__ == "Conv1D"
        else module.weight.detach()
        for name, module in model.named_modules()
        if is_matrix(module) and any(part.isdigit() for part in name.split("."))
    }


def walker(model: Any, ids: Tensor, batch: int = 2) -> Walker:
    return Walker(model, blocks(model)[1], list(ids.split(batch)))


@torch.no_grad()
def inputs_of(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Inputs [tokens, in] float64 of every Linear and Conv1D in one plain forward."""
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0].double().flatten(0, -2)})
        )
        for name, module in model.named_modules()
        if is_matrix(module)
    ]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


# The walk itself


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_blocks_run_alone_equal_the_plain_forward(family: str) -> None:
    model = tiny(family)
    walk = walker(model, tokens())
    walk.self_check()
    plain: dict[int, list[Tensor]] = {i: [] for i in range(len(walk.layers))}
    handles = [
        block.register_forward_hook(
            lambda module, args, out, i=i: plain[i].append(
                out if isinstance(out, Tensor) else out[0]
            )
        )
        for i, block in enumerate(walk.layers)
    ]
    for batch in walk.batches:
        model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    hidden: list[Any] = [None] * len(walk.batches)
    for i in range(len(walk.layers)):
        for b in range(len(walk.batches)):
            hidden[b] = walk.run(i, b, hidden[b])
            assert torch.equal(hidden[b], plain[i][b]), f"block {i}, batch {b}"


IGNORED = {"mamba": ["dt_proj"]}  # it multiplies by this weight without calling the module


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "sparsity"), [("wanda", "2:4"), ("sparsegpt", 0.5)], ids=["wanda", "sparsegpt"]
)
def test_every_matrix_loses_its_count_and_nothing_else_changes(
    family: str, method: str, sparsity: Any
) -> None:
    model = tiny(family)
    before = copy.deepcopy(model.state_dict())
    report = llmprune.prune(
        model,
        calibration=tokens(),
        sparsity=sparsity,
        method=method,
        ignore=IGNORED.get(family, []),
        progress=False,
    )
    matrices = decoder_matrices(model)
    for entry in IGNORED.get(family, []):
        matrices = {k: v for k, v in matrices.items() if not k.endswith(entry)}
    assert sorted(layer.name for layer in report.layers) == sorted(matrices)
    for layer in report.layers:
        weight = matrices[layer.name]
        assert layer.shape == tuple(weight.shape)
        assert layer.tokens == 5 * 24
        assert layer.kept == weight.count_nonzero(), layer.name
        assert layer.kept == weight.numel() - weight.numel() // 2, layer.name
        if sparsity == "2:4":
            assert (weight.reshape(-1, 4).ne(0).sum(1) == 2).all()
    touched = {f"{name}.weight" for name in matrices}
    for name, value in model.state_dict().items():
        same = torch.equal(value, before[name])
        assert same != (name in touched), name
    if method == "wanda":
        for name in touched:
            value = model.state_dict()[name]
            kept = value != 0
            assert torch.equal(value[kept], before[name][kept])


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_statistics_equal_those_of_plain_forwards_of_the_model_pruned_so_far(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 2:4, because there SparseGPT passes on what it leaves behind, with nothing brought back
    model = tiny()
    naive = copy.deepcopy(model)
    spy = Spy(monkeypatch, model, method)
    llmprune.prune(model, calibration=tokens(), sparsity="2:4", method=method, progress=False)
    assert list(spy.stats) == list(decoder_matrices(naive))
    pruned = decoder_matrices(model)
    for block in range(BLOCKS):
        inputs = inputs_of(naive, tokens())
        for name, weight in decoder_matrices(naive).items():
            if f".{block}." not in name:
                continue
            x = inputs[name]
            stats = spy.stats[name]
            assert stats.tokens == len(x)
            if method == "wanda":
                torch.testing.assert_close(
                    stats.sum_sq.double(), x.square().sum(0), rtol=1e-5, atol=0
                )
            else:
                gram = x.T @ x
                scale = gram.diagonal().sqrt()
                gap = (stats.gram.double() - gram) / (scale[:, None] * scale)
                assert gap.abs().max() < 1e-5
            weight.copy_(pruned[name])


def test_each_distinct_input_is_summed_once_and_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[int] = []
    plain = Gram.add
    monkeypatch.setattr(Gram, "add", lambda it, x: (added.append(id(it)), plain(it, x))[1])
    model = tiny()
    spy = Spy(monkeypatch, model, "sparsegpt")
    llmprune.prune(
        model,
        calibration=tokens(6),
        sparsity="2:4",
        method="sparsegpt",
        batch_size=2,
        progress=False,
    )
    batches, inputs = 3, 4  # inputs: of q, k, v; of o; of gate, up; of down
    assert len(added) == BLOCKS * inputs * batches
    of = {".".join(name.split(".")[2:]): id(stats) for name, stats in spy.stats.items()}
    for block in range(BLOCKS):
        attention = {of[f"{block}.self_attn.{x}_proj"] for x in "qkv"}
        mlp = {of[f"{block}.mlp.{x}_proj"] for x in ("gate", "up")}
        assert len(attention) == len(mlp) == 1
        single = {of[f"{block}.self_attn.o_proj"], of[f"{block}.mlp.down_proj"]}
        assert len(attention | mlp | single) == inputs


def test_the_inverse_is_computed_once_per_input(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *a: (calls.append(1), plain(*a))[1])
    llmprune.prune(tiny(), calibration=tokens(), method="sparsegpt", progress=False)
    assert len(calls) == BLOCKS * 4


@pytest.mark.parametrize(
    ("method", "sparsity"), [("wanda", 0.5), ("sparsegpt", 0.5), ("wanda", "2:4")]
)
def test_results_do_not_depend_on_the_batch_size(method: str, sparsity: Any) -> None:
    results = []
    for size in (1, 2, 5):
        model = tiny()
        # this seed has no two scores nearer than rounding, which could change places
        llmprune.prune(
            model,
            calibration=tokens(seed=1),
            sparsity=sparsity,
            method=method,
            batch_size=size,
            progress=False,
        )
        results.append(decoder_matrices(model))
    for name, weight in results[0].items():
        for other in results[1:]:
            assert torch.equal(weight != 0, other[name] != 0), name
            torch.testing.assert_close(weight, other[name], rtol=1e-3, atol=1e-5)


def test_conv1d_is_pruned_along_its_inputs() -> None:
    model = tiny("gpt2")
    dense = copy.deepcopy(model)
    llmprune.prune(model, calibration=tokens(), sparsity="2:4", method="wanda", progress=False)
    stored = model.transformer.h[0].mlp.c_fc.weight  # [in, out]
    assert stored.shape == (32, 128)
    assert (stored.T.reshape(-1, 4).count_nonzero(1) == 2).all()
    assert not (stored.reshape(-1, 4).count_nonzero(1) == 2).all()
    name = "transformer.h.0.attn.c_attn"  # the first of its block: its inputs are the dense model's
    norm = inputs_of(dense, tokens())[name].square().sum(0).sqrt()
    score = (dense.get_submodule(name).weight.T.abs() * norm).detach().reshape(-1, 4)
    low = score.argsort(dim=1, stable=True)[:, :2]
    expected = torch.ones_like(score, dtype=torch.bool).scatter_(1, low, False).reshape(-1, 32)
    assert torch.equal(model.get_submodule(name).weight.T != 0, expected)


def test_progress_comes_as_often_as_announced() -> None:
    for targets in ((), ("lm_head",), ("q_proj", "lm_head"), ("re:model.layers.1.*",)):
        model = tiny()
        walk = walker(model, tokens())
        chosen = matrices(model, targets)
        seen: list[int] = []
        task = Task(methods.build("wanda"), NM(2, 4))
        for _ in prune_blocks(walk, chosen, task, lambda block, *_, seen=seen: seen.append(block)):
            pass
        assert len(seen) == walk.steps(chosen), targets


def test_dropout_is_off_whatever_the_mode() -> None:
    quiet, training = tiny(), tiny(attention_dropout=0.5).train()
    for model in (quiet, training):
        llmprune.prune(model, calibration=tokens(), progress=False)
    for name, weight in decoder_matrices(quiet).items():
        assert torch.equal(weight, decoder_matrices(training)[name])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_changes_nothing() -> None:
    plain, saving = tiny(), tiny().train()
    saving.gradient_checkpointing_enable()
    for model in (plain, saving):
        llmprune.prune(model, calibration=tokens(), progress=False)
    assert saving.is_gradient_checkpointing
    for name, weight in decoder_matrices(plain).items():
        assert torch.equal(weight, decoder_matrices(saving)[name])


# What is refused before a weight is touched


def test_under_inference_mode() -> None:
    plain, inferring = tiny(), tiny()
    llmprune.prune(plain, calibration=tokens(), sparsity="2:4", progress=False)
    with torch.inference_mode():
        llmprune.prune(inferring, calibration=tokens(), sparsity="2:4", progress=False)
    for name, weight in decoder_matrices(plain).items():
        assert torch.equal(weight, decoder_matrices(inferring)[name])


def test_wrappers_in_any_order_are_seen_through() -> None:
    model = tiny()
    assert unwrapped(torch.nn.DataParallel(torch.compile(model))) is model
    assert unwrapped(torch.compile(torch.nn.DataParallel(model))) is model


def test_stopping_inside_a_block_leaves_the_counts_exact() -> None:
    """Corrections that wait for the end of the block are made also when it is not reached."""
    model = tiny()
    method = methods.build("sparsegpt")
    walker = Walker(model, blocks(model)[1], [tokens()])
    task = Task(method, method.resolve(llmprune.Unstructured(0.5)))
    with torch.no_grad():
        walk = prune_blocks(walker, matrices(model), task, lambda *step: None)
        matrix, report, keep = next(walk)
        walk.close()
    assert int(matrix.weight.count_nonzero()) == report.kept == int(keep.sum())


def test_a_block_that_the_forward_leaves_out_is_refused() -> None:
    model = tiny()
    skipped = model.model.layers[1]
    model.model.forward = functools.partial(without_block, model.model, skipped)
    with pytest.raises(WalkError, match="block 1 of LlamaForCausalLM takes no part"):
        llmprune.prune(model, calibration=tokens(), progress=False)


def without_block(model: Any, skipped: nn.Module, **kwargs: Any) -> Any:
    layers = model.layers
    model.layers = nn.ModuleList([block for block in layers if block is not skipped])
    try:
        return type(model).forward(model, **kwargs)
    finally:
        model.layers = layers


def test_a_matrix_that_no_forward_reaches_is_named() -> None:
    model = tiny()
    model.model.layers[1].mlp.unused = nn.Linear(32, 8)
    with pytest.raises(WalkError, match=r"model\.layers\.1\.mlp\.unused takes no part.*--ignore"):
        llmprune.prune(model, calibration=tokens(), progress=False)
    model = tiny()
    model.model.layers[1].mlp.unused = nn.Linear(32, 8)
    llmprune.prune(model, calibration=tokens(), ignore=["unused"], progress=False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_name_their_matrix(bad: float) -> None:
    model = tiny()
    before = decoder_matrices(model)["model.layers.0.mlp.up_proj"].clone()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 5] = bad
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.down_proj holds 1 NaN or Inf"):
        llmprune.prune(model, calibration=tokens(), progress=False)
    assert torch.equal(before, decoder_matrices(model)["model.layers.0.mlp.up_proj"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_activations_that_are_no_numbers_name_their_readers(bad: float, method: str) -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[4] = bad
    names = r"model\.layers\.1\.mlp\.gate_proj, model\.layers\.1\.mlp\.up_proj"
    with pytest.raises(NumericalError, match=f"NaN or Inf in the activations that enter {names}"):
        llmprune.prune(model, calibration=tokens(), method=method, progress=False)


def test_rows_that_the_pattern_does_not_divide() -> None:
    changes = {"hidden_size": 36, "head_dim": 8}  # o_proj reads 32, down_proj 64, all others 36
    model = tiny(**changes)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ModelError, match=r"q_proj has rows of 36 weights, which 4:8 does not divide"
    ):
        llmprune.prune(model, calibration=tokens(), sparsity="4:8", progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    report = llmprune.prune(
        model, calibration=tokens(), sparsity="4:8", ragged="dense", progress=False
    )
    for layer in report.layers:
        weight = decoder_matrices(model)[layer.name]
        if layer.shape[1] == 36:
            assert layer.skipped == "rows of 36 under 4:8"
            assert layer.sparsity == 0
            assert torch.equal(weight, before[f"{layer.name}.weight"])
        else:
            assert layer.skipped is None
            assert (weight.reshape(-1, 8).count_nonzero(1) == 4).all()
    with pytest.raises(ConfigError, match="no matrix can take 3:7"):
        llmprune.prune(tiny(), calibration=tokens(), sparsity="3:7", ragged="dense", progress=False)


def test_a_weight_used_without_its_module_is_named() -> None:
    with pytest.raises(WalkError, match=r"layers\.0\.mixer\.dt_proj takes no part.*--ignore"):
        llmprune.prune(tiny("mamba"), calibration=tokens(), progress=False)


def test_a_model_without_a_config_is_refused() -> None:
    with pytest.raises(ModelError, match="Sequential has no config"):
        llmprune.prune(nn.Sequential(nn.Linear(4, 4)), calibration=tokens(), progress=False)


# Which matrices


@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [
        (["q_proj"], [], ["self_attn.q_proj"]),
        (["mlp.*"], [], ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
        (["*.0.mlp.down_proj", "*.2.mlp.down_proj"], [], ["0.mlp.down_proj", "2.mlp.down_proj"]),
        (["[kv]_proj"], [], ["self_attn.k_proj", "self_attn.v_proj"]),
        ([r"re:model\.layers\.[01]\..*o_proj$"], [], ["0.self_attn.o_proj", "1.self_attn.o_proj"]),
        (["Linear"], ["lm_head", "mlp.*"], ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ([], ["self_attn.*", "up_proj"], ["gate_proj", "down_proj"]),
        (["model.layers.1.mlp.up_proj"], [], ["layers.1.mlp.up_proj"]),
    ],
)
def test_targets_and_ignore_choose(
    targets: list[str], ignore: list[str], expected: list[str]
) -> None:
    model = tiny()
    chosen = [m.name for m in matrices(model, targets, ignore)]
    wanted = [n for n in decoder_matrices(model) if any(n.endswith(f".{e}") for e in expected)]
    assert chosen == wanted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["qproj"]}, r"--targets 'qproj' matches no matrix; there are: .*q_proj"),
        ({"ignore": ["head"]}, r"--ignore 'head' matches no matrix"),
        ({"targets": ["Conv1D"]}, r"--targets 'Conv1D' matches no matrix"),
        ({"targets": ["re:("]}, r"'re:\(' is no regular expression"),
        ({"ignore": ["Linear"]}, "no matrix is left"),
        ({"targets": "q_proj"}, "lists of names, not one text"),
    ],
)
def test_choices_that_choose_nothing_say_so(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        llmprune.prune(tiny(), calibration=tokens(), progress=False, **settings)


def test_only_what_is_chosen_is_pruned() -> None:
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    llmprune.prune(model, calibration=tokens(), targets=["v_proj"], progress=False)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"model.layers.{i}.self_attn.v_proj.weight" for i in range(BLOCKS)}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_the_output_head_can_be_asked_for(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(tie_word_embeddings=False)
    inputs = inputs_of(model, tokens())["lm_head"]
    spy = Spy(monkeypatch, model, method)
    report = llmprune.prune(
        model,
        calibration=tokens(),
        targets=["lm_head"],
        method=method,
        sparsity="2:4",
        progress=False,
    )
    assert [layer.name for layer in report.layers] == ["lm_head"]
    assert (model.lm_head.weight.reshape(-1, 4).count_nonzero(1) == 2).all()
    stats = spy.stats["lm_head"]
    seen = stats.sum_sq if method == "wanda" else stats.gram.diagonal()
    torch.testing.assert_close(seen.double(), inputs.square().sum(0), rtol=1e-5, atol=0)


def test_the_output_head_after_pruned_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(tie_word_embeddings=False)
    spy = Spy(monkeypatch, model, "wanda")
    llmprune.prune(model, calibration=tokens(), targets=["Linear"], progress=False)
    assert list(spy.stats)[-1] == "lm_head"
    inputs = inputs_of(model, tokens())["lm_head"]
    torch.testing.assert_close(
        spy.stats["lm_head"].sum_sq.double(), inputs.square().sum(0), rtol=1e-5, atol=0
    )


def test_a_tied_output_head_is_refused() -> None:
    model = tiny(tie_word_embeddings=True)
    with pytest.raises(ModelError, match=r"lm_head is tied to the embedding model\.embed_tokens"):
        llmprune.prune(model, calibration=tokens(), targets=["lm_head"], progress=False)


# What is left as it was


@dataclass
class Snapshot:
    """Everything of a model and a process that pruning must leave alone."""

    hooks: list[tuple[int, ...]]
    modes: list[bool]
    grads: list[tuple[bool, Tensor | None, Tensor | None]]
    cache: bool
    torch_state: Tensor
    python_state: Any
    instance: list[Any]
    parameters: list[int]

    @classmethod
    def of(cls, model: Any) -> Snapshot:
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return cls(
            hooks=[tuple(len(getattr(m, kind)) for kind in kinds) for m in model.modules()],
            modes=[m.training for m in model.modules()],
            grads=[
                (p.requires_grad, p.grad, None if p.grad is None else p.grad.clone())
                for p in model.parameters()
            ],
            cache=model.config.use_cache,
            torch_state=torch.random.get_rng_state(),
            python_state=random.getstate(),
            instance=[m.__dict__.get("forward") for m in model.modules()],
            parameters=[id(p) for p in model.parameters()],
        )

    def check(self, model: Any) -> None:
        now = Snapshot.of(model)
        assert now.hooks == self.hooks
        assert now.modes == self.modes
        assert now.cache == self.cache
        assert torch.equal(now.torch_state, self.torch_state)
        assert now.python_state == self.python_state
        assert all(a is b for a, b in zip(now.instance, self.instance, strict=True))
        assert now.parameters == self.parameters
        for (required, grad, values), (was_required, was, was_values) in zip(
            now.grads, self.grads, strict=True
        ):
            assert required == was_required
            assert grad is was
            assert values is None or (was_values is not None and torch.equal(values, was_values))


def in_training() -> Any:
    """A model in the middle of training: gradients, mixed modes, a frozen part, a hook of its own."""
    model = tiny(attention_dropout=0.1).train()
    model.model.layers[1].eval()
    model.model.layers[0].self_attn.q_proj.requires_grad_(False)
    model.config.use_cache = True
    model.model.layers[2].register_forward_hook(lambda module, args, out: None)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    return model


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_all_but_the_pruned_weights_is_as_before(method: str) -> None:
    model = in_training()
    before = Snapshot.of(model)
    llmprune.prune(model, calibration=tokens(), method=method, progress=False)
    before.check(model)
    model(input_ids=tokens(), labels=tokens()).loss.backward()  # still trains


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_all_is_as_before_after_an_exception(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = in_training()
    calls: list[int] = []
    plain = methods.get("wanda").prune

    def failing(it: Any, weight: Tensor, stats: Any, pattern: Any) -> Any:
        calls.append(1)
        torch.rand(3)
        random.random()
        if len(calls) == 9:  # the second matrix of block 1
            raise error("in the middle")
        return plain(it, weight, stats, pattern)

    monkeypatch.setattr(methods.get("wanda"), "prune", failing)
    before = Snapshot.of(model)
    with pytest.raises(error, match="in the middle"):
        llmprune.prune(model, calibration=tokens(), progress=False)
    before.check(model)
    zeros = [int((w == 0).sum()) > 0 for w in decoder_matrices(model).values()]
    assert zeros == [True] * 8 + [False] * 13  # what was pruned by then stays pruned


def test_all_is_as_before_after_an_exception_in_the_forward() -> None:
    model = in_training()
    calls: list[int] = []

    def failing(module: nn.Module, args: Any) -> None:
        calls.append(1)
        if len(calls) == 6:  # the self-check's are four
            raise RuntimeError("in the forward")

    model.model.layers[1].mlp.register_forward_pre_hook(failing)
    before = Snapshot.of(model)
    with pytest.raises(RuntimeError, match="in the forward"):
        llmprune.prune(model, calibration=tokens(), batch_size=2, progress=False)
    before.check(model)


def test_an_instance_forward_is_used_and_put_back() -> None:
    model = tiny()  # accelerate's hooks live in such a forward, and move weights to their device
    plain = tiny()
    calls: list[int] = []

    def wrapped(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return type(block).forward(block, *args, **kwargs)

    own = [functools.partial(wrapped, block) for block in model.model.layers]
    for block, forward in zip(model.model.layers, own, strict=True):
        block.forward = forward
    for each in (model, plain):
        llmprune.prune(each, calibration=tokens(), progress=False)
    assert all(b.forward is f for b, f in zip(model.model.layers, own, strict=True))
    assert len(calls) > BLOCKS
    for name, weight in decoder_matrices(plain).items():
        assert torch.equal(weight, decoder_matrices(model)[name])


# Precisions and wrappers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_half_precision(family: str, dtype: torch.dtype, method: str) -> None:
    model = tiny(family, dtype)
    report = llmprune.prune(
        model, calibration=tokens(), sparsity="2:4", method=method, progress=False
    )
    assert report.sparsity == 0.5
    for weight in decoder_matrices(model).values():
        assert weight.dtype == dtype
        assert (weight.reshape(-1, 4).count_nonzero(1) <= 2).all()
    assert model(input_ids=tokens()).logits.isfinite().all()


def test_wrappers_are_seen_through() -> None:
    plain = tiny()
    llmprune.prune(plain, calibration=tokens(), progress=False)
    for wrap in (torch.compile, nn.DataParallel):
        inner = tiny()
        llmprune.prune(wrap(inner), calibration=tokens(), progress=False)
        for name, weight in decoder_matrices(plain).items():
            assert torch.equal(weight, decoder_matrices(inner)[name]), wrap


def test_adapters_and_quantised_models_are_refused() -> None:
    model = tiny()
    model.peft_config = {"default": object()}
    with pytest.raises(ModelError, match="merge_and_unload"):
        llmprune.prune(model, calibration=tokens(), progress=False)
    model = tiny()
    model.is_quantized = True
    with pytest.raises(ModelError, match="quantised"):
        llmprune.prune(model, calibration=tokens(), progress=False)


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    with pytest.raises(DataError, match="from 0 to 128, the model knows 0 to 127"):
        llmprune.prune(tiny(), calibration=torch.tensor([[0, 128]]), progress=False)


def test_windows_beyond_the_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="windows of 65 tokens; the model allows 64"):
        llmprune.prune(tiny(), calibration=tokens(1, 65), progress=False)
