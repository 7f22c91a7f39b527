"""What a manifest says of the code: a clean checkout, a changed one, none at all."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
from test_execute import job_of
from toy_stages import toy_recipe

from posttrain.launch import execute, source_code
from posttrain.launch.execute import execute_job
from posttrain.launch.source_code import SourceCode
from posttrain.pipeline.plan import make_plan
from posttrain.pipeline.store import CODE_DIFF, verify

IDENTITY = ("-c", "user.name=a", "-c", "user.email=a@b.c")


def git(root: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    (root / "posttrain").mkdir(parents=True)
    (root / "posttrain" / "a.py").write_text("x = 1\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, *IDENTITY, "commit", "-q", "-m", "one")
    return root


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD").decode().strip()
    assert source_code.source_code(checkout) == SourceCode({"commit": commit, "changed": False})
    (checkout / "model.safetensors").write_text("no source, as large as it may be")
    assert not source_code.source_code(checkout).entry["changed"]


def test_a_changed_checkout_can_be_had_again_from_commit_and_diff(checkout: Path, tmp_path: Path) -> None:
    (checkout / "posttrain" / "a.py").write_text("x = 2\n")
    (checkout / "posttrain" / "ü b.py").write_text("new\n")
    git(checkout, "config", "diff.noprefix", "true")
    git(checkout, "config", "color.ui", "always")
    code = source_code.source_code(checkout)
    assert code.entry["changed"]
    assert code.entry["diff"] == {"sha256": hashlib.sha256(code.diff).hexdigest(), "size": len(code.diff), "kept": True}
    new = hashlib.sha256(b"new\n").hexdigest()
    assert code.entry["untracked"] == [{"path": "posttrain/ü b.py", "sha256": new, "size": 4}]
    other = tmp_path / "other"
    git(tmp_path, "clone", "-q", str(checkout), str(other))
    (tmp_path / "changes").write_bytes(code.diff)
    git(other, "apply", str(tmp_path / "changes"))
    assert (other / "posttrain" / "a.py").read_text() == "x = 2\n"


def test_an_endless_diff_is_known_by_its_digest_alone(checkout: Path) -> None:
    (checkout / "posttrain" / "a.py").write_text("x = 1\n" * source_code.DIFF_LIMIT)
    code = source_code.source_code(checkout)
    assert code.diff is None and not code.entry["diff"]["kept"] and len(code.entry["diff"]["sha256"]) == 64


def test_no_checkout_is_the_installed_version_and_its_files(tmp_path: Path) -> None:
    entry = source_code.source_code(tmp_path).entry
    assert entry["commit"] is None and entry["why"] == "not run from a git checkout" and entry["version"]
    assert entry == source_code.source_code(tmp_path).entry and entry["files"] > 200


def test_the_installed_files_decide_the_digest(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "posttrain_copy").mkdir()
    module = tmp_path / "posttrain_copy" / "__init__.py"
    module.write_text("one")
    monkeypatch.setattr(source_code, "PACKAGES", ("posttrain_copy",))
    monkeypatch.syspath_prepend(str(tmp_path))
    before = source_code.source_code(tmp_path).entry
    module.write_text("two")
    after = source_code.source_code(tmp_path).entry
    assert before["files"] == after["files"] == 1 and before["sha256"] != after["sha256"]


def test_a_checkout_without_a_git_program_or_commit_says_so(checkout: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "empty").mkdir()
    git(tmp_path / "empty", "init", "-q")
    assert "that git does not read" in source_code.source_code(tmp_path / "empty").entry["why"]
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert "no git program" in source_code.source_code(checkout).entry["why"]


def test_the_diff_is_beside_the_manifest_and_not_in_the_key(monkeypatch) -> None:
    keys = []
    for diff in (None, b"-a\n+b\n"):
        states = iter([SourceCode({"commit": "c", "changed": bool(diff)}, diff)] * 2)
        monkeypatch.setattr(execute, "source_code", lambda states=states: next(states))
        plan = make_plan(toy_recipe(outputs=f"outputs-{bool(diff)}"))
        artifact = execute_job(*job_of(plan, "data", {}))
        keys.append(artifact.key)
        assert artifact.manifest["git"] == {"commit": "c", "changed": bool(diff)}
        assert (artifact.folder / CODE_DIFF).exists() == bool(diff) and verify(artifact.folder) == []
        assert "changed" not in json.dumps(artifact.manifest["key_document"])
    assert keys[0] == keys[1]


def test_code_that_was_changed_while_the_stage_ran_is_told(monkeypatch) -> None:
    states = iter([SourceCode({"commit": "c", "changed": False}), SourceCode({"commit": "d", "changed": False})])
    monkeypatch.setattr(execute, "source_code", lambda: next(states))
    plan = make_plan(toy_recipe())
    manifest = execute_job(*job_of(plan, "data", {})).manifest
    assert manifest["git"] == {"commit": "c", "changed": False, "changed_meanwhile": True}
