"""The pool: deadline and blame of the single item, in any thread, with nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from posttrain.errors import StageError
from posttrain.rewards import pool as pool_module
from posttrain.rewards.pool import Job, Pool

EVIL = ("posttrain.rewards.text:score", ("a" * 40 + "b", "(a+)+$", True))
"""A match that holds the interpreter for years."""


def root(number: float, seconds: float = 20.0) -> Job:
    return Job("math:sqrt", (number,), seconds)


def evil(seconds: float) -> Job:
    return Job(*EVIL, seconds)


def test_each_item_gets_its_own_outcome() -> None:
    jobs = [root(float(number * number)) for number in range(200)]
    jobs[40:40] = [evil(0.5)]
    jobs[90:90] = [Job("os:_exit", (3,), 20.0)]
    jobs[140:140] = [root("x")]
    jobs[150:150] = [Job("builtins:set", ((1,),), 20.0)]  # a value that JSON does not know
    with Pool(2) as pool:
        found = pool.run(jobs)
        statuses = {index: outcome.status for index, outcome in enumerate(found) if outcome.status != "value"}
        assert statuses == {40: "timeout", 90: "crashed", 140: "error", 150: "error"}
        assert "TypeError" in found[140].message
        rest = [outcome.value for outcome in found if outcome.status == "value"]
        assert rest == [float(number) for number in range(200)]
        assert [outcome.value for outcome in pool.run([root(4.0)])] == [2.0] and pool.run([]) == []


def test_a_late_item_costs_its_own_time_and_no_other() -> None:
    with Pool(2) as pool:
        # They go out in chunks of five, 1 s of work each, and no deadline is a chunk's.
        found = pool.run([Job("time:sleep", (0.2,), 0.8) for _ in range(40)])
        assert {outcome.status for outcome in found} == {"value"}
        found = pool.run([evil(0.4), *[root(1.0)] * 40])
        assert [outcome.status for outcome in found] == ["timeout", *["value"] * 40]


def test_memory_is_limited() -> None:
    with Pool(1, memory_mb=1024) as pool:
        found = pool.run([Job("builtins:bytearray", (1 << 32,), 20.0), root(4.0)])
    assert found[0].status == "error" and "MemoryError" in found[0].message and found[1].value == 2.0


def test_it_works_in_a_thread_and_two_rounds_take_turns() -> None:
    with ThreadPoolExecutor(2) as threads, Pool(1) as pool:
        rounds = [threads.submit(pool.run, [root(float(n))] * 20) for n in (4, 9)]
        assert [{outcome.value for outcome in done.result()} for done in rounds] == [{2.0}, {3.0}]
    with ThreadPoolExecutor(1) as threads:
        pool = Pool(1)
        threads.submit(pool.warm).result()
    # The thread that started the worker is gone, and the worker is not.
    time.sleep(0.2)
    assert pool.run([root(4.0)])[0].value == 2.0 and pool._workers[0].process.poll() is None
    process = pool._workers[0].process
    pool.close()
    assert process.returncode == -signal.SIGKILL


def test_a_thousand_small_items_take_less_than_half_a_second() -> None:
    jobs = [root(float(number)) for number in range(1024)]
    with Pool(2) as pool:
        pool.warm()
        took = []
        for _ in range(5):
            began = time.perf_counter()
            pool.run(jobs)
            took.append(time.perf_counter() - began)
    assert min(took) < 0.5


def test_a_worker_that_cannot_start_is_one_message() -> None:
    with Pool(1, prepare=["no_such_module"], where="stages.x") as pool, pytest.raises(StageError) as caught:
        pool.run([root(4.0)])
    assert "did not start" in str(caught.value) and "no_such_module" in str(caught.value)
    assert "stages.x" in str(caught.value)


def test_what_is_to_be_called_first_is_called_before_the_first_item() -> None:
    with Pool(1, prepare=["os:abort"]) as pool, pytest.raises(StageError, match="did not start"):
        pool.warm()


def test_a_worker_that_takes_too_long_to_start_is_one_message(monkeypatch) -> None:
    monkeypatch.setattr(pool_module, "STARTING_SECONDS", 0.01)
    with Pool(1) as pool, pytest.raises(StageError, match="did not start: timeout"):
        pool.warm()


def test_workers_that_die_without_work_are_replaced_and_then_given_up(monkeypatch) -> None:
    with Pool(1) as pool:
        pool.warm()
        pool._workers[0].process.kill()
        pool._workers[0].process.wait()
        assert pool.run([root(4.0)])[0].value == 2.0
        own = pool_module._Worker.take
        monkeypatch.setattr(pool_module._Worker, "take", lambda self, current, count: False)
        with pytest.raises(StageError, match="die without work"):
            pool.run([root(4.0)])
        monkeypatch.setattr(pool_module._Worker, "take", own)
        assert pool.run([root(9.0)])[0].value == 3.0


def test_an_error_that_concerns_all_is_raised_and_the_pool_goes_on() -> None:
    with Pool(1) as pool:
        with pytest.raises(StageError, match="far too much"):
            pool.run([Job("posttrain.errors:fail", ("far too much", "there", "less"), 20.0), *[root(9.0)] * 5])
        assert [outcome.value for outcome in pool.run([root(4.0)])] == [2.0]


def test_workers_get_no_secret(monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    job = Job("os:getenv", ("WANDB_API_KEY",), 20.0)
    with Pool(1) as pool:
        assert pool.run([job])[0].value is None
    with Pool(1, environment={"WANDB_API_KEY": "given"}) as pool:
        assert pool.run([job])[0].value == "given"


OWNER = """
import sys, threading, time
from posttrain.rewards.pool import Job, Pool
pool = Pool(2)
pool.warm()
print(*[worker.process.pid for worker in pool._workers], flush=True)
job = Job("posttrain.rewards.text:score", ("a" * 40 + "b", "(a+)+$", True), 600.0)
threading.Thread(target=pool.run, args=([job],), daemon=True).start()
time.sleep(600)
"""


def test_workers_die_with_their_owner_busy_or_idle() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, env=environment)
    workers = [psutil.Process(int(pid)) for pid in owner.stdout.readline().split()]
    assert len(workers) == 2
    time.sleep(0.7)  # one of them is in the match by now
    assert all(worker.is_running() for worker in workers)
    owner.kill()
    owner.wait()
    gone, alive = psutil.wait_procs(workers, timeout=10)
    assert not [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]


def test_work_that_goes_on_is_told() -> None:
    told: list[int] = []
    with Pool(1) as pool:
        pool.run([root(4.0), evil(0.3), root(9.0)], lambda: told.append(1))
    assert len(told) >= 2
