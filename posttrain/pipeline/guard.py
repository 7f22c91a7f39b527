"""Stops a plan that costs too much or cannot fit, and says what to do instead. Unknown values are never guessed."""

from __future__ import annotations

import os
from pathlib import Path

from posttrain.errors import Problem, RecipeError
from posttrain.pipeline.device import gpu_memory, host_memory
from posttrain.pipeline.plan import Plan, StagePlan
from posttrain.pipeline.plan_text import big_number, size

DATA_PASSES = 10
"""A training stage that goes over its data more often than this stops at the plan."""
LOWER = "lower the stage's settings"


def guard(plan: Plan) -> list[str]:
    """Check what has still to run against data, memory and disk; returns what could not be checked.

    Raises:
        RecipeError: with every excess, its cost, and the remedy.
    """
    remedy = _remedy(plan)
    device, capacity, unknown = "", None, []
    if plan.to_do and plan.resolved.frame.launcher.type == "slurm":
        unknown = ["memory of the cluster's nodes, so the plan was not compared with it"]
    elif plan.to_do:
        device, capacity, unknown = _capacity(plan.resolved.frame.engine.device)
    problems = []
    for planned in plan.to_do:
        for problem in (_tokens(planned, remedy), _memory(planned, device, capacity, remedy)):
            if problem is not None:
                problems.append(problem)
        unknown += _unknowns(planned)
    disk = _disk(plan)
    if disk is not None:
        problems.append(disk)
    if problems:
        raise RecipeError(problems=problems)
    return unknown


def _remedy(plan: Plan) -> str:
    scales, chosen = list(plan.resolved.frame.scales), plan.resolved.scale
    # A recipe lists its scales from small to large.
    smaller = [f"scale={name}" for name in (scales[: scales.index(chosen)] if chosen in scales else scales)]
    smaller.sort(key=lambda text: text != "scale=demo")
    ways = [f"choose a smaller size ({' or '.join(smaller)})"] if smaller else []
    if chosen is not None or not smaller:
        ways.append(LOWER)
    return f"{', '.join(ways)}, or --yes to do it all the same"


def _tokens(planned: StagePlan, remedy: str) -> Problem | None:
    tokens, data = planned.estimate.tokens, planned.estimate.data_tokens
    if not planned.estimate.trainable or tokens is None or data is None or tokens <= DATA_PASSES * data:
        return None
    passes = f"{tokens / data:,.0f} times over" if data else "without any data"
    cost = f"{big_number(tokens)} tokens, but its data has {big_number(data)}"
    steps = getattr(planned.cfg, "max_steps", 0) * DATA_PASSES * data // tokens
    if steps:
        own = f"lower stages.{planned.name}.max_steps to {steps}"
        remedy = remedy.replace(LOWER, own) if LOWER in remedy else f"{own}, {remedy}"
    return Problem(f"stage {planned.name} would train on {cost}: {passes}", f"stages.{planned.name}", remedy)


def _memory(planned: StagePlan, device: str, capacity: int | None, remedy: str) -> Problem | None:
    needed = sum(planned.estimate.memory.values())
    if capacity is None or needed <= capacity:
        return None
    terms = ", ".join(f"{term} {size(value)}" for term, value in planned.estimate.memory.items())
    what = f"stage {planned.name} needs about {size(needed)} of memory ({terms}), but {device} has {size(capacity)}"
    return Problem(what, f"stages.{planned.name}", remedy)


def _disk(plan: Plan) -> Problem | None:
    needed = sum(planned.estimate.disk_bytes or 0 for planned in plan.to_do)
    folder = _existing_parent(plan.outputs)
    if not _takes_folders(folder):
        fix = "write paths.outputs=FOLDER in a folder that you may write to"
        return Problem(f"results cannot be written to {plan.outputs}: {folder} takes no files", "paths.outputs", fix)
    free = free_disk(folder)
    if needed <= free:
        return None
    what = f"the run would leave {size(needed)} on disk, but {folder} has {size(free)} free"
    return Problem(what, "paths.outputs", "write paths.outputs=FOLDER on a larger disk, or `posttrain clean`")


def _unknowns(planned: StagePlan) -> list[str]:
    estimate = planned.estimate
    unknown = []
    if estimate.trainable and estimate.data_tokens is None:
        unknown.append(f"{planned.name}: tokens in its data are unknown, so its budget was not compared with them")
    if estimate.trainable and not estimate.memory:
        unknown.append(f"{planned.name}: peak memory is unknown, so it was not compared with the device")
    return unknown


def _capacity(device: str) -> tuple[str, int | None, list[str]]:
    """Name of the device, its memory in bytes (None: unknown), and what could not be found out."""
    if device != "cpu":
        memory = gpu_memory()
        if memory is not None:
            return "the GPU", memory, []
        if device == "cuda":
            return "the GPU", None, ["the GPU's memory (no nvidia-smi), so the plan was not compared with it"]
    return "this machine", host_memory(), []


def free_disk(folder: Path) -> int:
    """Bytes that may still be written where that folder is."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def _takes_folders(folder: Path) -> bool:
    """Whether a folder can be made there. A file system without blocks, such as /proc, refuses even root."""
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK) and os.statvfs(folder).f_blocks > 0


def _existing_parent(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder
