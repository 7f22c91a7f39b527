"""When the watchdog bites, and when it does not; who beats while a trainer works."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
from training_world import make_trainer

from posttrain.errors import StageError
from posttrain.pipeline.context import StageContext
from posttrain.training.watchdog import Watchdog


def watched(folder: Path, seconds: float, rank: int = 0) -> tuple[Watchdog, list[StageError]]:
    found: list[StageError] = []
    ctx = StageContext("rl", None, folder, rank=rank, abandon=found.append)  # type: ignore[arg-type]
    return Watchdog(ctx, seconds), found


def test_silence_is_ended_once(tmp_path: Path) -> None:
    watchdog, found = watched(tmp_path, 0.2, rank=3)
    with watchdog:
        watchdog.beat("scoring for step 7")
        time.sleep(0.9)
    (error,) = found
    (problem,) = error.problems
    assert "rank 3 has made no progress" in problem.what and "(scoring for step 7)" in problem.what
    assert problem.where == "stages.rl" and "stages.rl.hang_seconds=0.8" in problem.fix
    assert "test_watchdog.py" in (tmp_path / "hang_rank3.txt").read_text()


def test_who_beats_lives(tmp_path: Path) -> None:
    watchdog, found = watched(tmp_path, 1.0)
    with watchdog:
        for number in range(16):
            time.sleep(0.1)
            watchdog.beat(f"step {number}")
    assert found == [] and list(tmp_path.iterdir()) == []


def test_entering_is_a_beat(tmp_path: Path) -> None:
    """What happened before, such as loading the model, does not count."""
    watchdog, found = watched(tmp_path, 0.6)
    time.sleep(0.7)
    with watchdog:
        time.sleep(0.3)
    assert found == []


def test_afterwards_nobody_watches(tmp_path: Path) -> None:
    watchdog, found = watched(tmp_path, 0.3)
    with watchdog:
        pass
    with pytest.raises(ZeroDivisionError), watchdog:
        raise ZeroDivisionError
    time.sleep(0.6)
    assert found == []


def test_zero_never_bites(tmp_path: Path) -> None:
    watchdog, found = watched(tmp_path, 0)
    with watchdog:
        assert watchdog._thread is None
        time.sleep(0.1)
    assert found == []


def test_outside_a_worker_it_only_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    with Watchdog(StageContext("rl", None, tmp_path), 0.1):
        time.sleep(0.4)
    assert "has made no progress" in caplog.text and (tmp_path / "hang_rank0.txt").is_file()


def test_a_trainer_beats_at_every_step_and_save(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=3, save_every=2)
    said: list[Any] = []
    beat = trainer.watchdog.beat
    trainer.watchdog.beat = lambda doing: (said.append(doing), beat(doing))
    trainer.fit()
    assert said == ["starting", "step 1", "step 1", "step 2", "step 2", "saving step 2", "step 3", "step 3"]
    assert trainer.watchdog.seconds == 1800 and trainer.watchdog._thread is None


def test_a_trainer_that_hangs_is_found(tmp_path: Path) -> None:
    found: list[StageError] = []
    trainer = make_trainer(tmp_path, max_steps=2, hang_seconds=3)
    trainer.ctx.abandon = found.append
    step = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: (time.sleep(4.5 * (trainer.state.global_step == 1)), step(*args))[1]
    trainer.fit()
    assert len(found) == 1 and "(step 2)" in str(found[0])


def test_a_disk_that_is_gone_does_not_keep_what_hangs_alive(tmp_path: Path) -> None:
    watchdog, found = watched(tmp_path / "gone", 0.2)
    with watchdog:
        time.sleep(0.7)
    assert len(found) == 1
