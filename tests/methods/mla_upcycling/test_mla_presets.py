"""Presets fill in what was not given, say so, and their YaRN reaches the model."""

from __future__ import annotations

import math

import pytest
import torch
from methods.mla_upcycling.sources import logits, make_source, text, tokens
from methods.mla_upcycling.test_mla_card import published
from methods.mla_upcycling.test_mla_lossless import LLAMA3
from pydantic import ValidationError

import posttrain.methods.mla_upcycling as mla
from posttrain.errors import RecipeError
from posttrain.methods.mla_upcycling.presets import PRESETS
from posttrain.methods.mla_upcycling.shape import resolve_shape
from posttrain.methods.mla_upcycling.stage import MlaUpcycle
from posttrain.pipeline.stage import ArtifactMeta

Config = mla.MlaUpcycleConfig
STAGE = MlaUpcycle()


def notes(cfg: mla.MlaUpcycleConfig, model: str = "llama32_1b", calibrated: bool = True) -> str:
    inputs = {"model": ArtifactMeta("model", published(model), extra={"dtype": "bfloat16"})}
    if calibrated:
        inputs["calibration"] = ArtifactMeta("dataset")
    return "\n".join(STAGE.estimate(cfg, inputs).notes)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_its_settings_written_out(preset: str) -> None:
    short = Config(preset=preset, kv_lora_rank=16)
    values = {name: value for name, value in PRESETS[preset].items() if name != "energy"}
    written = Config(kv_lora_rank=16, **values)
    assert short.model_copy(update={"preset": None}) == written
    assert Config(**short.model_dump()) == short, "a dumped config is accepted again"


def test_paper_and_released_code_differ_in_ranks_and_scaling() -> None:
    paper, released = (Config(preset=f"x_ecomla_{which}") for which in ("paper", "released"))
    assert (paper.energy, paper.energy_rule, paper.rank_multiple, paper.rotary_scaling) == (
        0.95,
        "at_least",
        1,
        "source",
    )
    assert (released.energy, released.energy_rule, released.rank_multiple) == (0.95, "released", 8)
    assert (released.rotary_scaling, released.yarn_original_max_position_embeddings) == ("yarn", 4096)
    assert paper.rotary_plan == released.rotary_plan == "xeco"


def test_a_given_setting_wins_and_a_budget_replaces_the_energy() -> None:
    cfg = Config(preset="x_ecomla_released", kv_ratio=0.1, rank_multiple=4)
    assert (cfg.energy, cfg.kv_ratio, cfg.rank_multiple, cfg.energy_rule) == (None, 0.1, 4, "released")
    cfg = Config(preset="transmla", kv_lora_rank=64, freqfold=4, balance_ratio=0.5, objective=None)
    assert (cfg.freqfold, cfg.balance_ratio, cfg.objective) == (4, 0.5, "activation"), "null is as if not given"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"preset": "transmla", "rotary_plan": "paired"}, "preset=transmla is rotary_plan=rorope, not paired"),
        ({"preset": "x_ecomla_paper", "objective": "activation"}, "rotary_plan=xeco fixes objective"),
        ({"preset": "transmla", "keep_residual": False}, "rotary_plan=rorope fixes keep_residual"),
        ({"preset": "mla", "kv_ratio": 0.1}, "x_ecomla_paper"),
        ({"rotary_scaling": "yarn"}, "rotary_scaling=yarn belongs to rotary_plan=xeco"),
        ({"yarn_factor": 8.0, "rotary_plan": "xeco"}, "yarn_factor belongs to rotary_scaling=yarn"),
        ({"end_layer_rank": 8}, "end_layer_rank belongs to energy"),
    ],
)
def test_contradictions_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said) as caught:
        Config(**({} if "kv_ratio" in settings else {"kv_lora_rank": 16}), **settings)
    assert caught.value.error_count() == 1


def test_the_plan_says_what_a_preset_set() -> None:
    said = notes(Config(preset="transmla", kv_lora_rank=512, qk_rope_head_dim=64, freqfold=4))
    assert "preset transmla: rotary_plan=rorope, latent_plan=bkv" in said and "objective=activation" in said
    assert "instead of its own: freqfold=4" in said
    said = notes(Config(preset="x_ecomla_released"), calibrated=False)
    assert "energy=0.95" in said and "factor 32 over 4096 positions, instead of the source's llama3 scaling" in said
    assert "pins the first and last layer" in said
    assert "no calibration" not in said
    plain = notes(Config(preset="x_ecomla_released"), model="smollm2_1_7b")
    assert "replaces nothing: the source's rotary embedding is not scaled" in plain
    narrow = notes(Config(kv_lora_rank=64, q_lora_rank=1424))
    assert "rank 1424 save parameters; the cache is as large without" in narrow


def test_end_layers_keep_a_rank_of_their_own() -> None:
    cfg = {"preset": "x_ecomla_released", "qk_rope_head_dim": 8, "energy": 0.8}
    source = make_source("llama", num_hidden_layers=4)
    free, pinned = (
        [layer["kv_lora_rank"] for layer in mla.upcycle(source, {**cfg, **more})[1]["layers"]]
        for more in ({}, {"end_layer_rank": 40})
    )
    assert pinned == [40, *free[1:-1], 40] and all(rank % 8 == 0 and rank < 40 for rank in free)
    with pytest.raises(RecipeError, match="end_layer_rank 65 is larger than possible, 64"):
        mla.upcycle(source, {**cfg, "end_layer_rank": 65})


def test_released_yarn_turns_the_latent_layers_and_nothing_else() -> None:
    source = make_source("llama", rope_parameters=LLAMA3)
    base = {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "rotary_plan": "xeco"}
    kept, _ = mla.upcycle(source, base)
    new, _ = mla.upcycle(source, {**base, "rotary_scaling": "yarn", "yarn_factor": 4.0})
    assert kept.config.latent_rope_parameters is None and kept.config.rope_frequency_indices == [0, 2, 4, 6]
    own = new.config.latent_rope_parameters
    assert (own["rope_type"], own["factor"], own["original_max_position_embeddings"]) == ("yarn", 4.0, 64)
    assert new.config.rope_parameters["rope_type"] == "llama3"
    first, second = (model.model.layers[0].self_attn.state_dict() for model in (kept, new))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (logits(kept, tokens()) - logits(new, tokens())).abs().max() > 1e-2
    (cos, _), *_ = new.model.rotary_emb(torch.zeros(1), position_ids=torch.zeros(1, 1, dtype=torch.long))
    assert cos.flatten().tolist() == pytest.approx([0.1 * math.log(4) + 1] * 8)


def test_the_source_decides_what_yarn_is_not_told() -> None:
    def own(model: str, **settings) -> dict | None:
        cfg = Config(kv_lora_rank=64, rotary_plan="xeco", rotary_scaling="yarn", **settings)
        return resolve_shape(published(model), cfg).latent_rope_parameters

    released = {"rope_type": "yarn", "rope_theta": 500000.0, "original_max_position_embeddings": 8192}
    assert own("llama32_1b").items() >= {**released, "factor": 32.0}.items()
    assert own("llama31_8b").items() >= {**released, "factor": 8.0}.items()
    assert own("smollm2_1_7b") is None
    with pytest.raises(RecipeError, match="needs yarn_original_max_position_embeddings"):
        own("smollm2_1_7b", yarn_factor=4.0)
    assert own("smollm2_1_7b", yarn_factor=4.0, yarn_original_max_position_embeddings=2048)["factor"] == 4.0


def test_presets_convert(tmp_path) -> None:
    source = make_source("llama", rope_parameters=LLAMA3)
    for preset in PRESETS:
        budget = {"kv_lora_rank": 24} if preset in ("transmla", "activation_aware") else {}
        new, report = mla.upcycle(source, {"preset": preset, "qk_rope_head_dim": 8, **budget}, text())
        assert torch.isfinite(logits(new, tokens())).all() and report["config"]["preset"] == preset
        assert (new.config.latent_rope_parameters is not None) == (preset == "x_ecomla_released")
