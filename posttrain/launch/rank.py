"""One rank of a stage on several (`python -m posttrain.launch.rank WORKDIR`, started by `ranks.run_ranks`).

Rank 0 reports progress and leaves `computed.json` or the reason of a failure in the work folder; the worker that owns
the ranks checks, seals and publishes.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn

from posttrain.errors import EXIT_DONE, EXIT_FAILED, PosttrainError, StopRequested
from posttrain.launch.job import STOP, Job, describe_failure
from posttrain.pipeline.disk import free_reserve
from posttrain.pipeline.files import write_json

COMPUTED = "computed.json"
RANKS = "ranks"
"""What ranks leave in the work folder: rank 0 its result, and each that fails a file in the folder `ranks`."""
EXIT_TERM = 128 + signal.SIGTERM
"""Of a rank that the agent has ended, as shells write it."""
STOP_SECONDS = 2.0
"""After SIGTERM, for the file STOP to be seen."""
LONGEST_WAIT = timedelta(hours=12)
"""For a collective operation: one rank may do something alone for long, and a dead one is seen by the launcher."""


def main(work_dir: Path) -> int:
    """Run this rank's part; the exit code is 0 when it is done or has stopped, else 1."""
    _die_with_parent()
    listen_for_term(work_dir)
    import torch
    import torch.distributed as dist

    from posttrain.launch.agreement import agree
    from posttrain.launch.execute import compute, make_context, prepare_process

    rank, local_rank, world = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    job = Job.read(work_dir)
    try:
        device = prepare_process(job.seed, job.device)
        if device == "cuda":
            torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=LONGEST_WAIT)
        asking = dist.new_group(backend="gloo", timeout=LONGEST_WAIT) if device == "cuda" else None
        ranks = {
            "rank": rank,
            "world_size": world,
            "agree": partial(agree, group=asking),
            "abandon": partial(_fail, work_dir, rank),
        }
        context = make_context(job, work_dir, device, **ranks)
        computed = compute(job, context)
        # Ranks that came out of step would have hung or failed before; this one waits for their last writes.
        dist.barrier()
        if rank == 0:
            write_json(work_dir / COMPUTED, {"status": "done", **computed.to_json()})
    except StopRequested as stop:
        if rank == 0:
            write_json(work_dir / COMPUTED, {"status": "stopped", "step": stop.step})
    except (PosttrainError, Exception) as error:
        traceback.print_exc()
        _fail(work_dir, rank, error)
    dist.destroy_process_group()
    return EXIT_DONE


def _fail(work_dir: Path, rank: int, error: Exception) -> NoReturn:
    """Leave the reason and end this rank at once."""
    try:
        free_reserve(work_dir)
        (work_dir / RANKS).mkdir(exist_ok=True)
        failure = {"rank": rank, "time": time.time(), **describe_failure(error, work_dir)}
        write_json(work_dir / RANKS / f"failure_{rank}.json", failure)
        # No goodbye to the others: they may be waiting for this rank in an operation that cannot end.
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(EXIT_FAILED)


def _die_with_parent() -> None:
    """End at once when the worker is gone: a rank must never write beside the worker of the next attempt."""
    parent = os.getppid()
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        pass  # not Linux: the thread below looks

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(EXIT_FAILED)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def listen_for_term(work_dir: Path) -> None:
    """End at SIGTERM, even inside an operation that never returns, unless it came with a wish to stop.

    The agent sends it to a rank when another one has failed. Slurm sends it to every process of a job that it ends or
    requeues: the worker has then made the file STOP, and there may be time to save.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)  # told at once, whatever the main thread is in

    def default() -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    os.register_at_fork(after_in_child=default)  # another program resets handlers by itself

    def watch() -> None:
        while True:
            if os.read(read, 1) == bytes([signal.SIGTERM]):
                deadline = time.monotonic() + STOP_SECONDS
                while not (work_dir / STOP).exists():
                    if time.monotonic() > deadline:
                        os._exit(EXIT_TERM)
                    time.sleep(0.05)

    threading.Thread(target=watch, name="term-watch", daemon=True).start()


def leave(code: int) -> NoReturn:
    """End this process as `sys.exit` would, except that the interpreter is not taken down.

    A thread of some library that runs into that within C++ aborts the process ("terminate called without an active
    exception"), and a rank that had done its work would count as failed. What was registered to run at the end does;
    threads are not waited for.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(Path(sys.argv[1])))
