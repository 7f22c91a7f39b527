"""The distill stage: what it computes, what it keeps, and that an interruption changes nothing."""

from __future__ import annotations

import json
import math

import pytest
import torch
from distillation_world import SMALL, STAGE, assert_same, context, outcome, world
from safetensors.torch import load_file
from text_data import words, write_dataset

from posttrain.errors import StageError, StopRequested
from posttrain.methods.distillation import DistillConfig
from posttrain.training import checkpoints
from posttrain.training.sharding import trainer

__all__ = ["context", "world"]  # fixtures


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    from posttrain.pipeline.context import InputArtifact, StageContext
    from posttrain.pipeline.stage import ArtifactMeta

    inputs = {name: InputArtifact(world / name, ArtifactMeta(type=spec.type)) for name, spec in STAGE.inputs.items()}
    work = tmp_path_factory.mktemp("undisturbed")
    return outcome(StageContext("distill", DistillConfig(**SMALL), work, inputs, seed=3))


def test_history_and_results(undisturbed):
    weights, history, result = undisturbed
    assert [row["step"] for row in history] == [1, 2, 3, 4, 5]
    assert set(history[0]) == {"step", "loss", "kl", "lr", "grad_norm"}
    assert all(row["loss"] == pytest.approx(row["kl"], rel=1e-5) for row in history)
    assert [row["lr"] for row in history] == pytest.approx(
        [0.0, *(1e-2 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4))]
    )
    assert result["steps"] == 5 and result["tokens"] == 5 * 128
    assert result["final_kl"] == history[-1]["kl"] < history[0]["kl"]
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


def test_saved_model_is_the_students_folder(undisturbed, context, world):
    from posttrain.models.inspect import model_meta

    ctx = context(max_steps=1)
    folder = STAGE.run(ctx)["model"]
    before, after = model_meta(world / "student"), model_meta(folder)
    assert after.tokenizer == before.tokenizer and after.chat_template == before.chat_template
    assert after.architecture == before.architecture
    assert json.loads((folder / "config.json").read_text()).get("use_cache", True)


def test_the_tokenizer_of_a_qwen2_student_is_not_rewritten(context, world):
    from posttrain.models.inspect import tokenizer_digest

    folder = STAGE.run(context(max_steps=1, student=world / "teacher"))["model"]
    assert tokenizer_digest(folder) == tokenizer_digest(world / "teacher")


def test_stop_at_every_step_changes_nothing(undisturbed, context, monkeypatch):
    """Each attempt is stopped after one step; the last finds all steps done."""
    stops, result = [], None
    while result is None:
        ctx, asked = context(), []

        def should_stop(self, asked=asked):
            asked.append(1)
            return len(asked) > 1

        monkeypatch.setattr(type(ctx), "should_stop", should_stop)
        try:
            result = outcome(ctx)
        except StopRequested as stop:
            stops.append(stop.step)
            assert checkpoints.newest_complete(ctx.checkpoint_dir).name == f"checkpoint-{stop.step}"
    assert stops == [1, 2, 3, 4, 5]
    assert_same(undisturbed, result)


def test_stop_file_before_the_first_step(context):
    ctx = context()
    (ctx.work_dir / "STOP").touch()
    with pytest.raises(StopRequested) as stop:
        STAGE.run(ctx)
    assert stop.value.step == 0 and not ctx.checkpoint_dir.joinpath("checkpoint-1").exists()


class Killed(BaseException):
    """Stands for a kill: no handler for errors may see it."""


KILLS = [
    (trainer, "save_model"),
    (trainer.Trainer, "_save_optimizer_and_scheduler"),
    (trainer.Trainer, "_save_rng_state"),
    (checkpoints, "complete"),
    (checkpoints, "write_json"),
    (checkpoints, "rotate"),
]


@pytest.mark.parametrize(("owner", "name"), KILLS, ids=[name for _, name in KILLS])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_inside_a_save_changes_nothing(undisturbed, context, monkeypatch, owner, name, when):
    """The second of the saves is interrupted before or after one of its steps; then the stage is run again."""
    original, calls = getattr(owner, name), []

    def deadly(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2 and when == "before":
            raise Killed
        value = original(*args, **kwargs)
        if len(calls) == 2:
            raise Killed
        return value

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, deadly)
        with pytest.raises(Killed):
            STAGE.run(context(save_every=2))
    ctx = context(save_every=2)
    whole = checkpoints.newest_complete(ctx.checkpoint_dir, lambda message: None)
    late = name == "rotate" or (name, when) in {("complete", "after"), ("write_json", "after")}
    assert checkpoints.step_of(whole) == (4 if late else 2)
    assert_same(undisturbed, outcome(ctx))


def test_truncated_newest_checkpoint_falls_back(undisturbed, context, caplog):
    ctx = context(save_every=1, keep_checkpoints=3)
    STAGE.run(ctx)
    optimizer = ctx.checkpoint_dir / "checkpoint-4" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-10])
    assert_same(undisturbed, outcome(context(save_every=1)))
    assert "checkpoint of step 4 is not used" in caplog.text and "going on from step 3" in caplog.text


def test_resume_really_uses_the_checkpoint(context, undisturbed):
    """Guards the tests above: with other optimiser moments in the checkpoint the result differs."""
    ctx = context(save_every=3)
    STAGE.run(ctx)
    path = ctx.checkpoint_dir / "checkpoint-3"
    state = torch.load(path / "optimizer.pt", weights_only=True)
    for moments in state["state"].values():
        moments["exp_avg"].zero_()
    torch.save(state, path / "optimizer.pt")
    checkpoints.complete(path)
    weights, history, _ = outcome(context())
    assert history[:3] == undisturbed[1][:3] and history[4] != undisturbed[1][4]


def test_leftover_outputs_are_replaced(undisturbed, context):
    ctx = context()
    (ctx.output_dir("model") / "stale.safetensors").write_bytes(b"x")
    (ctx.work_dir / "outputs" / ".model-half").mkdir()
    folders = STAGE.run(ctx)
    assert not (folders["model"] / "stale.safetensors").exists()
    assert sorted(path.name for path in (ctx.work_dir / "outputs").iterdir()) == ["history", "model"]


def test_batch_sum_is_the_sum_over_a_sequences_tokens(context):
    history = outcome(context(reduction="batch_sum", max_steps=1))[1]
    assert history[0]["loss"] == pytest.approx(32 * history[0]["kl"], rel=1e-5)


def test_interruption_may_change_the_micro_batch(context):
    """How the work is split is no part of the result's key: an attempt may go on with another micro-batch."""
    first = outcome(context("one", micro_batch_size=4))[1]
    STAGE.run(context("two", micro_batch_size=1, save_every=3))
    second = outcome(context("two", micro_batch_size=4))[1]
    assert [row["loss"] for row in first] == pytest.approx([row["loss"] for row in second], rel=1e-5)


def test_student_equal_to_teacher_stays_as_it_is(context, world):
    before = load_file(world / "student" / "model.safetensors")
    weights, history, _ = outcome(context(teacher=world / "student", lr=0.1, max_steps=3))
    assert all(row["loss"] == row["kl"] == row["grad_norm"] == 0.0 for row in history)
    assert all(torch.equal(before[name], weights[name]) for name in before)


def test_bf16_keeps_fp32_parameters_and_learns(context):
    ctx = context(precision="bf16", teacher_dtype="bfloat16", save_every=4)
    weights, history, _ = outcome(ctx)
    assert history[-1]["kl"] < history[0]["kl"]
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    saved = torch.load(ctx.checkpoint_dir / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert {moments["exp_avg"].dtype for moments in saved["state"].values()} == {torch.float32}
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in weights.values())


def test_bf16_is_used(context):
    exact = outcome(context("fp32", max_steps=1))[1]
    cast = outcome(context("bf16", max_steps=1, precision="bf16"))[1]
    assert cast[0]["kl"] != exact[0]["kl"]
    assert cast[0]["kl"] == pytest.approx(exact[0]["kl"], rel=0.05)


def test_save_dtype(context):
    weights, _, _ = outcome(context(save_dtype="bfloat16", max_steps=1))
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_gradient_checkpointing_gives_the_same(undisturbed, context):
    assert_same(undisturbed, outcome(context(gradient_checkpointing=True)))


def test_activation_budget_gives_the_same(undisturbed, context):
    ctx = context(activation_budget_gib=1e-5)
    assert_same(undisturbed, outcome(ctx))
    assert ctx.timing["recomputed_layers"] == 2 and ctx.timing["compiled"] is False


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_other_divergences_are_trained(context, divergence):
    _, history, _ = outcome(context(divergence=divergence, jsd_beta=0.3))
    forward = outcome(context("forward", max_steps=1))[1]
    assert history[0]["kl"] != forward[0]["kl"] and history[-1]["kl"] < history[0]["kl"]


def test_mixers_alone(context, world):
    before = load_file(world / "student" / "model.safetensors")
    weights, history, _ = outcome(context(trainable="mixers"))
    changed = {name for name in before if not torch.equal(before[name], weights[name])}
    assert changed == {name for name in before if ".self_attn." in name}
    assert history[-1]["kl"] < history[0]["kl"]


def test_convergence(context, world, tmp_path):
    """A student of the teacher's shape, started elsewhere, gets most of the way on 40 steps."""
    from source_models import make_source

    from posttrain.models.loading import save_model
    from posttrain.models.tiny import tiny_tokenizer

    teacher = make_source("llama", seed=1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.3)
    save_model(teacher, tiny_tokenizer(), tmp_path / "teacher")
    _, history, _ = outcome(context(teacher=tmp_path / "teacher", max_steps=40, lr=3e-3))
    assert history[-1]["kl"] < 0.3 * history[0]["kl"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_stops_before_the_step_and_keeps_the_last_checkpoint(context, monkeypatch, value):
    from posttrain.methods.distillation.trainer import DistillTrainer

    original = DistillTrainer.compute_loss

    def broken(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss * value if self.state.global_step == 3 else loss

    monkeypatch.setattr(DistillTrainer, "compute_loss", broken)
    ctx = context(save_every=1)
    with pytest.raises(StageError, match="step 4") as error:
        STAGE.run(ctx)
    assert "stages.distill.lr=" in str(error.value)
    newest = checkpoints.newest_complete(ctx.checkpoint_dir)
    assert checkpoints.step_of(newest) == 3
    assert all(tensor.isfinite().all() for tensor in load_file(newest / "model.safetensors").values())


def test_infinite_gradient_of_a_finite_loss_stops(context, monkeypatch):
    from posttrain.methods.distillation.trainer import DistillTrainer

    def loss(self, model, inputs, **kwargs):
        weight = model.get_input_embeddings().weight
        return 1.0 + (weight - weight.detach()).sqrt().sum()

    monkeypatch.setattr(DistillTrainer, "compute_loss", loss)
    with pytest.raises(StageError, match="gradient norm is inf at step 1"):
        STAGE.run(context())


@pytest.mark.parametrize("texts", [[], ["short"]])
def test_too_little_data(context, tmp_path, texts):
    folder = write_dataset(tmp_path / "few", texts)
    with pytest.raises(StageError, match=f"{len(texts)} documents give {len(texts) * 6} tokens, one sequence takes 32"):
        STAGE.run(context(data=folder))


def test_vocabularies_differ(context, tmp_path):
    from source_models import make_source

    from posttrain.models.loading import save_model
    from posttrain.models.tiny import tiny_tokenizer

    save_model(make_source("llama", vocab_size=320), tiny_tokenizer(), tmp_path / "padded")
    with pytest.raises(StageError, match="300 and 320"):
        STAGE.run(context(teacher=tmp_path / "padded"))


def test_full_disk_is_noticed_before_the_first_step(context, monkeypatch):
    from posttrain.training import rehearsal

    monkeypatch.setattr(rehearsal.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**5})())
    ctx = context()
    with pytest.raises(StageError, match="too little space"):
        STAGE.run(ctx)
    assert not (ctx.work_dir / "metrics.jsonl").exists() and not (ctx.work_dir / ".rehearsal").exists()


def test_a_disk_that_changes_bits_is_noticed_before_the_first_step(context, monkeypatch):
    from posttrain.training import rehearsal

    monkeypatch.setattr(rehearsal, "load_file", lambda path: {n: t + 1 for n, t in load_file(path).items()})
    with pytest.raises(StageError, match="read back differs"):
        STAGE.run(context())


def test_progress_and_metrics_are_reported(context):
    ctx = context(max_steps=2)
    events = []
    ctx.emit = lambda event, fields: events.append((event, fields))
    STAGE.run(ctx)
    metrics = [fields for event, fields in events if event == "metrics"]
    assert [fields["step"] for fields in metrics] == [1, 2]
    assert metrics[0]["tokens_per_second"] > 0 and "kl" in metrics[0]
    assert [f["done"] for event, f in events if event == "progress"][-1] == 2
    assert ctx.timing["tokens_per_second"] > 0 and ctx.timing["peak_memory_bytes"] > 0


def test_order_is_a_permutation_per_epoch_and_depends_on_the_seed():
    from posttrain.training.blocks import OrderedBlocks

    blocks = torch.arange(7).unsqueeze(1)

    def order(seed, total=21):
        data = OrderedBlocks(blocks, total, seed)
        return [int(data[i]["input_ids"]) for i in range(len(data))]

    first = order(0)
    # Written out, because stored results depend on it.
    generators = [torch.Generator().manual_seed((5 << 20) + epoch) for epoch in range(3)]
    assert order(5) == [int(place) for one in generators for place in torch.randperm(7, generator=one)]
    assert all(sorted(first[i : i + 7]) == list(range(7)) for i in (0, 7, 14))
    assert first[:7] != first[7:14] and first != order(1) and order(0, 10) == first[:10]
    backwards = OrderedBlocks(blocks, 21, 0)
    assert [int(backwards[i]["input_ids"]) for i in reversed(range(21))] == first[::-1]


def test_words_fill_several_epochs(world):
    """The runs above wrap around their data: 20 sequences are used, fewer are there."""
    from posttrain.models.tiny import tiny_tokenizer
    from posttrain.training.blocks import read_blocks

    assert 20 > len(read_blocks(write_dataset(world / "again", words(5)), tiny_tokenizer(), 32)) > 5
