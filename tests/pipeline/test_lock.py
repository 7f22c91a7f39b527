from __future__ import annotations

import os
import shutil

import pytest

from posttrain.pipeline.lock import Lock, LockHeld, Owner, held, holder, start_time, this_process


def test_one_holder_at_a_time_who_says_who_it_is(tmp_path):
    path = tmp_path / "work" / "lock"
    assert not held(path) and holder(path) is None
    with Lock.acquire(path):
        assert held(path) and holder(path) == this_process()
        with pytest.raises(LockHeld) as caught:
            Lock.acquire(path, patience=0)
        assert caught.value.owner == this_process()
    assert not held(path)
    Lock.acquire(path, patience=0).release()


def test_a_lock_ends_with_its_process(tmp_path):
    path = tmp_path / "lock"
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        Lock.acquire(path)
        os.write(writing, b"x")
        os.kill(os.getpid(), 9)
    os.read(reading, 1)
    os.waitpid(child, 0)
    assert not held(path)
    Lock.acquire(path, patience=0).release()


def test_a_lock_on_a_removed_folder_holds_nobody_back(tmp_path):
    path = tmp_path / "work" / "lock"
    with Lock.acquire(path):
        shutil.rmtree(path.parent)
        assert not held(path)
        with Lock.acquire(path, patience=0):
            assert held(path)


def test_a_later_process_with_the_same_pid_is_not_the_owner():
    me = this_process()
    assert me.alive()
    assert not Owner(me.pid, "an earlier time").alive()


def test_a_zombie_is_not_alive():
    child = os.fork()
    if child == 0:
        os._exit(0)
    while start_time(child) is not None:
        pass
    assert not Owner(child, "x").alive()
    os.waitpid(child, 0)
