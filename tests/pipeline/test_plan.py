from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy_stages
from toy_stages import ToyEvaluateConfig, ToyTrainConfig, toy_recipe

from posttrain.errors import RecipeError
from posttrain.pipeline import device as device_module
from posttrain.pipeline import guard as guard_module
from posttrain.pipeline.events import EventLog
from posttrain.pipeline.execution import make_record
from posttrain.pipeline.guard import guard
from posttrain.pipeline.lock import Lock
from posttrain.pipeline.plan import RUNTIME_BYTES, make_plan
from posttrain.pipeline.plan_text import big_number, duration, render, size
from posttrain.pipeline.stage import Estimate


def remember(plan):
    """Write the run folder that a run of that plan would leave."""
    plan.run_dir.write_record(make_record(plan, created=1.0))
    EventLog(plan.run_dir.events_path).append("run_started")


def reasons(plan):
    return {planned.name: "; ".join(planned.reasons) for planned in plan.stages}


def test_a_first_plan_has_everything_new_and_writes_nothing(tmp_path):
    plan = make_plan(toy_recipe())
    assert reasons(plan) == {"data": "new", "train": "new", "evaluate": "new"}
    assert [planned.status for planned in plan.stages] == ["pending"] * 3
    assert plan["train"].estimate.data_tokens == 40
    assert list(tmp_path.iterdir()) == []


def test_reasons_after_a_change(tmp_path):
    remember(make_plan(toy_recipe()))
    changed = reasons(make_plan(toy_recipe(lr=2e-5)))
    assert changed == {"data": "not finished", "train": "lr 1e-05 → 2e-05", "evaluate": "parent train changed"}
    changed = reasons(make_plan(toy_recipe(frame={"seed": 3})))
    assert changed["train"] == "seed 0 → 3; parent data changed"
    changed = reasons(make_plan(toy_recipe(extra={"more": ToyTrainConfig(inputs={"data": "data.train"})})))
    assert changed["more"] == "new"


def test_reasons_come_from_the_most_recent_run_of_the_same_recipe(tmp_path):
    import os

    for index, lr in enumerate((1e-5, 3e-5)):
        plan = make_plan(toy_recipe(lr=lr))
        remember(plan)
        os.utime(plan.run_dir.events_path, (index + 1, index + 1))
    remember(make_plan(toy_recipe(lr=7e-5, recipe="another")))
    assert reasons(make_plan(toy_recipe(lr=4e-5)))["train"] == "lr 3e-05 → 4e-05"


def test_an_unreadable_run_is_passed_over(tmp_path):
    plan = make_plan(toy_recipe())
    remember(plan)
    plan.run_dir.record_path.write_text("{")
    assert reasons(make_plan(toy_recipe()))["train"] == "new"


def test_tracker_launcher_name_paths_and_engine_do_not_change_keys():
    plain = make_plan(toy_recipe())
    frame = {"run": {"name": "other", "limit_hours": 3}, "tracker": {"name": "wandb"}, "engine": {"device": "cuda"}}
    other = make_plan(toy_recipe("elsewhere", frame=frame | {"paths": {"outputs": "elsewhere"}}))
    assert [planned.key for planned in plain.stages] == [planned.key for planned in other.stages]


def test_the_default_run_name_follows_content_only():
    name = make_plan(toy_recipe()).run_name
    assert name.startswith("toy-") and len(name) == len("toy-") + 8
    assert make_plan(toy_recipe("elsewhere", frame={"tracker": {"name": "wandb"}})).run_name == name
    assert make_plan(toy_recipe(lr=1.0)).run_name != name
    assert make_plan(toy_recipe(frame={"run": {"name": "mine"}})).run_name == "mine"
    assert make_plan(toy_recipe(), name="typed").run_name == "typed"


def test_all_checks_are_reported_at_once():
    recipe = toy_recipe(
        lr=-1.0, extra={"more": ToyTrainConfig(lr=-2.0, inputs={"data": "data.train", "before": "train.history"})}
    )
    with pytest.raises(RecipeError) as caught:
        make_plan(recipe)
    assert [problem.where for problem in caught.value.problems] == ["stages.train", "stages.more"]


def test_a_source_without_a_key_is_one_error_and_the_rest_is_still_checked():
    extra = {"other": ToyEvaluateConfig(inputs={"history": "train.history", "data": "data.train"})}
    with pytest.raises(RecipeError) as caught:
        make_plan(toy_recipe(source={"outside": "missing"}, extra=extra))
    assert [problem.where for problem in caught.value.problems] == ["data"]


def test_a_stage_in_work_is_running_and_an_abandoned_one_continues():
    planned = make_plan(toy_recipe())["train"]
    work_dir = make_plan(toy_recipe()).store.work_dir("toy_train", planned.key)
    with Lock.acquire(work_dir / "lock"):
        assert make_plan(toy_recipe())["train"].status == "running"
    again = make_plan(toy_recipe())["train"]
    assert again.status == "pending" and again.reasons[-1] == "continues where it stopped"
    assert make_plan(toy_recipe(), force=["train"])["train"].resumes is False


def test_force_and_selection_names_are_checked():
    for flags in ({"force": ["trian"]}, {"from_": "trian"}, {"only": "data", "force": ["train"]}):
        with pytest.raises(RecipeError):
            make_plan(toy_recipe(), **flags)


def test_guard_stops_a_run_over_its_data_and_names_the_smaller_scales():
    frame = {"scales": {"smoke": ["a=1"], "demo": ["a=1"]}}
    guard(make_plan(toy_recipe(steps=40, frame=frame)))
    with pytest.raises(RecipeError) as caught:
        guard(make_plan(toy_recipe(steps=41, frame=frame)))
    (problem,) = caught.value.problems
    assert "410 tokens" in problem.what and "has 40" in problem.what
    assert "scale=demo or scale=smoke" in problem.fix and "--yes" in problem.fix
    with pytest.raises(RecipeError, match="--yes"):
        guard(make_plan(toy_recipe(steps=41)))


@pytest.mark.parametrize("remedy", ["lower the stage's settings, or --yes", "choose a smaller size, or --yes"])
def test_guard_says_for_how_many_steps_the_data_lasts(remedy):
    cfg, estimate = SimpleNamespace(max_steps=50), Estimate(trainable=1, tokens=1000, data_tokens=41)
    problem = guard_module._tokens(SimpleNamespace(name="train", cfg=cfg, estimate=estimate), remedy)
    assert problem.fix.startswith("lower stages.train.max_steps to 20, ") and problem.fix.endswith("--yes")
    within = replace(estimate, tokens=20 * 20)
    assert guard_module._tokens(SimpleNamespace(name="train", cfg=cfg, estimate=within), remedy) is None


def test_guard_offers_no_scale_that_is_as_large():
    frame = {"scales": {"smoke": ["a=1"], "demo": ["a=1"], "gpu1": ["a=1"]}}
    fixes = {}
    for scale in ("demo", "smoke"):
        with pytest.raises(RecipeError) as caught:
            guard(make_plan(replace(toy_recipe(steps=41, frame=frame), scale=scale)))
        fixes[scale] = caught.value.problems[0].fix
    assert "(scale=smoke), lower" in fixes["demo"]
    assert "scale" not in fixes["smoke"] and "lower the stage's settings" in fixes["smoke"]


def test_guard_looks_at_what_is_to_do_only():
    guard(make_plan(toy_recipe(steps=41), until="data"))


def test_guard_compares_memory_by_terms_with_the_machine(monkeypatch):
    monkeypatch.setattr(guard_module, "host_memory", lambda: 10**9)
    room = 10**9 - RUNTIME_BYTES
    assert guard(make_plan(toy_recipe(memory=room))) == []
    with pytest.raises(RecipeError, match="weights .*optimizer.*runtime.*this machine has 1.0 GB"):
        guard(make_plan(toy_recipe(memory=room + 2)))


@pytest.mark.parametrize(
    ("device", "gpu", "there"), [("cpu", 1, 1), ("auto", None, 1), ("auto", 1, 0), ("cuda", None, 0)]
)
def test_the_process_itself_counts_on_the_host_only(monkeypatch, device, gpu, there):
    monkeypatch.setattr(device_module, "gpu_memory", lambda: gpu)
    frame = {"engine": {"device": device}}
    memory = make_plan(toy_recipe(memory=10, frame=frame))["train"].estimate.memory
    assert memory == {"weights": 5, "optimizer": 5, **({"runtime": RUNTIME_BYTES} if there else {})}
    assert make_plan(toy_recipe(frame=frame))["train"].estimate.memory == {}, "what is unknown stays unknown"


def test_guard_says_what_it_does_not_know(monkeypatch):
    assert any("peak memory is unknown" in line for line in guard(make_plan(toy_recipe())))
    monkeypatch.setattr(guard_module, "gpu_memory", lambda: None)
    unknown = guard(make_plan(toy_recipe(memory=10**15, frame={"engine": {"device": "cuda"}})))
    assert any("no nvidia-smi" in line for line in unknown)


def test_guard_uses_the_gpus_memory_when_there_is_one(monkeypatch):
    monkeypatch.setattr(guard_module, "gpu_memory", lambda: 2 * 10**15)
    guard(make_plan(toy_recipe(memory=10**15, frame={"engine": {"device": "auto"}})))
    with pytest.raises(RecipeError, match="this machine"):
        guard(make_plan(toy_recipe(memory=10**15)))


def test_guard_stops_when_the_disk_is_too_small(monkeypatch):
    monkeypatch.setattr(guard_module, "free_disk", lambda folder: 399)
    with pytest.raises(RecipeError, match="400 ?B on disk"):
        guard(make_plan(toy_recipe()))


def test_the_text_has_every_stage_its_terms_and_its_reasons():
    text = render(make_plan(toy_recipe(memory=3_000_000)), ["something"])
    lines = text.splitlines()
    header = next(line for line in lines if line.startswith("stage"))
    row = next(line for line in lines if line.startswith("train"))
    assert row.index("new") == header.index("why")
    assert "cache/token (bf16)" in header
    assert "weights 1.5 MB + optimizer 1.5 MB" in text and "something" in text and "3 of 3 stages" in text


def test_the_plan_as_json_is_json():
    plan = make_plan(toy_recipe())
    data = json.loads(json.dumps(plan.to_json()))
    assert [stage["name"] for stage in data["stages"]] == ["data", "train", "evaluate"]
    assert data["stages"][1]["inputs"]["data"]["key"] == data["stages"][0]["key"]


def test_numbers_for_readers():
    assert [big_number(n) for n in (None, 0, 999, 134_515_008, 2.5e12)] == ["-", "0", "999", "134.5M", "2.5T"]
    assert [size(n) for n in (None, 12, 1_500_000)] == ["-", "12 B", "1.5 MB"]
    assert [duration(n) for n in (None, 5, 200, 7500)] == ["-", "5s", "3m20s", "2h05m"]


def test_a_new_stage_version_is_a_reason(monkeypatch):
    remember(make_plan(toy_recipe()))
    monkeypatch.setattr(toy_stages.ToyTrain, "version", "2")
    assert reasons(make_plan(toy_recipe()))["train"] == "stage code version 1 → 2"


@pytest.mark.parametrize("name", ["../../x", "", ".hidden", "a/b", "a b"])
def test_a_runs_name_is_a_plain_folder_name(name):
    with pytest.raises(RecipeError, match="cannot be the name"):
        make_plan(toy_recipe(), name=name)
    assert make_plan(toy_recipe(), name="mine-2.1").run_name == "mine-2.1"


def test_the_seed_counts_only_where_it_is_used(monkeypatch):
    monkeypatch.setattr(toy_stages.ToySource, "uses_seed", lambda self, cfg: False)
    first = make_plan(toy_recipe())
    remember(first)
    second = make_plan(toy_recipe(frame={"seed": 3}))
    assert first["data"].key == second["data"].key and first["train"].key != second["train"].key
    assert reasons(second)["train"] == "seed 0 → 3"


def test_guard_refuses_a_folder_that_takes_no_files():
    with pytest.raises(RecipeError, match="results cannot be written to /proc/x: /proc takes no files") as caught:
        guard(make_plan(toy_recipe(), outputs=Path("/proc/x")))
    assert "paths.outputs=FOLDER" in caught.value.problems[0].fix
