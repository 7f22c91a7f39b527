"""Who writes the completions: our decoder or TRL's ways, with adapters or without; and what is trained and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from policy_world import Recorder, column, distance, make_policy, make_trainer, weights

from posttrain.errors import StageError, StopRequested
from posttrain.generation import Sampling
from posttrain.policy.rollout import EngineRollout
from posttrain.policy.trainer import PolicyTrainer

LORA = {"lora": {"r": 2, "alpha": 4.0}, "max_steps": 2}


class RecordedGrpo(Recorder, PolicyTrainer):
    pass


def trained(folder: Path, **settings: Any) -> tuple[Any, list[dict[str, Any]]]:
    trainer = make_trainer("grpo", folder, cls=RecordedGrpo, **settings)
    return trainer, trainer.fit()


def ids(trainer: Any) -> list[Any]:
    return [written[0] for written in trainer.written]


def test_adapters_are_trained_and_merged(tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in make_policy().state_dict().items()}
    trainer, history = trained(tmp_path, **LORA)
    assert trainer.rollout is None and len(history) == 2
    moved = {name for name, one in trainer.model.named_parameters() if one.requires_grad}
    assert moved and all("lora_" in name for name in moved)
    base = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): value
        for name, value in weights(trainer).items()
        if "lora_" not in name
    }
    assert distance(base, before) == 0
    merged = {name: value.clone() for name, value in trainer.trained().state_dict().items()}
    assert merged.keys() == before.keys() and 0 < distance(merged, before) < 0.2
    changed = {name for name, value in merged.items() if not torch.equal(value, before[name])}
    assert changed and all("proj" in name for name in changed)


def test_without_adapters_the_model_itself_is_saved(tmp_path: Path) -> None:
    trainer = make_trainer("grpo", tmp_path)
    assert trainer.trained() is trainer.model and trainer.rollout is not None


def test_with_adapters_the_reference_is_the_input_model(tmp_path: Path) -> None:
    _, history = trained(tmp_path, **LORA, beta=0.5)
    assert column(history, "kl")[0] == pytest.approx(0, abs=1e-6) and column(history, "kl")[1] > 1e-5


def test_the_engine_is_refused_where_it_cannot_write(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="does not support adapters") as error:
        make_trainer("grpo", tmp_path, rollout="engine", **LORA)
    assert error.value.problems[0].fix == "rollout=transformers"


def test_a_model_that_the_engine_does_not_know_is_written_by_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posttrain.policy.arguments.unsupported", lambda model: "this attention")
    assert make_trainer("grpo", tmp_path).rollout is None
    with pytest.raises(StageError, match="rollout=engine: the decoder does not support this attention"):
        make_trainer("grpo", tmp_path, rollout="engine")


def test_mixers_alone(tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in make_policy().state_dict().items()}
    trainer, _ = trained(tmp_path, trainable="mixers", max_steps=1)
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert changed and all("self_attn" in name for name in changed)


@pytest.mark.parametrize("rollout", ["engine", "transformers"])
def test_the_seed_decides_what_is_written(rollout: str, tmp_path: Path) -> None:
    settings = {"rollout": rollout, "max_steps": 1}
    first, again = (trained(tmp_path / name, **settings)[0] for name in "ab")
    other, _ = trained(tmp_path / "c", ctx={"seed": 4}, **settings)
    assert ids(first) == ids(again) != ids(other)
    far, _ = trained(tmp_path / "d", ctx={"seed": 3 + 256}, **settings)
    assert ids(far) != ids(first)


@pytest.mark.parametrize("settings", [{"rollout": "transformers", "max_steps": 4}, {**LORA, "max_steps": 4}])
def test_transformers_writes_the_same_after_a_resume(settings: dict[str, Any], tmp_path: Path) -> None:
    whole, history = trained(tmp_path / "whole", **settings)
    assert whole.rollout is None and "rollout/logprob_gap" not in history[0]
    first = make_trainer("grpo", tmp_path / "cut", **settings)
    stop = tmp_path / "cut" / "STOP"
    first.ctx.emit = lambda event, fields: stop.touch() if fields.get("step") == 2 else None
    with pytest.raises(StopRequested) as stopped:
        first.fit()
    assert stopped.value.step == 2
    stop.unlink()
    again, its = trained(tmp_path / "cut", **settings)
    assert ids(again) == ids(whole)[2:] and its == history
    assert distance(weights(again), weights(whole)) == 0
    assert len({tuple(one) for batch in ids(whole) for one in batch}) > 40


class Drawing(RecordedGrpo):
    """Draws random numbers while it learns, as dropout does."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        torch.rand(5)
        return super().compute_loss(*args, **kwargs)


def test_what_is_written_does_not_depend_on_what_was_drawn_before(tmp_path: Path) -> None:
    settings = {"rollout": "transformers", "max_steps": 3}
    plain, _ = trained(tmp_path / "plain", **settings)
    drawing = make_trainer("grpo", tmp_path / "drawing", cls=Drawing, **settings)
    drawing.fit()
    assert ids(drawing) == ids(plain)


def test_no_two_batches_are_written_with_the_same_draws(tmp_path: Path) -> None:
    """A rate of nothing: the policy stays as it is, and four questions are all there are."""
    trainer, _ = trained(tmp_path, lr=1e-30, questions=4, max_steps=3)
    batches = [sorted(map(tuple, batch)) for batch in ids(trainer)]
    assert batches[0] != batches[1] != batches[2] != batches[0]


def test_draws_do_not_depend_on_how_prompts_are_shared() -> None:
    model = make_policy()
    sampling = Sampling(max_new_tokens=6, temperature=1.0, stop=(257,))
    prompts = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]

    def rollout(rows: int) -> EngineRollout:
        return EngineRollout(model, sampling, rows, 4)

    whole = rollout(4)(prompts, 10, seed=3)
    waves: list[int] = []
    parts = rollout(2)(prompts, 10, seed=3, at_wave=lambda: waves.append(1))
    assert parts.tokens == whole.tokens and len(waves) == 2
    halves = rollout(2)(prompts[:2], 10, seed=3).tokens + rollout(2)(prompts[2:], 12, seed=3).tokens
    assert halves == whole.tokens != rollout(4)(prompts, 10, seed=4).tokens
    assert rollout(4)(prompts, 0, seed=3).tokens != whole.tokens
    assert all(len(one) == len(two) for one, two in zip(whole.tokens, whole.logprobs, strict=True))


def test_every_call_takes_over_the_weights() -> None:
    model = make_policy()
    sampling = Sampling(max_new_tokens=6, temperature=1.0, stop=(257,))
    rollout = EngineRollout(model, sampling, 2, 4)
    first = rollout([[5, 6]], 0, seed=1)
    with torch.no_grad():
        for one in model.parameters():
            one.mul_(1.5)
    changed = rollout([[5, 6]], 0, seed=1)
    fresh = EngineRollout(model, sampling, 2, 4)([[5, 6]], 0, seed=1)
    assert changed.logprobs == fresh.logprobs != first.logprobs and changed.tokens == fresh.tokens


@pytest.mark.parametrize(("longest", "caches"), [(1, 32 + 6), (32, 32 + 6), (33, 64 + 6)])
def test_caches_are_made_for_the_longest_prompt(longest: int, caches: int) -> None:
    assert EngineRollout(make_policy(), Sampling(max_new_tokens=6), 2, longest).max_tokens == caches
