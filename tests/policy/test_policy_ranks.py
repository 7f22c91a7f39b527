"""Two gloo processes train as one does: the same numbers, the same tracker, and other draws on every rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_world import Recorder, make_trainer, weights

from posttrain.errors import StageError
from posttrain.methods.riskpo.trainer import RiskpoTrainer
from posttrain.policy.trainer import PolicyTrainer

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "riskpo": ("riskpo", {"risk": {"bundle_size": 2, "bundles": "stratified"}, "kept_completions": 5}),
    "bnpo": ("grpo", {"loss_type": "bnpo"}),
    "dapo": ("grpo", {"loss_type": "dapo", "scale_rewards": "batch"}),
    "tokens": ("tokens", {"loss_type": "dapo"}),
}
SETTINGS: dict[str, Any] = {"adam_epsilon": 1e-3, "rollout_rows": 8, "micro_batch_size": 2}
HERE = Path(__file__).parent


class RecordedGrpo(Recorder, PolicyTrainer):
    pass


class RecordedRiskpo(Recorder, RiskpoTrainer):
    pass


class OfTokens(RecordedGrpo):
    """Advantages for every token: the longest completion is on one rank only."""

    def advantages_of(self, rewards: torch.Tensor) -> torch.Tensor:
        return (rewards - 0.5) / torch.arange(1, 1 + int(self.lengths.max()))


CLASSES = {"riskpo": RecordedRiskpo, "grpo": RecordedGrpo, "tokens": OfTokens}


class Liar(RiskpoTrainer):
    """A rank that saw other rewards: its tracker is another."""

    def _compare_ranks(self) -> None:
        self.tracker.update(torch.tensor([float(self.ctx.rank)]))
        super()._compare_ranks()


def of_rows(batch: dict[str, Any]) -> torch.Tensor:
    """A number a completion, whatever its padding."""
    values = batch["advantages"]
    return values if values.dim() == 1 else (values * batch["completion_mask"]).sum(1)


def run(case: str, folder: Path, rank: int = 0, world_size: int = 1, **changes: Any) -> dict[str, Any]:
    """Train a case and say what came of it."""
    kind, settings = CASES[case]
    context: dict[str, Any] = {}
    if world_size > 1:
        from posttrain.launch.agreement import agree

        context = {"rank": rank, "world_size": world_size, "agree": agree}
    base = "riskpo" if kind == "riskpo" else "grpo"
    trainer = make_trainer(base, folder, ctx=context, cls=CLASSES[kind], **{**SETTINGS, **settings, **changes})
    history = trainer.fit()
    return {
        "history": history,
        "advantages": [of_rows(batch).tolist() for batch in trainer.batches],
        "ids": [[ids for ids in written[0]] for written in trainer.written],
        "tracker": trainer.tracker.state_dict() if kind == "riskpo" else None,
        "weights": sum(float(value.double().abs().sum()) for value in weights(trainer).values()),
        "log": (folder / "completions.jsonl").read_text() if (folder / "completions.jsonl").is_file() else None,
    }


def of_rank(rank: int, folder: Path) -> None:
    """What each of the two processes does."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {case: run(case, folder / case, rank, 2) for case in CASES}
    one_question = {"num_generations": 16, "rollout": "transformers", "max_steps": 1}
    found["transformers"] = run("dapo", folder / "transformers", rank, 2, **one_question)
    from posttrain.launch.agreement import agree

    context = {"rank": rank, "world_size": 2, "agree": agree}
    liar = make_trainer("riskpo", folder / "liar", cls=Liar, ctx=context)
    try:
        # Looked at by itself: the first rank would go on to a collective that the other never joins.
        liar._compare_ranks()
        found["liar"] = None
    except StageError as error:
        found["liar"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    paths = os.pathsep.join([str(HERE), *sys.path])
    shared = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    code = f"from pathlib import Path; import test_policy_ranks as t; t.of_rank(RANK, Path({str(folder)!r}))"
    code += "; from posttrain.launch.rank import leave; leave(0)"  # as real ranks end
    port = str(20000 + os.getpid() % 20000)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code.replace("RANK", str(rank))],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port},
        )
        for rank in range(2)
    ]
    assert [process.wait(240) for process in processes] == [0, 0]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one(case: str, two: list[dict[str, Any]], tmp_path: Path) -> None:
    alone, shared = run(case, tmp_path), [one[case] for one in two]
    assert shared[0]["weights"] == shared[1]["weights"]
    assert shared[0]["weights"] == pytest.approx(alone["weights"], rel=1e-6)
    for batch, whole in enumerate(alone["ids"]):
        assert shared[0]["ids"][batch] + shared[1]["ids"][batch] == whole
        parts = shared[0]["advantages"][batch] + shared[1]["advantages"][batch]
        assert parts == pytest.approx(alone["advantages"][batch], rel=1e-6, abs=1e-7)
    for row, together in zip(alone["history"], shared[0]["history"], strict=True):
        assert together.keys() == row.keys()
        for name, value in row.items():
            assert together[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_both_ranks_track_the_same_quantiles(two: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = run("riskpo", tmp_path)
    assert two[0]["riskpo"]["tracker"] == two[1]["riskpo"]["tracker"] == alone["tracker"]
    assert alone["tracker"]["atoms"]


def test_the_first_rank_keeps_completions_of_all(two: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = run("riskpo", tmp_path)
    mine, its = ([json.loads(line) for line in one["log"].splitlines()] for one in (alone, two[0]["riskpo"]))
    assert len(mine) == len(its) == 3 * 4  # of sixteen, every fourth
    for one, other in zip(mine, its, strict=True):
        assert one.pop("advantage") == pytest.approx(other.pop("advantage"), rel=1e-6) and one == other


def test_a_rank_that_tracks_something_else_is_told(two: list[dict[str, Any]]) -> None:
    assert two[0]["liar"] is None
    assert "rank 1 tracks other quantiles than the first" in two[1]["liar"]


def test_ranks_draw_different_random_numbers(two: list[dict[str, Any]]) -> None:
    """A way to generate that takes the global generator; both ranks continue the same question."""
    ids = [one["transformers"]["ids"][0] for one in two]
    assert not {tuple(one) for one in ids[0] if len(one) > 2} & {tuple(one) for one in ids[1]}
