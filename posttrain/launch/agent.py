"""The process that starts a machine's ranks and tells which of them died of what: torch's elastic agent as a library.

`torchrun` as a command would hide both behind the exit code 1.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from posttrain.launch.job import Job
from posttrain.launch.rank import EXIT_TERM, RANKS
from posttrain.pipeline.files import write_json

JOIN_SECONDS = 300
"""For all ranks to have started; each imports torch first."""


@dataclass(frozen=True)
class Node:
    """A machine's place among those of a stage.

    Attributes:
        index: from 0.
        endpoint: HOST:PORT of the first machine, at which all meet; None with one machine, which takes a free port.
        name: for people.
    """

    index: int = 0
    endpoint: str | None = None
    name: str = ""


def start_ranks(job: Job, work_dir: Path, node: Node) -> str:
    """Start this machine's `job.ranks` ranks and wait for their end; returns which one died of what, "" if none did.

    What is returned is also written down as `ranks/node_INDEX.json` of the work folder, with `code` and `time`.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logs = work_dir / RANKS / f"torchrun_{node.index}"
    logs.mkdir(parents=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_of_a_rank(job)))
    if node.endpoint is None:
        # A port of its own, chosen by the system, on this machine alone.
        meeting = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "localhost"}
        settings = {"timeout": JOIN_SECONDS}
    else:
        # Static: ranks are numbered by machine, not by arrival, so that sums over them round the same in every attempt.
        meeting = {"rdzv_backend": "static", "rdzv_endpoint": node.endpoint}
        settings = {"rank": node.index, "timeout": JOIN_SECONDS}
    config = LaunchConfig(
        min_nodes=job.nodes,
        max_nodes=job.nodes,
        nproc_per_node=job.ranks,
        **meeting,
        rdzv_configs=settings,
        run_id=job.key[:16],
        max_restarts=0,
        monitor_interval=0.1,
        # A wish to stop comes as a file; the worker's own handling of SIGTERM stays.
        signals_to_handle="SIGQUIT",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.NONE),
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "posttrain.launch.rank", str(work_dir))
    except ChildFailedError as error:
        failures = [(rank, one.pid, one.exitcode) for rank, one in error.failures.items()]
        rank, pid, code = first_to_end(failures)
        how = f"was killed by signal {-code}" if code < 0 else f"exited {code}"
        where = f" on {node.name}" if node.name else ""
        ended = f"rank {rank} of {job.world_size} (process {pid}{where}) {how}"
        note_end(work_dir, node, ended, code)
        return ended
    return ""


def note_end(work_dir: Path, node: Node, ended: str, code: int) -> None:
    """Write down how this machine's part came to an end that it should not have."""
    write_json(work_dir / RANKS / f"node_{node.index}.json", {"ended": ended, "code": code, "time": time.time()})


def innocence(code: int) -> int:
    """How little a rank with that exit code is to blame, where several ended.

    One that was killed made the others fail in the operation that they shared; SIGTERM is how the agent ends the rest.
    """
    return 2 if code in (-signal.SIGTERM, EXIT_TERM) else int(code >= 0)


def first_to_end(failures: list[tuple[int, int, int]]) -> tuple[int, int, int]:
    """Of ranks that ended within one look, the one to blame, as (rank, pid, exit code)."""
    return min(failures, key=lambda failure: (innocence(failure[2]), failure[0]))


def threads_of_a_rank(job: Job) -> int:
    """CPU threads of each rank: the machine shared among them."""
    return max(1, len(os.sched_getaffinity(0)) // job.ranks) if hasattr(os, "sched_getaffinity") else 1
