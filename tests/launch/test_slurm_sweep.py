"""Submitted sweeps: one job for what points share, arrays for what they do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from submitted_runs import recipe

from posttrain.cli import cancel
from posttrain.errors import EXIT_INTERRUPTED, EXIT_STOPPED, RecipeError, StageError
from posttrain.launch.slurm.follow import follow, request
from posttrain.launch.slurm.ledger import read_ledger
from posttrain.launch.slurm.sweep import count_of, submit_sweep
from posttrain.pipeline.plan import make_plan
from posttrain.pipeline.stage_runner import Quiet
from posttrain.pipeline.sweep import new_record, save_record


def points(*rates, **launcher):
    found = []
    for number, rate in enumerate(rates, 1):
        frame = {"launcher": {"name": "slurm", "type": "slurm", **launcher}, "run": {"name": f"point-{number}"}}
        found.append(make_plan(recipe(frame=frame, lr=rate)))
    return found


def send(plans):
    return submit_sweep(plans, Path("outputs/sweeps/many").absolute(), Quiet())


def test_shared_stages_once_and_the_others_as_arrays(slurm: FakeSlurm):
    jobs = send(points(0.1, 0.2, 0.3))
    first, second, third = slurm.named("sbatch")
    assert first[-1].endswith("runs/point-1/slurm/source.sh")
    assert "--dependency=afterok:101" in second and second[-1].endswith("sweeps/many/slurm/train.sh")
    assert "--dependency=aftercorr:102,afterok:101" in third
    assert [one["source"] for one in jobs] == ["101"] * 3
    assert [one["train"] for one in jobs] == ["102_0", "102_1", "102_2"]
    assert count_of(jobs) == 7
    text = Path("outputs/sweeps/many/slurm/train.sh").read_text()
    assert "#SBATCH --array=0-2" in text and "train-%A_%a.out" in text
    assert "job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" in text
    runs = next(Path("outputs/sweeps/many/slurm").glob("train-*.runs")).read_text().split()
    assert [Path(run).name for run in runs] == ["point-1", "point-2", "point-3"]


def test_a_shared_stage_is_every_runs_and_a_runs_own_are_its_own(slurm, job, monkeypatch, reports):
    plans = points(0.1, 0.2)
    send(plans)
    assert job(plans[0], "source") == 0
    for plan in plans:
        assert read_ledger(plan.run_dir).entries["source"].status == "done"
    for number, plan in enumerate(plans):
        for array, stage in (("102", "train"), ("103", "evaluate")):
            monkeypatch.setenv("SLURM_ARRAY_JOB_ID", array)
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
            assert job(plan, stage) == 0
        assert plan.run_dir.events()[-1]["status"] == "done"
    assert len(reports) == 2
    computed = [e["stage"] for p in plans for e in p.run_dir.events() if e["event"] == "stage_finished"]
    assert sorted(computed) == ["evaluate", "evaluate", "source", "train", "train"]


def test_a_shared_stage_that_fails_ends_all_runs(slurm, job):
    plans = points(0.1, 0.2)
    send(plans)
    Path("outside.txt").write_text("changed")
    assert job(plans[0], "source") == 1
    for plan in plans:
        assert plan.run_dir.events()[-1]["status"] == "failed"
        cancelled = [e["stage"] for e in plan.run_dir.events() if e["event"] == "stage_cancelled"]
        assert set(cancelled) >= {"train", "evaluate"}
    assert {"102_0", "102_1", "103_0", "103_1"} <= {word for call in slurm.named("scancel") for word in call}


def test_points_that_want_other_resources_have_jobs_of_their_own(slurm):
    plans = [*points(0.1), *points(9, 0.2, mem="5G")[1:]]
    send(plans)
    scripts = [call[-1] for call in slurm.named("sbatch")]
    assert all("/runs/point-" in script for script in scripts) and len(scripts) == 5


def test_what_one_point_has_in_the_queue_others_take_too(slurm):
    plans = points(0.1, 0.2)
    send(plans)
    for task in ("102_0", "102_1", "103_0", "103_1"):
        slurm.set(task, "CANCELLED")
    again = send(points(0.1, 0.2))
    assert [one["source"] for one in again] == ["101", "101"]
    assert "--dependency=afterok:101" in slurm.named("sbatch")[3]


def test_a_point_that_is_done_already_ends_at_once(slurm, job, reports):
    plans = points(0.1)
    send(plans)
    for stage in ("source", "train", "evaluate"):
        assert job(plans[0], stage) == 0
    first, second = points(0.1, 0.2)
    jobs = send([first, second])
    assert jobs[0] == {} and set(jobs[1]) == {"train", "evaluate"}
    assert first.run_dir.events()[-1]["status"] == "done" and second.run_dir.events()[-1]["event"] != "run_finished"


def test_a_refused_array_ends_the_sweep(slurm):
    slurm.refuse("sbatch", after=1)
    plans = points(0.1, 0.2)
    with pytest.raises(StageError, match="submitted before it are cancelled"):
        send(plans)
    assert slurm.state("101") == "CANCELLED"
    assert all(plan.run_dir.events()[-1]["event"] == "run_finished" for plan in plans)


def test_a_later_submission_leaves_the_lists_of_living_arrays_alone(slurm, job):
    """The same first point, fewer points: by stage and first point alone, both lists would have one name."""
    plans = points(0.1, 0.2, 0.3)
    send(plans)
    assert job(plans[0], "source") == 0
    (first,) = Path("outputs/sweeps/many/slurm").glob("train-*.runs")
    before = first.read_text()
    for task in ("102_0", "102_1", "103_0", "103_1"):
        slurm.set(task, "CANCELLED")
    slurm.set("102_2", "RUNNING")
    again = send(points(0.1, 0.2, 0.3))
    assert [one["train"] for one in again] == ["104_0", "104_1", "102_2"]
    assert first.read_text() == before
    (second,) = set(Path("outputs/sweeps/many/slurm").glob("train-*.runs")) - {first}
    assert [Path(run).name for run in second.read_text().split()] == ["point-1", "point-2"]


def test_points_wait_for_their_own_parents_alone(slurm):
    """Two rates, two seeds of what comes after: one rate that fails must not take the other's points with it."""
    plans = []
    for number, (rate, sample) in enumerate([(0.1, 1), (0.1, 2), (0.2, 1), (0.2, 2)], 1):
        frame = {"launcher": {"name": "slurm", "type": "slurm"}, "run": {"name": f"grid-{number}"}}
        resolved = recipe(frame=frame, lr=rate)
        evaluate = resolved.stages["evaluate"].model_copy(update={"seed_of_sample": sample})
        plans.append(make_plan(replace(resolved, stages={**resolved.stages, "evaluate": evaluate})))
    jobs = send(plans)
    assert len({one["train"] for one in jobs}) == 2
    dependencies = [
        word for call in slurm.named("sbatch") if "evaluate" in call[-1] for word in call if "--dependency" in word
    ]
    assert sorted(dependencies) == [
        f"--dependency=afterok:{train},afterok:101" for train in sorted({one["train"] for one in jobs})
    ]


def test_a_point_that_cannot_be_submitted_leaves_the_others_as_they_are(slurm):
    """The first points would otherwise have begun anew, with nothing submitted for them."""
    plans = points(0.1, 0.2)
    jobs = send(plans)
    second = plans[1].run_dir
    second.events_path.write_text(second.events_path.read_text().replace(plans[1]["train"].key, "0" * 32))
    slurm.set("101", "COMPLETED")
    slurm.set(jobs[1]["train"], "RUNNING")
    before = [plan.run_dir.events() for plan in plans]
    with pytest.raises(RecipeError, match="at work on stage train"):
        send(points(0.1, 0.2))
    assert [plan.run_dir.events() for plan in plans] == before
    assert not slurm.named("scancel")


@pytest.mark.parametrize("now", [False, True])
def test_a_shared_job_that_is_cancelled_ends_the_points_that_wait_for_it(slurm, now):
    plans = points(0.1, 0.2)
    send(plans)
    request(plans[0].run_dir, now=now)
    assert slurm.state("101") == "CANCELLED"
    end = plans[1].run_dir.events()[-1]
    assert end["event"] == "run_finished"
    (source,) = [e for e in plans[1].run_dir.events() if e["event"] == "stage_cancelled" and e["stage"] == "source"]
    assert "point-1" in source["message"]


def recorded(plans):
    """The sweep's record, as the command writes it."""
    folder = Path("outputs/sweeps/many").absolute()
    record = new_record(folder, "toy", [], [{} for _ in plans])
    for entry, plan in zip(record["points"], plans, strict=True):
        entry["run"] = plan.run_name
    save_record(folder, record)


def test_cancelling_a_sweep_stops_all_points(slurm, capsys):
    plans = points(0.1, 0.2, 0.3)
    send(plans)
    recorded(plans)
    cancel.command("many", now=False, outputs=Path("outputs"))
    assert {slurm.state(job) for job in ("101", "102_0", "102_1", "102_2", "103_2")} == {"CANCELLED"}
    ends = [plan.run_dir.events()[-1] for plan in plans]
    assert [(end["event"], end["status"]) for end in ends] == [("run_finished", "stopped")] * 3
    said = capsys.readouterr().out
    assert all(f"posttrain resume point-{number}" in said for number in (1, 2, 3))
    cancel.command("many", now=False, outputs=Path("outputs"))
    assert "no submitted point left" in capsys.readouterr().out


class _Presses:
    """Stands for the keyboard: Ctrl-C has been pressed once when it is looked at."""

    looks = 0

    @property
    def count(self):
        self.looks += 1
        assert self.looks < 40, "the follower does not come to an end"
        return 1

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


def test_ctrl_c_stops_the_points_beside_the_one_that_is_followed(slurm, monkeypatch):
    monkeypatch.setattr("posttrain.launch.slurm.follow.Interrupts", _Presses)
    plans = points(0.1, 0.2)
    send(plans)
    assert follow(plans[0].run_dir, Quiet(), [plans[1].run_dir]).exit_code == EXIT_STOPPED
    assert {slurm.state(job) for job in ("101", "102_1", "103_1")} == {"CANCELLED"}
    assert read_ledger(plans[1].run_dir).finished == "stopped", "before anybody follows it"


def test_one_ctrl_c_leaves_a_run_that_is_stopping_already(slurm, monkeypatch):
    monkeypatch.setattr("posttrain.launch.slurm.follow.Interrupts", _Presses)
    plans = points(0.1, 0.2)
    send(plans)
    slurm.set("101", "RUNNING")
    request(*(plan.run_dir for plan in plans))
    result = follow(plans[0].run_dir, Quiet())
    assert result.exit_code == EXIT_INTERRUPTED and "left run point-1 as it is" in result.message
    assert slurm.state("101") == "RUNNING"
