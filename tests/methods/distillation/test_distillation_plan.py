"""What the plan knows of a distill stage: settings, checks and estimates, without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError
from source_models import make_source

from posttrain.errors import RecipeError
from posttrain.methods.distillation import Distill, DistillConfig
from posttrain.models.architecture import normalise, parameter_count
from posttrain.pipeline.device import planning_for
from posttrain.pipeline.stage import ArtifactMeta

STAGE = Distill()


def metas(**changes):
    arch = normalise(make_source("llama").config.to_dict())
    found = {
        "student": ArtifactMeta("model", architecture=arch, tokenizer="a" * 64, chat_template="c"),
        "teacher": ArtifactMeta("model", architecture=arch, tokenizer="a" * 64),
        "data": ArtifactMeta("dataset", rows=10, tokens=5000),
    }
    for role, fields in changes.items():
        found[role] = ArtifactMeta(**{**found[role].to_json(), **fields})
    return found


def config(**fields):
    return DistillConfig(**{"sequence_length": 128, "tokens_per_step": 1024, **fields})


def test_plan_needs_no_torch():
    code = (
        "import sys, posttrain.methods.distillation.stage as s, posttrain.methods.distillation as d;"
        "d.DistillConfig; d.Distill; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_defaults_are_the_papers():
    cfg = DistillConfig()
    assert (cfg.lr, cfg.warmup_ratio, cfg.max_grad_norm, cfg.temperature, cfg.ce_weight) == (8e-5, 0.01, 1.0, 1.0, 0.0)
    assert cfg.sequence_length == 2048 and cfg.tokens_per_step == 8 * 12 * 2 * 2048


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"tokens_per_step": 1000, "sequence_length": 128},
            r"multiple of sequence_length \(128\).*tokens_per_step=896",
        ),
        ({"tokens_per_step": 100, "sequence_length": 128}, "tokens_per_step=128"),
        ({"max_steps": 0}, "max_steps"),
        ({"ce_weight": 1.5}, "ce_weight"),
        ({"reduction": "mean"}, "token_mean"),
        ({"temperature": 0}, "temperature"),
        ({"max_stesp": 3}, "max_stesp"),
        ({"divergence": "kl"}, "reverse_kl"),
        ({"jsd_beta": 1.0}, "jsd_beta"),
        ({"compile": "model"}, "layers"),
        ({"activation_budget_gib": 0}, "activation_budget_gib"),
        ({"precision": "fp16"}, "precision"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        DistillConfig(**fields)


def test_key_holds_what_is_computed_and_not_how():
    one = config().key_fields()
    how = dict(
        micro_batch_size=3,
        chunk_tokens=5,
        gradient_checkpointing=True,
        activation_budget_gib=1.5,
        compile="layers",
        attention="flash",
        cuda_graph="off",
        save_every=1,
        save_seconds=2,
        keep_checkpoints=9,
    )
    assert config(**how).key_fields() == one
    what = {"lr": 1e-3, "tokens_per_step": 2048, "precision": "bf16", "reduction": "batch_sum", "trainable": "mixers"}
    what |= {"divergence": "jsd", "jsd_beta": 0.1}
    for name, value in what.items():
        assert config(**{name: value}).key_fields() != one, name
    bf16 = config(precision="bf16").key_fields()
    for name in ("logits_dtype", "residual_dtype"):
        assert config(precision="bf16", **{name: "bfloat16"}).key_fields() != bf16, name
        with pytest.raises(ValueError, match="needs precision=bf16"):
            config(**{name: "bfloat16"})


@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (3, 3), (5, 4), (6, 6), (11, 6), (100, 12)])
def test_micro_batch_is_the_largest_divisor_within_the_limit(limit, expected):
    assert config(tokens_per_step=12 * 128, micro_batch_size=limit).micro_batch() == expected


def test_micro_batch_of_several_ranks():
    assert config(tokens_per_step=12 * 128, micro_batch_size=4).micro_batch(world_size=2) == 3
    with pytest.raises(ValueError, match="5 ranks"):
        config(tokens_per_step=12 * 128).micro_batch(world_size=5)


def test_good_inputs_pass_and_unknown_ones_too():
    STAGE.check(config(), metas())
    STAGE.check(config(), metas(teacher={"tokenizer": None, "architecture": None}, data={"rows": None, "tokens": None}))


def test_every_problem_is_reported_at_once():
    arch = metas()["teacher"].architecture
    bad = metas(
        teacher={"tokenizer": "b" * 64, "architecture": {**arch, "vocab_size": 320, "max_position_embeddings": 64}},
        data={"rows": 0},
    )
    cfg = config(inputs={"student": "upcycle.model", "teacher": "models.big", "data": "data.train"})
    with pytest.raises(RecipeError) as error:
        STAGE.check(cfg, bad)
    said = str(error.value)
    assert len(error.value.problems) == 4
    assert "aaaaaaaaaaaa" in said and "bbbbbbbbbbbb" in said and "student=upcycle.model, teacher=models.big" in said
    assert "300" in said and "320" in said and "sequence_length=64" in said and "data=data.train" in said


def test_output_is_the_student_in_the_saved_type():
    found = STAGE.describe(config(save_dtype="bfloat16"), metas(student={"extra": {"dtype": "float32", "label": "x"}}))
    assert list(found) == list(STAGE.outputs) and found["history"].type == "history"
    assert found["model"].architecture == metas()["student"].architecture
    assert found["model"].tokenizer == "a" * 64 and found["model"].chat_template == "c"
    assert found["model"].extra == {"dtype": "bfloat16", "label": "x"}


def test_estimate():
    arch = metas()["student"].architecture
    found = STAGE.estimate(config(max_steps=7, save_dtype="bfloat16"), metas())
    assert found.parameters == found.trainable == parameter_count(arch)
    assert found.tokens == 7 * 1024 and found.data_tokens == 5000
    assert found.disk_bytes == 2 * parameter_count(arch)
    assert {"weights", "gradients", "optimizer", "activations", "logits", "teacher"} == set(found.memory)
    lean = STAGE.estimate(config(activation_budget_gib=1e-3), metas())
    assert lean.memory["activations"] < found.memory["activations"]
    compiled = STAGE.estimate(config(compile="layers"), metas())
    assert compiled.memory["activations"] < STAGE.estimate(config(compile="off"), metas()).memory["activations"]
    long = config(max_steps=1000)
    for device, same in (("cpu", "off"), ("cuda", "layers")):  # whatever this machine has
        with planning_for(device):
            planned = STAGE.estimate(long, metas()).memory["activations"]
        assert planned == STAGE.estimate(config(max_steps=1000, compile=same), metas()).memory["activations"]
    frozen = STAGE.estimate(config(trainable="mixers"), metas())
    assert frozen.trainable < found.trainable and frozen.memory["optimizer"] < found.memory["optimizer"]
    assert STAGE.estimate(config(), metas(student={"architecture": None})).tokens == 1000 * 1024


def test_a_student_that_is_its_own_teacher_is_refused():
    same = {"student": "upcycle.model", "teacher": "upcycle.model", "data": "data.train"}
    with pytest.raises(RecipeError, match=r"(?s)the teacher is the student.*inputs\.teacher="):
        STAGE.check(config(inputs=same), metas())
    STAGE.check(config(inputs={**same, "teacher": "model"}), metas())
    STAGE.check(config(inputs=same, ce_weight=0.5), metas())  # keeps a model near where it began


@pytest.mark.parametrize(
    ("engine", "settings", "said"),
    [
        (("cpu", "single"), {}, "needs a GPU"),
        (("cuda", "fsdp2"), {}, "whole model on every rank"),
        (("cuda", "single"), {"packing": "documents"}, "differ in shape"),
        (("cuda", "single"), {"teacher_device": "cpu"}, "another device"),
        (("cuda", "ddp"), {"teacher_sharding": "sharded"}, "in shards"),
    ],
)
def test_a_graph_that_cannot_be_is_refused_by_the_plan(engine, settings, said):
    with planning_for(*engine, 2), pytest.raises(RecipeError, match=f"(?s){said}.*cuda_graph=auto"):
        STAGE.check(config(cuda_graph="on", **settings), metas())
    with planning_for("cuda", "ddp", 2):
        STAGE.check(config(cuda_graph="on"), metas())
        for cached in ({"teacher_device": "cpu"}, {"teacher_sharding": "sharded"}):  # no teacher runs in a step
            STAGE.check(config(cuda_graph="on", teacher_cache={"top_k": 8}, **cached), metas())
    with planning_for("cuda", "single", 1):
        STAGE.check(config(cuda_graph="on", teacher_sharding="sharded"), metas())  # one rank holds it whole
    with planning_for(*engine, 2):
        STAGE.check(config(**settings), metas())
