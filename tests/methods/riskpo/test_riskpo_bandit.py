"""The bandit script follows the true gradient, and its table runs from the command line."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from posttrain.methods.riskpo import RiskSettings

ROOT = Path(__file__).parents[3]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import riskpo_bandit

    return riskpo_bandit


def test_the_table_runs(tmp_path: Path) -> None:
    tiny = "--questions 10 --arms-each 4 --generations 4 --seeds 2 --target 0.7 --lr 1 --limit 60 --shift 0".split()
    command = [sys.executable, "scripts/riskpo_bandit.py", *tiny, "--plot", str(tmp_path / "curves.svg")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 11
    assert lines[2].startswith("| GRPO |") and "2 of 2" in lines[2] and "side" in lines[2]
    assert "questions=10, arms=4" in done.stdout
    assert (tmp_path / "curves.svg").read_text().count("<path") > 20


def test_the_gradient_is_that_of_the_answers(script: ModuleType) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    answers, advantages = torch.randint(4, (3, 5)), torch.randn(3, 5, dtype=torch.float64)
    (logits.log_softmax(1).gather(1, answers) * advantages).mean(1).sum().backward()
    found = script.policy_gradient(logits.detach().softmax(1), answers, advantages)
    torch.testing.assert_close(found, logits.grad)


def test_a_run_ends_at_the_target_with_its_own_figures(script: ModuleType) -> None:
    world = script.World(questions=10, arms=4, generations=8, shift=0.0, lr=1.0)
    run = script.train(RiskSettings(), world, 3)
    assert run.accuracy[-1] >= 0.6 > max(run.accuracy[:-1])
    assert run.steps == len(run.entropy) - 1 > 0
    assert 0 < run.entropy[-1] < run.entropy[0] < math.log(4)
    assert run.accuracy[-1] < run.pass_at_16 <= 1
    again = script.train(RiskSettings(), world, 3)
    assert again == run
    short = script.train(RiskSettings(), script.World(questions=10, arms=4, generations=8, limit=2), 3)
    assert short.steps == 2


def test_verdicts(script: ModuleType) -> None:
    assert script.verdict([1.0, 1.2], 1.1, 2) == "1.10 inside"
    assert script.verdict([1.101, 1.2], 1.1, 2) == "1.10 inside", "the card rounds"
    assert script.verdict([1.11, 1.2], 1.1, 2) == "1.10 outside"
    assert script.verdict([1.0, 1.09], 1.1, 2) == "1.10 outside"
    assert script.verdict([], 1.1, 2) == "1.10 outside"


def test_a_row_has_the_runs_that_got_there(script: ModuleType) -> None:
    there, missed = script.Run([0.1, 0.7], [2.0, 1.0], 0.9), script.Run([0.1, 0.5], [2.0, 1.5], 0.8)
    row = script.row_of("rb", [there, missed], script.World())
    assert (row.entropy, row.pass_at_16, row.steps, row.missed) == ([1.0], [0.9], [1.0], 1)
    assert "| 1 of 2 |" in script.table([row])[-1]
