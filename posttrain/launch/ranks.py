"""A stage on several ranks, of this machine or of all machines of a Slurm job, owned by the worker."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from posttrain.errors import Problem, StageError, StopRequested
from posttrain.launch.agent import Node, innocence, start_ranks
from posttrain.launch.job import Job
from posttrain.launch.rank import COMPUTED, RANKS
from posttrain.pipeline.files import read_json, remove_tree

PORTS = range(10_000, 30_000)
"""Below the range from which systems give out ports by themselves."""


def run_ranks(job: Job, work_dir: Path) -> dict[str, Any]:
    """Start the job's ranks, wait for their end and return what rank 0 computed (`Computed.to_json`).

    Raises:
        StopRequested: a stop was asked for, and the ranks have saved their state.
        StageError: a rank failed or was killed (the others were ended at once), or a machine could not be reached.
    """
    (work_dir / COMPUTED).unlink(missing_ok=True)
    if (work_dir / RANKS).exists():
        remove_tree(work_dir / RANKS)
    (work_dir / RANKS).mkdir(parents=True)
    if job.nodes == 1:
        if sys.platform == "linux":
            # All ranks are on this machine, whose name need not resolve.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        ended = start_ranks(job, work_dir, Node())
    else:
        ended = _on_nodes(job, work_dir)
    reasons = sorted((read_json(file) for file in (work_dir / RANKS).glob("failure_*.json")), key=lambda r: r["time"])
    if ended:
        raise _failed(job, ended, reasons)
    computed = read_json(work_dir / COMPUTED)
    if computed.pop("status") == "stopped":
        raise StopRequested(computed["step"])
    return computed


def _on_nodes(job: Job, work_dir: Path) -> str:
    """One process on every machine of the Slurm job, each of which starts its ranks; as `start_ranks`."""
    hosts = hosts_of_job(job.nodes)
    endpoint = f"{hosts[0]}:{port_of_job(os.environ)}"
    command = srun_command(job.nodes, [sys.executable, "-u", "-m", "posttrain.launch.node", str(work_dir), endpoint])
    print(f"posttrain: {job.nodes} machines ({', '.join(hosts)}), meeting at {endpoint}", flush=True)
    code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    failures = [read_json(file) for file in (work_dir / RANKS).glob("node_*.json")]
    if failures:
        return min(failures, key=lambda one: (innocence(one["code"]), one["time"]))["ended"]
    # What rank 0 left is from after the last thing that ranks do together; srun fails too when Slurm ends the job then.
    complete = (work_dir / COMPUTED).exists()
    return f"srun ended with code {code} and no machine said why" if code and not complete else ""


def hosts_of_job(nodes: int) -> list[str]:
    """Names of the machines of the Slurm job around this process, in order.

    Raises:
        StageError: there is no job around, it has another number of machines, or Slurm's commands are not to be found.
    """
    listed = os.environ.get("SLURM_JOB_NODELIST")
    fix = "submit it with launcher=slurm, or engine.nodes=1"
    if not listed or "SLURM_JOB_ID" not in os.environ:
        raise StageError(f"engine.nodes={nodes}, but this process is in no Slurm job", "engine.nodes", fix)
    for program in ("scontrol", "srun"):
        if shutil.which(program) is None:
            what = f"{program} is not on the PATH of the job's first machine, so that the others cannot be reached"
            raise StageError(what, "launcher", "load Slurm's module there: launcher.setup")
    answer = subprocess.run(["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=False)
    hosts = answer.stdout.split()
    if answer.returncode or len(hosts) != nodes:
        said = f": {answer.stderr.strip()}" if answer.stderr.strip() else ""
        what = f"the Slurm job has {len(hosts)} machines ({listed}), the stage wants {nodes}{said}"
        raise StageError(what, "engine.nodes", fix)
    return hosts


def port_of_job(environment: Any) -> int:
    """A port that other jobs on the first machine will hardly have; another one after a requeue."""
    number = 101 * int(environment["SLURM_JOB_ID"]) + int(environment.get("SLURM_RESTART_COUNT", 0))
    return PORTS[number % len(PORTS)]


def srun_command(nodes: int, command: list[str]) -> list[str]:
    """`command` once on every machine of the job; when one fails the others are ended."""
    options = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--export=ALL"]
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
        # Since 22.05 a step does not inherit it from the job.
        options.append(f"--cpus-per-task={cpus}")
    return ["srun", *options, *command]


def _failed(job: Job, ended: str, reasons: list[dict[str, Any]]) -> StageError:
    """The first rank that says why, rather than those that failed for want of it."""
    known = [reason for reason in reasons if reason["known"]]
    if known:
        return StageError(problems=[Problem(*problem) for problem in known[0]["problems"]])
    # Those that a dead rank leaves behind fail in whatever operation they had with it.
    others = [reason for reason in reasons if ended.startswith(f"rank {reason['rank']} ")]
    if others:
        return StageError(f"rank {others[0]['rank']} of {job.world_size} failed: {others[0]['traceback']}")
    memory = "; the system kills processes that take too much memory" if "signal 9" in ended else ""
    what = f"{ended}{memory}; the other ranks were ended"
    return StageError(what, "engine.ranks", "posttrain resume goes on from the newest checkpoint")
