"""What the plan knows of an sft stage: settings, checks and estimates, without torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from pydantic import ValidationError
from source_models import make_source

from posttrain.errors import RecipeError
from posttrain.methods.sft import Sft, SftConfig
from posttrain.models.architecture import normalise, parameter_count
from posttrain.pipeline.stage import ArtifactMeta
from posttrain.training.adapters import adapter_parameters

STAGE = Sft()


def metas(rows: str | None = "messages", count: int | None = 10):
    arch = normalise(make_source("llama").config.to_dict())
    extra = {"rows": rows} if rows else {}
    return {
        "model": ArtifactMeta("model", architecture=arch, tokenizer="a" * 64, chat_template="c"),
        "data": ArtifactMeta("dataset", rows=count, tokens=5000, extra=extra),
    }


def config(**fields):
    return SftConfig(**{"sequence_length": 128, "tokens_per_step": 1024, **fields})


def test_plan_needs_no_torch():
    code = (
        "import sys, posttrain.methods.sft.stage as s, posttrain.methods.sft as d; d.SftConfig; d.Sft;"
        "assert not {'torch', 'transformers', 'trl', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens_per_step": 1000}, r"multiple of sequence_length \(128\).*tokens_per_step=896"),
        ({"lora": {}, "trainable": "mixers"}, "both choose what is trained"),
        ({"lora": {"rank": 4}}, "lora.rank"),
        ({"loss_on": "user"}, "loss_on"),
        ({"cuda_graph": "on"}, "cuda_graph=auto"),
    ],
)
def test_refused_settings(fields, message):
    with pytest.raises(ValidationError, match=message):
        config(**fields)


@pytest.mark.parametrize(
    ("cfg", "inputs", "message"),
    [
        ({}, metas(count=0), "no rows"),
        ({}, metas("text"), r"plain text.*loss_on=all"),
        ({}, metas("preference"), "preference pairs"),
        ({"sequence_length": 2**20, "tokens_per_step": 2**20}, metas(), "positions.*sequence_length="),
        ({"lora": {"target_modules": ["qkv"]}}, metas(), "no layers qkv.*q_proj"),
    ],
)
def test_check_refuses(cfg, inputs, message):
    with pytest.raises(RecipeError, match=f"(?s){message}"):
        STAGE.check(config(**cfg), inputs)


def test_conversations_need_a_chat_template_before_anything_runs():
    inputs = metas("messages")
    chatless = {**inputs, "model": replace(inputs["model"], chat_template=None)}
    for loss_on in ("assistant", "completion", "all"):
        with pytest.raises(RecipeError, match="no chat template"):
            STAGE.check(config(loss_on=loss_on), chatless)
    STAGE.check(config(loss_on="completion"), {**chatless, "data": metas("prompt")["data"]})
    STAGE.check(config(), {**chatless, "model": replace(chatless["model"], tokenizer=None)})  # not fetched yet


@pytest.mark.parametrize(("cfg", "rows"), [({}, "messages"), ({"loss_on": "all"}, "text"), ({}, None)])
def test_check_passes(cfg, rows):
    STAGE.check(config(**cfg), metas(rows))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
@pytest.mark.parametrize("family", ["llama", "upcycled"])
def test_adapters_are_counted_as_peft_makes_them(targets, family):
    from peft import LoraConfig, get_peft_model

    from posttrain.models.upcycled.configuration_upcycled import UpcycledConfig
    from posttrain.models.upcycling import build_upcycled

    model = make_source("llama")
    if family == "upcycled":
        latent = {"kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
        mixers = ["full_attention"] + ["latent_attention"] * (model.config.num_hidden_layers - 1)
        model = build_upcycled(model, UpcycledConfig.from_source(model.config, mixers=mixers, **latent))
    cfg = config(lora={"r": 3, "target_modules": targets})
    counted = adapter_parameters(normalise(model.config.to_dict()), cfg.lora)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=targets))
    assert counted == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)


def test_estimate():
    inputs = metas()
    full, lora = STAGE.estimate(config(), inputs), STAGE.estimate(config(lora={"r": 2}), inputs)
    arch = inputs["model"].architecture
    assert full.parameters == full.trainable == parameter_count(arch) and full.tokens == 1000 * 1024
    assert lora.trainable < full.trainable and sum(lora.memory.values()) < sum(full.memory.values())
    assert full.memory["logits"] >= 3 * 4 * 1024 * 32768
    assert STAGE.describe(config(), inputs)["model"].extra["dtype"] == "float32"
