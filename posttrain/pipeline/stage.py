"""What a stage is: the contract between the runner and every method.

A stage turns artifacts into artifacts. Everything but `run` works from the config and from `ArtifactMeta` alone, so
that a plan needs neither weights nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from posttrain.pipeline.context import StageContext

ARTIFACT_TYPES = ("model", "dataset", "evaluation", "history", "conversion", "selection", "certificate")

NOT_IN_KEY = {"key": False}
"""`Field(json_schema_extra=NOT_IN_KEY)` marks a setting that says how the work is done, not what is computed."""

ONLY_SAID = {"key": False, "digest": False}
"""Marks a field for readers: it is neither in the key nor in the digest that names a run."""


class StageConfig(BaseModel):
    """Base of every stage's settings, which stand beside `type` and `inputs`; defaults live only here, not in YAML."""

    # Deferred: this base is never validated itself, and a command rarely needs the settings of every stage type.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), defer_build=True)

    type: str = Field(description="Stage type, as in `posttrain list stages`.")
    inputs: dict[str, str] = Field(
        default_factory=dict,
        description="Input name to reference: `model`, `data.SPLIT`, `models.NAME`, `datasets.NAME.SPLIT` or "
        "`STAGE.OUTPUT`.",
    )

    def key_fields(self) -> dict[str, Any]:
        """The JSON-able settings that enter the fingerprint: all but `inputs` and those marked `NOT_IN_KEY`."""
        return self.model_dump(mode="json", exclude={"inputs"} | self._marked("key"))

    def digest_fields(self) -> dict[str, Any]:
        """The settings that enter the recipe's digest: all but those marked `ONLY_SAID`."""
        return self.model_dump(mode="json", exclude=self._marked("digest"))

    def _marked(self, mark: str) -> set[str]:
        extras = ((name, info.json_schema_extra) for name, info in type(self).model_fields.items())
        return {name for name, extra in extras if isinstance(extra, dict) and extra.get(mark) is False}


@dataclass(frozen=True)
class InputSpec:
    """Type of one input of a stage, whether it may be missing, and what it is for."""

    type: str
    optional: bool = False
    doc: str = ""


@dataclass(frozen=True)
class ArtifactMeta:
    """What is known of an artifact without opening it: predicted at plan time, measured once it exists.

    Attributes:
        architecture: for a model, the `config.json` fields that estimates need.
        tokenizer: SHA-256 of the tokenizer's content, None while unknown.
        chat_template: SHA-256 of the chat template, None while unknown or absent.
        rows, tokens: for a dataset, documents and (estimated) tokens; None while unknown.
        extra: anything else a consumer's `check` may want, JSON-able. `stock`: model type of a model in classes of
            another program, which this package does not read.
    """

    type: str
    architecture: dict[str, Any] | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    rows: int | None = None
    tokens: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ArtifactMeta:
        return cls(**data)


@dataclass(frozen=True)
class Estimate:
    """What a stage will cost, by formula.

    Attributes:
        parameters, trainable: of the model the stage produces or runs.
        tokens: tokens the stage will process in all; `data_tokens`: distinct tokens in its training data.
        memory: peak memory by term, bytes, e.g. {"weights": …, "optimizer": …}; the sum is the peak.
        cache_bytes_per_token: KV-cache growth per token of the model the stage produces or evaluates, at 2 bytes an
            element (bf16) whatever precision the stage works in, so that a plan's stages can be compared.
        cache_state_bytes: what a sequence's cache holds besides, whatever its length: recurrent states in 4 bytes an
            element, columns of convolutions in 2. None without states. The plan fills it in, and the ratios.
        cache_ratio_without_states, cache_ratio_with_states: of a model with states, that cache relative to plain
            attention of the same shape: its growing part alone, and all of it by length in tokens.
        disk_bytes: what the stage leaves in the store.
        notes: short sentences shown in the plan (e.g. the real ratio after rounding a rank).
    """

    parameters: int | None = None
    trainable: int | None = None
    tokens: int | None = None
    data_tokens: int | None = None
    memory: dict[str, int] = field(default_factory=dict)
    cache_bytes_per_token: int | None = None
    cache_state_bytes: int | None = None
    cache_ratio_without_states: float | None = None
    cache_ratio_with_states: dict[str, float] | None = None
    disk_bytes: int | None = None
    notes: tuple[str, ...] = ()


class Stage:
    """Base of all stages. Subclasses set the class attributes and implement `describe` and `run`."""

    type: ClassVar[str]
    version: ClassVar[str] = "1"
    """Raised when the same config would give another result."""
    Config: ClassVar[type[StageConfig]]
    inputs: ClassVar[dict[str, InputSpec]] = {}
    parallel: ClassVar[bool] = False
    """Whether `run` works on several ranks (`ctx.rank`, `ctx.world_size`): only rank 0 writes then. If not, the stage
    runs on one rank whatever `engine.ranks` says."""
    outputs: ClassVar[dict[str, str]] = {}
    """Output name to artifact type. The first output is what a bare `STAGE` reference means."""

    def config_for(self, body: Mapping[str, Any]) -> type[StageConfig]:
        """The model of these settings: `Config`, or one made from it that knows more. Raises RecipeError."""
        return self.Config

    def external(self, cfg: Any) -> dict[str, Any]:
        """What lies outside the recipe and decides the result (digest of a folder, Python version): enters the key."""
        return {}

    def uses_seed(self, cfg: Any) -> bool:
        """Whether the run's seed decides the result: if not, it does not enter the key."""
        return True

    def describe(self, cfg: Any, inputs: Mapping[str, ArtifactMeta]) -> dict[str, ArtifactMeta]:
        """Predict the meta of every output from the config and the inputs' metas. Raises RecipeError."""
        raise NotImplementedError

    def check(self, cfg: Any, inputs: Mapping[str, ArtifactMeta]) -> None:
        """Cheap checks without weights. Raises RecipeError. Also called by the worker with measured metas."""

    def check_ranks(self, cfg: Any, ranks: int) -> None:
        """Whether the work can be shared by that many ranks; asked of parallel stages. Raises ValueError."""

    def estimate(self, cfg: Any, inputs: Mapping[str, ArtifactMeta]) -> Estimate:
        """Cost by formula. `inputs` as in `describe`."""
        return Estimate()

    def run(self, ctx: StageContext) -> dict[str, Path]:
        """Do the work; return the folder of every output (use `ctx.output_dir(name)`)."""
        raise NotImplementedError

    def measure(self, name: str, path: Path, predicted: ArtifactMeta) -> ArtifactMeta:
        """Meta of a finished output, read from its files. The default keeps the prediction."""
        return predicted
