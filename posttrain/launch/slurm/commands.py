"""Slurm's commands, and what they say."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence

from posttrain.errors import StageError

KEPT = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}
"""Variables that say where the cluster is, not what an enclosing job is."""
_OF_A_JOB = re.compile(r"(SLURM|SBATCH|SRUN|SALLOC|SLURMD|PMI|PMIX)_")
"""Outside of a job these are the user's own defaults, such as SBATCH_ACCOUNT."""
_OF_ANSWERS = re.compile(r"(SQUEUE|SCANCEL|SCONTROL)_")
"""They would filter or format what is read here, also within the job."""
_OF_RANKS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"}
_OF_DEVICES = {"CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES"}
_SECONDS = 60.0


def clean_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment without what an enclosing job or torchrun has put there: it would pass into the new job.

    The user's defaults for Slurm's commands stay, but for those that change how their answers read.
    """
    environment = os.environ if environment is None else environment
    inside = "SLURM_JOB_ID" in environment
    dropped = _OF_RANKS | (_OF_DEVICES if inside else set())

    def passes(name: str) -> bool:
        if name in dropped or name == "POSTTRAIN_PDB" or _OF_ANSWERS.match(name):
            return False
        return name in KEPT or not (inside and _OF_A_JOB.match(name))

    return {name: value for name, value in environment.items() if passes(name)}


def run(command: Sequence[str], *, patience: float = 0.0) -> str:
    """What one of Slurm's commands prints.

    Args:
        patience: seconds for which a command that fails is tried again; a controller may be down for a while.

    Raises:
        StageError: it is not there, or says that it failed.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_SECONDS, env=clean_environment(), check=False
            )
        except FileNotFoundError as error:
            what = f"there is no `{command[0]}` on this machine, so it cannot talk to Slurm"
            raise StageError(what, fix="submit from a login node of the cluster, or use launcher=local") from error
        except subprocess.TimeoutExpired:
            said = f"no answer within {_SECONDS:.0f} seconds"
        else:
            if done.returncode == 0:
                return done.stdout
            said = done.stderr.strip() or f"exit code {done.returncode}"
        if time.monotonic() >= deadline:
            raise StageError(f"{command[0]} failed: {said}", " ".join(command))
        time.sleep(2.0)


def sbatch(arguments: Sequence[str]) -> str:
    """Submit a job; its id."""
    # With several clusters the answer is ID;CLUSTER.
    return run(["sbatch", *arguments]).strip().splitlines()[-1].partition(";")[0]


def queued(*, patience: float = 0.0) -> dict[str, str]:
    """Every job of this user that is not over, by its id, with its state. A task of an array has the id ARRAY_TASK."""
    text = run(["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i %T"], patience=patience)
    return dict(line.split(maxsplit=1) for line in text.splitlines() if line.strip())


def scancel(jobs: Iterable[str], *options: str) -> None:
    """Cancel jobs; those that are over already are passed over."""
    jobs = list(jobs)
    if jobs:
        run(["scancel", "--quiet", *options, *jobs], patience=20.0)


def steps_of(job: str) -> list[str]:
    """Steps that a job has started with srun and that are not over, as JOB.NUMBER; not its batch script."""
    names = run(["squeue", "--noheader", "--steps", f"--jobs={job}", "--format=%i"]).split()
    return [name for name in names if name.rpartition(".")[2].isdigit()]
