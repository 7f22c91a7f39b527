from __future__ import annotations

import json
import threading

from posttrain.pipeline.events import EventLog, EventReader, read_events
from posttrain.pipeline.progress import state_of


def test_events_come_back_in_order(tmp_path):
    log = EventLog(tmp_path / "run" / "events.jsonl")
    log.append("run_started")
    log.append("progress", "train", done=1, total=2)
    assert [(event["event"], event["stage"]) for event in read_events(log.path)] == [
        ("run_started", None),
        ("progress", "train"),
    ]
    assert read_events(tmp_path / "nowhere") == []


def test_a_torn_line_is_skipped_and_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "events.jsonl"
    EventLog(path).append("one")
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole + whole[:cut])
        assert [event["event"] for event in read_events(path)] == ["one"]
        EventLog(path).append("two")
        events = [event["event"] for event in read_events(path)]
        # A line that only lost its end of line is whole.
        assert events == (["one", "one", "two"] if cut == len(whole) - 1 else ["one", "two"])


def test_lines_that_are_no_events_are_skipped(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'7\n[1]\n{"no": "event"}\n\xff\xfe\n\n')
    EventLog(path).append("one")
    assert [event["event"] for event in read_events(path)] == ["one"]


def test_a_reader_gives_each_event_once_and_waits_for_the_end_of_a_line(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.append("before")
    reader = EventReader(path, at_end=True)
    assert list(reader.poll()) == []
    log.append("one")
    with path.open("ab") as file:
        file.write(b'{"event": "tw')
    assert [event["event"] for event in reader.poll()] == ["one"]
    with path.open("ab") as file:
        file.write(b'o"}\n')
    assert [event["event"] for event in reader.poll()] == ["two"]
    assert list(reader.poll()) == []


def test_writers_do_not_mix_their_lines(tmp_path):
    path = tmp_path / "events.jsonl"

    def write(number):
        log = EventLog(path)
        for count in range(50):
            log.append("progress", f"s{number}", done=count, filler="x" * 500)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # A log opened in the middle of another's write may add an empty line, which means nothing.
    lines = [line for line in path.read_text().splitlines() if line]
    assert len(lines) == 200 and all(json.loads(line) for line in lines)
    assert len(read_events(path)) == 200


def event(kind, time, stage="train", **fields):
    return {"event": kind, "time": time, "stage": stage, **fields}


def test_state_follows_attempts_rate_and_loss():
    events = [
        {"event": "run_started", "time": 0, "stage": None},
        event("stage_started", 0, attempt=1, pid=7),
        event("progress", 10, done=1, total=40, unit="step"),
        event("progress", 20, done=11, total=40, unit="step"),
        event("metrics", 20, step=11, loss=2.5),
    ]
    state = state_of(events, ["data", "train"])
    train = state.stages["train"]
    assert list(state.stages) == ["data", "train"] and state.stages["data"].status == "waiting"
    assert (train.status, train.rate, train.eta, train.loss, train.pid) == ("running", 1.0, 29.0, 2.5, 7)
    state = state_of([*events, event("stage_stopped", 21, step=11), event("stage_started", 30, attempt=2, pid=8)])
    assert (state.stages["train"].attempts, state.stages["train"].rate) == (2, None)
    assert state.stages["train"].seconds == 21


def test_a_new_loop_of_a_stage_starts_its_rate_anew():
    events = [
        event("stage_started", 0, attempt=1),
        event("progress", 1, done=1, total=40, unit="step"),
        event("progress", 2, done=40, total=40, unit="step"),
        event("progress", 3, done=1, total=10, unit="document"),
    ]
    assert state_of(events).stages["train"].rate is None
