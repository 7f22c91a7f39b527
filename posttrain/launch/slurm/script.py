"""The batch script of a stage, from `job.sh.j2`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.config.launcher import Resources

if TYPE_CHECKING:
    from posttrain.config.schema import Engine
    from posttrain.pipeline.plan import Plan, StagePlan

TEMPLATE = Path(__file__).with_name("job.sh.j2")


@dataclass(frozen=True)
class Place:
    """Where a job's script and output are, and which run it is for.

    Attributes:
        folder: of the script and the output.
        name: of the run or sweep, for people.
        run: the run's folder; None for an array, whose task N works for the run in line N (from 0) of the file `runs`.
    """

    folder: Path
    name: str
    run: Path | None = None
    runs: Path | None = None
    tasks: int = 1

    def script(self, stage: str) -> Path:
        return self.folder / f"{stage}.sh"


def script_text(plan: Plan, planned: StagePlan, place: Place, cwd: Path) -> str:
    """The text of a stage's batch script."""
    import jinja2

    launcher, engine = plan.resolved.frame.launcher, plan.resolved.frame.engine
    resources = launcher.of(planned.name)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        stage=planned.name,
        run=place.name,
        options=options(resources, engine, planned, place, launcher.signal_lead_s),
        extra=resources.extra,
        cwd=cwd,
        modules=launcher.modules,
        environment=list(_import_path().items()),
        setup=launcher.setup,
        folder=place.run,
        runs=place.runs,
        command=[*launcher.command, launcher.python or sys.executable, "-m", "posttrain"],
        force=planned.forced,
    )


def options(resources: Resources, engine: Engine, planned: StagePlan, place: Place, signal_lead_s: int) -> list[str]:
    """The options of sbatch that stand in the script."""
    nodes = engine.nodes if planned.stage.parallel else 1
    output = "%A_%a" if place.runs is not None else "%j"
    asked: dict[str, object] = {
        "job-name": f"{place.name}.{planned.name}",
        "output": f"{place.folder}/{planned.name}-{output}.out",
        "account": resources.account,
        "partition": resources.partition,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "time": resources.time,
        "nodes": nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": resources.cpus_per_task,
        "mem": resources.mem,
        **_gpus(resources, engine, planned),
        "array": f"0-{place.tasks - 1}" if place.runs is not None else None,
        "signal": f"B:USR1@{signal_lead_s}",
        "open-mode": "append",
    }
    given = [f"--{name}={shlex.quote(str(value))}" for name, value in asked.items() if value is not None]
    return [*given, "--requeue"]


def gpus_of(resources: Resources, engine: Engine, planned: StagePlan) -> int:
    """GPUs on each node of a stage's job."""
    if resources.gpus_per_node is not None:
        return resources.gpus_per_node
    if engine.device != "cuda":
        return 0
    return engine.ranks if planned.stage.parallel else 1


def _gpus(resources: Resources, engine: Engine, planned: StagePlan) -> Mapping[str, str]:
    count = gpus_of(resources, engine, planned)
    if count == 0:
        return {}
    kind = f"{resources.gpu_type}:" if resources.gpu_type else ""
    return (
        {"gpus-per-node": f"{kind}{count}"}
        if resources.gpu_option == "gpus-per-node"
        else {"gres": f"gpu:{kind}{count}"}
    )


def _import_path() -> dict[str, str]:
    """Variables that a job needs to import a posttrain that is not installed but run from its checkout."""
    root = Path(__file__).resolve().parents[3]
    if not (root / "pyproject.toml").exists():
        return {}
    paths = shlex.quote(f"{root}:{root / 'kernels'}")
    return {"PYTHONPATH": f'{paths}"${{PYTHONPATH:+:$PYTHONPATH}}"'}
