"""The event log of a run: one JSON object a line, only ever appended to; the single source of `status` and progress."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class EventLog:
    """Appends events; several processes may share one file, since every event is a single write with O_APPEND."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._close_torn_line()

    def append(self, event: str, stage: str | None = None, **fields: Any) -> Event:
        """Write one event, stamped with the time, and return it."""
        record = {"time": time.time(), "event": event, "stage": stage, **fields}
        self._write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
        return record

    def _write(self, text: str) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, text.encode("utf-8"))
        finally:
            os.close(descriptor)

    def _close_torn_line(self) -> None:
        """A writer that died inside a line must not spoil the next event; an empty line too many does no harm."""
        try:
            with self.path.open("rb") as file:
                file.seek(0, os.SEEK_END)
                if file.tell() == 0:
                    return
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
        except FileNotFoundError:
            return
        if torn:
            self._write("\n")


class EventReader:
    """Reads a growing event log piece by piece."""

    def __init__(self, path: Path, *, at_end: bool = False) -> None:
        self.path = path
        self._offset = path.stat().st_size if at_end and path.exists() else 0

    def poll(self) -> Iterator[Event]:
        """Events completed since the last call. Lines that are no JSON object (torn by a crash) are skipped."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        complete = data.rfind(b"\n") + 1
        self._offset += complete
        for line in data[:complete].splitlines():
            event = _parse(line)
            if event is not None:
                yield event


def read_events(path: Path) -> list[Event]:
    """All complete events of a log; empty when there is no log. A torn line is skipped."""
    return list(EventReader(path).poll())


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None
