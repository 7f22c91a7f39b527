"""A worker process that knows the toy stages: `python toy_worker.py WORKDIR`."""

from __future__ import annotations

import sys
from pathlib import Path

from toy_stages import TOYS

from posttrain.config import registry
from posttrain.launch import execute, worker

registry.STAGES.update(TOYS)
# The toys compute nothing: without torch a worker starts in a fraction of the time.
execute.prepare_process = lambda seed, device: "cpu"

if __name__ == "__main__":
    sys.exit(worker.main(Path(sys.argv[1]), watch_stdin=True))
