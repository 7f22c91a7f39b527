"""A thousand hostile answers: none hangs, none gets out, and the time is bounded."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
from pathlib import Path

import pytest
from test_rewards_code import namespaces_allowed

SPEC = importlib.util.spec_from_file_location(
    "hostile_answers", Path(__file__).parents[2] / "scripts" / "hostile_answers.py"
)
hostile_answers = importlib.util.module_from_spec(SPEC)
sys.modules["hostile_answers"] = hostile_answers
SPEC.loader.exec_module(hostile_answers)


@pytest.mark.skipif(not namespaces_allowed(), reason="no user namespaces here")
def test_a_thousand_hostile_answers(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "secret")
    watch = hostile_answers.Watch(tmp_path)
    hostile = hostile_answers.answers(1000, 0.03, tmp_path, watch.port)
    assert len({(answer.reward, answer.kind) for answer in hostile}) > 40
    scores, took = hostile_answers.score(hostile, 0.5, 2)
    assert not watch.broken()
    own = [scores.by_reward[answer.reward][index] for index, answer in enumerate(hostile)]
    assert own == [0.0] * 1000
    assert scores.counts["timeouts"] >= 8 and scores.counts["gold_failures"] == 0
    assert took < 200


def test_what_gets_out_is_seen(tmp_path) -> None:
    """The same programs without a sandbox."""
    watch = hostile_answers.Watch(tmp_path)
    for kind in ("write canary", "write beside", "connect", "abstract socket", "read canary", "proc"):
        text = hostile_answers.PROGRAMS[kind](random.Random(0), tmp_path, watch.port)
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
        assert done.stdout == "ESCAPED\n", (kind, done.stderr)
    assert set(watch.broken()) == {"new", "canary", "socket"}
