"""One cluster for all tests on a real Slurm; they are skipped where it cannot be brought up."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_world import Site, cluster


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    if os.geteuid() != 0:
        pytest.skip("a Slurm of one's own needs root")
    if shutil.which("slurmctld") is None and shutil.which("apt-get") is None:
        pytest.skip("there is no Slurm, and no apt-get to install one with")
    # As long as a cluster usually waits between SIGTERM and SIGKILL: ranks save in that time.
    with cluster(tmp_path_factory.mktemp("slurm"), CPUS="8", EXTRA="KillWait=25") as environment:
        yield environment


@pytest.fixture(scope="module")
def site(slurm: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"), slurm)


@pytest.fixture(scope="session")
def history(tmp_path_factory: pytest.TempPathFactory):
    """What training of so many steps gives when nothing disturbs it; by a local run."""
    site = Site(tmp_path_factory.mktemp("undisturbed"), dict(os.environ))
    found: dict[tuple[int, str], bytes] = {}

    def result(steps: int, lr: str) -> bytes:
        if (steps, lr) not in found:
            name = f"local-{steps}-{lr.replace('.', '-')}"
            settings = [f"stages.train.steps={steps}", f"stages.train.lr={lr}"]
            site.posttrain("run", "./toy.yaml", *settings, "--name", name)
            path = Path("outputs/runs", name, "artifacts/train/history/history.jsonl")
            found[steps, lr] = (site.folder / path).read_bytes()
        return found[steps, lr]

    return result
