"""What the plan knows of a preference stage: settings, checks and estimates, without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError
from source_models import make_source

from posttrain.errors import RecipeError
from posttrain.methods.preference import Preference, PreferenceConfig
from posttrain.models.architecture import normalise, parameter_count
from posttrain.pipeline.stage import ArtifactMeta

STAGE = Preference()
REFERENCES = {"model": "model", "data": "data.train", "gate_data": "data.heldout"}


def metas(
    rows: str | None = "preference", count: int | None = 200, *without: str, **changes
) -> dict[str, ArtifactMeta]:
    arch = normalise(make_source("llama").config.to_dict())
    data = ArtifactMeta("dataset", rows=count, tokens=10_000, extra={"rows": rows} if rows else {})
    found = {"model": ArtifactMeta("model", architecture=arch), "data": data, "gate_data": data, **changes}
    return {name: meta for name, meta in found.items() if name not in without}


def config(**fields) -> PreferenceConfig:
    return PreferenceConfig(**{"inputs": REFERENCES, "sequence_length": 256, **fields})


def test_plan_needs_no_torch():
    code = (
        "import sys, posttrain.methods.preference.stage as s, posttrain.methods.preference as d;"
        "d.PreferenceConfig; d.Preference;"
        "assert not {'torch', 'transformers', 'trl', 'peft', 'reasoning_gym'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_defaults_are_the_papers():
    cfg = PreferenceConfig()
    assert (cfg.loss_type, cfg.beta, cfg.lr, cfg.lr_scheduler, cfg.warmup_ratio) == (
        "sigmoid",
        0.01,
        5e-7,
        "cosine",
        0.1,
    )
    assert cfg.sequence_length == 1024 and cfg.weight_decay == 0 and cfg.sequences_per_step == 32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing does nothing with loss_type=sigmoid"),
        ({"label_smoothing": 0.5, "loss_type": "robust"}, "less than 0.5"),
        ({"lora": {}, "trainable": "mixers"}, "both choose what is trained"),
        ({"loss_type": "aot"}, "loss_type"),
        ({"cuda_graph": "on"}, "cuda_graph=auto"),
        ({"gate_metric": "loss"}, "gate_metric"),
    ],
)
def test_refused_settings(fields, message):
    with pytest.raises(ValidationError, match=message):
        config(**fields)


@pytest.mark.parametrize(
    ("cfg", "inputs", "message"),
    [
        ({}, metas(count=0), "training data has no rows"),
        ({}, metas("text"), "training data has rows of text, and no preference pairs.*reasoning_gym_pairs"),
        ({}, metas("messages+text"), "rows of messages and text"),
        (
            {},
            metas("preference", 9, "gate_data"),
            "compares pair_accuracy on held-out pairs, and none.*gate_data=data.held",
        ),
        ({"gate_metric": "perplexity"}, metas(), "compares perplexity on held-out text.*gate_text="),
        ({"inputs": {**REFERENCES, "gate_data": "data.train"}}, metas(), "gate_data is the training data"),
        ({"sequence_length": 2**20}, metas(), "positions.*sequence_length="),
        ({"lora": {"target_modules": ["qkv"]}}, metas(), "no layers qkv.*q_proj"),
    ],
)
def test_check_refuses(cfg, inputs, message):
    with pytest.raises(RecipeError, match=f"(?s){message}"):
        STAGE.check(config(**cfg), inputs)


@pytest.mark.parametrize(
    ("cfg", "inputs"),
    [
        ({}, metas()),
        ({}, metas(None, None)),
        ({}, metas("preference+text")),
        ({"keep": "trained"}, metas("preference", 9, "gate_data")),
    ],
)
def test_check_passes(cfg, inputs):
    STAGE.check(config(**cfg), inputs)


def test_estimate():
    inputs = metas()
    arch = inputs["model"].architecture
    plain, lora, lean = (
        STAGE.estimate(config(**fields), inputs) for fields in ({}, {"lora": {"r": 2}}, {"precompute_reference": True})
    )
    assert plain.parameters == plain.trainable == parameter_count(arch) and lora.trainable < plain.trainable
    # 50 tokens of prompt and chosen answer a row: twice that a pair.
    assert plain.tokens == 1000 * 32 * 100 and plain.data_tokens == 200 * 100
    assert plain.memory["reference"] >= 4 * parameter_count(arch)
    assert "reference" not in lora.memory and "reference" not in lean.memory
    assert not plain.notes
    few = STAGE.estimate(config(), metas(count=12))
    assert "12 held-out pairs" in few.notes[0]
    unknown = STAGE.estimate(config(), metas(None, None))
    assert unknown.tokens == 1000 * 32 * 2 * 256 and unknown.data_tokens == 20_000
    assert STAGE.describe(config(), inputs)["model"].extra["dtype"] == "float32"
