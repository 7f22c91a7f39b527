"""The teacher in another precision and on a named device."""

from __future__ import annotations

import pytest
import torch
from distillation_world import context, outcome, uneven, world

from posttrain.methods.distillation import trainer
from posttrain.methods.distillation.data import run_sequences
from posttrain.models.loading import load_model, load_tokenizer

__all__ = ["context", "uneven", "world"]  # fixtures


def expected_kl(ctx, world, dtype):
    """Token mean of KL over the first step's rows, fp64 from hidden states of a teacher computed in `dtype`."""
    from posttrain.training.blocks import read_blocks

    config = ctx.config
    blocks = read_blocks(world / "data", load_tokenizer(world / "student"), config.sequence_length)
    sequences = run_sequences(blocks, config, ctx.seed)
    ids = torch.stack([sequences[i]["input_ids"] for i in range(config.sequences_per_step)]).long()
    teacher = load_model(world / "teacher", dtype=dtype)
    with torch.no_grad():
        student = load_model(world / "student")(ids).logits.double().log_softmax(-1)
        hidden = trainer.hidden_states(teacher, ids)
        logits = hidden.double() @ teacher.get_output_embeddings().weight.double().T
    teacher = logits.log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1).mean().item()


def test_a_bf16_teacher_on_a_cpu_is_the_teacher_rounded(context, world):
    """Its weights and hidden states are bf16, its head's product is not; the effect is that rounding and no more."""
    first = {}
    for dtype in ("float32", "bfloat16"):
        ctx = context(dtype, teacher_dtype=dtype, teacher_device="cpu", max_steps=2)
        weights, history, _ = outcome(ctx)
        first[dtype] = history[0]["kl"]
        assert first[dtype] == pytest.approx(expected_kl(ctx, world, getattr(torch, dtype)), rel=1e-5)
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert first["bfloat16"] != first["float32"] == pytest.approx(first["bfloat16"], rel=0.02)


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_a_bf16_teacher_trains_and_is_cached_the_same(context, uneven, packing):
    common = {"data": uneven, "packing": packing, "teacher_dtype": "bfloat16", "teacher_device": "cpu"}
    live = outcome(context("live", **common))[1]
    cached = outcome(context("cached", **common, teacher_cache={"top_k": 300, "dtype": "float32"}))[1]
    assert live[-1]["kl"] < live[0]["kl"]
    assert [row["kl"] for row in live] == pytest.approx([row["kl"] for row in cached], rel=1e-4)


def test_the_teachers_head_is_brought_over_once(context, monkeypatch):
    """Every micro-batch gets the tensor that was made when the trainer was."""
    heads, original = [], trainer.distillation_loss

    def spy(student_h, student_w, teacher_h, teacher_w, **options):
        heads.append(teacher_w)
        return original(student_h, student_w, teacher_h, teacher_w, **options)

    monkeypatch.setattr(trainer, "distillation_loss", spy)
    outcome(context(max_steps=3, teacher_device="cpu", teacher_dtype="bfloat16"))
    assert len(heads) == 6 and all(head is heads[0] for head in heads) and heads[0].dtype == torch.bfloat16
