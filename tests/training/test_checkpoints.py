"""A checkpoint counts only when it is whole."""

from __future__ import annotations

import json
import zlib

import pytest
import torch
from safetensors.torch import save_file

from posttrain.training import checkpoints


def _write(folder, step, *, whole=True):
    path = checkpoints.begin(folder, step)
    path.mkdir(parents=True)
    save_file({"weight": torch.full((4, 4), float(step))}, path / "model.safetensors")
    (path / "optimizer.pt").write_bytes(b"o" * 100)
    (path / "sub").mkdir()
    (path / "sub" / "state.json").write_text("{}")
    if whole:
        checkpoints.complete(path)
    return path


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)


def test_marker_lists_every_file_with_its_size_and_checksum(tmp_path):
    path = _write(tmp_path, 3)
    marker = json.loads((path / "COMPLETE").read_text())
    assert marker["step"] == 3
    assert marker["files"] == {
        name: {"size": (path / name).stat().st_size, "crc32": zlib.crc32((path / name).read_bytes())}
        for name in ("model.safetensors", "optimizer.pt", "sub/state.json")
    }
    assert checkpoints.find_problem(path) is None


def test_newest_is_by_step_not_by_name_or_time(tmp_path):
    for step in (10, 9, 100):
        _write(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoints.newest_complete(tmp_path).name == "checkpoint-100"


def test_no_folder_no_checkpoint(tmp_path):
    assert checkpoints.newest_complete(tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda path: (path / "COMPLETE").unlink(), "half-written"),
        (lambda path: _truncate(path / "optimizer.pt"), "99 bytes instead of 100"),
        (lambda path: _flip(path / "optimizer.pt"), "the content of optimizer.pt is not what was written"),
        (lambda path: _flip(path / "model.safetensors"), "the content of model.safetensors"),
        (lambda path: (path / "sub" / "state.json").unlink(), "missing"),
        (lambda path: (path / "COMPLETE").write_text("{"), "cannot be read"),
        (lambda path: (path / "COMPLETE").write_text('{"files": 3}'), "cannot be read"),
    ],
)
def test_damaged_checkpoint_is_skipped_and_reported(tmp_path, damage, word):
    good, bad = _write(tmp_path, 4), _write(tmp_path, 8)
    damage(bad)
    said = []
    assert checkpoints.newest_complete(tmp_path, said.append) == good
    assert len(said) == 1 and "step 8" in said[0] and word in said[0]
    assert not bad.exists()


def test_safetensors_header_is_looked_at_beyond_the_size(tmp_path):
    """A file of the recorded size whose content is not a safetensors file of that size."""
    path = _write(tmp_path, 1, whole=False)
    weights = path / "model.safetensors"
    size = weights.stat().st_size
    for content in (b"\0" * size, b"\xff" * size, (10**6).to_bytes(8, "little") + b"{" * (size - 8)):
        weights.write_bytes(content)
        checkpoints.complete(path)
        assert "model.safetensors" in checkpoints.find_problem(path)


def test_empty_safetensors_is_a_problem(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"")
    assert checkpoints.safetensors_problem(path) == "truncated header"


def test_all_damaged_means_start_over(tmp_path):
    for step in (1, 2):
        _truncate(_write(tmp_path, step) / "optimizer.pt")
    said = []
    assert checkpoints.newest_complete(tmp_path, said.append) is None
    assert len(said) == 2 and not list(tmp_path.iterdir())


def test_begin_removes_leftovers(tmp_path):
    leftover = _write(tmp_path, 5, whole=False)
    (leftover / "stale.bin").write_bytes(b"x")
    path = _write(tmp_path, 5)
    assert not (path / "stale.bin").exists()


def test_rotation_keeps_the_newest_whole_ones_and_never_counts_half_written(tmp_path):
    for step in (1, 2, 3):
        _write(tmp_path, step)
    _write(tmp_path, 4, whole=False)
    checkpoints.rotate(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert checkpoints.newest_complete(tmp_path, lambda message: None).name == "checkpoint-3"


def test_discard_takes_the_marker_first(tmp_path, monkeypatch):
    path = _write(tmp_path, 1)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoints.discard(path)
    assert path.is_dir() and checkpoints.find_problem(path).startswith("half-written")
