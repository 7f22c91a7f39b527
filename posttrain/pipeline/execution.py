"""One execution of a plan: stage after stage in workers of their own, every step of the way an event."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, PosttrainError
from posttrain.pipeline.disk import disk_error, free_reserve, keep_reserve
from posttrain.pipeline.files import write_text
from posttrain.pipeline.plan import Plan, StagePlan
from posttrain.pipeline.run_dir import FORMAT, RunDir
from posttrain.pipeline.run_report import update_report
from posttrain.pipeline.stage_runner import Display, Interrupted, StageRunner


@dataclass(frozen=True)
class RunResult:
    """How a run ended: its folder, the exit code, why it failed, and the report when there is one."""

    run_dir: RunDir
    exit_code: int
    message: str = ""
    report: Path | None = None
    followed: bool = False


class Execution(StageRunner):
    """One execution of a plan; the caller holds the run's lock."""

    def __init__(self, plan: Plan, run_dir: RunDir, display: Display) -> None:
        super().__init__(plan, run_dir, display)
        self.repaired: set[str] = set()
        """Stages that were run again because their artifact was damaged; twice means a disk that cannot be trusted."""

    def run_all(self) -> RunResult:
        """Execute what is to do; a disk that is full or cannot be written is a failed run with one message."""
        try:
            return self._run_all()
        except OSError as error:
            known = disk_error(error, self.run_dir.path)
            if known is None:
                raise
            return RunResult(self.run_dir, EXIT_FAILED, str(known))

    def _run_all(self) -> RunResult:
        self._freeze()
        keep_reserve(self.run_dir.path)
        self.log.append("run_started", recipe=self.plan.resolved.recipe, stages=len(self.plan.stages))
        status, code, message = "failed", EXIT_FAILED, ""
        try:
            with self.interrupts:
                status, code, message = self._stages()
        except Interrupted:
            status, code, message = "interrupted", EXIT_INTERRUPTED, self._how_to_continue()
        except (PosttrainError, OSError) as error:
            message = str((isinstance(error, OSError) and disk_error(error, self.run_dir.path)) or error)
            raise
        finally:
            free_reserve(self.run_dir.path)
            self.log.append("run_finished", status=status, exit=code, message=message)
            self._show_events()
        report = update_report(self.plan, self.run_dir, self.finished) if code == EXIT_DONE else None
        return RunResult(self.run_dir, code, message, report)

    def _freeze(self) -> None:
        freeze(self.plan, self.run_dir)

    def _retired(self, lost: list[StagePlan]) -> None:
        self._freeze()

    def _rerun(self, planned: StagePlan) -> None:
        self._freeze()

    def _stages(self) -> tuple[str, int, str]:
        for planned in self.plan.stages:
            if planned.status == "cached" and planned.artifact is not None:
                self._cached(planned, planned.artifact)
        # Asked anew each time: a stage that was run again may have made an earlier one a stage to do.
        while (planned := self._next()) is not None:
            self._show_events()
            if self._stop_wanted():
                return self._stopped()
            status, message = self._stage_on_good_inputs(planned)
            self._show_events()
            if status == "stopped":
                return self._stopped()
            if status == "failed":
                return "failed", EXIT_FAILED, message
        return "done", EXIT_DONE, ""

    def _next(self) -> StagePlan | None:
        """The first stage that is still to do."""
        return next((one for one in self.plan.stages if one.to_do and one.name not in self.finished), None)

    def _stopped(self) -> tuple[str, int, str]:
        return "stopped", EXIT_STOPPED, self._how_to_continue()

    def _how_to_continue(self) -> str:
        return f"continue with: {self.run_dir.typed('resume')}"

    def _stage_on_good_inputs(self, planned: StagePlan) -> tuple[str, str]:
        """`_stage`; where its worker finds inputs damaged, the stages that made them run again first."""
        status, message = self._stage(planned)
        while status == "damaged":
            why, damaged = message, (self._outcome(planned) or {})["damaged"]
            parents: dict[str, list[str]] = {}
            for name, found in damaged.items():
                parents.setdefault(planned.inputs[name].stage, []).extend(found)
            for producer, found in parents.items():
                parent, lines = self.plan[producer], list(dict.fromkeys(found))
                adopted = "adopted" in self.finished[parent.name].manifest
                if parent.name in self.repaired or not parent.selected or adopted:
                    return self._failed(planned, why)
                self.repaired.add(parent.name)
                self.display.note(f"{parent.name}: its artifact is damaged ({', '.join(lines)}); it is made again")
                self.log.append("artifact_damaged", parent.name, lines=lines)
                parent.status, parent.artifact, parent.damaged = "pending", None, True
                del self.finished[parent.name]
                status, message = self._stage_on_good_inputs(parent)
                self._show_events()
                if status not in ("done", "cached"):
                    return status, message
            status, message = self._stage(planned)
        return status, message


def freeze(plan: Plan, run: RunDir) -> None:
    """Write run.json and the resolved recipe."""
    created = run.record()["created"] if run.exists() else time.time()
    record = make_record(plan, created)
    text = plan.resolved.to_yaml()
    if not run.recipe_path.exists() or run.recipe_path.read_text(encoding="utf-8") != text:
        write_text(run.recipe_path, text)
    run.write_record(record)


def make_record(plan: Plan, created: float) -> dict[str, Any]:
    """The content of run.json."""
    resolved = plan.resolved
    return {
        "format": FORMAT,
        "name": plan.run_name,
        "recipe_digest": plan.recipe_digest,
        **resolved.account(),
        "created": created,
        "cwd": str(Path.cwd()),
        "seed": resolved.frame.seed,
        "stages": [
            {
                **{field: planned.to_json()[field] for field in ("name", "type", "key", "inputs")},
                "artifact": plan.store.folder(planned.stage.type, planned.key).relative_to(plan.outputs).as_posix(),
                "status": "cached" if planned.status == "cached" else "pending",
                "selected": planned.selected,
                "forced": planned.forced,
                "begun": planned.forced and planned.begun,
                "before": planned.before,
                "key_document": planned.document,
            }
            for planned in plan.stages
        ],
    }
