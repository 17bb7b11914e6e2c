"""The card, and the push with the real client against a Hub on the loopback."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, point_at, serving
from huggingface_hub import ModelCard, constants

from llmprune import hub
from llmprune.errors import ConfigError, HubError
from llmprune.report import CalibrationReport, LayerReport, PerplexityReport, Report


def report(name: str = "meta-llama/Llama-3.2-1B", source: str = "wikitext2 (train)") -> Report:
    def measured(value: float) -> PerplexityReport:
        protocol = "one text tokenised once, disjoint windows of 2048"
        return PerplexityReport(value, 0.25, 140, 2048, "wikitext2 (test)", protocol, 3.0, 1e4)

    return Report(
        recipe={
            "method": "wanda",
            "settings": {"alpha": 1.0},
            "sparsity": "2:4",
            "within": "2:4 neighbours",
        },
        model={"name": name},
        layers=[LayerReport("model.layers.0.mlp.up_proj", (8, 16), 64, 0.5, 0.1, 0.2, 9, 1.0)],
        calibration=CalibrationReport(source, 128, 2048, 0, "ab" * 32),
        perplexity={"dense": measured(10.0), "pruned": measured(12.345678)},
    )


def test_card_says_what_the_hub_reads() -> None:
    text = hub.card(report(), repo_id="ann/tiny", command="python -m llmprune --model x")
    data = ModelCard(text).data
    assert data.base_model == "meta-llama/Llama-3.2-1B"
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["llmprune", "pruned", "sparse", "wanda"]
    assert data.datasets == ["Salesforce/wikitext"]
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("perplexity", 12.3457)
    assert result.dataset_type == "Salesforce/wikitext"
    for part in (
        "50.00%", "2:4 (kept of neighbours)", "| pruned | 12.346 | 0.250 |", "ab" * 32,
        "python -m llmprune --model x", 'from_pretrained("ann/tiny")', "disjoint windows of 2048",
        "as large as the dense",
    ):  # fmt: skip
        assert part in text


@pytest.mark.parametrize("name", ["/data/llama", "demo", "models/llama"])
def test_card_names_no_local_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models/llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = hub.card(report(name, "notes/mine.txt"), command="c")
    data = ModelCard(text).data
    assert data.base_model is None
    assert data.datasets is None
    assert "/data" not in text


def test_card_without_data_or_perplexity() -> None:
    bare = Report(recipe={"method": "magnitude", "sparsity": "0.5"}, model={}, layers=[])
    text = hub.card(bare, command="c")
    assert "Perplexity" not in text
    assert "calibration" not in text
    assert ModelCard(text).data.tags[-1] == "magnitude"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "my out"
    path.mkdir()
    (path / "README.md").write_text(hub.card(report(), command="c"))
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    return path


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as running:
        point_at(monkeypatch, running.url, str(tmp_path / "cache"))
        yield running


@pytest.mark.parametrize("xet", [True, False])
@pytest.mark.parametrize("private", [True, False])
def test_push_delivers_every_byte(
    server: Hub, folder: Path, xet: bool, private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    server.large = None if xet else ".safetensors"  # large files over xet need its storage server
    hub.check_push("ann/tiny")
    assert hub.push(folder, "ann/tiny", private=private) == f"{server.url}/ann/tiny"
    assert server.files == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert server.private is private
    if not xet:
        assert any(line.startswith("PUT /blob/") for line in server.asked)
    hub.push(folder, "ann/tiny", private=private)  # the repository is there now


def test_private_does_not_end_up_public(server: Hub, folder: Path) -> None:
    server.private = False
    with pytest.raises(HubError, match=r"exists and is public.*--private"):
        hub.push(folder, "ann/tiny", private=True)
    assert not server.files


def _refused(error: pytest.ExceptionInfo[HubError], folder: Path) -> str:
    """The message, held to what every failed push must say."""
    text = str(error.value)
    assert "\n" not in text
    assert f"{folder} is complete" in text
    assert f"hf upload ann/tiny '{folder}'" in text
    assert "hf_loopback" not in text
    return text


@pytest.mark.parametrize("where", ["/api/repos/create", "/preupload/", "/commit/"])
@pytest.mark.parametrize("xet", [True, False])
def test_push_without_rights(
    server: Hub, folder: Path, where: str, xet: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    server.forbid = where
    with pytest.raises(HubError) as error:
        hub.push(folder, "ann/tiny")
    assert "no right to write" in _refused(error, folder)


@pytest.mark.parametrize(
    "where", ["/api/repos/create", "/preupload/", "/batch", "/blob/", "/commit/"]
)
@pytest.mark.parametrize("xet", [True, False])
def test_server_gone_midway(
    server: Hub, folder: Path, where: str, xet: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if xet:
        where = {"/batch": "/xet-write-token/", "/blob/": "/validate-yaml"}.get(where, where)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)
    server.large = ".safetensors" if not xet or "xet" in where else None
    server.vanish = where
    begun = time.perf_counter()
    with pytest.raises(HubError) as error:
        hub.push(folder, "ann/tiny")
    assert time.perf_counter() - begun < 30
    _refused(error, folder)


def test_xet_refused(server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    server.large, server.forbid = ".safetensors", "/xet-write-token/"
    with pytest.raises(HubError) as error:
        hub.push(folder, "ann/tiny")
    _refused(error, folder)


def test_no_server_at_all(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(monkeypatch, "http://127.0.0.1:9", str(tmp_path / "cache"))
    with pytest.raises(HubError, match=r":9 does not answer") as error:
        hub.push(folder, "ann/tiny")
    _refused(error, folder)
    with pytest.raises(HubError, match="does not answer"):
        hub.check_push("ann/tiny")


def test_offline(server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import close_session

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        hub.check_push("ann/tiny")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        hub.push(folder, "ann/tiny")
    monkeypatch.undo()
    close_session()


def test_no_token(server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="there is no token; log in"):
        hub.check_push("ann/tiny")


def test_wrong_tokens(server: Hub) -> None:
    with pytest.raises(HubError, match="does not know this token"):
        hub.check_push("ann/tiny", token="hf_other")
    with pytest.raises(HubError, match=r"the token is ann's, who cannot write to bob"):
        hub.check_push("bob/tiny")
    hub.check_push("lab/tiny")
    server.role = "read"
    with pytest.raises(HubError, match="can only read"):
        hub.check_push("ann/tiny")


@pytest.mark.parametrize(
    "name", ["tiny", "ann/", "ann/tiny/x", "ann/ti--ny", "https://hf.co/ann/tiny", "a n/x"]
)
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(ConfigError, match="repository"):
        hub.check_push(name)
