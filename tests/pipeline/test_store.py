from __future__ import annotations

import json
import os
import shutil

import pytest

from posttrain.errors import RecipeError, StageError
from posttrain.pipeline import store as store_module
from posttrain.pipeline.stage import ArtifactMeta
from posttrain.pipeline.store import CODE_DIFF, Store, link, publish, read_artifact, seal, sealed, verify

KEY = "0123456789abcdef0123456789abcdef"


def body(type_="history", **outputs):
    declared = outputs or {"history": type_}
    return {
        "format": 1,
        "key": KEY,
        "seconds": 1.0,
        "outputs": {name: {"type": kind, "meta": ArtifactMeta(kind).to_json()} for name, kind in declared.items()},
    }


def finished_work(store: Store):
    work_dir = store.work_dir("toy", KEY)
    output = work_dir / "outputs" / "history"
    (output / "deeper").mkdir(parents=True)
    (output / "history.jsonl").write_text('{"loss": 1}\n')
    (output / "deeper" / "more.txt").write_text("more")
    (work_dir / "checkpoints").mkdir()
    (work_dir / "checkpoints" / "state").write_text("state")
    return work_dir


def finalize(work_dir, store):
    if not sealed(work_dir):
        seal(work_dir, body())
    return publish(work_dir, store.folder("toy", KEY))


def test_an_artifact_is_complete_verified_and_without_checkpoints(tmp_path):
    store = Store(tmp_path)
    work_dir = finished_work(store)
    artifact = finalize(work_dir, store)
    assert artifact.folder == tmp_path / "toy" / KEY
    assert sorted(artifact.manifest["outputs"]["history"]["files"]) == ["deeper/more.txt", "history.jsonl"]
    assert store.find("toy", KEY) == artifact and list(store.artifacts()) == [artifact.folder]
    assert verify(artifact.folder) == []
    assert not (work_dir / "checkpoints").exists()
    assert artifact.metas["history"].type == "history"


STEPS = {"fsync": 40, "rename": 3, "replace": 3}


def test_the_diff_of_the_code_lies_beside_the_manifest_which_knows_it(tmp_path):
    store = Store(tmp_path)
    work_dir = finished_work(store)
    (work_dir / "outputs" / CODE_DIFF).write_text("of an attempt that a crash ended before its manifest")
    seal(work_dir, body(), b"-old\n+\xff\n")
    folder = publish(work_dir, store.folder("toy", KEY)).folder
    assert (folder / CODE_DIFF).read_bytes() == b"-old\n+\xff\n" and verify(folder) == []
    (folder / CODE_DIFF).write_bytes(b"-old\n+new\n")
    assert verify(folder) == [f"changed: {CODE_DIFF}"]
    (folder / CODE_DIFF).unlink()
    assert verify(folder) == [f"missing: {CODE_DIFF}"] and store_module.damage(folder) == []
    (folder / CODE_DIFF).write_bytes(b"-old\n+\xff\n")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["beside"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "SHA-256 does not match" in verify(folder)[0]


@pytest.mark.parametrize("call", STEPS)
def test_a_crash_at_any_step_leaves_resumable_work_or_a_complete_artifact(tmp_path, monkeypatch, call):
    real = getattr(os, call)
    crashed = 0
    for moment in range(STEPS[call]):
        store = Store(tmp_path / str(moment))
        work_dir = finished_work(store)
        left = moment

        def crash(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(os, call, crash)
        try:
            finalize(work_dir, store)
        except KeyboardInterrupt:
            crashed += 1
        monkeypatch.setattr(os, call, real)
        artifact = store.find("toy", KEY)
        if artifact is None:
            assert (work_dir / "outputs" / "history" / "history.jsonl").exists()
            assert (work_dir / "checkpoints" / "state").exists()
            artifact = finalize(work_dir, store)
        assert verify(artifact.folder) == []
    assert 0 < crashed < STEPS[call], "the loop must go past the last call"


def test_a_crash_while_old_things_are_removed_leaves_a_complete_artifact(tmp_path, monkeypatch):
    store = Store(tmp_path)
    work_dir = finished_work(store)
    seal(work_dir, body())

    def crash(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(store_module, "remove_tree", crash)
    with pytest.raises(KeyboardInterrupt):
        publish(work_dir, store.folder("toy", KEY))
    assert verify(store.find("toy", KEY).folder) == []


def test_sealing_again_after_a_change_hashes_again(tmp_path):
    store = Store(tmp_path)
    work_dir = finished_work(store)
    seal(work_dir, body())
    (work_dir / "outputs" / "history" / "history.jsonl").write_text("changed\n")
    seal(work_dir, body())
    assert verify(publish(work_dir, store.folder("toy", KEY)).folder) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(seconds=2.0),
        lambda data: data["outputs"]["history"]["files"]["history.jsonl"].update(size=1),
        lambda data: data.pop("sha256"),
        lambda data: data.update(format=99),
        lambda data: data.update(seconds=float("nan")),
    ],
)
def test_a_manifest_edited_by_hand_is_refused_with_advice(tmp_path, change):
    store = Store(tmp_path)
    folder = finalize(finished_work(store), store).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RecipeError, match=f"rm -r {folder}"):
        store.find("toy", KEY)
    assert verify(folder) != []


def test_reformatting_a_manifest_is_no_change(tmp_path):
    store = Store(tmp_path)
    folder = finalize(finished_work(store), store).folder
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(json.dumps(json.loads(text), sort_keys=True))
    assert store.find("toy", KEY) is not None


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_manifest_that_is_none_is_refused(tmp_path, text):
    store = Store(tmp_path)
    folder = finalize(finished_work(store), store).folder
    (folder / "manifest.json").write_text(text)
    with pytest.raises(RecipeError):
        read_artifact(folder)


def test_verify_names_changed_missing_and_extra_files(tmp_path):
    store = Store(tmp_path)
    folder = finalize(finished_work(store), store).folder
    (folder / "history" / "history.jsonl").write_text('{"loss": 2}\n')
    (folder / "history" / "deeper" / "more.txt").unlink()
    (folder / "history" / "new.txt").write_text("new")
    assert sorted(verify(folder)) == [
        "changed: history/history.jsonl",
        "extra: history/new.txt",
        "missing: history/deeper/more.txt",
    ]


def test_a_renamed_artifact_is_refused(tmp_path):
    store = Store(tmp_path)
    folder = finalize(finished_work(store), store).folder
    folder.rename(folder.with_name("f" * 32))
    with pytest.raises(RecipeError, match="renamed"):
        store.find("toy", "f" * 32)


def break_missing(output):
    shutil.rmtree(output)


def break_empty(output):
    shutil.rmtree(output)
    output.mkdir()


def break_type(output):
    (output / "history.jsonl").rename(output / "other.jsonl")


def break_link(output):
    (output / "link").symlink_to(output / "history.jsonl")


def break_undeclared(output):
    (output.parent / "surprise").mkdir()


@pytest.mark.parametrize("damage", [break_missing, break_empty, break_type, break_link, break_undeclared])
def test_outputs_that_break_the_contract_are_not_sealed(tmp_path, damage):
    work_dir = finished_work(Store(tmp_path))
    damage(work_dir / "outputs" / "history")
    with pytest.raises(StageError):
        seal(work_dir, body())
    assert not sealed(work_dir)


def test_an_artifact_set_aside_comes_back_or_is_replaced(tmp_path):
    store = Store(tmp_path)
    finalize(finished_work(store), store)
    store.set_aside("toy", KEY)
    assert store.find("toy", KEY) is None
    assert store.restore("toy", KEY) and store.find("toy", KEY) is not None
    store.set_aside("toy", KEY)
    finalize(finished_work(store), store)
    assert store.find("toy", KEY) is not None and not store.aside("toy", KEY).exists()
    assert not store.restore("toy", KEY)


def test_links_are_relative_and_replaceable(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "store" / name).mkdir(parents=True)
        link(tmp_path / "runs" / "stage", tmp_path / "store" / name)
        assert (tmp_path / "runs" / "stage").resolve() == tmp_path / "store" / name
    assert not os.path.isabs(os.readlink(tmp_path / "runs" / "stage"))
