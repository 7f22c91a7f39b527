"""The frame of a recipe: everything but the stages' own settings. Defaults live here, YAML says only what differs."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from posttrain.config.deepspeed import forbidden
from posttrain.config.launcher import Launcher
from posttrain.config.section import Section


class Run(Section):
    """This run: its name and what it may cost."""

    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Folder name under outputs/runs. null: the recipe's name and 8 hexadecimal digits of its content.",
    )
    limit_hours: float = Field(
        1.0, gt=0, description="Hours of computing above which a run stops at the plan and asks for --yes."
    )


class Paths(Section):
    """Where results go."""

    outputs: str = Field("outputs", min_length=1, description="Folder of store and runs, made when a run starts.")


REPLICATED, SHARDED = ("single", "ddp"), ("zero2", "zero3", "fsdp2")
"""Strategies by which every rank has the whole model that it trains, and those by which ranks have shards of it."""


class Engine(Section):
    """What a stage computes on."""

    name: str = Field("auto", description="The option chosen from conf/engine.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda when a device is there, else cpu.")
    strategy: Literal["single", "ddp", "zero2", "zero3", "fsdp2"] = Field(
        "single",
        description="How training stages use several ranks, each with its share of each step's sequences. single: one "
        "rank. ddp: every rank has the whole model. zero2 (DeepSpeed): gradients and AdamW's moments in shards. zero3 "
        "(DeepSpeed), fsdp2 (torch): weights in shards as well.",
    )
    ranks: int = Field(
        1, ge=1, le=1024, description="Processes of a training stage on one machine, one for each GPU: engine=ddp."
    )
    nodes: int = Field(
        1, ge=1, le=1024, description="Machines of a training stage, each with `ranks` ranks: launcher=slurm."
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="Laid over the DeepSpeed configuration of zero2 and zero3, which `posttrain show RECIPE "
        "engine=zero2` prints.",
    )

    @property
    def world_size(self) -> int:
        """Ranks of a training stage on all machines together."""
        return self.ranks * self.nodes

    @model_validator(mode="after")
    def _ranks_need_a_strategy(self) -> Self:
        if self.world_size > 1 and self.strategy == "single":
            raise ValueError(
                f"engine={self.name} works on one rank, not on {self.world_size} (engine.ranks times engine.nodes), "
                "e.g. engine=ddp"
            )
        return self

    @model_validator(mode="after")
    def _deepspeed_keeps_promises(self) -> Self:
        if self.deepspeed and not self.strategy.startswith("zero"):
            raise ValueError(f"deepspeed is for engine=zero2 and engine=zero3, not for engine={self.name}")
        if problems := forbidden(self.deepspeed):
            raise ValueError("; ".join(problems))
        return self


class Tracker(Section):
    """Where training curves are sent, besides the metrics that every stage writes to its own folder."""

    name: Literal["none", "wandb"] = Field("none", description="none, or wandb (imported only when chosen).")
    project: str = Field("posttrain", min_length=1, description="The tracker's project.")
    mode: Literal["offline", "online"] = Field(
        "offline", description="offline: written beside the run and sent later with `wandb sync`; online: sent at once."
    )


class Debug(Section):
    """Ways to look into a run: `debug=OPTION`. None of them is meant for results that count."""

    name: str = Field("none", description="The option chosen from conf/debug.")
    max_steps: int | None = Field(
        None, ge=1, description="Training stages end after so many steps at most. It changes what is computed."
    )
    anomaly: bool = Field(
        False,
        description="torch's anomaly detection: the operation whose gradient is NaN is named. Slow; nothing is "
        "compiled or captured.",
    )
    profile_steps: int = Field(
        0, ge=0, le=50, description="Steps of every training stage, from its third on, that torch's profiler records."
    )
    inline: bool = Field(
        False,
        description="Stages use the terminal, so that breakpoint() works, and a failing one ends in Python's debugger.",
    )


class Paper(Section):
    """The publication that a recipe follows, and where it does not. Words for readers: nothing is computed from it."""

    title: str = Field(min_length=1, description="Title of the publication.")
    link: str = Field(min_length=1, description="Where to read it.")
    differs: list[str] = Field(
        default_factory=list,
        description="What the recipe's own full-scale settings do otherwise than the publication, a sentence each.",
    )


class Frame(Section):
    """A whole recipe, with the stages and sources as plain mappings; those are checked by their own types."""

    description: str = Field("", description="What the recipe does, in a sentence.")
    paper: Paper | None = Field(None, description="The publication that the recipe follows, and where it does not.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of every stage's random numbers.")
    run: Run = Field(default_factory=Run, description="This run.")
    paths: Paths = Field(default_factory=Paths, description="Where results go.")
    engine: Engine = Field(default_factory=Engine, description="What a stage computes on: `engine=OPTION`.")
    launcher: Launcher = Field(default_factory=Launcher, description="What starts the stages: `launcher=OPTION`.")
    tracker: Tracker = Field(default_factory=Tracker, description="Where curves are sent: `tracker=OPTION`.")
    debug: Debug = Field(default_factory=Debug, description="Ways to look into a run: `debug=OPTION`.")
    model: dict[str, Any] | None = Field(None, description="The source model: `model=OPTION`.")
    models: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Further models: `model@models.NAME=OPTION`."
    )
    data: dict[str, Any] | None = Field(None, description="The recipe's data: `data=OPTION`.")
    datasets: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Further data: `data@datasets.NAME=OPTION`."
    )
    stages: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Stage name to its type, inputs and settings."
    )
    scales: dict[str, list[str]] = Field(
        default_factory=dict, description="Scale name to a list of overrides, applied before the user's own."
    )


SOURCE_SECTIONS = {"model": "model_source", "data": "data_source"}
"""Sections that are themselves one source stage, and its type."""
SOURCE_GROUPS = {"models": "model_source", "datasets": "data_source"}
"""Sections that hold further source stages by name."""
