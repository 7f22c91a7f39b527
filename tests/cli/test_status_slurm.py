"""`status` and `logs` of a run whose stages are Slurm jobs: from its folder alone, with or without Slurm at hand."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from posttrain.cli import logs, status
from posttrain.launch.job import CLAIM
from posttrain.pipeline import slurm_job
from posttrain.pipeline.activity import activity_of
from posttrain.pipeline.events import EventLog
from posttrain.pipeline.lock import Lock
from posttrain.pipeline.run_dir import FORMAT, RunDir


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run of two stages, of which nothing has been submitted yet; Slurm cannot be asked."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(slurm_job, "_answers", {})
    found = RunDir(tmp_path / "outputs" / "runs" / "r")
    stages = [{"name": name, "type": "toy", "key": name * 4, "artifact": f"store/toy/{name * 4}"} for name in "ab"]
    found.write_record({"format": FORMAT, "name": "r", "recipe": "toy", "stages": stages})
    return found


def say(run: RunDir, event: str, stage: str | None = None, **fields: object) -> None:
    EventLog(run.events_path).append(event, stage, **fields)


def submit(run: RunDir) -> None:
    say(run, "stage_submitted", "a", job="17", dependency="")
    say(run, "stage_submitted", "b", job="18", dependency="afterok:17")


def work(run: RunDir, stage: str) -> Lock:
    return Lock.acquire(run.outputs / "store" / "toy" / f".work-{stage * 4}" / CLAIM)


def row(run: RunDir, stage: str) -> list[str]:
    return next(line.split() for line in status.screen(run).splitlines() if line.startswith(f"{stage} "))


def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: dict[str, str]) -> None:
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    cases = "".join(f'*--jobs={job}*) echo "{answer}";; ' for job, answer in answers.items())
    unknown = '*) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1;;'
    (folder / "squeue").write_text(f'#!/bin/sh\ncase "$*" in {cases}{unknown} esac\n')
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    slurm_job._answers.clear()


def test_submitted_stages_are_queued_with_their_jobs(run: RunDir) -> None:
    submit(run)
    assert "r: toy, queued" in status.screen(run)
    assert row(run, "a")[1] == "queued" and row(run, "a")[-2:] == ["17", "-"]
    assert activity_of(run).alive


def test_a_started_stage_shows_its_machine_while_somebody_works_in_its_folder(run: RunDir) -> None:
    submit(run)
    say(run, "stage_started", "a", job="17", node="n4", attempt=1, pid=5)
    say(run, "progress", "a", done=3, total=10, unit="step", loss=2.5)
    with work(run, "a"):
        assert "r: toy, running" in status.screen(run)
        assert row(run, "a")[1] == "running" and row(run, "a")[-2:] == ["17", "n4"] and "2.5" in row(run, "a")
    assert row(run, "a")[1] == "interrupted"
    assert activity_of(run).alive, "b is still queued"


def test_a_requeued_stage_is_queued_again_and_keeps_its_time(run: RunDir) -> None:
    submit(run)
    say(run, "stage_started", "a", job="17", node="n4", attempt=1)
    time.sleep(0.05)
    say(run, "stage_stopped", "a", step=3, requeue=True)
    assert activity_of(run).state.stages["a"].status == "queued", "before Slurm has started it again"
    say(run, "stage_requeued", "a", job="17", restarts=1)
    state = activity_of(run).state.stages["a"]
    assert (state.status, state.job, state.node) == ("queued", "17", "") and state.seconds >= 0.05


def test_a_job_that_is_kept_goes_on_and_a_stage_that_another_run_made_is_there(run: RunDir) -> None:
    submit(run)
    say(run, "stage_started", "a", job="17", node="n4", attempt=1)
    say(run, "stage_submitted", "a", job="17", dependency="", kept=True)
    say(run, "stage_cached", "b", key="x")
    stages = activity_of(run).state.stages
    assert (stages["a"].status, stages["a"].node) == ("running", "n4") and stages["a"].started is not None
    assert stages["b"].status == "cached"
    say(run, "stage_submitted", "a", job="19", dependency="")
    assert activity_of(run).state.stages["a"].status == "queued", "another job is another attempt"


def test_a_cancelled_stage_says_why(run: RunDir) -> None:
    submit(run)
    say(run, "stage_started", "a", job="17", node="n4", attempt=1)
    say(run, "stage_failed", "a", message="stage a failed: no luck")
    say(run, "stage_cancelled", "b", message="stage a failed")
    say(run, "run_finished", status="failed", exit=1, message="")
    screen = status.screen(run)
    assert "r: toy, failed" in screen and "no luck" in screen
    assert "stage b was cancelled: stage a failed" in screen and "posttrain resume r" in screen


def test_slurm_says_why_a_job_waits(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submit(run)
    squeue(tmp_path, monkeypatch, {"17": "PENDING Priority", "18": "PENDING Dependency"})
    assert row(run, "a")[1:3] == ["queued", "(Priority)"] and row(run, "b")[2] == "(Dependency)"


def test_a_job_that_is_gone_is_not_waited_for(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submit(run)
    squeue(tmp_path, monkeypatch, {"17": "CANCELLED None"})
    assert not activity_of(run).alive
    screen = status.screen(run)
    assert "interrupted" in screen and screen.count("job is gone") == 2 and "posttrain resume r" in screen


def test_watch_prints_what_changes_until_the_end(run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(status, "REDRAW_SECONDS", 0.05)
    submit(run)

    def end() -> None:
        time.sleep(0.3)
        say(run, "stage_cancelled", "a", message="scancel")
        say(run, "stage_cancelled", "b", message="scancel")

    thread = threading.Thread(target=end)
    thread.start()
    status.watch_run(run)
    thread.join()
    shown = capsys.readouterr().out
    assert shown.count("r: toy, queued") == 1 and shown.count("cancelled: scancel") == 2


def test_follow_goes_on_with_later_attempts_and_stages(run: RunDir, capsys, monkeypatch) -> None:
    monkeypatch.setattr(logs, "ACTIVITY_SECONDS", 0.05)
    submit(run)
    first = run.log_path("a", 1)
    first.parent.mkdir(parents=True)
    first.write_text("one\n")

    def go_on() -> None:
        time.sleep(0.3)
        with first.open("a") as file:
            file.write("two\n")
        time.sleep(0.3)
        run.log_path("a", 2).write_text("three")
        time.sleep(0.3)
        run.log_folder("b").mkdir()
        run.log_path("b", 1).write_text("four")
        say(run, "stage_cancelled", "a", message="")
        say(run, "stage_cancelled", "b", message="")

    thread = threading.Thread(target=go_on)
    thread.start()
    logs.follow_log(run, first, lambda: logs.log_of(run, None, None))
    thread.join()
    assert [line for line in capsys.readouterr().out.splitlines() if line] == [
        "one",
        "two",
        "==> a, attempt 2 <==",
        "three",
        "==> b, attempt 1 <==",
        "four",
    ]
