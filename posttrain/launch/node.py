"""One machine's part of a stage on several (`python -m posttrain.launch.node WORKDIR ENDPOINT`, started by srun)."""

from __future__ import annotations

import os
import platform
import signal
import sys
import traceback
from pathlib import Path

from posttrain.errors import EXIT_DONE, EXIT_FAILED
from posttrain.launch.agent import Node, note_end, start_ranks
from posttrain.launch.job import STOP, Job


def main(work_dir: Path, endpoint: str) -> int:
    """Start this machine's ranks; the exit code is 0 when all of them are done or have stopped, else 1.

    Which rank died of what stands in the work folder then; srun ends the other machines' processes.
    """
    # Slurm's to every process of a job that it ends or requeues: the ranks may have time to save.
    signal.signal(signal.SIGTERM, lambda *_: (work_dir / STOP).touch())
    index = int(os.environ["SLURM_PROCID"])
    node = Node(index, endpoint, os.environ.get("SLURMD_NODENAME") or platform.node())
    try:
        return EXIT_FAILED if start_ranks(Job.read(work_dir), work_dir, node) else EXIT_DONE
    except Exception as error:
        traceback.print_exc()
        what = f"{node.name} could not start its ranks or lost the others: {type(error).__name__}: {error}"
        note_end(work_dir, node, what, EXIT_FAILED)
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
