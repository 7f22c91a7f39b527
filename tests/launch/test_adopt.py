"""`posttrain adopt`: a hand-made artifact in a stage's place, checked like one that was computed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy
import pytest
from source_models import make_source
from test_run import Recorder, run
from toy_stages import toy_recipe

from posttrain.config import load_recipe
from posttrain.errors import EXIT_DONE, EXIT_FAILED, RecipeError, StageError
from posttrain.launch.adopt import adopt
from posttrain.models.finite import first_non_finite
from posttrain.models.tiny import tiny_tokenizer
from posttrain.pipeline.lock import Lock
from posttrain.pipeline.plan import make_plan
from posttrain.pipeline.store import verify


def hand_made(text: str = '{"step": 1, "loss": 0.25}\n') -> Path:
    folder = Path("hand")
    folder.mkdir(exist_ok=True)
    (folder / "history.jsonl").write_text(text)
    return folder


def plan(**settings):
    return make_plan(toy_recipe(**settings))


def test_an_adopted_artifact_takes_the_stages_place():
    run(selection={"until": "data"})
    artifact = adopt(plan(), "train", hand_made())
    assert verify(artifact.folder) == []
    adopted = artifact.manifest["adopted"]
    assert adopted["from"] == str(Path("hand").resolve()) and adopted["made_up"] == []
    planned = plan()["train"]
    assert planned.status == "cached" and planned.reasons == [f"adopted from {Path('hand').resolve()}"]
    result = run()
    assert result.exit_code == EXIT_DONE
    started = [event["stage"] for event in result.run_dir.events() if event["event"] == "stage_started"]
    assert started == ["data", "evaluate"], "train was not run"
    metrics = json.loads((result.run_dir.artifact("evaluate").folder / "evaluation" / "metrics.json").read_text())
    assert metrics == {"rows": 1}
    assert Path("hand/history.jsonl").exists(), "copied, not moved"


def test_it_takes_the_place_of_another_only_when_told():
    computed = run().run_dir.artifact("train")
    with pytest.raises(RecipeError, match="has an artifact already"):
        adopt(plan(), "train", hand_made())
    adopted = adopt(plan(), "train", hand_made(), force=True)
    assert adopted.folder == computed.folder and adopted.manifest["sha256"] != computed.manifest["sha256"]
    assert [path.name[:7] for path in Path("outputs/store").glob("*/.*")] == [".stale-"], "evaluate's, of the old one"


def test_what_fails_leaves_the_artifact_that_was_there(monkeypatch):
    computed = run().run_dir.artifact("train").manifest["sha256"]
    empty = Path("empty")
    empty.mkdir()
    with pytest.raises(RecipeError, match="it has no history.jsonl"):
        adopt(plan(), "train", empty, force=True)

    def fail(*_):
        raise StageError("the structure is another one")

    monkeypatch.setattr("posttrain.launch.adopt.seal", fail)
    with pytest.raises(RecipeError, match="the structure is another one"):
        adopt(plan(), "train", hand_made(), force=True)
    assert plan()["train"].artifact.manifest["sha256"] == computed


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda folder: os.symlink("/etc/hostname", folder / "link"), "may not hold links"),
        (lambda folder: (folder / "weights.pt").write_bytes(b"x"), "pickled files are not taken over"),
        (lambda folder: (folder / "history.jsonl").unlink(), "it has no history.jsonl"),
    ],
)
def test_what_an_artifact_may_not_be(spoil, what: str):
    run(selection={"until": "data"})
    folder = hand_made()
    spoil(folder)
    with pytest.raises(RecipeError, match=what):
        adopt(plan(), "train", folder)
    assert not list(Path("outputs/store").glob("toy_train/*"))


def test_a_model_of_another_shape_is_told_of_the_stage_not_of_an_option(tmp_path: Path):
    """There may be no YAML with an `architecture:` behind the stage that it is adopted for."""
    made = tmp_path / "made"
    make_source("llama").save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    with pytest.raises(RecipeError, match="not the model that was planned: ") as refused:
        adopt(make_plan(load_recipe("x_ecomla", ["scale=smoke"])), "model", made)
    fix = "adopt a model of the planned shape, or give stage model the settings that this one was made with"
    assert refused.value.problems[0].fix == fix


def test_a_folder_that_holds_the_outputs_is_refused(tmp_path: Path):
    """`posttrain adopt RECIPE STAGE .` copied the store into itself until the disk or the path was full."""
    run(selection={"until": "data"})
    (Path.cwd() / "history.jsonl").write_text("{}\n")
    with pytest.raises(RecipeError, match="holds the outputs folder") as refused:
        adopt(plan(), "train", Path("."))
    assert "paths.outputs=DIR" in refused.value.problems[0].fix


def test_inputs_must_be_there_and_names_right():
    with pytest.raises(RecipeError, match="takes data, which is not in the store"):
        adopt(plan(), "train", hand_made())
    with pytest.raises(RecipeError) as caught:
        adopt(plan(), "trian", hand_made())
    assert caught.value.problems[0].fix == "write train"
    run(selection={"until": "data"})
    with pytest.raises(RecipeError, match="nowhere is no folder"):
        adopt(plan(), "train", Path("nowhere"))


def test_a_stage_that_is_being_computed_is_left_alone():
    run(selection={"until": "data"})
    planned = plan()
    work_dir = planned.store.work_dir("toy_train", planned["train"].key)
    with Lock.acquire(work_dir / "runner"), pytest.raises(RecipeError, match="is being computed"):
        adopt(planned, "train", hand_made())


def test_a_damaged_adopted_artifact_is_never_replaced_by_a_computed_one():
    run(selection={"until": "data"})
    artifact = adopt(plan(), "train", hand_made())
    file = artifact.folder / "history" / "history.jsonl"
    file.write_text(file.read_text().replace("0.25", "0.75"))
    display = Recorder()
    result = run(display)
    assert result.exit_code == EXIT_FAILED and "changed: history/history.jsonl" in result.message
    assert artifact.folder.exists()
    file.write_text("")
    with pytest.raises(RecipeError, match="the adopted artifact of stage train is damaged"):
        plan()
    assert adopt(make_plan(toy_recipe(), replacing="train"), "train", hand_made(), force=True).folder == artifact.folder
    assert plan()["train"].status == "cached"


def test_what_was_made_from_a_replaced_artifact_is_made_again():
    run()
    adopt(plan(), "train", hand_made(), force=True)
    assert plan()["evaluate"].status == "pending"
    result = run()
    metrics = json.loads((result.run_dir.artifact("evaluate").folder / "evaluation" / "metrics.json").read_text())
    assert metrics == {"rows": 1}


def test_clean_leaves_an_adopted_artifact_that_waits_for_its_run():
    from posttrain.cli import clean

    run(selection={"until": "data"})
    artifact = adopt(plan(lr=7.0), "train", hand_made())
    clean.command(True, Path("outputs"))
    assert artifact.folder.exists()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "F64", "I64"])
@pytest.mark.parametrize("value", [1.5, float("nan"), float("inf")])
def test_numbers_that_are_none_are_found_in_every_type(tmp_path: Path, kind: str, value: float):
    types = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
    good = numpy.arange(5, dtype="<f4")
    if kind == "BF16":
        bad = (numpy.array([1.0, value], dtype="<f4").view("<u4") >> 16).astype("<u2")
    elif kind == "I64":
        bad = numpy.array([1, -1], dtype="<i8")
    else:
        bad = numpy.array([1.0, value], dtype=types[kind])
    header = {
        "__metadata__": {"format": "pt"},
        "good": {"dtype": "F32", "shape": [5], "data_offsets": [0, good.nbytes]},
        "bad": {"dtype": kind, "shape": [2], "data_offsets": [good.nbytes, good.nbytes + bad.nbytes]},
    }
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + good.tobytes() + bad.tobytes())
    assert first_non_finite(file) == ("bad" if kind != "I64" and not numpy.isfinite(value) else None)
