"""The folder of a run: what was asked for, what happened, where the results are."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import RecipeError
from posttrain.pipeline.events import Event, read_events
from posttrain.pipeline.files import read_json, write_json
from posttrain.pipeline.graph import nearest
from posttrain.pipeline.store import Artifact, link, read_artifact

FORMAT = 1


class RunDir:
    """`outputs/runs/<name>/`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def outputs(self) -> Path:
        """The outputs folder that holds `runs/` and `store/`."""
        return self.path.parent.parent

    def typed(self, verb: str) -> str:
        """A command on this run as one types it here, with the outputs folder if it is not `outputs`."""
        command = f"posttrain {verb} {self.name}"
        usual = self.outputs.resolve() == (Path.cwd() / "outputs").resolve()
        return command if usual else f"{command} --outputs {shlex.quote(str(self.outputs))}"

    @property
    def record_path(self) -> Path:
        return self.path / "run.json"

    @property
    def recipe_path(self) -> Path:
        """The resolved recipe, frozen when the run started."""
        return self.path / "recipe.yaml"

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def lock_path(self) -> Path:
        """Held by the process that executes the run."""
        return self.path / "lock"

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"

    @property
    def report_record_path(self) -> Path:
        """What the report was made from, as a digest."""
        return self.path / "report.json"

    def exists(self) -> bool:
        return self.record_path.exists()

    def record(self) -> dict[str, Any]:
        """The content of `run.json`.

        Raises:
            RecipeError: it is missing, unreadable or of another format.
        """
        try:
            record = read_json(self.record_path)
        except (OSError, ValueError) as error:
            fix = f"start the run again under another name, or remove {self.path}"
            raise RecipeError(f"run {self.name} cannot be read: {error}", str(self.record_path), fix) from error
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise RecipeError(f"run.json is not of format {FORMAT}", str(self.record_path), f"remove {self.path}")
        return record

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replace `run.json` if it would change."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.exists() or read_json(self.record_path) != record:
            write_json(self.record_path, dict(record))

    def events(self) -> list[Event]:
        return read_events(self.events_path)

    def log_folder(self, stage: str) -> Path:
        return self.path / "logs" / stage

    def logs(self, stage: str) -> list[Path]:
        """Log files of a stage, first attempt first."""
        return sorted(self.log_folder(stage).glob("attempt_*.log"), key=_attempt_number)

    def next_attempt(self, stage: str) -> int:
        """Number of the attempt that would be started now, from 1."""
        logs = self.logs(stage)
        return _attempt_number(logs[-1]) + 1 if logs else 1

    def log_path(self, stage: str, attempt: int) -> Path:
        return self.log_folder(stage) / f"attempt_{attempt}.log"

    def link_artifact(self, stage: str, folder: Path) -> None:
        """Link a finished artifact as `artifacts/<stage>`."""
        link(self.path / "artifacts" / stage, folder)

    def artifact(self, stage: str) -> Artifact | None:
        """The finished artifact of a stage of this run, None while there is none."""
        for entry in self.record()["stages"]:
            if entry["name"] == stage:
                folder = self.outputs / entry["artifact"]
                return read_artifact(folder) if (folder / "manifest.json").exists() else None
        return None


def _attempt_number(path: Path) -> int:
    number = path.stem.removeprefix("attempt_")
    return int(number) if number.isdigit() else 0


def require_outputs(outputs: Path) -> None:
    """Raises RecipeError when there is no such outputs folder."""
    if not outputs.is_dir():
        fix = "give the folder with --outputs, or go to where the runs were started"
        raise RecipeError(f"there is no outputs folder {outputs}", "--outputs", fix)


def list_runs(outputs: Path) -> list[RunDir]:
    """All runs, the one that was active last first."""
    runs = [RunDir(path.parent) for path in (outputs / "runs").glob("*/run.json")]
    return sorted(runs, key=last_activity, reverse=True)


def last_activity(run: RunDir) -> float:
    """When the run last wrote an event, seconds since 1970."""
    path = run.events_path if run.events_path.exists() else run.record_path
    return path.stat().st_mtime


def find_run(name: str | None, outputs: Path) -> RunDir:
    """The run of that name, or whose name begins so, or at that path; the newest one when no name is given.

    Raises:
        RecipeError: there is none, or several begin so.
    """
    runs = list_runs(outputs)
    if name is None:
        if not runs:
            fix = "start one: posttrain run RECIPE, or give the folder that they went to (paths.outputs): --outputs DIR"
            raise RecipeError(f"there are no runs in {outputs / 'runs'}", fix=fix)
        return runs[0]
    if Path(name, "run.json").exists():
        return RunDir(Path(name).absolute())
    exact = [run for run in runs if run.name == name]
    matches = exact or [run for run in runs if run.name.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    names = [run.name for run in runs]
    if matches:
        listed = ", ".join(run.name for run in matches[:8])
        raise RecipeError(f"several runs begin with '{name}': {listed}", fix="give more of the name")
    near = nearest(name, names)
    listed = ", ".join(names[:8]) or "none yet"
    fix = f"write {near}" if near else f"runs in {outputs / 'runs'}: {listed}"
    raise RecipeError(f"there is no run '{name}' in {outputs / 'runs'}", fix=fix)
