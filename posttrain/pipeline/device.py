"""Where stages will compute, and how much memory there is; without torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from pathlib import Path

_planned: ContextVar[tuple[str, str, int]] = ContextVar("planned_engine", default=("auto", "single", 1))


@contextlib.contextmanager
def planning_for(device: str, strategy: str = "single", ranks: int = 1) -> Iterator[None]:
    """Inside, stages estimate for that `engine.device`, `engine.strategy` and number of ranks on all machines."""
    token = _planned.set((device, strategy, ranks))
    try:
        yield
    finally:
        _planned.reset(token)


def plans_for_gpu() -> bool:
    """Whether the stages being planned will compute on a GPU; outside a plan, whether there is one."""
    return not computes_on_host(_planned.get()[0])


def planned_strategy() -> str:
    """How the ranks of the stages being planned hold a model that they train."""
    return _planned.get()[1]


def planned_ranks() -> int:
    """Ranks of the stages being planned."""
    return _planned.get()[2]


def planned_memory() -> int | None:
    """Memory in bytes of the device that the stages being planned will compute on; None: unknown."""
    return gpu_memory() if plans_for_gpu() else host_memory()


def computes_on_host(device: str) -> bool:
    """Whether that `engine.device` means the CPU; `auto` does where no GPU can be seen."""
    return device == "cpu" or (device == "auto" and gpu_memory() is None)


def host_memory() -> int:
    """Physical memory in bytes, or the control group's limit where that is lower."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return physical
    return min(physical, int(limit)) if limit.isdigit() else physical


@cache
def gpu_memory() -> int | None:
    """Memory of the smallest GPU in bytes, None without nvidia-smi or GPU."""
    import shutil
    import subprocess

    program = shutil.which("nvidia-smi")
    if program is None:
        return None

    command = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    sizes = [int(line) for line in answer.split() if line.isdigit()]
    return min(sizes) * 2**20 if sizes else None
