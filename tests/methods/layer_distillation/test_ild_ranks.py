"""Layers shared out among gloo ranks: bit for bit the result of one rank, also when the number of ranks changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from layer_world import assert_same, context, outcome, world  # noqa: F401

from posttrain.pipeline.context import StageContext

RANK = """
import json, os, sys
from pathlib import Path
import torch, torch.distributed as dist
from posttrain.errors import StopRequested
from posttrain.launch.agreement import agree
from posttrain.methods.layer_distillation import Ild, IldConfig
from posttrain.pipeline.context import InputArtifact, StageContext
from posttrain.pipeline.stage import ArtifactMeta
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True, warn_only=True)
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo")
for job in json.loads(sys.argv[1]):
    asked = 0
    class Context(StageContext):
        def should_stop(self):
            global asked
            asked += 1
            return self.same(job["stop_after"] is not None and asked > job["stop_after"])
    inputs = {name: InputArtifact(Path(path), ArtifactMeta("model")) for name, path in job["inputs"].items()}
    ranks = {"rank": rank, "world_size": world, "agree": agree, "strategy": job["strategy"]}
    ctx = Context("ild", IldConfig(**job["config"]), Path(job["work"]), inputs, seed=3, **ranks)
    try:
        Ild().run(ctx)
        if rank == 0:
            Path(job["work"], "result.json").write_text(json.dumps(ctx.result))
    except StopRequested as stop:
        assert stop.step == job["stop_after"], stop.step
dist.destroy_process_group()
from posttrain.launch.rank import leave
leave(0)
"""


def job_of(ctx: StageContext, strategy: str = "ddp", stop_after: int | None = None) -> dict[str, object]:
    inputs = {name: str(given.path) for name, given in ctx.inputs.items()}
    config = ctx.config.model_dump(exclude={"type", "inputs"})
    return {
        "work": str(ctx.work_dir),
        "inputs": inputs,
        "config": config,
        "strategy": strategy,
        "stop_after": stop_after,
    }


def on_ranks(ranks: int, jobs: list[dict[str, object]]) -> None:
    port = str(20000 + (os.getpid() * 11 + ranks) % 20000)
    shared = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, json.dumps(jobs)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    try:
        assert [process.wait(300) for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()


def found_in(ctx: StageContext):
    from safetensors.torch import load_file

    folder = ctx.work_dir / "outputs"
    rows = [json.loads(line) for line in (folder / "history" / "history.jsonl").read_text().splitlines()]
    return (
        load_file(folder / "model" / "model.safetensors"),
        rows,
        json.loads((ctx.work_dir / "result.json").read_text()),
    )


@pytest.mark.timeout(600)
def test_two_ranks_are_one_and_resume_each_others_work(context) -> None:  # noqa: F811
    settings = {"save_every": 2, "trainable": "all"}
    one = outcome(context(work="one", **settings))
    whole, cut = context(work="two", **settings), context(work="cut", **settings)
    on_ranks(2, [job_of(whole, "zero2"), job_of(cut, stop_after=3)])
    assert len(list(cut.checkpoint_dir.glob("checkpoint-*"))) >= 1
    on_ranks(2, [job_of(cut)])
    changed = context(work="changed", **settings)
    on_ranks(2, [job_of(changed, stop_after=3)])
    for weights, rows, result in (found_in(whole), found_in(cut)):
        # Numbers for the log go through sums over ranks; the weights must be the same bits.
        assert rows == [pytest.approx(row, rel=1e-6) for row in one[1]]
        assert result["least_fall"] == pytest.approx(one[2]["least_fall"])
        assert_same((weights, 0, 0), (one[0], 0, 0))
    assert_same((outcome(context(work="changed", **settings))[0], 0, 0), (one[0], 0, 0))
