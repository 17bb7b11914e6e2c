"""The picture of a run, for every shape a report may take."""

import sys
from pathlib import Path

import pytest

from llmprune import plot as plotting
from llmprune.errors import ConfigError
from llmprune.plot import check, plot
from llmprune.report import LayerReport, PerplexityReport, Report

pytest.importorskip("matplotlib")
KINDS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def report(
    blocks: int = 12, data: bool = True, head: bool = False, kinds: tuple[str, ...] = KINDS
) -> Report:
    def layer(name: str, error: float) -> LayerReport:
        return LayerReport(name, (64, 64), 2048, 0.5, error, error / 3 if data else None, 9, 0.1)

    layers = [
        layer(f"model.layers.{b}.{kind}", 0.01 * (k + 1) * 1.3**b)
        for b in range(blocks)
        for k, kind in enumerate(kinds)
    ]
    if head:
        layers.append(layer("lm_head", 0.2))
    measured = {
        name: PerplexityReport(value, 0.2, 128, 256, "wikitext2 (test)", "p", 1.0, 1.0)
        for name, value in (("dense", 10.5), ("pruned", 12.25))
    }
    recipe = {"method": "wanda", "sparsity": "0.5"}
    return Report(recipe, {"name": "meta-llama/Llama-3.2-1B"}, layers, perplexity=measured)


def bare() -> Report:
    return Report({}, {}, [LayerReport("lm_head", (4, 4), 16, 0.0, 0.0, None, 0, 0.0)])


@pytest.mark.parametrize(
    "drawn",
    [
        report(), report(1), report(80, data=False), report(head=True), bare(),
        report(3, kinds=tuple(f"mlp.experts.{i}.w{j}" for i in range(4) for j in range(3))),
        report(4, kinds=tuple(f"kind.{c}" for c in "abcdefghijk")),
    ],
)  # fmt: skip
def test_every_report_can_be_drawn(drawn: Report, tmp_path: Path) -> None:
    plot(drawn, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("suffix", [".svg", ".pdf", ".PNG"])
def test_formats(suffix: str, tmp_path: Path) -> None:
    plot(report(2), tmp_path / f"run{suffix}")
    assert (tmp_path / f"run{suffix}").stat().st_size > 1000


def test_experts_are_one_kind() -> None:
    kinds = plotting._kinds(report(2, kinds=("mlp.experts.0.w1", "mlp.experts.1.w1")))
    assert list(kinds) == ["experts.w1"]
    assert [len(layers) for layers in kinds["experts.w1"].values()] == [2, 2]


def test_no_global_state(tmp_path: Path) -> None:
    had = "matplotlib.pyplot" in sys.modules
    plot(report(1), tmp_path / "run.png")
    assert ("matplotlib.pyplot" in sys.modules) == had


def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("run.xyz", "run"):
        with pytest.raises(ConfigError, match=rf"'{name}'; use one of .*\.png"):
            check(tmp_path / name)
    with pytest.raises(ConfigError, match="No such file or directory"):
        check(tmp_path / "nowhere/run.png")
    (tmp_path / "a.png").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        check(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="holds no matrix"):
        plot(Report({}, {}, []), tmp_path / "run.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r'pip install "llmprune\[plot\]"'):
        check(tmp_path / "run.png")
