"""Settings of a recipe's `data:` section: where the text comes from and how it is split."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from posttrain.data.sections import GYM_LATER, PROBLEM_FIELDS, GymTasks, HubData, PairSamples, PythonText, Samples
from posttrain.pipeline.stage import NOT_IN_KEY, StageConfig

Builder = Literal["tiny", "python_text", "teacher_samples", "hub", "reasoning_gym", "preference_pairs"]

SECTIONS = {
    "hub": ("hub",),
    "teacher_samples": ("samples",),
    "python_text": ("python",),
    "reasoning_gym": ("gym",),
    "preference_pairs": ("gym", "pairs"),
}
"""Builder to the sections of settings that decide what it makes."""

GYM_BUILDERS = ("reasoning_gym", "preference_pairs")
"""Builders whose held-out rows come from seeds of their own."""


class DataSourceConfig(StageConfig):
    """Where text comes from: files of yours (`path`), or a builder; and which documents are held out.

    A `path` wins over whatever the chosen option says: its `builder`, `inputs`, `hub`, `python`, `samples`, `gym`,
    `pairs`, `settings`, `heldout` and `label` are then ignored, so that `data.path=./my.jsonl` works on top of any
    option. Typed beside it they are an error.
    """

    ignored_with_path: ClassVar[tuple[str, ...]] = (
        "label",
        "builder",
        "inputs",
        "hub",
        "python",
        "samples",
        "gym",
        "pairs",
        "settings",
        "heldout",
    )

    type: Literal["data_source"] = "data_source"
    label: str | None = Field(
        None, description="Name in tables and reports; default: what it comes from.", json_schema_extra=NOT_IN_KEY
    )
    path: str | None = Field(
        None,
        description="A .jsonl, .txt or .md file, or a folder of them; ~ and relative paths as in a shell. "
        "A .jsonl row has `text_field`, `messages`, `prompt` with `completion`, `prompt` with `chosen` and "
        "`rejected`, `question` with `answer`, or a `prompt` alone; a .txt or .md file is one document.",
        json_schema_extra=NOT_IN_KEY,
    )
    text_field: str = Field("text", description="Field of a .jsonl or hub row that holds the text.")
    document_field: str | None = Field(
        None, description="Field that names the document a row was cut from; its rows stay in one split."
    )
    builder: Builder | None = Field(None, description="What makes the text when there is no `path`.")
    hub: HubData | None = Field(None, description="For builder `hub`.")
    python: PythonText = Field(default_factory=PythonText, description="For builder `python_text`.")
    samples: Samples = Field(default_factory=Samples, description="For builder `teacher_samples`.")
    gym: GymTasks = Field(default_factory=GymTasks, description="For builders `reasoning_gym` and `preference_pairs`.")
    pairs: PairSamples = Field(default_factory=PairSamples, description="For builder `preference_pairs`.")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="For a builder of an installed package: what it can be told."
    )
    heldout: Literal["split", "committed"] = Field(
        "split",
        description="split: whole documents of the same source, or generated problems of other seeds; committed: "
        "posttrain's own held-out text (data/heldout), the same on every machine.",
    )
    heldout_path: str | None = Field(
        None,
        description="Held-out text of yours, like `path`; wins over `heldout`.",
        json_schema_extra=NOT_IN_KEY,
    )
    heldout_fraction: float = Field(0.05, gt=0, lt=1, description="Share of documents held out by `heldout=split`.")
    max_rows: int | None = Field(None, ge=1, description="Keep at most this many training documents.")
    max_bytes: int | None = Field(None, ge=1, description="Keep at most this much training text, bytes.")

    @model_validator(mode="before")
    @classmethod
    def _files_need_no_model(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("path") is not None:
            return {name: value for name, value in data.items() if name != "inputs"}
        return data

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.path is not None:
            return self
        if self.builder is None:
            raise ValueError(
                "data needs a builder or a path; choose an option (`data=demo_text`) or a file (`data.path=./my.jsonl`)"
            )
        if self.builder == "hub" and self.hub is None:
            raise ValueError("builder hub needs `hub: {name: owner/name}`")
        if self.settings and self.builder in get_args(Builder):
            raise ValueError(f"`settings` are for builders of installed packages, and {self.builder} is not one")
        if self.builder == "preference_pairs" and (self.gym.answer_format != "plain" or self.gym.instruction):
            raise ValueError("`gym.answer_format` and `gym.instruction` are for builder reasoning_gym: pairs are plain")
        return self

    @property
    def kind(self) -> str:
        """Which source counts: `files` or the builder."""
        return "files" if self.path is not None else str(self.builder)

    @property
    def source_path(self) -> Path:
        """The file or folder that `path` names, absolute."""
        return Path(self.path or "").expanduser().resolve()

    @property
    def heldout_source_path(self) -> Path:
        """The file or folder that `heldout_path` names, absolute."""
        return Path(self.heldout_path or "").expanduser().resolve()

    @property
    def heldout_kind(self) -> Literal["path", "split", "committed"]:
        """Where the held-out documents come from."""
        if self.heldout_path is not None:
            return "path"
        return "split" if self.path is not None else self.heldout

    @property
    def name(self) -> str:
        """What tables call the data."""
        if self.path is not None:
            return self.source_path.name
        return self.label or (self.hub.name if self.kind == "hub" and self.hub else self.kind)

    def key_fields(self) -> dict[str, Any]:
        """Only what decides the result: files count by their content (`external`), an ignored option not at all."""
        fields = super().key_fields()
        fields["source"] = self.kind
        fields["heldout"] = self.heldout_kind
        foreign = self.kind not in ("files", *get_args(Builder))
        used = ("settings",) if foreign else SECTIONS.get(self.kind, ())
        for name in ("hub", "samples", "python", "gym", "pairs", "builder", "settings"):
            value = fields.pop(name)
            if name in used:
                fields[name] = value
        for name, later in (("hub", PROBLEM_FIELDS), ("gym", GYM_LATER)):
            section = getattr(self, name)
            for setting in later if name in fields else ():
                if getattr(section, setting) == type(section).model_fields[setting].default:
                    fields[name].pop(setting)
        if "pairs" in fields:
            fields["pairs"].pop("score_seconds")
            if fields["pairs"]["reward"] is None:
                fields["pairs"].pop("reward")
        if self.heldout_kind != "split":
            fields.pop("heldout_fraction")
        if self.kind not in ("files", "hub") and self.heldout_kind != "path":
            fields.pop("text_field")
            fields.pop("document_field")
        return fields
