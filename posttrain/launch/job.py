"""What a launcher hands to a worker: everything it needs to run one stage, as `job.json` in the work folder."""

from __future__ import annotations

import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from posttrain.errors import DamagedInputs, PosttrainError, StageError
from posttrain.pipeline.disk import disk_error
from posttrain.pipeline.files import read_json, remove_tree, write_json
from posttrain.pipeline.run_dir import RunDir
from posttrain.pipeline.store import Store

JOB, LOCK, STOP, OUTCOME = "job.json", "lock", "STOP", "outcome.json"
CLAIM = "runner"
"""Lock of the runner that looks after a work folder, from before its worker starts until the artifact is linked."""


@dataclass(frozen=True)
class Job:
    """One attempt at one stage.

    Attributes:
        stage, type, key, document, config, seed: as planned; `config` is the stage's settings with defaults.
        inputs: input name to {"reference", "path" (absolute), "key", "output", "meta"}.
        predicted: output name to the planned meta; estimate: the planned `Estimate`.
        target: absolute folder of the artifact to be.
        events, log: absolute paths in the run's folder; log is None when the launcher keeps it.
        ranks, nodes: ranks on each machine, and machines.
        attended: a runner waits for the worker and holds its pipe.
        tracker: the recipe's tracker section and `dir`, see `StageContext.tracker`; None without one.
        debug: the recipe's debug section.
        profile: folder for profiles of training steps; None: none are taken.
        environment: recorded in the manifest (engine section of the recipe).
        recipe: recorded in the manifest (`ResolvedRecipe.account` and the run's name).
    """

    stage: str
    type: str
    key: str
    document: dict[str, Any]
    config: dict[str, Any]
    seed: int
    inputs: dict[str, dict[str, Any]]
    predicted: dict[str, dict[str, Any]]
    estimate: dict[str, Any]
    target: str
    events: str
    device: str = "auto"
    ranks: int = 1
    nodes: int = 1
    attempt: int = 1
    log: str | None = None
    attended: bool = True
    tracker: dict[str, Any] | None = None
    debug: dict[str, Any] = field(default_factory=dict)
    profile: str | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        """Ranks on all machines together."""
        return self.ranks * self.nodes

    def write(self, work_dir: Path) -> None:
        work_dir.mkdir(parents=True, exist_ok=True)
        write_json(work_dir / JOB, {"format": 1, **asdict(self)})

    @classmethod
    def read(cls, work_dir: Path) -> Job:
        """Raises StageError when there is no readable job."""
        try:
            data = read_json(work_dir / JOB)
            data.pop("format")
            return cls(**data)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            what = f"{work_dir} holds no job that this version of posttrain can run: {error}"
            raise StageError(what, str(work_dir / JOB), "start the stage with posttrain run or resume") from error


def clear_work(work_dir: Path) -> None:
    """Remove what attempts have left in a work folder: all but its locks and the job itself."""
    for path in work_dir.iterdir() if work_dir.exists() else []:
        if path.name in (LOCK, CLAIM, JOB):
            continue
        if path.is_dir() and not path.is_symlink():
            remove_tree(path)
        else:
            path.unlink()


def describe_failure(error: BaseException, work_dir: Path) -> dict[str, Any]:
    """Why an attempt failed, as fields of its outcome: a known reason with its problems, or a traceback."""
    if not isinstance(error, PosttrainError):
        error = disk_error(error, work_dir) or error
    if isinstance(error, PosttrainError):
        problems = [[problem.what, problem.where, problem.fix] for problem in error.problems]
        advised = any(problem.fix for problem in error.problems)
        damaged = {"damaged": error.inputs} if isinstance(error, DamagedInputs) else {}
        return {"message": str(error), "known": True, "advised": advised, "problems": problems, **damaged}
    text = "".join(traceback.format_exception(error))
    return {"message": f"{type(error).__name__}: {error}", "known": False, "traceback": text}


def write_outcome(work_dir: Path, status: str, **fields: Any) -> dict[str, Any]:
    """Record how an attempt ended: "done", "stopped" (with step) or "failed" (with message)."""
    outcome = {"status": status, **fields}
    write_json(work_dir / OUTCOME, outcome)
    return outcome


def read_outcome(work_dir: Path) -> dict[str, Any] | None:
    """How the last attempt ended; None when it was killed before it could say."""
    try:
        outcome = read_json(work_dir / OUTCOME)
    except (OSError, ValueError):
        return None
    return outcome if isinstance(outcome, dict) and "status" in outcome else None


def work_dirs_of(run: RunDir) -> list[Path]:
    """Work folders in which stages of this run are computed for this run, not for another one that shares a key."""
    found = []
    for stage in run.record()["stages"]:
        folder = Store(run.outputs / "store").work_dir(stage["type"], stage["key"])
        try:
            if Path(Job.read(folder).events).resolve() == run.events_path.resolve():
                found.append(folder)
        except StageError:
            continue
    return found
