"""The Slurm job around a process, and whether a job is over, as far as can be told from here."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping

ASK_SECONDS = 10.0
"""How long an answer about a job's state is believed: the controller is everybody's."""
PATIENCE_SECONDS = 15.0
"""For the controller's answer."""
AT_WORK = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
"""States in which processes of a job may still be there."""

_answers: dict[str, tuple[float, str | None]] = {}


def this_job(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Id of the Slurm job around this process and how often it has been requeued; ("", 0) outside of one.

    A task of an array is ARRAY_TASK: one of the tasks has the array's own id as its job id.
    """
    job, restarts = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_RESTART_COUNT", "0")
    if array := environment.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{environment.get('SLURM_ARRAY_TASK_ID', '')}"
    return job, int(restarts) if restarts.isdigit() else 0


def is_over(job: str, restarts: int) -> bool | None:
    """Whether that attempt of a job has ended, so that none of its processes is left; None: cannot be told."""
    own, own_restarts = this_job()
    if job == own and restarts != own_restarts:
        # Slurm does not start a job again before it has given up its last attempt.
        return restarts < own_restarts
    state = state_of(job)
    return None if state is None else state not in AT_WORK


def state_of(job: str) -> str | None:
    """State of a job, as squeue names it, "" for one that Slurm does not know any more; None: no answer."""
    answer = _answer(job)
    return answer if not answer else answer.split()[0]


def waits_for(job: str) -> str:
    """Why a job that is pending does not start, as squeue names it, e.g. "Priority"; "" if there is nothing to say."""
    state, _, reason = (_answer(job) or "").partition(" ")
    return reason if state == "PENDING" and reason != "None" else ""


def _answer(job: str) -> str | None:
    asked, answer = _answers.get(job, (-ASK_SECONDS, None))
    if time.monotonic() - asked >= ASK_SECONDS:
        answer = _ask(job)
        _answers[job] = (time.monotonic(), answer)
    return answer


def _ask(job: str) -> str | None:
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", "--states=all", "--format=%T %r", f"--jobs={job}"]
    # Variables of the user's may filter and format what squeue says.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    settings = {"capture_output": True, "text": True, "timeout": PATIENCE_SECONDS, "env": environment}
    try:
        answer = subprocess.run(command, **settings, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    if answer.returncode == 0:
        # Nothing where jobs of others are hidden; of a job that it does not know it says so, below.
        return answer.stdout.strip().partition("\n")[0] or None
    return "" if "Invalid job id" in answer.stderr else None
