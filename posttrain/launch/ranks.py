"""A stage on several ranks of this machine: torch's elastic agent as a library, inside the worker that owns it.

The agent tells which rank died of what, which `torchrun` as a command would hide behind the exit code 1.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from posttrain.errors import Problem, StageError, StopRequested
from posttrain.launch.job import Job
from posttrain.launch.rank import COMPUTED, RANKS
from posttrain.pipeline.files import read_json, remove_tree

JOIN_SECONDS = 300
"""For all ranks to have started; each imports torch first."""


def run_ranks(job: Job, work_dir: Path) -> dict[str, Any]:
    """Start `job.ranks` ranks, wait for their end and return what rank 0 computed (`Computed.to_json`).

    Raises:
        StopRequested: a stop was asked for, and the ranks have saved their state.
        StageError: a rank failed or was killed; the others were ended at once.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    (work_dir / COMPUTED).unlink(missing_ok=True)
    if (work_dir / RANKS).exists():
        remove_tree(work_dir / RANKS)
    logs = work_dir / RANKS / "torchrun"
    logs.mkdir(parents=True)
    if sys.platform == "linux":
        # All ranks are on this machine, whose name need not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_of_a_rank(job)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job.ranks,
        # A port of its own, chosen by the system, on this machine alone.
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        rdzv_configs={"timeout": JOIN_SECONDS},
        local_addr="localhost",
        run_id=job.key[:16],
        max_restarts=0,
        monitor_interval=0.1,
        # A wish to stop comes as a file; the worker's own handling of SIGTERM stays.
        signals_to_handle="SIGQUIT",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.NONE),
    )
    ended = ""
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "posttrain.launch.rank", str(work_dir))
    except ChildFailedError as error:
        rank, pid, code = first_to_end([(rank, one.pid, one.exitcode) for rank, one in error.failures.items()])
        how = f"was killed by signal {-code}" if code < 0 else f"exited {code}"
        ended = f"rank {rank} of {job.ranks} (process {pid}) {how}"
    reasons = sorted((read_json(file) for file in (work_dir / RANKS).glob("failure_*.json")), key=lambda r: r["time"])
    if ended:
        raise _failed(job, ended, reasons)
    computed = read_json(work_dir / COMPUTED)
    if computed.pop("status") == "stopped":
        raise StopRequested(computed["step"])
    return computed


def first_to_end(failures: list[tuple[int, int, int]]) -> tuple[int, int, int]:
    """Of ranks that ended within one look, the one to blame, as (rank, pid, exit code).

    One that was killed made the others fail in the operation that they shared; SIGTERM is how the agent ends the rest.
    """

    def innocence(code: int) -> int:
        return 2 if code == -signal.SIGTERM else int(code >= 0)

    return min(failures, key=lambda failure: (innocence(failure[2]), failure[0]))


def threads_of_a_rank(job: Job) -> int:
    """CPU threads of each rank: the machine shared among them."""
    return max(1, len(os.sched_getaffinity(0)) // job.ranks) if hasattr(os, "sched_getaffinity") else 1


def _failed(job: Job, ended: str, reasons: list[dict[str, Any]]) -> StageError:
    """The first rank that says why, rather than those that failed for want of it."""
    known = [reason for reason in reasons if reason["known"]]
    if known:
        return StageError(problems=[Problem(*problem) for problem in known[0]["problems"]])
    # Those that a dead rank leaves behind fail in whatever operation they had with it.
    others = [reason for reason in reasons if ended.startswith(f"rank {reason['rank']} ")]
    if others:
        return StageError(f"rank {others[0]['rank']} of {job.ranks} failed: {others[0]['traceback']}")
    memory = "; the system kills processes that take too much memory" if "signal 9" in ended else ""
    what = f"{ended}{memory}; the other ranks were ended"
    return StageError(what, "engine.ranks", "posttrain resume goes on from the newest checkpoint")
