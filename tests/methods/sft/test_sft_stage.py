"""The sft stage: its loss, what it keeps, and that an interruption changes nothing."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from sft_world import STAGE, context, world, write_rows
from torch.nn import functional as F

from posttrain.data.spans import IGNORE
from posttrain.errors import StageError, StopRequested
from posttrain.methods.sft.data import read_sequences
from posttrain.models.tiny import tiny_tokenizer
from posttrain.training.order import run_order

__all__ = ["context", "world"]  # fixtures


def outcome(ctx):
    """Run the stage; weights, history rows and results."""
    folders = STAGE.run(ctx)
    rows = [json.loads(line) for line in (folders["history"] / "history.jsonl").read_text().splitlines()]
    return load_file(folders["model"] / "model.safetensors"), rows, dict(ctx.result)


def difference(one, other) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def expected_loss(folder, data, cfg, step: int = 0, seed: int = 3) -> float:
    """Mean cross-entropy of a step's learnt tokens in fp64, a document at a time, from full logits."""
    from posttrain.models.loading import load_model

    rows = read_sequences(data, tiny_tokenizer(), cfg).rows
    order = run_order(len(rows), cfg.max_steps * cfg.sequences_per_step, seed).tolist()
    model = load_model(folder, dtype=torch.float64).eval()
    total, count = 0.0, 0
    for index in order[step * cfg.sequences_per_step : (step + 1) * cfg.sequences_per_step]:
        start = 0
        for length in rows[index]["lengths"]:
            ids = torch.tensor(rows[index]["input_ids"][start : start + length])
            labels = torch.tensor(rows[index]["labels"][start : start + length])
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, :-1]
            total += float(F.cross_entropy(logits, labels[1:], ignore_index=IGNORE, reduction="sum"))
            count += int((labels[1:] != IGNORE).sum())
            start += length
    return total / count


@pytest.mark.parametrize(
    ("data", "settings"),
    [
        ("chats", {}),
        ("chats", {"packing": False}),
        ("chats", {"loss_on": "completion"}),
        ("prompts", {"loss_on": "completion"}),
        ("texts", {"loss_on": "all"}),
        ("texts", {"loss_on": "all", "packing": False, "micro_batch_size": 1}),
    ],
)
def test_the_loss_is_the_learnt_tokens_mean_cross_entropy(context, world, data, settings):
    ctx = context(data=data, max_steps=1, **settings)
    history = outcome(ctx)[1]
    assert history[0]["loss"] == pytest.approx(expected_loss(world / "model", world / data, ctx.config), rel=2e-6)


@pytest.mark.parametrize("settings", [{}, {"lora": {"r": 4}}], ids=["full", "lora"])
def test_history_results_and_saved_model(context, world, settings):
    from posttrain.models.inspect import model_meta

    ctx = context(**settings)
    weights, history, result = outcome(ctx)
    assert [row["step"] for row in history] == [1, 2, 3, 4]
    assert set(history[0]) == {"step", "loss", "lr", "grad_norm", "entropy", "mean_token_accuracy"}
    assert result["documents"] == 14 and result["truncated"] == result["left_out"] == 0
    assert result["tokens"] == 4 * 512 and result["final_loss"] == history[-1]["loss"]
    before, after = model_meta(world / "model"), model_meta(ctx.work_dir / "outputs" / "model")
    assert after.tokenizer == before.tokenizer and after.chat_template == before.chat_template
    assert after.architecture == before.architecture
    old, new = (
        json.loads((folder / "config.json").read_text()) for folder in (world / "model", ctx.work_dir / "outputs/model")
    )
    assert old == new  # neither special tokens nor use_cache nor dtype
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert not list(ctx.work_dir.rglob("README.md"))


@pytest.mark.parametrize("settings", [{}, {"packing": False, "tokens_per_step": 1024}])
def test_micro_batches_change_nothing(context, settings):
    """Sequences have different numbers of learnt tokens, so that a mean of means would differ."""
    whole = outcome(context("whole", micro_batch_size=8, **settings))
    parts = outcome(context("parts", micro_batch_size=1, **settings))
    assert difference(whole[0], parts[0]) < 1e-5
    assert [row["loss"] for row in whole[1]] == pytest.approx([row["loss"] for row in parts[1]], rel=1e-5)


LORA = {"lora": {"r": 4, "alpha": 8.0}, "lr": 1e-2}


@pytest.mark.parametrize("settings", [{}, LORA], ids=["full", "lora"])
def test_recomputing_changes_nothing(context, settings):
    """With adapters too, where nothing before the first of them has a gradient."""
    kept, recomputed = (outcome(context(str(on), gradient_checkpointing=on, **settings)) for on in (False, True))
    assert difference(kept[0], recomputed[0]) == 0 and kept[1] == recomputed[1]


@pytest.mark.parametrize("settings", [{}, LORA], ids=["full", "lora"])
def test_stop_at_every_step_changes_nothing(context, monkeypatch, settings):
    undisturbed = outcome(context("undisturbed", **settings))
    stops, result = [], None
    while result is None:
        ctx, asked = context(**settings), []

        def should_stop(self, asked=asked):
            asked.append(1)
            return len(asked) > 1

        monkeypatch.setattr(type(ctx), "should_stop", should_stop)
        try:
            result = outcome(ctx)
        except StopRequested as stop:
            stops.append(stop.step)
    assert stops == [1, 2, 3, 4]
    assert difference(undisturbed[0], result[0]) == 0
    assert undisturbed[1:] == result[1:]


def test_the_same_again(context):
    assert difference(outcome(context("a"))[0], outcome(context("b"))[0]) == 0


def test_it_learns(context):
    """Sums of small numbers by heart: far below the 5.7 nats of a uniform guess, and better than the unigrams' 2.7."""
    history = outcome(context(max_steps=80, lr=5e-3))[1]
    assert history[0]["loss"] > 5 and history[-1]["loss"] < 0.6
    assert history[-1]["mean_token_accuracy"] > 0.8


@pytest.mark.parametrize("settings", [{"trainable": "mixers"}, {"lora": {"r": 4, "target_modules": ["q_proj"]}}])
def test_what_is_frozen_stays(context, world, settings):
    before, after = load_file(world / "model" / "model.safetensors"), outcome(context(lr=1e-2, **settings))[0]
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    wanted = "self_attn" if "trainable" in settings else "q_proj"
    assert before.keys() == after.keys()  # merged: no adapters in the folder
    assert moved == {name for name in before if wanted in name}


def test_merged_adapters_are_the_trained_model(context, world):
    """The next step's loss from the saved folder is what the adapters' next step had."""
    ctx = context(max_steps=3, lr_scheduler="constant", warmup_ratio=0.0, **LORA)
    history = outcome(ctx)[1]
    short = context("short", max_steps=2, lr_scheduler="constant", warmup_ratio=0.0, **LORA)
    outcome(short)
    found = expected_loss(short.work_dir / "outputs" / "model", world / "chats", ctx.config, step=2)
    assert found == pytest.approx(history[2]["loss"], rel=1e-5)
    assert abs(found - history[0]["loss"]) > 1e-3


def test_bf16_saves_are_bf16(context):
    assert {tensor.dtype for tensor in outcome(context(max_steps=1, save_dtype="bfloat16"))[0].values()} == {
        torch.bfloat16
    }


def test_a_nan_ends_the_stage(context, world, monkeypatch):
    from posttrain.methods.sft.trainer import SftTrainer

    plain = SftTrainer.compute_loss

    def spoilt(self, *args, **kwargs):
        return plain(self, *args, **kwargs) * (float("nan") if self.state.global_step == 2 else 1.0)

    monkeypatch.setattr(SftTrainer, "compute_loss", spoilt)
    with pytest.raises(StageError, match=r"(?s)the loss is nan at step 3.*stages\.sft\.lr="):
        STAGE.run(context())


def test_bad_rows_are_told_before_any_training(context, world, tmp_path, monkeypatch):
    monkeypatch.setattr("posttrain.models.loading.load_model", None)  # not even loaded
    empty = write_rows(tmp_path / "empty", [])
    for data, message in ((world / "texts", "plain text has no assistant"), (empty, "no rows")):
        with pytest.raises(StageError, match=message):
            STAGE.run(context(data=data))


def test_a_model_with_another_head_is_refused(context, monkeypatch):
    monkeypatch.setattr(
        "posttrain.training.logprob.plain_head", lambda model: (_ for _ in ()).throw(StageError("a head with a bias"))
    )
    with pytest.raises(StageError, match="head"):
        STAGE.run(context())
