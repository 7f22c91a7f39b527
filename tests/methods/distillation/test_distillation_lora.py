"""Adapters on the student: what is trained and saved, and that an interruption changes nothing."""

from __future__ import annotations

import pytest
import torch
from distillation_world import SMALL, STAGE, assert_same, context, outcome, uneven, world
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from source_models import make_source

from posttrain.errors import RecipeError, StageError, StopRequested
from posttrain.methods.distillation import DistillConfig
from posttrain.methods.distillation.models import add_adapters
from posttrain.models.architecture import normalise, parameter_count
from posttrain.pipeline.stage import ArtifactMeta
from posttrain.training import checkpoints
from posttrain.training.adapters import LoraSettings, adapter_parameters

__all__ = ["context", "uneven", "world"]  # fixtures

LORA = {"lora": {"r": 4, "alpha": 8.0}}


@pytest.fixture(scope="module")
def upcycled(world, tmp_path_factory):
    """The student's folder with latent attention."""
    from posttrain.methods.mla_upcycling import upcycle
    from posttrain.models.loading import load_model, load_tokenizer, save_model

    source = load_model(world / "student", attn_implementation="sdpa")
    calibration = [torch.randint(0, 250, (2, 64), generator=torch.Generator().manual_seed(9))]
    model = upcycle(source, {"kv_lora_rank": 24, "qk_rope_head_dim": 8}, calibration)[0]
    folder = tmp_path_factory.mktemp("upcycled") / "student"
    save_model(model, load_tokenizer(world / "student"), folder)
    return folder


def weights_of(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("kind", "packing"), [("llama", "documents"), ("upcycled", "stream")])
def test_adapters_learn_and_are_merged(context, world, upcycled, uneven, kind, packing):
    """What is saved has the student's tensors and no others; the layers with adapters moved, and nothing else did."""
    student = upcycled if kind == "upcycled" else world / "student"
    ctx = context(student=student, data=uneven, packing=packing, max_steps=8, **LORA)
    weights, history, _ = outcome(ctx)
    before = weights_of(student)
    moved = {name for name in before if not torch.equal(before[name], weights[name])}
    assert before.keys() == weights.keys() and history[-1]["kl"] < 0.95 * history[0]["kl"]
    assert moved == {name for name in before if "_proj" in name}


@pytest.mark.parametrize(("kind", "packing"), [("llama", "documents"), ("upcycled", "stream")])
def test_the_merged_model_is_the_trained_one(context, world, upcycled, uneven, kind, packing):
    """The third step's divergence is that of the model saved after two, computed without adapters."""
    student = upcycled if kind == "upcycled" else world / "student"
    common = {"data": uneven, "packing": packing, "lr_scheduler": "constant", "warmup_ratio": 0.0}
    history = outcome(context("long", student=student, max_steps=3, **common, **LORA))[1]
    short = context("short", student=student, max_steps=2, **common, **LORA)
    outcome(short)
    merged = context("merged", student=short.work_dir / "outputs" / "model", max_steps=3, **common)
    merged.config = merged.config.model_copy(update={"lr": 1e-30})
    assert outcome(merged)[1][2]["kl"] == pytest.approx(history[2]["kl"], rel=1e-5)
    assert abs(history[2]["kl"] / history[0]["kl"] - 1) > 1e-3


@pytest.mark.parametrize("cache", [{}, {"teacher_cache": {"top_k": 8}}], ids=["live", "cached"])
def test_stop_at_every_step_changes_nothing(context, upcycled, monkeypatch, cache):
    settings = {"student": upcycled, "max_steps": 3, **LORA, **cache}
    undisturbed = outcome(context("undisturbed", **settings))
    stops, result = [], None
    while result is None:
        # Not the first attempt's random state: adapters must come from the seed, then from the checkpoint.
        torch.manual_seed(100 + len(stops))
        ctx, asked = context(**settings), []
        monkeypatch.setattr("posttrain.methods.distillation.teacher_pass._Pass._report", lambda *_: None)
        monkeypatch.setattr(type(ctx), "should_stop", lambda self, asked=asked: asked.append(1) or len(asked) > 1)
        try:
            result = outcome(ctx)
        except StopRequested as stop:
            stops.append(stop.step)
    assert stops == [1, 2, 3]
    assert_same(undisturbed, result)


def test_a_checkpoint_holds_adapters_and_their_moments(context):
    ctx = context(save_every=2, **LORA)
    outcome(ctx)
    newest = checkpoints.newest_complete(ctx.checkpoint_dir)
    adapters = {name: tensor for name, tensor in weights_of(newest).items() if ".lora_" in name}
    assert len(adapters) == 2 * 2 * 7 and all(tensor.abs().max() > 0 for tensor in adapters.values())
    state = torch.load(newest / "optimizer.pt", weights_only=True)["state"]
    assert sum(moments["exp_avg"].numel() for moments in state.values()) == sum(t.numel() for t in adapters.values())


def test_resume_really_uses_the_checkpointed_adapters(context):
    """Guards the tests above: with other adapters in the checkpoint the result differs."""
    undisturbed = outcome(context("undisturbed", **LORA))
    ctx = context(save_every=3, **LORA)
    outcome(ctx)
    path = ctx.checkpoint_dir / "checkpoint-3"
    changed = {name: 0.9 * t if ".lora_B" in name else t for name, t in weights_of(path).items()}
    save_file(changed, path / "model.safetensors", metadata={"format": "pt"})
    checkpoints.complete(path)
    history = outcome(context(**LORA))[1]
    assert history[:3] == undisturbed[1][:3] and history[3] != undisturbed[1][3]


def test_adapters_depend_on_the_seed_alone():
    def adapters(seed, state):
        model = make_source("llama")
        torch.manual_seed(state)
        before = torch.random.get_rng_state()
        model = add_adapters(model, LoraSettings(r=2), seed)
        assert torch.equal(before, torch.random.get_rng_state())
        return {name: p.clone() for name, p in model.named_parameters() if "lora_A" in name}

    first, again, other = adapters(3, 1), adapters(3, 2), adapters(4, 1)
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)


def test_only_named_layers(context, world):
    before = weights_of(world / "student")
    weights = outcome(context(max_steps=3, lora={"r": 4, "target_modules": ["q_proj", "down_proj"]}))[0]
    moved = {name for name in before if not torch.equal(before[name], weights[name])}
    assert moved == {name for name in before if "q_proj" in name or "down_proj" in name}


def metas():
    arch = normalise(make_source("llama").config.to_dict())
    model = ArtifactMeta("model", architecture=arch, tokenizer="a" * 64)
    return {"student": model, "teacher": model, "data": ArtifactMeta("dataset", rows=10, tokens=5000)}


def test_what_cannot_be_is_refused_with_a_reason(context):
    with pytest.raises(ValidationError, match="both choose what is trained"):
        DistillConfig(trainable="mixers", **LORA)
    with pytest.raises(RecipeError, match=r"no layers qkv.*q_proj"):
        STAGE.check(DistillConfig(**SMALL, lora={"target_modules": ["qkv"]}), metas())
    STAGE.check(DistillConfig(**SMALL, lora={"target_modules": ["q_proj"]}), metas())
    for target, message in (("qkv", "qkv"), ("lm_head", "output head cannot")):
        with pytest.raises(StageError, match=message):
            STAGE.run(context(lora={"target_modules": [target]}))


def test_plan_counts_adapters():
    full, lora = (STAGE.estimate(DistillConfig(**SMALL, **more), metas()) for more in ({}, LORA))
    arch = metas()["student"].architecture
    adapters = adapter_parameters(arch, LoraSettings(**LORA["lora"]))
    assert lora.parameters == parameter_count(arch) and lora.trainable == adapters < full.trainable
    assert lora.memory["weights"] == full.memory["weights"] + 4 * adapters
    assert lora.memory["optimizer"] == 8 * adapters and sum(lora.memory.values()) < sum(full.memory.values())


def test_adapters_of_layers_with_query_ranks_of_their_own_are_counted():
    from posttrain.models.upcycled.configuration_upcycled import UpcycledConfig
    from posttrain.models.upcycling import build_upcycled

    source = make_source("llama")
    latent = {"kv_lora_rank": [40, 6], "q_lora_rank": [None, 10], "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
    config = UpcycledConfig.from_source(source.config, mixers=["latent_attention"] * 2, v_head_dim=16, **latent)
    model = add_adapters(build_upcycled(source, config), LoraSettings(r=3), 0)
    counted = adapter_parameters(normalise(model.config.to_dict()), LoraSettings(r=3))
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad)
