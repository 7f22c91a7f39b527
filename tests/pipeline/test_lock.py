from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from posttrain.errors import StageError
from posttrain.pipeline import lock as locks
from posttrain.pipeline.lock import Lock, LockHeld, Owner, held, holder, start_time, this_process

ELSEWHERE = Owner(4711, "1", "node-7", "another machine", "t")


def write_lock(path: Path, owner: Owner, number: int = 1) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    file = path / str(number)
    file.write_text(json.dumps(asdict(owner)))
    return file


def age(file: Path, seconds: float) -> None:
    os.utime(file, (time.time() - seconds,) * 2)


def gone_process() -> Owner:
    """A process of this machine that has ended."""
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    owner = replace(this_process(), pid=child.pid, start=start_time(child.pid) or "")
    child.wait()
    return owner


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
        with Lock.acquire(path, patience=0) as second:
            assert held(path) and second.held


def test_releasing_leaves_the_lock_of_whoever_came_after(tmp_path):
    path = tmp_path / "work" / "lock"
    first = Lock.acquire(path)
    shutil.rmtree(path.parent)
    with Lock.acquire(path) as second:
        first.release()
        assert second.held and held(path)


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


def test_no_flock_is_needed(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)
    with Lock.acquire(tmp_path / "lock", patience=0), pytest.raises(LockHeld):
        Lock.acquire(tmp_path / "lock", patience=0)


def test_without_hard_links_a_lock_is_exclusive_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with Lock.acquire(tmp_path / "lock", patience=0), pytest.raises(LockHeld) as caught:
        Lock.acquire(tmp_path / "lock", patience=0)
    assert caught.value.owner == this_process()
    Lock.acquire(tmp_path / "lock", patience=0).release()


def test_a_holder_elsewhere_counts_as_dead_after_a_silence(tmp_path):
    path = tmp_path / "lock"
    file = write_lock(path, ELSEWHERE)
    age(file, locks.STALE_SECONDS - 5)
    assert held(path)
    with pytest.raises(LockHeld, match="process 4711 on node-7"):
        Lock.acquire(path, patience=0)
    age(file, locks.STALE_SECONDS + 1)
    assert not held(path)
    with Lock.acquire(path, patience=0):
        assert not file.exists(), "the stale number is taken away"


def test_silence_is_measured_by_the_clock_of_the_file_system(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    write_lock(path, ELSEWHERE)
    real = time.time
    monkeypatch.setattr(locks, "_clocks", {})
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    assert held(path), "our clock is an hour ahead, and the holder is alive"
    monkeypatch.setattr(locks, "_clocks", {})
    age(path / "1", locks.STALE_SECONDS + 3601)
    monkeypatch.setattr(time, "time", lambda: real() - 3600)
    assert not held(path), "our clock is an hour behind, and the holder is dead"


def test_a_holder_of_this_machine_is_never_dead_while_it_lives(tmp_path):
    path = tmp_path / "lock"
    with Lock.acquire(path):
        age(next(path.glob("[0-9]*")), 10 * locks.STALE_SECONDS)
        assert held(path), "a stopped process, say, or one on a machine that slept"


def test_a_process_of_this_machine_that_is_gone_is_replaced_at_once(tmp_path):
    path = tmp_path / "lock"
    write_lock(path, gone_process(), 7)
    assert not held(path) and holder(path) is None
    with Lock.acquire(path, patience=0):
        assert [entry.name for entry in path.iterdir()] == ["8"]


def test_of_many_that_replace_a_dead_holder_one_wins(tmp_path):
    for _ in range(20):
        path = tmp_path / "lock"
        write_lock(path, gone_process())
        won: list[Lock] = []
        start = threading.Barrier(4)

        def take(path=path, won=won, start=start):
            start.wait()
            try:
                won.append(Lock.acquire(path, patience=0))
            except LockHeld:
                return

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1 and won[0].held
        won[0].release()
        shutil.rmtree(path)


def test_a_slow_taker_does_not_get_a_lock_that_moved_on(tmp_path, monkeypatch):
    """It sees number 3 dead; before it makes 4, another made 4, let go of it, and a third has 1 of a new folder."""
    path = tmp_path / "lock"
    stale = write_lock(path, gone_process(), 3)
    real, others = locks._make, []

    def slow(file, text):
        if file.name == "4" and not others:
            stale.unlink()
            others.append(write_lock(path, this_process(), 1))
        real(file, text)

    monkeypatch.setattr(locks, "_make", slow)
    with pytest.raises(LockHeld):
        Lock.acquire(path, patience=0)
    assert [entry.name for entry in path.iterdir()] == ["1"]


def test_who_follows_a_holder_that_left_is_not_taken_for_it(tmp_path, monkeypatch):
    """While number 1 is being judged its holder lets go, and somebody else makes a number 1, which is no less held."""
    path = tmp_path / "lock"
    first = write_lock(path, this_process(), 1)
    real, followers = locks._holds, []

    def look(file):
        if not followers:
            first.unlink()
            followers.append(write_lock(path, this_process(), 1))
            return False  # as of a file that is gone
        return real(file)

    monkeypatch.setattr(locks, "_holds", look)
    with pytest.raises(LockHeld):
        Lock.acquire(path, patience=0)
    assert [entry.name for entry in path.iterdir()] == ["1"]


def test_somebody_who_comes_too_late_does_not_make_a_holder_lose_its_lock(tmp_path, monkeypatch):
    """The number made in vain is there for a moment, in which the holder looks; and for good when it lets go."""
    lock = Lock.acquire(tmp_path / "lock")
    late = lock.path / str(int(lock._file.name) + 1)
    late.write_text("")
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: late.unlink(missing_ok=True))
    assert lock.held
    monkeypatch.undo()
    late.write_text("")
    lock.release()
    assert [entry.name for entry in lock.path.iterdir()] == [late.name]


def test_processes_that_take_turns_never_overlap(tmp_path):
    script = (
        "import sys, time; from pathlib import Path\n"
        "from posttrain.pipeline.lock import Lock\n"
        "path, count = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "for _ in range(25):\n"
        "    with Lock.acquire(path, patience=60):\n"
        "        seen = int(count.read_text()); time.sleep(0.001); count.write_text(str(seen + 1))\n"
    )
    count = tmp_path / "count"
    count.write_text("0")
    command = [sys.executable, "-c", script, str(tmp_path / "lock"), str(count)]
    for child in [subprocess.Popen(command) for _ in range(4)]:
        assert child.wait(100) == 0
    assert count.read_text() == "100"


def test_a_holder_touches_its_lock_and_learns_that_it_lost_it(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.02)
    lost = threading.Event()
    lock = Lock.acquire(tmp_path / "lock", on_lost=lost.set)
    file = next(lock.path.glob("[0-9]*"))
    age(file, 50)
    deadline = time.monotonic() + 5
    while time.time() - file.stat().st_mtime > 40:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.require()
    write_lock(lock.path, ELSEWHERE, int(file.name) + 1)
    assert lost.wait(5) and lock.lost
    with pytest.raises(StageError, match="taken over"):
        lock.require()
    lock.release()
    assert holder(lock.path) == ELSEWHERE


def test_a_lock_file_of_an_earlier_version_is_replaced(tmp_path):
    (tmp_path / "lock").write_text('{"pid": 1, "start": "2"}')
    with Lock.acquire(tmp_path / "lock", patience=0):
        assert held(tmp_path / "lock")


def test_a_taker_whose_number_was_gone_before_it_looked_again_backs_out(tmp_path):
    """It saw number 5 dead; then another made 6 and let go of it, and a third has 1 in the empty folder."""
    path = tmp_path / "lock"
    stale = write_lock(path, gone_process(), 5)
    seen = locks._token(stale)
    stale.unlink()
    write_lock(path, this_process(), 1)
    assert locks._take(path, stale, seen, this_process()) is None
    assert [entry.name for entry in path.iterdir()] == ["1"]


def test_a_server_that_does_not_answer_has_not_taken_the_lock_away(tmp_path, monkeypatch):
    lock = Lock.acquire(tmp_path / "lock")
    real, failures = Path.read_text, [OSError(116, "Stale file handle")]

    def read(self, *arguments, **options):
        if failures and self.name.isdigit():
            raise failures.pop()
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", read)
    assert lock.held and not lock.lost and not failures
    lock.release()


def test_a_link_whose_answer_was_lost_is_still_ours(tmp_path, monkeypatch):
    real = os.link

    def link(source, target):
        real(source, target)
        raise FileExistsError(17, "File exists")

    monkeypatch.setattr(os, "link", link)
    with Lock.acquire(tmp_path / "lock", patience=0) as lock:
        assert lock.held
