"""One stage of a plan from its claim to its end, in a worker of its own: what every launcher does alike."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from posttrain.errors import PosttrainError
from posttrain.pipeline.events import Event, EventLog, EventReader
from posttrain.pipeline.files import discard_tree
from posttrain.pipeline.graph import in_section
from posttrain.pipeline.lock import Lock, LockHeld, held, holder
from posttrain.pipeline.plan import Plan, StagePlan
from posttrain.pipeline.progress import RunState, state_of
from posttrain.pipeline.run_dir import RunDir
from posttrain.pipeline.store import Artifact, damage

if TYPE_CHECKING:
    from posttrain.launch.job import Job
    from posttrain.launch.local import LocalWorker

POLL_SECONDS = 0.1


class Display(Protocol):
    """What shows a run's course to somebody."""

    def event(self, event: Event, state: RunState) -> None:
        """One event has come; `state` includes it."""

    def note(self, text: str) -> None:
        """A sentence for the reader."""


class Quiet:
    """Shows nothing."""

    def event(self, event: Event, state: RunState) -> None:
        return

    def note(self, text: str) -> None:
        return


class Interrupted(Exception):
    """A second Ctrl-C: the worker has been killed."""


class StageRunner:
    """Runs single stages of a plan; who made it decides which, and holds what lock that needs."""

    stopping_note = "stopping: the stage saves its state first (Ctrl-C again ends it at once)"

    def __init__(self, plan: Plan, run_dir: RunDir, display: Display) -> None:
        from posttrain.launch.signals import Interrupts

        self.plan, self.run_dir, self.display = plan, run_dir, display
        self.log = EventLog(run_dir.events_path)
        self.reader = EventReader(run_dir.events_path, at_end=True)
        self.state = state_of([], [planned.name for planned in plan.stages])
        self.interrupts = Interrupts()
        self.stopping = False
        self.finished: dict[str, Artifact] = {}

    def _started(self) -> dict[str, Any]:
        """What the event of a started stage says besides attempt, process and log."""
        return {}

    def _stopped_how(self) -> dict[str, Any]:
        """What the event of a stopped stage says besides where it stopped."""
        return {}

    def _retired(self, lost: list[StagePlan]) -> None:
        """Stages have lost artifacts that were made from outputs which a rerun replaced."""

    def _rerun(self, planned: StagePlan) -> None:
        """A forced stage has begun, or is done."""

    def _cached(self, planned: StagePlan, artifact: Artifact) -> None:
        self.finished[planned.name] = artifact
        self.run_dir.link_artifact(planned.name, artifact.folder)
        self.log.append("stage_cached", planned.name, key=planned.key)
        discard_work(self.plan.store.work_dir(planned.stage.type, planned.key))

    def _outcome(self, planned: StagePlan) -> dict[str, Any] | None:
        from posttrain.launch.job import read_outcome

        return read_outcome(self.plan.store.work_dir(planned.stage.type, planned.key))

    def _stage(self, planned: StagePlan) -> tuple[str, str]:
        """Run one stage to its end; returns "done", "cached", "stopped" or "failed", and why."""
        work_dir = self.plan.store.work_dir(planned.stage.type, planned.key)
        claim = self._claim(planned, work_dir)
        if claim is None:
            return "stopped", ""
        with claim:
            return self._claimed(planned, work_dir, claim)

    def _claim(self, planned: StagePlan, work_dir: Path) -> Lock | None:
        """The right to look after a work folder, once no other runner has it; None when a stop was asked for."""
        from posttrain.launch.job import CLAIM, LOCK, Job
        from posttrain.launch.local import end_orphan

        told = False
        while True:
            try:
                claim = Lock.acquire(work_dir / CLAIM, patience=0)
            except LockHeld:
                claim = None
            try:
                if claim is not None and held(work_dir / LOCK) and Job.read(work_dir).attended:
                    self.display.note(f"{planned.name}: waiting for the worker of an earlier, dead runner to end")
                    end_orphan(work_dir)
            except BaseException:
                if claim is not None:
                    claim.release()
                raise
            if claim is not None and not held(work_dir / LOCK):
                return claim
            if claim is not None:
                claim.release()
            if not told:
                who = holder(work_dir / CLAIM) or holder(work_dir / LOCK)
                whose = f" ({who})" if who is not None else ""
                self.display.note(f"{planned.name}: another run{whose} is computing it; waiting for that")
                told = True
            self._show_events()
            if self._stop_wanted():
                return None
            time.sleep(POLL_SECONDS)

    def _claimed(self, planned: StagePlan, work_dir: Path, claim: Lock) -> tuple[str, str]:
        """Run one stage whose work folder is ours."""
        from posttrain.launch.job import clear_work
        from posttrain.launch.local import LocalWorker
        from posttrain.pipeline.rerun import files_before

        store, type_, key = self.plan.store, planned.stage.type, planned.key
        before = planned.before if planned.begun else files_before(store, type_, key)
        # Asked again: another runner may have made it anew meanwhile.
        if planned.damaged and damage(store.folder(type_, key)):
            store.set_damaged(type_, key)
        planned.damaged = False
        artifact = store.find(type_, key)
        if artifact is not None and planned.begun and (self._outcome(planned) or {}).get("status") == "done":
            # A worker that outlived the runner which had forced the stage has published it.
            self._done(planned, artifact, work_dir)
            self._consequences(planned, before)
            return "done", ""
        if artifact is not None and not planned.forced:
            self._cached(planned, artifact)
            discard_tree(work_dir)
            return "cached", ""
        if planned.forced:
            if not planned.begun:
                clear_work(work_dir)
            if artifact is not None:
                store.set_aside(type_, key)
            planned.begun, planned.before = True, before
            self._rerun(planned)
        try:
            job = self._job(planned)
        except PosttrainError as error:
            problems = in_section(error.problems, planned.stage, planned.name)
            return self._failed(planned, "\n".join(map(str, problems)))
        worker = LocalWorker.start(job, work_dir)
        self.log.append(
            "stage_started", planned.name, attempt=job.attempt, pid=worker.pid, log=job.log, **self._started()
        )
        try:
            code = self._attend(worker)
        except Interrupted:
            self.log.append("stage_stopped", planned.name, message="killed by a second Ctrl-C")
            raise
        except BaseException:
            worker.kill()
            raise
        if not claim.held:
            who = holder(claim.path)
            what = f"stage {planned.name}: {who or 'another process'} has taken over its work folder, as this runner "
            return self._failed(planned, f"{what}showed no life for a while; it goes on there")
        how = self._conclude(planned, job, code)
        if planned.name in self.finished:
            self._consequences(planned, before)
        return how

    def _consequences(self, planned: StagePlan, before: dict[str, Any] | None) -> None:
        """What follows from a stage that has been done, for those after it and for what the run still has to do."""
        if before is not None:
            self._rerun_descendants(planned, before)
        if planned.forced:
            planned.forced = planned.begun = False
            planned.before = None
            self._rerun(planned)

    def _rerun_descendants(self, planned: StagePlan, before: dict[str, Any]) -> None:
        """When a stage that was run again came out differently, have what was made from its old outputs made again."""
        from posttrain.pipeline.rerun import files_of, retire_descendants

        after = files_of(self.finished[planned.name].manifest)
        lost = retire_descendants(self.plan, planned.name, before, after)
        for stale in lost:
            self.finished.pop(stale.name, None)
            (self.run_dir.path / "artifacts" / stale.name).unlink(missing_ok=True)
            then = "it runs again" if stale.selected else "left out now, the next run makes it again"
            self.display.note(f"{stale.name}: made from outputs of {planned.name} that were replaced; {then}")
        if lost:
            self._retired(lost)

    def _job(self, planned: StagePlan) -> Job:
        """The job with the inputs' measured metas; raises RecipeError when they do not fit after all."""
        from posttrain.launch.job import Job

        parents = {name: self.finished[one.stage] for name, one in planned.inputs.items()}
        metas = {name: parents[name].metas[one.output] for name, one in planned.inputs.items()}
        predicted = planned.stage.describe(planned.cfg, metas)
        attempt = self.run_dir.next_attempt(planned.name)
        engine, debug = self.plan.resolved.frame.engine, self.plan.resolved.frame.debug
        return Job(
            stage=planned.name,
            type=planned.stage.type,
            key=planned.key,
            document=planned.document,
            config=planned.cfg.model_dump(mode="json"),
            seed=self.plan.resolved.frame.seed,
            inputs={
                name: {
                    "reference": one.reference,
                    "path": str(parents[name].output(one.output)),
                    "key": one.key,
                    "output": one.output,
                    "meta": metas[name].to_json(),
                }
                for name, one in planned.inputs.items()
            },
            predicted={name: meta.to_json() for name, meta in predicted.items()},
            estimate=planned.to_json()["estimate"],
            target=str(self.plan.store.folder(planned.stage.type, planned.key)),
            events=str(self.run_dir.events_path),
            device=engine.device,
            ranks=engine.ranks if planned.stage.parallel else 1,
            nodes=engine.nodes if planned.stage.parallel else 1,
            attempt=attempt,
            log=None if debug.inline else str(self.run_dir.log_path(planned.name, attempt)),
            tracker=self._tracker(),
            debug=debug.model_dump(mode="json"),
            profile=str(self.run_dir.path / "profile" / planned.name) if debug.profile_steps else None,
            environment=engine.model_dump(mode="json"),
            recipe={**self.plan.resolved.account(), "run": self.run_dir.name},
        )

    def _tracker(self) -> dict[str, Any] | None:
        tracker = self.plan.resolved.frame.tracker
        return None if tracker.name == "none" else {**tracker.model_dump(mode="json"), "dir": str(self.run_dir.path)}

    def _attend(self, worker: LocalWorker) -> int:
        """Follow a worker's events until it ends, passing on the wish to stop; returns its exit code."""
        passed_on = False
        while (code := worker.wait(POLL_SECONDS)) is None:
            self._show_events()
            if self.interrupts.count > 1:
                worker.kill()
                raise Interrupted
            if self._stop_wanted() and not passed_on:
                passed_on = True
                worker.stop()
        return code

    def _stop_wanted(self) -> bool:
        """Whether Ctrl-C, SIGTERM or `posttrain cancel` asked for an end."""
        if self.interrupts.count and not self.stopping:
            self.stopping = True
            self.log.append("stop_requested", source="signal")
            self.display.note(self.stopping_note)
        return self.stopping

    def _conclude(self, planned: StagePlan, job: Job, code: int) -> tuple[str, str]:
        self._show_events()
        work_dir = self.plan.store.work_dir(planned.stage.type, planned.key)
        outcome = self._outcome(planned)
        artifact = self.plan.store.find(planned.stage.type, planned.key)
        if artifact is not None:
            self._done(planned, artifact, work_dir)
            return "done", ""
        if outcome is not None and outcome["status"] == "stopped":
            self.log.append("stage_stopped", planned.name, step=outcome["step"], **self._stopped_how())
            return "stopped", ""
        if outcome is None and self.stopping:
            how = {"message": "ended before it could save", **self._stopped_how()}
            self.log.append("stage_stopped", planned.name, **how)
            return "stopped", ""
        message = self._failure(planned, job, outcome, code)
        if outcome is not None and outcome.get("damaged"):
            return "damaged", message
        return self._failed(planned, message)

    def _done(self, planned: StagePlan, artifact: Artifact, work_dir: Path) -> None:
        self.finished[planned.name] = artifact
        self.run_dir.link_artifact(planned.name, artifact.folder)
        discard_tree(work_dir)
        self.log.append("stage_finished", planned.name, seconds=artifact.manifest["seconds"])

    def _failure(self, planned: StagePlan, job: Job, outcome: dict[str, Any] | None, code: int) -> str:
        lines = [f"stage {planned.name} failed"]
        if outcome is None:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            memory = "; the system kills processes that take too much memory" if code == -9 else ""
            lines = [f"the worker of stage {planned.name} {how} without saying why{memory}"]
        elif outcome.get("known"):
            lines.append(outcome["message"])
        else:
            lines.append(outcome.get("traceback") or outcome.get("message", ""))
        if job.log is not None:
            lines.append(f"  log: {job.log}")
        resume = self.run_dir.typed("resume")
        # A resumed run keeps its recipe, so a fix of the recipe cannot be followed by that.
        advised = outcome is not None and outcome.get("advised")
        lines.append(
            f"  or, when the cause lies outside the recipe: {resume}"
            if advised
            else f"  do: {resume}, once the cause is gone"
        )
        return "\n".join(lines)

    def _failed(self, planned: StagePlan, message: str) -> tuple[str, str]:
        self.log.append("stage_failed", planned.name, message=message)
        if planned.forced and self.plan.store.restore(planned.stage.type, planned.key):
            self.display.note(f"{planned.name}: the artifact that --force had set aside is back")
        return "failed", message

    def _show_events(self) -> None:
        for event in self.reader.poll():
            self.state.update(event)
            self.display.event(event, self.state)
            if event["event"] == "stop_requested":
                self.stopping = True


def discard_work(work_dir: Path) -> bool:
    """Remove a work folder unless somebody works in it; true when it is gone."""
    from posttrain.launch.job import CLAIM, LOCK

    if not work_dir.exists():
        return True
    try:
        # In a runner's order: it claims the folder first and starts a worker then.
        with Lock.acquire(work_dir / CLAIM, patience=0), Lock.acquire(work_dir / LOCK, patience=0):
            discard_tree(work_dir)
    except LockHeld:
        return False
    return True
