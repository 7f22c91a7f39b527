"""A model type of an installed package: planned, made, trained on, saved and loaded like a built-in one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from plugin_packages import forget, install, see

import posttrain
from posttrain.config import plugins
from posttrain.errors import RecipeError
from posttrain.generation.support import unsupported
from posttrain.methods.export.stage import Export
from posttrain.methods.mla_upcycling.shape import check_family
from posttrain.models import foreign
from posttrain.models.architecture import cache_bytes_per_token, normalise, parameter_count
from posttrain.models.inspect import check_model_folder, model_meta
from posttrain.models.loading import load_model, load_tokenizer
from posttrain.models.tiny import write_random_model
from posttrain.pipeline.stage import ArtifactMeta

LIGHT = """
def register():
    from transformers import AutoConfig, AutoModelForCausalLM

    from own_modelling import OwnConfig, OwnModel

    AutoConfig.register("own_model", OwnConfig, exist_ok=True)
    AutoModelForCausalLM.register(OwnConfig, OwnModel, exist_ok=True)


def architecture(config):
    return {**config, "model_type": "llama", "hidden_size": config["width"], "intermediate_size": 2 * config["width"]}
"""
MODELLING = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_model"

    def __init__(self, width=32, **kwargs):
        kwargs = {name: value for name, value in kwargs.items() if name not in ("hidden_size", "intermediate_size")}
        self.width = width
        super().__init__(hidden_size=width, intermediate_size=2 * width, **kwargs)


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
SHAPE = {
    "model_type": "own_model",
    "width": 32,
    "vocab_size": 300,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
    "max_position_embeddings": 128,
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = {"own_light.py": LIGHT, "own_modelling.py": MODELLING}
    see(monkeypatch, install(tmp_path / "site", "posttrain-own", {"models:own_model": "own_light"}, files))
    yield
    from transformers import CONFIG_MAPPING

    for module in ("own_light", "own_modelling"):
        sys.modules.pop(module, None)
    CONFIG_MAPPING._extra_content.pop("own_model", None)
    foreign._register.cache_clear()
    plugins._loaded.clear()
    forget()


def test_a_model_of_a_package_is_made_measured_and_loaded(package, tmp_path: Path) -> None:
    planned = normalise(SHAPE)
    assert planned["model_type"] == "own_model" and planned["counted_as"] == "llama"
    assert normalise(planned) == planned
    assert "own_modelling" not in sys.modules  # a plan needs no class
    folder = tmp_path / "model"
    write_random_model(folder, SHAPE, seed=0)
    check_model_folder(folder)
    assert model_meta(folder).architecture["hidden_size"] == planned["hidden_size"] == 32
    model = load_model(folder)
    assert type(model).__name__ == "OwnModel" and load_tokenizer(folder).eos_token_id == 257
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(planned)
    assert cache_bytes_per_token(planned) == 2 * 2 * 2 * 2 * 8
    again, _ = posttrain.load(folder)
    ids = torch.arange(12).reshape(1, 12)
    assert torch.equal(again(ids.to(again.device)).logits.cpu(), model(ids).logits)
    assert plugins.in_use() == {"posttrain-own": "1.2"}


def test_loading_alone_registers_the_type(package, tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING

    write_random_model(tmp_path / "model", SHAPE, seed=0)
    CONFIG_MAPPING._extra_content.pop("own_model")
    foreign._register.cache_clear()
    assert type(load_model(tmp_path / "model")).__name__ == "OwnModel"


def test_what_needs_the_blocks_of_a_known_family_refuses_it(package, tmp_path: Path) -> None:
    arch = normalise(SHAPE)
    with pytest.raises(RecipeError, match="cannot convert model_type own_model"):
        check_family(arch)
    stage = Export()
    with pytest.raises(RecipeError, match="installed package's"):
        stage.check(stage.Config(inputs={"model": "model"}), {"model": ArtifactMeta("model", architecture=arch)})
    write_random_model(tmp_path / "model", SHAPE, seed=0)
    assert "belong to an installed package" in unsupported(load_model(tmp_path / "model"))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def architecture(config):\n    return {'model_type': 'gpt2'}\n", "counted as 'gpt2'"),
        ("import absent_library\n", "No module named 'absent_library'"),
    ],
)
def test_a_package_that_describes_badly_is_one_message(tmp_path: Path, monkeypatch, code: str, words: str) -> None:
    see(monkeypatch, install(tmp_path / "s", "posttrain-own", {"models:own_model": "own_bad"}, {"own_bad.py": code}))
    try:
        with pytest.raises(RecipeError, match=words):
            normalise(SHAPE)
    finally:
        sys.modules.pop("own_bad", None)
        forget()


def test_a_type_that_registers_nothing_is_told(tmp_path: Path, monkeypatch) -> None:
    see(monkeypatch, install(tmp_path / "s", "posttrain-own", {"models:own_model": "own_mute"}, {"own_mute.py": ""}))
    try:
        with pytest.raises(RecipeError, match="not known to transformers after its registration"):
            foreign.register("own_model")
    finally:
        sys.modules.pop("own_mute", None)
        forget()


def test_without_the_package_the_type_is_refused_as_before() -> None:
    forget()
    with pytest.raises(RecipeError, match="unsupported architecture: model_type 'own_model'"):
        normalise(SHAPE)
