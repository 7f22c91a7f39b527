"""The report of a run that has ended, built anew only when what it is made of has changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.pipeline.files import read_json, write_json
from posttrain.pipeline.fingerprint import digest
from posttrain.pipeline.plan import Plan
from posttrain.pipeline.run_dir import FORMAT, RunDir
from posttrain.pipeline.store import Artifact


def update_report(plan: Plan, run: RunDir, finished: Mapping[str, Artifact]) -> Path:
    """Build the report, unless nothing has changed since it was built; its path. `finished`: artifacts by stage."""
    content = {"format": FORMAT, "made_from": _made_from(plan, run, finished)}
    if run.report_path.exists() and _last(run) == content:
        return run.report_path
    from posttrain import report

    path = report.build(run.path)
    write_json(run.report_record_path, content)
    return path


def _made_from(plan: Plan, run: RunDir, finished: Mapping[str, Artifact]) -> str:
    """Digest of what the report is made of: the run's facts and the artifacts there are, of whichever run."""
    facts = [plan.resolved.account(), plan.resolved.frame.seed]
    artifacts = {name: artifact.manifest["sha256"] for name, artifact in finished.items()}
    stages = [[planned.name, planned.key, artifacts.get(planned.name)] for planned in plan.stages]
    return digest([run.name, facts, stages])


def _last(run: RunDir) -> Any:
    try:
        return read_json(run.report_record_path)
    except (OSError, ValueError):
        return None
