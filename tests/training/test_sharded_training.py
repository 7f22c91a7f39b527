"""Engines zero2, zero3 and fsdp2 on one and two gloo ranks: one rank's numbers, and resumed runs that are the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sharded_world import METHODS, make_worlds, run_jobs, train

from posttrain.config.schema import SHARDED
from posttrain.training import checkpoints

# The first test of an engine carries all of its runs, which share two cores with another test's.
pytestmark = pytest.mark.timeout(1200)
TOLERANCE = 1e-5
"""Relative: sums over ranks are rounded in another order than sums over micro-batches."""

SAME_ON_ANY = ("loss", "grad_norm", "lr", "kl", "nats", "reward", "rewards/margins")
"""TRL's other metrics are means over micro-batches, which hold the rows of all ranks."""

LOWEST = {"grpo": 1e-6}
"""Absolute, where the loss of a step is a sum of ones that cancel."""

LORA = {"lora": {"r": 4, "alpha": 8.0}}
VARIANTS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "adapters": ("preference", {**LORA, "lr": 1e-2}, ("zero3", "fsdp2")),
    "mixers": ("distill", {"trainable": "mixers"}, ("zero3",)),
    "recomputed": ("distill", {"gradient_checkpointing": True, "teacher_sharding": "sharded"}, ("zero3", "fsdp2")),
    "unclipped": ("rows", {"max_grad_norm": 0.0, "weight_decay": 0.1}, ("zero2", "fsdp2")),
    "reused": ("grpo", {"num_iterations": 2}, ("zero3",)),
}
"""What reads weights, gradients or moments in another way, and where that could matter."""

EVERYTHING = {method: (method, {}, SHARDED) for method in METHODS} | VARIANTS
PAIRS = [(strategy, name) for name, (_, _, strategies) in EVERYTHING.items() for strategy in strategies]


def job(method: str, strategy: str, root: Path, work: str, **changes: Any) -> dict[str, Any]:
    return {"method": method, "strategy": strategy, "root": str(root), "work": str(root / work / strategy), **changes}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    make_worlds(folder)
    return folder


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, dict[str, Any]]:
    """One rank with the whole model, in this process."""
    found = {}
    for name, (method, changes, _) in {**EVERYTHING, "generated": ("grpo", {**LORA, "beta": 0.1}, ())}.items():
        torch.manual_seed(0)
        found[name] = train(method, root, root / "alone" / name, {}, **changes)
    return found


@pytest.fixture(scope="module")
def one_rank(root: Path) -> dict[str, Any]:
    """Every engine on one rank: whole runs, and one that ends after its second step."""
    jobs = {}
    for strategy in SHARDED:
        jobs[f"{strategy} rows"] = job("rows", strategy, root, "one_whole")
        jobs[f"{strategy} cut"] = job("rows", strategy, root, "one_cut", stop_after=2)
    for strategy in ("zero3", "fsdp2"):
        jobs[f"{strategy} generated"] = job("grpo", strategy, root, "one_generated", **LORA, beta=0.1)
    return run_jobs(1, jobs, root)[0]


class TwoRanks:
    """What came of the runs on two ranks, by "STRATEGY NAME"; a strategy's run together when the first is asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.found: dict[str, dict[str, Any]] = {}

    def __getitem__(self, name: str) -> dict[str, Any]:
        strategy = name.split()[0]
        if strategy not in self.found:
            self.found[strategy] = run_jobs(2, self._jobs(strategy), self.root)[0]
        return self.found[strategy][name]

    def _jobs(self, strategy: str) -> dict[str, dict[str, Any]]:
        root = self.root
        if strategy == "refused":
            whole, sharded = (root / folder for folder in ("whole/ddp", "spoilt/zero2"))
            return {
                "refused zero2": {**job("rows", "zero2", root, ""), "work": str(whole)},
                "refused ddp": {**job("rows", "ddp", root, ""), "work": str(sharded)},
            }
        if strategy == "ddp":
            jobs = {f"ddp {method}": job(method, "ddp", root, f"two_{method}") for method in METHODS}
            return {**jobs, "ddp cut": job("rows", "ddp", root, "whole", stop_after=2)}
        jobs = {}
        for one, name in PAIRS:
            if one == strategy:
                method, changes, _ = EVERYTHING[name]
                jobs[f"{strategy} {name}"] = job(method, strategy, root, f"two_{name}", **changes)
        jobs[f"{strategy} cut"] = job("rows", strategy, root, "two_cut", stop_after=2)
        jobs[f"{strategy} resumed"] = job("rows", strategy, root, "two_cut")
        jobs[f"{strategy} from one"] = job("rows", strategy, root, "one_cut")
        jobs[f"{strategy} spoilt"] = job("rows", strategy, root, "spoilt", spoil=[3, float("nan")], save_every=1)
        return jobs


@pytest.fixture(scope="module")
def two_ranks(root: Path, one_rank: dict[str, Any]) -> TwoRanks:
    """On two ranks: whole runs, one that is cut and goes on, one that goes on from one rank, and one that breaks."""
    return TwoRanks(root)


@pytest.fixture(scope="module")
def back_on_one(root: Path, two_ranks: TwoRanks) -> dict[str, Any]:
    """The second step of two ranks' broken runs, gone on with by one rank; also by another engine than wrote it."""
    assert all("error" in two_ranks[f"{strategy} spoilt"] for strategy in SHARDED)
    shutil.copytree(root / "spoilt" / "zero3", root / "other" / "fsdp2")
    jobs = {strategy: job("rows", strategy, root, "spoilt") for strategy in SHARDED}
    return run_jobs(1, {**jobs, "other": job("rows", "fsdp2", root, "other")}, root)[0]


def assert_close(
    found: dict[str, Any], expected: dict[str, Any], method: str = "rows", names: tuple[str, ...] = SAME_ON_ANY
) -> None:
    assert len(found["history"]) == len(expected["history"]) == 4
    for row, whole in zip(found["history"], expected["history"], strict=True):
        assert row.keys() == whole.keys()
        for name in whole.keys() & set(names or whole):
            near = pytest.approx(whole[name], rel=TOLERANCE, abs=LOWEST.get(method, 1e-7))
            assert row[name] == near, (whole["step"], name)
    one, other = weights(found), weights(expected)
    assert one.keys() == other.keys()
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 2e-6


def weights(found: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(found["model"]) / "model.safetensors")


@pytest.mark.parametrize(("strategy", "name"), PAIRS)
def test_two_ranks_are_one(strategy: str, name: str, two_ranks: TwoRanks, alone: dict[str, Any]) -> None:
    assert_close(two_ranks[f"{strategy} {name}"], alone[name], EVERYTHING[name][0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", SHARDED)
def test_engines_log_what_ddp_logs(strategy: str, method: str, two_ranks: TwoRanks) -> None:
    """All metrics, which for TRL's depend on the number of ranks."""
    assert_close(two_ranks[f"{strategy} {method}"], two_ranks[f"ddp {method}"], method, ())


@pytest.mark.parametrize("strategy", SHARDED)
def test_one_rank_is_one(strategy: str, one_rank: dict[str, Any], alone: dict[str, Any]) -> None:
    assert_close(one_rank[f"{strategy} rows"], alone["rows"])


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_completions_are_written_by_whole_weights(
    strategy: str, one_rank: dict[str, Any], alone: dict[str, Any]
) -> None:
    """By transformers' generate, and scored by the policy without its adapters, outside of the training step."""
    assert_close(one_rank[f"{strategy} generated"], alone["generated"], "grpo", ("loss", "grad_norm", "reward", "kl"))


@pytest.mark.parametrize("strategy", SHARDED)
def test_interrupted_and_resumed_is_uninterrupted(strategy: str, two_ranks: TwoRanks) -> None:
    whole, resumed = two_ranks[f"{strategy} rows"], two_ranks[f"{strategy} resumed"]
    assert two_ranks[f"{strategy} cut"]["stopped"] == 2
    assert resumed["history"] == whole["history"]
    one, other = weights(resumed), weights(whole)
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("strategy", SHARDED)
def test_another_number_of_ranks_goes_on(
    strategy: str, two_ranks: TwoRanks, back_on_one: dict[str, Any], alone: dict[str, Any]
) -> None:
    assert_close(two_ranks[f"{strategy} from one"], alone["rows"])
    assert_close(back_on_one[strategy], alone["rows"])


def test_an_engine_goes_on_from_anothers_shards(back_on_one: dict[str, Any], alone: dict[str, Any]) -> None:
    assert_close(back_on_one["other"], alone["rows"])


def test_whole_and_sharded_checkpoints_are_not_mistaken(two_ranks: TwoRanks) -> None:
    assert two_ranks["ddp cut"]["stopped"] == 2 and "error" in two_ranks["zero2 spoilt"]
    sharded, whole = two_ranks["refused zero2"]["error"], two_ranks["refused ddp"]["error"]
    assert "step 2 was written with the whole model on every rank (strategy ddp)" in sharded
    assert "engine=auto or engine=ddp" in sharded
    assert "step 2 was written in shards (strategy zero2)" in whole and "go on with engine=zero2 or" in whole


@pytest.mark.parametrize("strategy", SHARDED)
def test_no_checkpoint_of_a_nan(strategy: str, root: Path, two_ranks: TwoRanks) -> None:
    said = two_ranks[f"{strategy} spoilt"]["error"]
    assert "is nan at step 3" in said and "checkpoint of step 2 is kept" in said


@pytest.mark.parametrize("strategy", SHARDED)
def test_a_shard_that_is_missing_is_not_made_up(strategy: str, root: Path, two_ranks: TwoRanks, tmp_path: Path) -> None:
    assert two_ranks[f"{strategy} cut"]["stopped"] == 2
    folder = checkpoints.checkpoint_path(root / "two_cut" / strategy / "checkpoints", 2)
    (folder / "shard_0001.safetensors").rename(tmp_path / "shard")
    try:
        assert "shard_0001.safetensors is missing" in str(checkpoints.find_problem(folder))
    finally:
        (tmp_path / "shard").rename(folder / "shard_0001.safetensors")


@pytest.mark.parametrize("method", ["distill", "sft", "preference"])
def test_what_is_saved_is_an_ordinary_model(method: str, two_ranks: TwoRanks) -> None:
    from transformers import AutoModelForCausalLM

    folder = two_ranks[f"fsdp2 {method}"]["model"]
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    logits = model(input_ids=torch.arange(8)[None]).logits
    assert torch.isfinite(logits).all() and logits.shape == (1, 8, model.config.vocab_size)
