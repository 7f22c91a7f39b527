from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import toy_stages
from toy_stages import toy_recipe

from posttrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, Problem, StageError
from posttrain.launch import execute, worker
from posttrain.launch.execute import check_result, execute_job
from posttrain.launch.job import Job, read_outcome
from posttrain.pipeline.events import read_events
from posttrain.pipeline.execution import Execution
from posttrain.pipeline.plan import make_plan
from posttrain.pipeline.stage import ArtifactMeta
from posttrain.pipeline.stage_runner import Quiet
from posttrain.pipeline.store import CODE_DIFF, verify


def job_of(plan, name, finished):
    """The job the runner would hand out, and its work folder."""
    execution = Execution(plan, plan.run_dir, Quiet())
    execution.finished = finished
    planned = plan[name]
    work_dir = plan.store.work_dir(planned.stage.type, planned.key)
    job = execution._job(planned)
    job.write(work_dir)
    return job, work_dir


def train_job(**settings):
    plan = make_plan(toy_recipe(**settings))
    source = execute_job(*job_of(plan, "data", {}))
    return job_of(plan, "train", {"data": source})


def test_a_job_becomes_an_artifact_with_a_full_manifest():
    artifact = execute_job(*train_job())
    manifest = artifact.manifest
    assert verify(artifact.folder) == []
    assert manifest["metrics"]["result"] == {"loss": pytest.approx(0.2 + 1e-5)}
    assert manifest["inputs"]["data"]["output"] == "train" and manifest["estimate"]["tokens"] == 50
    assert manifest["engine"]["device"] == "cpu" and "torch" in manifest["versions"]
    assert {"git", "host", "started", "finished", "seconds", "attempts", "config", "seed"} <= manifest.keys()


def test_the_tracker_reaches_the_stage_and_not_the_key():
    wandb = {"name": "wandb", "project": "p", "mode": "offline"}
    contexts, keys = {}, set()
    for name, tracker in (("none", {}), ("wandb", wandb)):
        plan = make_plan(toy_recipe(frame={"tracker": tracker}))
        job, work_dir = job_of(plan, "data", {})
        keys.add(job.key)
        contexts[name] = execute.make_context(Job.read(work_dir), work_dir, "cpu")
    assert contexts["none"].tracker is None
    assert contexts["wandb"].tracker == {**wandb, "dir": str(plan.run_dir.path)}
    assert len(keys) == 1


def test_a_tracked_job_tells_the_trainer(monkeypatch):
    from posttrain.training.arguments import training_arguments
    from posttrain.training.config import TrainingConfig

    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    monkeypatch.setattr(os, "environ", {**environment, "WANDB_MODE": "offline"})
    for tracker, expected in (("none", []), ("wandb", ["wandb"])):
        plan = make_plan(toy_recipe(frame={"tracker": {"name": tracker}}))
        context = execute.make_context(*job_of(plan, "data", {})[:1], Path("work"), "cpu")
        assert training_arguments(context, TrainingConfig(type="train", max_steps=2), 1, 1).report_to == expected
    assert os.environ["WANDB_DIR"] == str(plan.run_dir.path)


def test_leftovers_of_a_killed_attempt_do_not_reach_the_artifact():
    job, work_dir = train_job()
    half = work_dir / "outputs" / ".history-x1"
    half.mkdir(parents=True)
    (half / "history.jsonl").write_text("{")
    (work_dir / "outputs" / "history").mkdir()
    (work_dir / "outputs" / "history" / ".history.jsonl.17.aside").write_text("{")
    artifact = execute_job(job, work_dir)
    names = {path.name for path in artifact.folder.rglob("*")} - {CODE_DIFF}
    assert names == {"history", "history.jsonl", "manifest.json"}


def test_what_a_stage_reports_is_said_in_the_recipes_words(monkeypatch):
    job, work_dir = train_job()

    def refuse(self, ctx):
        raise StageError("too fast", "lr", "write lr=1e-6")

    monkeypatch.setattr(toy_stages.ToyTrain, "run", refuse)
    with pytest.raises(StageError) as caught:
        execute_job(job, work_dir)
    assert caught.value.problems == [Problem("too fast", "stages.train.lr", "write stages.train.lr=1e-6")]


def test_a_job_survives_its_file():
    job, work_dir = train_job()
    assert Job.read(work_dir) == job
    (work_dir / "job.json").write_text('{"format": 1}')
    with pytest.raises(StageError):
        Job.read(work_dir)


def test_progress_and_metrics_become_events_of_the_run():
    job, work_dir = train_job(steps=3)
    execute_job(job, work_dir)
    events = [event for event in read_events(Path(job.events)) if event["stage"] == "train"]
    assert [event["step"] for event in events if event["event"] == "metrics"] == [1, 2, 3]
    assert [event for event in events if event["event"] == "progress"][-1]["done"] == 3


def test_stop_then_resume_ends_as_if_nothing_had_happened(monkeypatch):
    undisturbed = execute_job(*train_job(steps=6))
    expected = (undisturbed.output("history") / "history.jsonl").read_bytes()
    Path("outputs").rename("undisturbed")
    job, work_dir = train_job(steps=6)
    real = execute.StageContext.log_metrics

    def stop_at_two(self, step, **values):
        real(self, step, **values)
        if step == 2:
            (self.work_dir / "STOP").touch()

    monkeypatch.setattr(execute.StageContext, "log_metrics", stop_at_two)
    assert worker.run_job(job, work_dir) == EXIT_STOPPED
    assert read_outcome(work_dir) == {"status": "stopped", "step": 2}
    (work_dir / "STOP").unlink()
    monkeypatch.setattr(execute.StageContext, "log_metrics", real)
    assert worker.run_job(job, work_dir) == EXIT_DONE
    resumed = Path(job.target)
    assert (resumed / "history" / "history.jsonl").read_bytes() == expected
    assert (
        json.loads((resumed / "manifest.json").read_text())["metrics"]["result"]
        == undisturbed.manifest["metrics"]["result"]
    )


@pytest.mark.parametrize(
    ("fail", "known", "said"),
    [("known", True, "do: lower lr"), ("unknown", False, "ZeroDivisionError: a bug"), ("nan", True, "loss = nan")],
)
def test_failures_are_recorded_with_their_message(fail, known, said):
    job, work_dir = train_job(fail=fail)
    assert worker.run_job(job, work_dir) == EXIT_FAILED
    outcome = read_outcome(work_dir)
    assert outcome["status"] == "failed" and outcome["known"] is known and said in outcome["message"]
    assert not Path(job.target).exists()


def test_results_must_be_numbers_at_any_depth():
    check_result("train", {"a": 1.0, "b": [1, {"c": 2.0}], "d": "nan", "e": None})
    with pytest.raises(StageError, match=r"b\[1\].c = inf"):
        check_result("train", {"b": [1, {"c": float("inf")}]})


def test_a_model_unlike_the_planned_one_is_refused():
    planned = ArtifactMeta("model", architecture={"hidden_size": 64, "kv_lora_rank": 8, "rope": 1})
    fitting = ArtifactMeta("model", architecture={"hidden_size": 64})
    execute._check_prediction("upcycle", "model", planned, fitting, "another plan")
    found = ArtifactMeta("model", architecture={"hidden_size": 64, "kv_lora_rank": 16, "rope": 2})
    with pytest.raises(StageError, match="kv_lora_rank 8 → 16"):
        execute._check_prediction("upcycle", "model", planned, found, "another plan")


def test_a_crash_between_sealing_and_publishing_only_publishes(monkeypatch):
    job, work_dir = train_job()
    monkeypatch.setattr(execute, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        execute_job(job, work_dir)
    monkeypatch.undo()
    monkeypatch.setattr(execute.registry, "stage", lambda name: pytest.fail("the stage ran again"))
    assert verify(execute_job(job, work_dir).folder) == []


def test_cuda_that_is_not_there_is_an_error_with_advice():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(StageError, match="engine=cpu"):
        execute.prepare_process(0, "cuda")
    assert execute.prepare_process(0, "auto") == "cpu"


def test_the_seed_reaches_every_generator():
    import random

    import numpy
    import torch

    def draw():
        execute.prepare_process(7, "cpu")
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    assert draw() == draw()


def test_an_input_that_changes_under_the_run_is_not_published(monkeypatch):
    plan = make_plan(toy_recipe())
    job, work_dir = job_of(plan, "data", {})
    real = toy_stages.ToySource.run

    def run(self, ctx):
        folders = real(self, ctx)
        Path("outside.txt").write_text("new")
        (ctx.work_dir / "partial.jsonl").write_text("{}")
        return folders

    monkeypatch.setattr(toy_stages.ToySource, "run", run)
    with pytest.raises(StageError, match="an input changed while the run was going on") as caught:
        execute_job(job, work_dir)
    assert "file added (new)" in caught.value.problems[0].where and "run again" in caught.value.problems[0].fix
    assert not Path(job.target).exists()
    assert [path.name for path in work_dir.iterdir()] == ["job.json"], "what came of the other content is gone"


def test_an_input_that_changed_before_the_worker_came_is_noticed_at_once(monkeypatch):
    job, work_dir = job_of(make_plan(toy_recipe()), "data", {})
    Path("outside.txt").write_text("new")
    monkeypatch.setattr(toy_stages.ToySource, "run", lambda self, ctx: pytest.fail("it ran"))
    with pytest.raises(StageError, match="an input changed"):
        execute_job(job, work_dir)
