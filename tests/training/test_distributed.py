"""Three gloo processes: sums over ranks, and one rank's word for all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from posttrain.errors import StopRequested
from posttrain.pipeline.context import StageContext
from posttrain.training import distributed

RANK = """
import json, sys, time
import torch, torch.distributed as dist
from posttrain.errors import StopRequested
from posttrain.launch.agreement import agree
from posttrain.pipeline.context import StageContext
from posttrain.training import distributed
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
distributed.BUCKET_BYTES = 64
make = lambda *shape: torch.nn.Parameter(torch.zeros(*shape))
parameters = [make(3), make(20, 2), make(5), torch.nn.Parameter(torch.zeros(2).double()), make(4)]
for index, parameter in enumerate(parameters[:4]):
    parameter.grad = torch.full_like(parameter, float(10**rank * (index + 1)))
parameters[4].requires_grad_(False)
if rank == 1:
    parameters[2].grad = None
distributed.add_gradients(parameters)
numbers = distributed.add_numbers({"loss": rank + 0.5, "kl": torch.tensor(2.0)}, torch.device("cpu"))
ctx = StageContext("s", None, None, rank=rank, world_size=3, agree=agree)
if rank == 0:
    time.sleep(0.3)
seen = [ctx.same({"from": rank, "text": "ü" * 5}), ctx.same(None), ctx.first_does(lambda: [rank, ctx.same("mine")])]
stopped = None
try:
    ctx.first_does(lambda: ctx.stop(7 + rank))
except StopRequested as stop:
    stopped = stop.step
grads = [None if p.grad is None else p.grad.flatten().tolist() for p in parameters]
found = {"grads": grads, "numbers": {n: float(v) for n, v in numbers.items()}, "seen": seen, "stopped": stopped}
open(f"{folder}/{rank}.json", "w").write(json.dumps(found))
dist.destroy_process_group()
from posttrain.launch.rank import leave
leave(0)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    processes = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(folder)]) for rank in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(3)]


def test_gradients_are_sums_over_ranks_and_a_missing_one_is_zero(ranks: list[dict]) -> None:
    sums = [[111.0] * 3, [222.0] * 40, [303.0] * 5, [444.0] * 2, None]
    assert all(found["grads"] == sums for found in ranks)


def test_numbers_are_sums_over_ranks(ranks: list[dict]) -> None:
    assert all(found["numbers"] == {"loss": 4.5, "kl": 6.0} for found in ranks)


def test_the_first_ranks_word_counts(ranks: list[dict]) -> None:
    assert all(found["seen"] == [{"from": 0, "text": "ü" * 5}, None, [0, "mine"]] for found in ranks)


def test_what_stops_the_first_rank_stops_all(ranks: list[dict]) -> None:
    assert [found["stopped"] for found in ranks] == [7, 7, 7]


def test_alone_nothing_is_asked(tmp_path: Path) -> None:
    ctx = StageContext("s", None, tmp_path)
    assert ctx.same(3) == 3 and ctx.first_does(lambda: 4) == 4 and not ctx.should_stop()
    with pytest.raises(StopRequested):
        ctx.first_does(lambda: ctx.stop(1))


def test_buckets_hold_neighbours_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "BUCKET_BYTES", 32)
    sizes = [(torch.float32, 4), (torch.float32, 4), (torch.float32, 1), (torch.float64, 9), (torch.float32, 2)]
    tensors = [torch.zeros(count, dtype=dtype) for dtype, count in sizes]
    assert [[t.numel() for t in bucket] for bucket in distributed._buckets(tensors)] == [[4, 4], [1], [9], [2]]
