from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_stages import ToySource, ToySourceConfig, ToyTrain, ToyTrainConfig

from posttrain.config import registry
from posttrain.errors import RecipeError
from posttrain.pipeline import fingerprint
from posttrain.pipeline.fingerprint import (
    canonical_json,
    digest,
    digest_by,
    digest_path,
    explain,
    key_document,
    key_of,
)

configs = st.builds(
    lambda lr, steps: ToyTrainConfig(lr=lr, steps=steps),
    st.floats(0.0, 1.0, allow_nan=False),
    st.integers(1, 10**6),
)
parents = st.dictionaries(
    st.sampled_from(["data", "before"]), st.tuples(st.text("0123456789abcdef", min_size=1), st.just("train"))
)


@given(configs, configs, st.integers(0, 3), st.integers(0, 3), parents, parents)
def test_keys_differ_exactly_when_something_in_them_does(one, two, seed, other_seed, inputs, other_inputs):
    first = key_document(ToyTrain(), one, seed, inputs)
    second = key_document(ToyTrain(), two, other_seed, other_inputs)
    same = (one.lr, one.steps, seed, inputs) == (two.lr, two.steps, other_seed, other_inputs)
    assert (key_of(first) == key_of(second)) == same
    assert (explain(first, second) == []) == same


@given(st.floats(0, 10), st.text(), st.dictionaries(st.sampled_from(["data", "before"]), st.text(), min_size=1))
def test_how_the_work_is_done_and_reference_names_do_not_count(pause, fail, references):
    plain = key_document(ToyTrain(), ToyTrainConfig(), 0, {})
    changed = key_document(ToyTrain(), ToyTrainConfig(pause=pause, fail=fail, inputs=references), 0, {})
    assert key_of(plain) == key_of(changed)


@given(st.permutations(["a", "b", "c", "ü"]))
def test_canonical_json_does_not_depend_on_order(names):
    assert canonical_json({name: name for name in names}) == canonical_json({name: name for name in sorted(names)})


def test_stage_version_and_external_count(monkeypatch):
    before = key_document(ToySource(), ToySourceConfig(), 0, {})
    monkeypatch.setattr(ToySource, "version", "2")
    assert explain(before, key_document(ToySource(), ToySourceConfig(), 0, {})) == ["stage code version 1 → 2"]
    monkeypatch.undo()
    after = key_document(ToySource(), ToySourceConfig(outside="x"), 0, {})
    assert any("outside the recipe" in reason for reason in explain(before, after))


def test_explanations_read_well():
    old = key_document(ToyTrain(), ToyTrainConfig(lr=1e-5), 0, {"data": ("aa", "train")})
    new = key_document(ToyTrain(), ToyTrainConfig(lr=2e-5), 1, {"data": ("bb", "train"), "before": ("cc", "history")})
    assert explain(None, new) == ["new"]
    reasons = explain(old, new, {"data": "upcycle"})
    assert reasons == ["lr 1e-05 → 2e-05", "seed 0 → 1", "input before added", "parent upcycle changed"]


def test_nan_is_refused():
    with pytest.raises(ValueError):
        digest({"x": float("nan")})


def age(path: Path) -> None:
    """Make a file old enough for the cache to trust its time."""
    os.utime(path, ns=(10**18, 10**18))


def test_folder_digest_follows_content_and_names(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text("one")
    (folder / "sub" / "b").write_text("two")
    first = digest_path(folder)
    (folder / ".cache").write_text("not content")
    assert digest_path(folder) == first
    (folder / "sub" / "b").write_text("2wo")
    second = digest_path(folder)
    (folder / "a").rename(folder / "c")
    assert len({first, second, digest_path(folder)}) == 3


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(st.binary(max_size=64))
def test_file_digest_is_the_contents_sha256(tmp_path, content):
    import hashlib

    (tmp_path / "file").write_bytes(content)
    assert digest_path(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_unchanged_files_are_read_once(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("content")
    age(file)
    first = digest_path(file)

    def no_reading(path):
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr(fingerprint, "hash_file", no_reading)
    assert digest_path(file) == first


def test_another_digest_of_a_file_is_computed_once_too_and_kept_apart(tmp_path):
    file = tmp_path / "file"
    file.write_text("content")
    age(file)
    calls = []

    def length(path):
        calls.append(path)
        return str(path.stat().st_size)

    content = digest_path(file)
    assert [digest_by(file, length, "length-1") for _ in range(2)] == ["7", "7"] and len(calls) == 1
    assert digest_path(file) == content
    file.write_text("longer content")
    age(file)
    assert digest_by(file, length, "length-1") == "14"
    assert digest_by(file, lambda path: "other", "length-2") == "other"


def test_a_file_replaced_with_the_same_size_and_time_is_noticed(tmp_path):
    file = tmp_path / "file"
    file.write_text("content")
    age(file)
    first = digest_path(file)
    file.write_text("CONTENT")
    age(file)
    assert digest_path(file) != first


def test_a_damaged_cache_costs_only_time(tmp_path):
    file = tmp_path / "file"
    file.write_text("content")
    age(file)
    first = digest_path(file)
    for entry in (tmp_path / "cache").rglob("*.json"):
        entry.write_text("{not json")
    assert digest_path(file) == first


def test_missing_and_empty_paths_are_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in ("nowhere", "empty"):
        with pytest.raises(RecipeError):
            digest_path(tmp_path / path)


@pytest.mark.parametrize(
    ("type_", "settings", "counts"),
    [
        ("model_source", {"architecture": {"model_type": "llama"}, "random": True}, False),
        ("data_source", {"builder": "tiny"}, False),
        ("data_source", {"builder": "python_text"}, False),
        ("data_source", {"builder": "teacher_samples"}, True),
    ],
)
def test_the_seed_is_in_the_key_of_a_source_that_draws_from_it(type_, settings, counts):
    stage = registry.stage(type_)
    cfg = stage.Config.model_validate({"type": type_, **settings})
    assert ("seed" in key_document(stage, cfg, 0, {})) == counts
