"""The preference stage: its loss, what it keeps, and that an interruption changes nothing."""

from __future__ import annotations

import json
import math

import pytest
import torch
from preference_world import STAGE, context, latent_source, world
from safetensors.torch import load_file
from source_models import make_source

from posttrain.errors import StageError, StopRequested
from posttrain.methods.preference.data import read_pairs
from posttrain.methods.preference.trainer import PreferenceTrainer
from posttrain.models.tiny import tiny_tokenizer
from posttrain.training.order import run_order

__all__ = ["context", "world"]  # fixtures

LORA = {"lora": {"r": 4, "alpha": 8.0}, "lr": 1e-2}


def outcome(ctx):
    """Run the stage; weights, history rows and results."""
    folders = STAGE.run(ctx)
    rows = [json.loads(line) for line in (folders["history"] / "history.jsonl").read_text().splitlines()]
    return load_file(folders["model"] / "model.safetensors"), rows, dict(ctx.result)


def difference(one, other) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def answer_logprob(model, prompt: list[int], answer: list[int]) -> float:
    """Sum of log p of an answer's tokens from full logits in the model's precision."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return float(logprobs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum())


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


LOSSES = {
    "sigmoid": lambda c, r, beta, n: -math.log(sigmoid(beta * (c - r))),
    "hinge": lambda c, r, beta, n: max(0.0, 1 - beta * (c - r)),
    "ipo": lambda c, r, beta, n: (c / n[0] - r / n[1] - 1 / (2 * beta)) ** 2,
    "sigmoid_norm": lambda c, r, beta, n: -math.log(sigmoid(beta * (c / n[0] - r / n[1]))),
    "robust": lambda c, r, beta, n: (
        (-(1 - 0.1) * math.log(sigmoid(beta * (c - r))) + 0.1 * math.log(sigmoid(-beta * (c - r)))) / (1 - 2 * 0.1)
    ),
    "apo_zero": lambda c, r, beta, n: 1 - sigmoid(beta * c) + sigmoid(beta * r),
}
"""The papers' losses of a pair from its log-ratios `c` and `r`, written down anew."""


def expected_loss(policy, reference, rows, indices, loss_type: str, beta: float) -> float:
    """Mean loss of those pairs, in fp64."""
    total = 0.0
    for index in indices:
        row = rows[index]
        ratios = [
            answer_logprob(policy, row["prompt_ids"], row[side])
            - answer_logprob(reference, row["prompt_ids"], row[side])
            for side in ("chosen_ids", "rejected_ids")
        ]
        lengths = len(row["chosen_ids"]), len(row["rejected_ids"])
        total += LOSSES[loss_type](*ratios, beta, lengths)
    return total / len(indices)


@pytest.mark.parametrize("loss_type", sorted(LOSSES))
@pytest.mark.parametrize("family", ["llama", "latent"])
def test_the_loss_is_the_papers(context, world, loss_type, family):
    """The first step of a policy that differs from its reference, against full logits of every sequence alone."""
    smoothing = {"label_smoothing": 0.1} if loss_type == "robust" else {}
    ctx = context(loss_type=loss_type, beta=0.3, max_steps=1, **smoothing)
    rows = read_pairs(world / "pairs", tiny_tokenizer(), 96).rows
    policy, reference = latent_source() if family == "latent" else make_source(), make_source(seed=5)
    indices = run_order(len(rows), 4, ctx.seed).tolist()
    wanted = expected_loss(policy.double(), reference.double(), rows, indices, loss_type, 0.3)
    trainer = PreferenceTrainer(ctx, ctx.config, policy.float(), reference.float(), tiny_tokenizer(), rows)
    assert trainer.fit()[0]["loss"] == pytest.approx(wanted, rel=2e-5)


@pytest.mark.parametrize("model", ["model", "latent"])
@pytest.mark.parametrize("settings", [{}, {"precompute_reference": True}, LORA], ids=["full", "precomputed", "lora"])
def test_the_reference_is_the_input_model(context, world, model, settings):
    """The third step's loss from the weights saved after the second, merged adapters included, and the input model."""
    from posttrain.models.loading import load_model

    steady = {"lr_scheduler": "constant", "warmup_ratio": 0.0, "model": model, **settings}
    history = outcome(context("long", max_steps=3, **steady))[1]
    short = context("short", max_steps=2, **steady)
    outcome(short)
    rows = read_pairs(world / "pairs", tiny_tokenizer(), 96).rows
    policy = load_model(short.work_dir / "outputs" / "model", dtype=torch.float64)
    reference = load_model(world / model, dtype=torch.float64)
    indices = run_order(len(rows), 12, short.seed).tolist()[8:]
    wanted = expected_loss(policy, reference, rows, indices, "sigmoid", 0.1)
    assert history[2]["loss"] == pytest.approx(wanted, rel=1e-4)
    assert history[0]["loss"] == pytest.approx(math.log(2), rel=1e-6) and abs(wanted - math.log(2)) > 0.01


@pytest.mark.parametrize("settings", [{}, {"precompute_reference": True}, LORA], ids=["full", "precomputed", "lora"])
def test_micro_batches_change_nothing(context, settings):
    whole = outcome(context("whole", micro_batch_size=4, **settings))
    parts = outcome(context("parts", micro_batch_size=1, **settings))
    assert difference(whole[0], parts[0]) < 2e-5
    for name in ("loss", "rewards/margins", "rewards/accuracies"):
        assert [row[name] for row in whole[1]] == pytest.approx([row[name] for row in parts[1]], rel=1e-4, abs=1e-6)


def stopped_everywhere(context, monkeypatch, **settings):
    """The outcome of a run that is stopped after every step, and after which steps."""
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
    monkeypatch.undo()
    return stops, result


@pytest.mark.parametrize("settings", [{}, LORA], ids=["full", "lora"])
def test_stop_at_every_step_changes_nothing(context, monkeypatch, settings):
    undisturbed = outcome(context("undisturbed", **settings))
    stops, result = stopped_everywhere(context, monkeypatch, **settings)
    assert stops == [1, 2, 3, 4]
    assert difference(undisturbed[0], result[0]) == 0
    assert undisturbed[1:] == result[1:]


def test_half_and_half_is_the_whole_with_a_gate_and_precomputed_references(context, monkeypatch):
    settings = {"gate_data": "held", "gate_text": "texts", "keep": "better", "precompute_reference": True}
    undisturbed = outcome(context("undisturbed", **settings))
    ctx, at = context(**settings), []
    monkeypatch.setattr(
        PreferenceTrainer, "log", lambda self, *a, **k: (at.append(1), super(PreferenceTrainer, self).log(*a, **k))
    )
    monkeypatch.setattr(type(ctx), "should_stop", lambda self: len(at) == 2)
    with pytest.raises(StopRequested):
        outcome(ctx)
    monkeypatch.undo()
    result = outcome(context(**settings))
    assert difference(undisturbed[0], result[0]) == 0 and undisturbed[1:] == result[1:]


def test_history_results_and_saved_model(context, world):
    from posttrain.models.inspect import model_meta

    ctx = context()
    weights, history, result = outcome(ctx)
    assert [row["step"] for row in history] == [1, 2, 3, 4]
    assert {
        "loss",
        "lr",
        "grad_norm",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    } <= set(history[0])
    assert "num_tokens" not in history[0]
    assert (result["pairs"], result["truncated"], result["left_out"], result["kept"]) == (14, 0, 0, "trained")
    before, after = model_meta(world / "model"), model_meta(ctx.work_dir / "outputs" / "model")
    assert after.tokenizer == before.tokenizer and after.chat_template == before.chat_template
    old, new = (
        json.loads((folder / "config.json").read_text()) for folder in (world / "model", ctx.work_dir / "outputs/model")
    )
    assert old == new  # neither special tokens nor use_cache nor dtype
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert not list(ctx.work_dir.rglob("README.md"))


@pytest.mark.parametrize("settings", [{"trainable": "mixers"}, {"lora": {"r": 4, "target_modules": ["q_proj"]}}])
def test_what_is_frozen_stays(context, world, settings):
    before, after = load_file(world / "model" / "model.safetensors"), outcome(context(lr=1e-2, **settings))[0]
    wanted = "self_attn" if "trainable" in settings else "q_proj"
    assert before.keys() == after.keys()  # merged: no adapters in the folder
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if wanted in name
    }


def test_another_trl_is_refused(context, monkeypatch):
    monkeypatch.setattr("trl.DPOTrainer.compute_ref_log_probs", lambda self, inputs: None)
    with pytest.raises(StageError, match=r"DPOTrainer\.compute_ref_log_probs of TRL .* posttrain knows"):
        STAGE.run(context())


def test_a_nan_ends_the_stage(context, monkeypatch):
    plain = PreferenceTrainer.compute_loss

    def spoilt(self, *args, **kwargs):
        return plain(self, *args, **kwargs) * (float("nan") if self.state.global_step == 2 else 1.0)

    monkeypatch.setattr(PreferenceTrainer, "compute_loss", spoilt)
    with pytest.raises(StageError, match=r"(?s)the loss is nan at step 3.*stages\.preference\.lr="):
        STAGE.run(context())


def test_bad_rows_are_told_before_a_model_is_loaded(context, monkeypatch):
    monkeypatch.setattr("posttrain.methods.preference.train.load_model", None)
    with pytest.raises(StageError, match="no preference pairs: 5 rows: a text"):
        STAGE.run(context(data="texts"))
