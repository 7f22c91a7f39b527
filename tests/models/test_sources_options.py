"""Every shipped model option: valid, of the stated size, and plannable without the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from posttrain.models.architecture import normalise, parameter_count
from posttrain.models.config import ModelSourceConfig
from posttrain.models.stage import ModelSource
from posttrain.paths import shipped

OPTIONS = sorted((shipped("conf") / "model").glob("*.yaml"))
PUBLISHED = {
    "llama31_8b": 8_030_261_248,
    "llama32_1b": 1_235_814_400,
    "llama32_3b": 3_212_749_824,
    "mistral_7b": 7_248_023_552,
    "qwen25_0_5b": 494_032_768,
    "qwen25_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "smollm2_135m": 134_515_008,
    "smollm2_135m_hub": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
}


@pytest.fixture(autouse=True)
def _empty_caches(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


def test_only_random_weights_have_no_licence() -> None:
    licences = {path.stem: yaml.safe_load(path.read_text()).get("licence") for path in OPTIONS}
    assert [name for name, licence in licences.items() if licence is None] == ["tiny"]


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: path.stem)
def test_option_is_planned_without_weights(path: Path) -> None:
    cfg = ModelSourceConfig(**yaml.safe_load(path.read_text()))
    stage = ModelSource()
    stage.check(cfg, {})
    meta = stage.describe(cfg, {})["model"]
    assert meta.extra["label"] == cfg.label
    estimate = stage.estimate(cfg, {})
    assert estimate.parameters == parameter_count(meta.architecture)
    if path.stem in PUBLISHED:
        assert estimate.parameters == PUBLISHED[path.stem]
        assert estimate.disk_bytes == 2 * PUBLISHED[path.stem]
        assert estimate.notes


def test_every_published_size_has_its_option() -> None:
    assert set(PUBLISHED) <= {path.stem for path in OPTIONS}


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: path.stem)
def test_architecture_is_what_transformers_builds(path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from posttrain.models.tiny import config_fields

    architecture = yaml.safe_load(path.read_text())["architecture"]
    config = AutoConfig.for_model(**config_fields(architecture))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(normalise(architecture))
    assert normalise(config.to_dict()) == normalise(architecture)


def test_a_licence_is_said_of_the_model_it_belongs_to_and_names_no_run(tmp_path: Path) -> None:
    from posttrain.models.tiny import write_random_model

    source, tiny = ModelSource(), yaml.safe_load((shipped("conf") / "model" / "tiny.yaml").read_text())
    option = ModelSourceConfig(**tiny, licence="mit")
    assert source.describe(option, {})["model"].extra["licence"] == "mit"
    without = option.model_copy(update={"licence": None})
    assert option.key_fields() == without.key_fields() and option.digest_fields() == without.digest_fields()
    assert option.digest_fields() != option.model_copy(update={"label": "b"}).digest_fields()
    write_random_model(tmp_path / "m", tiny["architecture"], 0)
    mine = option.model_copy(update={"path": str(tmp_path / "m")})
    assert "licence" not in source.describe(mine, {})["model"].extra, "the option's is not the folder's"
    (tmp_path / "m" / "README.md").write_text("---\nlicense: llama3.2\n---\n# A model\n---\nlicense: other\n")
    assert source.describe(mine, {})["model"].extra["licence"] == "llama3.2"
    for text in ("# A model\n\n---\nlicense: mit\n---\n", "---\nlicense: [mit\n---\n", "---\nother: 1\n---\n", ""):
        (tmp_path / "m" / "README.md").write_text(text)
        assert "licence" not in source.describe(mine, {})["model"].extra, text
