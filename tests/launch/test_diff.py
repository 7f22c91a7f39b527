"""`posttrain diff`: what differs between two runs of toy stages, and which change came first."""

from __future__ import annotations

import json
from pathlib import Path

from test_run import run

from posttrain.cli import diff as command
from posttrain.pipeline.diff import ONLY_FIRST, ONLY_SECOND, OWN, PARENT, SAME, compare_runs
from posttrain.pipeline.files import write_json
from posttrain.pipeline.run_dir import RunDir
from posttrain.pipeline.store import manifest_digest


def two(first: dict | None = None, second: dict | None = None):
    runs = [
        run(**{**settings, "frame": {**settings.get("frame", {}), "run": {"name": name}}}).run_dir
        for name, settings in (("one", first or {}), ("two", second or {}))
    ]
    return compare_runs(*runs)


def statuses(diff) -> dict[str, str]:
    return {stage.name: stage.status for stage in diff.stages}


def test_the_same_run_twice():
    found = two()
    assert set(statuses(found).values()) == {SAME} and found.cause is None
    assert [stage.files for stage in found.stages] == [False, False, False]
    assert command.lines_of(found)[-1] == "all keys are equal: the runs compute the same"


def test_a_changed_setting_is_the_cause_and_what_comes_after_is_not():
    found = two({"lr": 1e-5}, {"lr": 2e-5})
    assert statuses(found) == {"data": SAME, "train": OWN, "evaluate": PARENT}
    assert found.cause.name == "train" and found.cause.changes[0].startswith("lr 1e-05 → 2e-05")
    assert found.stages[2].parents == ["train"]
    first, second = found.cause.metrics["loss"]
    assert abs(second - first - 1e-5) < 1e-9
    text = "\n".join(command.lines_of(found))
    assert "first change: train: lr 1e-05 → 2e-05" in text and "evaluate: parent changed (train)" in text


def test_the_change_that_came_first_in_the_graph_is_named():
    found = two({"lr": 1e-5}, {"lr": 2e-5, "source": {"rows": 5}})
    assert statuses(found) == {"data": OWN, "train": OWN, "evaluate": PARENT}
    assert found.cause.name == "data" and found.cause.changes == ["rows 4 → 5"]
    assert found.stages[1].parents == ["data"]


def test_stages_that_only_one_has_and_runs_that_are_not_done():
    from toy_stages import ToyTrainConfig

    more = {"more": ToyTrainConfig(inputs={"data": "data.train"})}
    found = two({"extra": more}, {"fail": "known"})
    assert statuses(found) == {"data": SAME, "train": SAME, "evaluate": SAME, "more": ONLY_FIRST}
    assert statuses(compare_runs(RunDir(Path("outputs/runs/two")), RunDir(Path("outputs/runs/one"))))["more"] == (
        ONLY_SECOND
    )


def test_equal_keys_that_came_out_differently_are_told(monkeypatch, tmp_path):
    one = run().run_dir
    two_ = run(noise=0.5, frame={"paths": {"outputs": "elsewhere"}}).run_dir
    found = compare_runs(one, two_)
    assert set(statuses(found).values()) == {SAME}
    assert {stage.name: stage.files for stage in found.stages} == {"data": False, "train": True, "evaluate": False}
    lines = command.lines_of(found)
    assert "train: same, but its files differ" in lines
    assert any("the first files that differ are those of train" in line for line in lines)


def test_what_was_typed_is_shown_and_so_is_the_machine(capsys):
    found = two({"lr": 1e-5}, {"lr": 2e-5})
    assert found.cause is not None
    folder = Path("outputs/runs/two")
    record = json.loads((folder / "run.json").read_text())
    record["overrides"] = ["seed=3", "stages.train.lr=2e-5"]
    write_json(folder / "run.json", record)
    artifact = RunDir(folder).artifact("train").folder / "manifest.json"
    manifest = json.loads(artifact.read_text())
    manifest["versions"]["torch"] = "9.9"
    manifest["sha256"] = manifest_digest(manifest)
    write_json(artifact, manifest)
    command.command("one", "two", outputs=Path("outputs"), json_=False)
    shown = capsys.readouterr().out
    assert "lr 1e-05 → 2e-05  (second: stages.train.lr=2e-5)" in shown and "→ 9.9" in shown
    command.command("one", "two", outputs=Path("outputs"), json_=True)
    data = json.loads(capsys.readouterr().out)
    assert data["cause"] == "train" and data["stages"][1]["status"] == OWN
