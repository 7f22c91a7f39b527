"""The gate: its figures against fp64, its rule, and that the folder holds the model it says."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from preference_world import STAGE, context, pair, world, write_rows
from safetensors.torch import load_file
from source_models import make_source
from test_preference_stage import answer_logprob, difference, outcome

from posttrain.errors import StageError
from posttrain.methods.preference import PreferenceConfig
from posttrain.methods.preference.data import read_pairs
from posttrain.methods.preference.gate import (
    Figures,
    PairScores,
    decide,
    figures,
    implicit_rewards,
    score_pairs,
    text_perplexity,
)
from posttrain.models.tiny import tiny_tokenizer

__all__ = ["context", "world"]  # fixtures

GATE = {"gate_data": "held", "gate_text": "texts", "keep": "better"}


@pytest.mark.parametrize("at_once", [1, 4])
def test_scores_are_those_of_full_logits(world, at_once):
    rows = read_pairs(world / "held", tiny_tokenizer(), 96).rows
    model = make_source(seed=2)
    found = score_pairs(model, rows, 258, at_once)
    exact = model.double()
    for index, row in enumerate(rows):
        for side, value in (("chosen_ids", found.chosen), ("rejected_ids", found.rejected)):
            assert float(value[index]) == pytest.approx(answer_logprob(exact, row["prompt_ids"], row[side]), rel=1e-5)
    assert found.chosen_tokens.tolist() == [len(row["chosen_ids"]) for row in rows]
    margins = found.chosen / found.chosen_tokens - found.rejected / found.rejected_tokens
    assert figures(found, None).pair_accuracy == sum(margins > 0) / len(rows)


def test_rewards_are_log_ratios_of_whole_answers():
    def scores(*values):
        return PairScores(*(torch.tensor(value, dtype=torch.float64) for value in (*values, [1, 1], [1, 1])))

    found = implicit_rewards(scores([-1.0, -4.0], [-5.0, -1.0]), scores([-2.0, -3.0], [-4.0, -2.0]), beta=0.5)
    assert found == {"reward_accuracy": 0.5, "reward_margin": 0.5 * ((1 + 1) + (-1 - 1)) / 2}


def test_perplexity_is_that_of_full_logits():
    model = make_source(seed=2).double()
    documents = [list(range(10, 40)), [5, 6, 7], [9] * 13]
    total, count = 0.0, 0
    for document in documents:
        for start in range(0, len(document), 12):
            window = document[start : start + 12]
            if len(window) > 1:
                total -= answer_logprob(model, window[:1], window[1:])
                count += len(window) - 1
    assert text_perplexity(model.float(), documents, 12) == pytest.approx(math.exp(total / count), rel=1e-5)


def rule(before: dict, after: dict, **settings) -> str:
    cfg = PreferenceConfig(**{"keep": "better", **settings})
    return decide(Figures(**before), Figures(**after), cfg)[0]


def test_the_rule():
    def accuracy(value, margin=0.0, **more):
        return {"pair_accuracy": value, "pair_margin": margin, **more}

    assert rule(accuracy(0.5), accuracy(0.6)) == "trained" and rule(accuracy(0.5), accuracy(0.4)) == "input"
    assert rule(accuracy(0.5, 0.1), accuracy(0.5, 0.2)) == "trained"
    assert rule(accuracy(0.5, 0.1), accuracy(0.5, 0.0)) == rule(accuracy(0.5), accuracy(0.5)) == "input"
    assert rule(accuracy(0.5, 0.1), accuracy(0.6, 0.0), gate_metric="pair_margin") == "input"
    assert rule(accuracy(0.5, perplexity=10.0), accuracy(0.6, perplexity=10.19)) == "trained"
    assert rule(accuracy(0.5, perplexity=10.0), accuracy(0.6, perplexity=10.21)) == "input"
    assert rule({"perplexity": 10.0}, {"perplexity": 9.9}, gate_metric="perplexity") == "trained"
    assert rule({"perplexity": 10.0}, {"perplexity": 10.1}, gate_metric="perplexity") == "input"
    assert rule(accuracy(0.5), accuracy(0.9, math.nan)) == "input"
    assert rule(accuracy(0.5), accuracy(0.9, perplexity=math.inf)) == "input"
    assert rule(accuracy(0.5), accuracy(0.4), keep="trained") == "trained"


def test_a_model_that_became_worse_is_not_kept(context, world, caplog):
    """A huge rate ruins the model: the output is the input model, bit for bit, and everything says so."""
    caplog.set_level(logging.WARNING)
    ctx = context(lr=3.0, lr_scheduler="constant", warmup_ratio=0.0, **GATE)
    weights, history, result = outcome(ctx)
    assert result["kept"] == "input" and "the input model is kept" in caplog.text
    assert result["gate"]["reason"] in caplog.text and history[-1]["gate/kept_trained"] == 0.0
    assert difference(weights, load_file(world / "model" / "model.safetensors")) == 0
    folder = ctx.work_dir / "outputs" / "model"
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        file.name: file.read_bytes() for file in (world / "model").iterdir()
    }
    assert len(history) == 4 and result["steps"] == 4  # the training is not hidden


def test_a_model_that_became_better_is_kept(context, world):
    """Held-out pairs of the same pattern: more of them are told apart, and the text's perplexity falls."""
    weights, history, result = outcome(context(max_steps=6, **GATE))
    gate = result["gate"]
    assert result["kept"] == "trained" and gate["after"]["pair_accuracy"] > gate["before"]["pair_accuracy"]
    assert history[-1]["gate/after/pair_accuracy"] == gate["after"]["pair_accuracy"]
    assert gate["after"]["reward_accuracy"] == 1.0 and (gate["pairs"], gate["documents"]) == (10, 5)
    assert difference(weights, load_file(world / "model" / "model.safetensors")) > 0


def test_the_figures_are_those_of_the_saved_folder(context, world):
    """Weights saved in bf16 are what is scored, not those that were trained."""
    from posttrain.models.loading import load_model

    ctx = context(save_dtype="bfloat16", gate_data="held")
    result = outcome(ctx)[2]
    rows = read_pairs(world / "held", tiny_tokenizer(), 96).rows
    saved = load_model(ctx.work_dir / "outputs" / "model", dtype=torch.float32)
    wanted = figures(score_pairs(saved, rows, 258, 2), None).given
    assert {name: result["gate"]["after"][name] for name in wanted} == wanted


def test_text_that_suffers_more_than_allowed_keeps_the_input(context, tmp_path):
    """The text is made of what the pairs teach not to write."""
    text = write_rows(tmp_path / "noes", [{"id": str(n), "text": "No" + "o" * n + ". No. Noooo."} for n in range(4)])
    gate = {**GATE, "gate_text": text}
    results = [
        outcome(context(f"{allowed}", max_steps=6, gate_max_perplexity_increase=allowed, **gate))[2]
        for allowed in (0.0, 9.0)
    ]
    for result in results:
        assert result["gate"]["after"]["pair_accuracy"] > result["gate"]["before"]["pair_accuracy"]
        assert result["gate"]["after"]["perplexity"] > result["gate"]["before"]["perplexity"]
    assert [result["kept"] for result in results] == ["input", "trained"]
    assert "perplexity rose" in results[0]["gate"]["reason"]


def test_figures_that_are_no_numbers_keep_the_input_and_can_be_stored(context, monkeypatch):
    from posttrain.methods.preference import gated
    from posttrain.pipeline.fingerprint import canonical_json

    found = iter([100.0, math.inf])
    monkeypatch.setattr(gated, "text_perplexity", lambda *args: next(found))
    _, history, result = outcome(context(max_steps=6, **GATE))
    assert result["kept"] == "input" and "perplexity is not a finite number" in result["gate"]["reason"]
    assert result["gate"]["after"]["perplexity"] is None and "gate/after/perplexity" not in history[-1]
    canonical_json(result)


def test_the_same_again(context):
    first, second = (outcome(context(work, **GATE)) for work in ("a", "b"))
    assert difference(first[0], second[0]) == 0 and first[1:] == second[1:]


def test_held_out_pairs_that_are_trained_on_do_not_judge(context, world, tmp_path):
    mixed = write_rows(tmp_path / "mixed", [pair(number) for number in range(10, 20)])
    result = outcome(context(gate_data=mixed))[2]
    assert result["gate"]["overlap"] == 4 and result["gate"]["pairs"] == 6
    with pytest.raises(StageError, match="all prompts of the held-out pairs are trained on"):
        STAGE.run(context("again", gate_data="pairs"))


def test_without_held_out_data_nothing_is_claimed(context):
    result = outcome(context())[2]
    assert result["kept"] == "trained" and result["gate"]["reason"] == "no held-out data was given"
    json.dumps(result)
