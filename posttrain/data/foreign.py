"""Data builders of installed packages: what such a package writes, and how a `data:` section takes its settings.

A package names a subclass of `Builder` under the entry-point group `posttrain.data`; `data.builder=NAME` chooses it and
`data.settings` are its own. Holding documents out, limits, cards and keys are those of every other builder.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, create_model

from posttrain.config import plugins
from posttrain.data.config import Builder as BuiltIn
from posttrain.data.config import DataSourceConfig
from posttrain.data.documents import Document
from posttrain.errors import StageError
from posttrain.pipeline.context import StageContext

BUILT_IN: tuple[str, ...] = get_args(BuiltIn)


class NoSettings(BaseModel):
    """Settings of a builder that has none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Builder:
    """Makes the documents of a `data:` section. Subclasses set the class attributes and implement `build`.

    Like a stage it is imported by plans, so it imports nothing heavy at its top.
    """

    Config: ClassVar[type[BaseModel]] = NoSettings
    """Its settings: a pydantic model with `extra="forbid"`, whose defaults are the only ones."""
    version: ClassVar[str] = "1"
    """Raised when the same settings would give other documents: it enters the key."""
    licence: ClassVar[str] = "see the package that made it"
    """Of the text, written into `dataset.json`."""
    rows: ClassVar[str | None] = None
    """Kind of all its rows if it is one: text, messages, prompt, preference."""
    random: ClassVar[bool] = False
    """Whether `ctx.seed` decides the documents; if not, one artifact serves all seeds."""
    needs_model: ClassVar[bool] = False
    """Whether it reads `ctx.inputs["model"]`."""

    def external(self, cfg: Any) -> dict[str, Any]:
        """What lies outside the recipe and decides the documents, e.g. a file's digest. Raises RecipeError."""
        return {}

    def size(self, cfg: Any) -> int | None:
        """Bytes of text to expect, for plans; None if unknown. Raises RecipeError for settings that cannot work."""
        return None

    def build(self, cfg: Any, ctx: StageContext) -> list[Document]:
        """All documents, training and held-out. Re-entrant, as a stage: see `posttrain.data.builders.batches`."""
        raise NotImplementedError


def is_foreign(cfg: DataSourceConfig) -> bool:
    """Whether the documents come from a builder of an installed package."""
    return cfg.path is None and cfg.builder not in BUILT_IN


def builder_of(cfg: DataSourceConfig) -> Builder:
    """The builder of such a section. Raises RecipeError when it cannot be used."""
    return _builder(_plugin(str(cfg.builder)))


def identity(cfg: DataSourceConfig) -> dict[str, Any]:
    """What enters the key for it: package, version, and what it reads from outside."""
    builder = builder_of(cfg)
    package = _plugin(str(cfg.builder)).package
    return {"package": package, "version": builder.version, **builder.external(cfg.settings)}


def documents(cfg: DataSourceConfig, ctx: StageContext) -> list[Document]:
    """What the builder makes. Raises StageError when that is no list of documents."""
    made = list(builder_of(cfg).build(cfg.settings, ctx))
    for document in made:
        if not isinstance(document, Document):
            kind = type(document).__name__
            raise StageError(f"builder {cfg.builder} made a {kind}, not a posttrain.data.documents.Document")
    return made


def config_model(body: Mapping[str, Any]) -> type[DataSourceConfig]:
    """The model of a `data:` section: where the builder is an installed package's, with its settings as a section.

    Raises:
        RecipeError: the builder cannot be imported, or several packages have it.
    """
    name = body.get("builder")
    if not isinstance(name, str) or name in BUILT_IN or not (foreign := plugins.names(plugins.DATA)):
        return DataSourceConfig
    chosen = _plugin(name) if name in foreign and body.get("path") is None else None
    return _model(tuple(foreign), chosen)


@lru_cache
def _model(names: tuple[str, ...], chosen: plugins.Plugin | None) -> type[DataSourceConfig]:
    info = DataSourceConfig.model_fields["builder"]
    fields: dict[str, Any] = {
        "builder": (Literal[(*BUILT_IN, *names)] | None, Field(None, description=info.description))
    }
    if chosen is not None:
        settings = _builder(chosen).Config
        required = any(field.is_required() for field in settings.model_fields.values())
        default = {} if required else {"default_factory": settings}
        fields["settings"] = (settings, Field(description=f"For builder `{chosen.name}`.", **default))
    return create_model("DataSourceConfig", __base__=DataSourceConfig, **fields)


def _plugin(name: str) -> plugins.Plugin:
    plugin = plugins.lookup(plugins.DATA, name, BUILT_IN)
    assert plugin is not None, name
    return plugin


@lru_cache
def _builder(plugin: plugins.Plugin) -> Builder:
    found = plugins.load(plugin)
    if not (isinstance(found, type) and issubclass(found, Builder)):
        raise plugins.refuse(plugin, "is not a subclass of posttrain.data.foreign.Builder")
    if not issubclass(found.Config, BaseModel):
        raise plugins.refuse(plugin, "has a `Config` that is no pydantic model")
    return found()
