"""The `launcher` section: what starts the stages' processes. Nothing in it is part of a stage's key."""

from __future__ import annotations

import re
import shlex
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from posttrain.config.section import Section

_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d\d?))?(?::(\d\d?))?")
_OURS = {"array", "dependency", "error", "export", "kill-on-invalid-dep", "nodes", "no-requeue", "ntasks"}
_OURS |= {"ntasks-per-node", "open-mode", "output", "parsable", "requeue", "signal", "time"}
"""Options of sbatch that posttrain writes itself; a second one would win over it, or change nothing."""
_OURS_SHORT = re.compile(r"-[HOQsvW]*[adeoNnt]")
"""The same in one letter: its value may follow without a space, and options without a value may come before."""
_ONE_LINE = r"^[^\n]*$"


def minutes(time: str) -> float:
    """Minutes of a time as Slurm reads it: MINUTES, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS.

    Raises:
        ValueError: it is none of these, or nothing.
    """
    found = _TIME.fullmatch(time)
    if found is None:
        raise ValueError(f"'{time}' is no time: write minutes, HH:MM:SS or D-HH:MM:SS")
    days, first, second, third = (None if part is None else int(part) for part in found.groups())
    if days is not None:
        total = days * 1440 + first * 60 + (second or 0) + (third or 0) / 60
    elif third is not None:
        total = first * 60 + (second or 0) + third / 60
    else:
        total = first + (second or 0) / 60
    if total <= 0:
        raise ValueError(f"'{time}' leaves no time at all")
    return total


def is_ours(word: str) -> bool:
    """Whether a word of an sbatch line is an option that posttrain sets itself, in any spelling that sbatch takes."""
    if word.startswith("--"):
        # An option may be shortened as long as it can be told from others.
        name = word[2:].partition("=")[0]
        return any(option.startswith(name) for option in _OURS)
    return _OURS_SHORT.match(word) is not None


class Resources(Section):
    """What a stage's job asks of Slurm; null leaves it to the cluster."""

    account: str | None = Field(None, pattern=r"^\S+$", description="Account that is charged (--account).")
    partition: str | None = Field(None, pattern=r"^\S+$", description="Partition, or several with commas.")
    qos: str | None = Field(None, pattern=r"^\S+$", description="Quality of service (--qos).")
    constraint: str | None = Field(None, pattern=_ONE_LINE, description="Features that a node must have, e.g. h100.")
    time: str | None = Field(
        None,
        description="Time limit of one attempt: MM:SS, HH:MM:SS or D-HH:MM:SS. A stage stops in time and goes on in "
        "the next attempt.",
    )
    mem: str | None = Field(None, pattern=r"^\d+[KMGT]?$", description="Memory of each node, e.g. 200G; 0: all of it.")
    cpus_per_task: int | None = Field(None, ge=1, description="CPU cores on each node, where one task runs.")
    gpus_per_node: int | None = Field(
        None, ge=0, description="GPUs on each node. null: with engine.device=cuda a GPU a rank, else none."
    )
    gpu_type: str | None = Field(None, pattern=r"^[\w.-]+$", description="Kind of GPU as the cluster calls it.")
    gpu_option: Literal["gpus-per-node", "gres"] = Field(
        "gpus-per-node", description="How GPUs are asked for: --gpus-per-node=N or --gres=gpu:N."
    )
    extra: list[str] = Field(
        default_factory=list, description="Further options of sbatch, a line each, e.g. --exclusive."
    )

    @field_validator("time", mode="before")
    @classmethod
    def _readable(cls, time: Any) -> Any:
        if isinstance(time, int | float):
            raise ValueError(f"{time} has no unit, and may be 4:00:00 as YAML reads it without quotes; write HH:MM:SS")
        if isinstance(time, str):
            minutes(time)
        return time

    @field_validator("extra")
    @classmethod
    def _options(cls, extra: list[str]) -> list[str]:
        for line in extra:
            if not re.fullmatch(r"-[^\n]+", line):
                raise ValueError(f"'{line}' is no option of sbatch, which begins with a dash, e.g. --exclusive")
            try:
                words = shlex.split(line)
            except ValueError as error:
                raise ValueError(f"'{line}' cannot be read as options of sbatch: {error}") from error
            for word in words:
                if is_ours(word):
                    raise ValueError(f"{word} is set by posttrain: launcher.time, engine.nodes and its own needs")
        return extra


class Launcher(Resources):
    """What starts the stages' processes."""

    name: str = Field("local", description="The option chosen from conf/launcher.")
    type: Literal["local", "slurm"] = Field(
        "local", description="local: a child process of the command. slurm: a batch job a stage."
    )
    modules: list[str] = Field(default_factory=list, description="Environment modules that a job loads.")
    setup: list[str] = Field(
        default_factory=list, description="Shell lines that a job runs before posttrain, e.g. source env.sh."
    )
    command: list[str] = Field(
        default_factory=list,
        description="Words put before posttrain's command in a job, such as those that start a container.",
    )
    python: str | None = Field(
        None, min_length=1, description="The Python of the jobs. null: the one that submits, by its path."
    )
    signal_lead_s: int = Field(
        300, ge=10, le=65535, description="Seconds before the time limit at which a stage is told to save and stop."
    )
    max_requeues_without_progress: int = Field(
        3, ge=0, description="A stage that was requeued more often than this in a row and came no further has failed."
    )
    stages: dict[str, Resources] = Field(
        default_factory=dict, description="Stage name to what its job asks for instead; null as the launcher does."
    )
    dependencies: dict[str, dict[str, Literal["afterok", "afterany"]]] = Field(
        default_factory=dict,
        description="Stage name to a stage it needs to when it may start: afterok, once that is done (the default); "
        "afterany, however that job ended, for a result that may come from elsewhere.",
    )

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        # Of single stages a recipe may say what their jobs need, wherever it runs.
        fields = set(type(self).model_fields) - {"name", "type", "stages", "dependencies"}
        default = type(self).model_construct()
        changed = sorted(field for field in fields if getattr(self, field) != getattr(default, field))
        if self.type == "local" and changed:
            listed = ", ".join(f"launcher.{field}" for field in changed)
            what = f"{listed} has no effect with launcher={self.name}; it is for Slurm's jobs"
            raise ValueError(f"{what}, e.g. launcher=slurm")
        return self

    @model_validator(mode="after")
    def _signal_comes_in_time(self) -> Self:
        for stage in (None, *self.stages):
            time = self.of(stage).time
            if time is not None and self.signal_lead_s > minutes(time) * 30:
                whose = f"of stage {stage} " if stage is not None else ""
                raise ValueError(
                    f"signal_lead_s={self.signal_lead_s} is more than half the time limit {whose}({time}): a stage "
                    "would be told to stop soon after it has started; raise time, or lower signal_lead_s"
                )
        return self

    def of(self, stage: str | None) -> Resources:
        """The resources of a stage's job: its own where it has any, else the launcher's."""
        common = {field: getattr(self, field) for field in Resources.model_fields}
        own = self.stages.get(stage) if stage is not None else None
        if own is None:
            return Resources.model_construct(**common)
        default = Resources.model_construct()
        changed = {f: getattr(own, f) for f in Resources.model_fields if getattr(own, f) != getattr(default, f)}
        return Resources.model_construct(**common | changed)
