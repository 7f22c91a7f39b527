"""Full and unwritable disks, in the forms in which libraries report them."""

from __future__ import annotations

import errno
import shutil
import subprocess
from pathlib import Path

import pytest

from posttrain.launch.job import describe_failure, read_outcome, write_outcome
from posttrain.pipeline import disk
from posttrain.pipeline.disk import RESERVE, RESERVE_BYTES, disk_error, free_reserve, keep_reserve


@pytest.fixture
def full_disk(tmp_path: Path):
    """A file system of 2 MiB with a reserve and no byte besides."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    keep_reserve(place)
    with (place / "ballast").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)) == 4096:
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_the_reserve_leaves_room_to_say_what_failed(full_disk: Path):
    assert shutil.disk_usage(full_disk).free == 0
    with pytest.raises(OSError):
        write_outcome(full_disk, "failed", message="x")
    free_reserve(full_disk)
    write_outcome(full_disk, "failed", message="the disk is full")
    assert read_outcome(full_disk)["message"] == "the disk is full"


def test_a_reserve_takes_real_space_and_is_kept_once(tmp_path: Path):
    keep_reserve(tmp_path)
    before = (tmp_path / RESERVE).stat()
    assert before.st_size == RESERVE_BYTES and before.st_blocks * 512 >= RESERVE_BYTES
    keep_reserve(tmp_path)
    assert (tmp_path / RESERVE).stat().st_mtime_ns == before.st_mtime_ns
    free_reserve(tmp_path)
    free_reserve(tmp_path)
    assert not (tmp_path / RESERVE).exists()
    keep_reserve(tmp_path / "nowhere")


class SafetensorError(Exception):
    """As of the library, which is no OSError."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/model"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/x"), "quota"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "read-only"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "may not be written"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "full"),
    ],
)
def test_a_disk_is_blamed_in_whatever_form(error: Exception, words: str, tmp_path: Path):
    known = disk_error(error, tmp_path)
    assert words in known.problems[0].what and known.problems[0].fix
    described = describe_failure(error, tmp_path)
    assert described["known"] and words in described["message"] and "Traceback" not in described["message"]
    wrapped = RuntimeError("while saving")
    wrapped.__cause__ = error
    assert words in disk_error(wrapped, tmp_path).problems[0].what


def test_torch_does_not_say_why_a_write_failed(monkeypatch, tmp_path: Path):
    error = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    assert disk_error(error, tmp_path) is None, "there is room: it was something else"
    monkeypatch.setattr(disk, "_free", lambda folder: 0)
    assert "the disk is full" in disk_error(error, tmp_path).problems[0].what


def test_other_errors_are_not_the_disks(tmp_path: Path):
    for error in (ValueError("x"), FileNotFoundError(errno.ENOENT, "No such file", "/x"), RuntimeError("os error 2")):
        assert disk_error(error, tmp_path) is None


def test_an_error_that_was_handled_before_is_not_blamed(tmp_path: Path):
    with pytest.raises(ValueError) as caught:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/x")
        except OSError:
            raise ValueError("something else, while that one was looked after")  # noqa: B904
    assert disk_error(caught.value, tmp_path) is None
