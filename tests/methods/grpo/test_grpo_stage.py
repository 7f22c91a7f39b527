"""The stages from folder to folder: a model and questions in, a trained model, its history and some completions out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_world import SMALL, make_policy
from safetensors.torch import load_file

from posttrain.errors import StageError, StopRequested
from posttrain.methods.grpo import Grpo, GrpoConfig
from posttrain.methods.riskpo.config import RiskpoConfig
from posttrain.methods.riskpo.stage import Riskpo
from posttrain.methods.riskpo.trainer import RiskpoTrainer
from posttrain.models.loading import load_model, save_model
from posttrain.models.tiny import tiny_tokenizer
from posttrain.pipeline.context import InputArtifact, StageContext
from posttrain.pipeline.stage import ArtifactMeta
from posttrain.policy.trainer import PolicyTrainer

REWARDS = {"letters": {"type": "regex", "pattern": "[a-m]", "match": "search"}}
STAGES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "grpo": (Grpo(), GrpoConfig, {}),
    "riskpo": (Riskpo(), RiskpoConfig, {"risk": {"bundle_size": 2}, "risk_reward": "letters"}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `model` and `data`: seven questions, one of them too long."""
    root = tmp_path_factory.mktemp("policy_stage")
    save_model(make_policy(), tiny_tokenizer(), root / "model")
    rows = [
        {"id": str(number), "messages": [{"role": "user", "content": f"Say {'much ' * (20 * (number == 6))}{number}."}]}
        for number in range(7)
    ]
    (root / "data").mkdir()
    (root / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def context(kind: str, world: Path, folder: Path, **changes: Any) -> StageContext:
    folder.mkdir(exist_ok=True)
    inputs = {
        name: InputArtifact(world / name, ArtifactMeta(type))
        for name, type in (("model", "model"), ("data", "dataset"))
    }
    settings = {**SMALL, "rewards": REWARDS, "max_prompt_length": 80, **STAGES[kind][2], **changes}
    return StageContext("rl", STAGES[kind][1](**settings), folder, inputs, seed=3)


def run(kind: str, ctx: StageContext) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], list[dict[str, Any]]]:
    outputs = STAGES[kind][0].run(ctx)
    assert set(outputs) == {"model", "history"}
    lines = [(outputs["history"] / name).read_text().splitlines() for name in ("history.jsonl", "completions.jsonl")]
    history, kept = ([json.loads(line) for line in one] for one in lines)
    return load_file(outputs["model"] / "model.safetensors"), history, kept


@pytest.mark.parametrize("kind", STAGES)
def test_a_stage_learns_and_says_what_it_did(kind: str, world: Path, tmp_path: Path) -> None:
    ctx = context(kind, world, tmp_path / "work")
    weights, history, kept = run(kind, ctx)
    before = load_file(world / "model" / "model.safetensors")
    assert max(float((weights[name] - before[name]).abs().max()) for name in weights) > 1e-3
    assert [row["step"] for row in history] == [1, 2, 3] and 0 < history[0]["reward"] < 1
    assert ("risk/q_beta" in history[0]) == (kind == "riskpo")
    assert [row["step"] for row in kept] == [step for step in range(3) for _ in range(4)]
    result = ctx.result
    assert (result["steps"], result["rollouts"], result["completions"], result["questions"]) == (3, 3, 48, 6)
    assert (result["left_out"], result["epochs"]) == (1, 2.0)
    assert result["first_reward"] == history[0]["reward"] and result["last_tenth_reward"] == history[-1]["reward"]
    assert result["first_entropy"] == history[0]["entropy"] and isinstance(result["alarms"], list)
    timing = ctx.timing
    assert timing["rollout"] == "engine" and timing["micro_batch"] == 4 and not timing["compiled"]
    parts = timing["parts"]
    assert set(parts) == {"rollout", "scoring", "batching", "updates"} and min(parts.values()) >= 0
    assert sum(parts.values()) <= timing["seconds"] and parts["rollout"] > 0 and parts["scoring"] > 0


def test_which_trainer() -> None:
    assert Grpo().trainer() is PolicyTrainer and Riskpo().trainer() is RiskpoTrainer


def test_stopped_and_run_again_is_the_same(world: Path, tmp_path: Path) -> None:
    whole_ctx = context("riskpo", world, tmp_path / "whole")
    whole = run("riskpo", whole_ctx)
    ctx = context("riskpo", world, tmp_path / "work")
    ctx.emit = lambda event, fields: (ctx.work_dir / "STOP").touch() if fields.get("step") == 1 else None
    with pytest.raises(StopRequested):
        run("riskpo", ctx)
    (ctx.work_dir / "STOP").unlink()
    stale = ctx.work_dir / "outputs" / "model" / "stale.bin"
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.write_bytes(b"of an attempt that was killed while it wrote")
    again_ctx = context("riskpo", world, tmp_path / "work")
    again = run("riskpo", again_ctx)
    assert whole[1:] == again[1:] and whole_ctx.result == again_ctx.result and not stale.exists()
    assert all(torch.equal(whole[0][name], again[0][name]) for name in whole[0])


@pytest.mark.parametrize("changes", [{"save_dtype": "bfloat16"}, {"lora": {"r": 2}}])
def test_what_is_saved_can_be_loaded(changes: dict[str, Any], world: Path, tmp_path: Path) -> None:
    ctx = context("grpo", world, tmp_path / "work", max_steps=1, **changes)
    weights, *_ = run("grpo", ctx)
    dtype = torch.bfloat16 if "save_dtype" in changes else torch.float32
    assert {value.dtype for value in weights.values()} == {dtype}
    assert weights.keys() == load_file(world / "model" / "model.safetensors").keys()
    load_model(ctx.work_dir / "outputs" / "model")
    measured = Grpo().measure("model", ctx.work_dir / "outputs" / "model", ArtifactMeta("model"))
    assert measured.architecture["hidden_size"] == 64
    assert ctx.timing["rollout"] == ("transformers" if "lora" in changes else "engine")


def test_no_completions_are_kept_unless_wanted(world: Path, tmp_path: Path) -> None:
    ctx = context("grpo", world, tmp_path / "work", max_steps=1, kept_completions=0)
    Grpo().run(ctx)
    assert sorted(path.name for path in (ctx.work_dir / "outputs" / "history").iterdir()) == ["history.jsonl"]


def test_nothing_to_ask_is_said_before_a_model_is_loaded(world: Path, tmp_path: Path) -> None:
    ctx = context("grpo", world, tmp_path / "work", max_prompt_length=5)
    with pytest.raises(StageError, match="7 rows: longer than max_prompt_length=5"):
        Grpo().run(ctx)
