"""From a stage's type to its code. Names map to "module:Class" strings, so listing them imports nothing.

Built-in types stand here; installed packages add theirs by entry points, see `plugins`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from posttrain.config import plugins

if TYPE_CHECKING:
    from posttrain.config.plugins import Plugin
    from posttrain.pipeline.stage import Stage

STAGES: dict[str, str] = {
    "model_source": "posttrain.models.stage:ModelSource",
    "data_source": "posttrain.data.stage:DataSource",
    "mla_upcycle": "posttrain.methods.mla_upcycling.stage:MlaUpcycle",
    "hybrid_init": "posttrain.methods.hybrid_ssm.init_stage:HybridInit",
    "layer_select": "posttrain.methods.hybrid_ssm.select_stage:LayerSelect",
    "assemble": "posttrain.methods.hybrid_ssm.assemble_stage:Assemble",
    "distill": "posttrain.methods.distillation.stage:Distill",
    "ild": "posttrain.methods.layer_distillation.stage:Ild",
    "sft": "posttrain.methods.sft.stage:Sft",
    "preference": "posttrain.methods.preference.stage:Preference",
    "grpo": "posttrain.methods.grpo.stage:Grpo",
    "riskpo": "posttrain.methods.riskpo.stage:Riskpo",
    "evaluate": "posttrain.methods.evaluation.stage:Evaluate",
    "export": "posttrain.methods.export.stage:Export",
}
SOURCE_TYPES = ("model_source", "data_source")
"""Stages behind a recipe's `model`, `models.*`, `data`, `datasets.*`; not for use under `stages`."""


def names() -> list[str]:
    """Types of stages, built in and of installed packages."""
    return list(dict.fromkeys([*STAGES, *plugins.names(plugins.STAGES)]))


def usable() -> list[str]:
    """Types that may stand under a recipe's `stages`."""
    return [name for name in names() if name not in SOURCE_TYPES]


def package_of(type_name: str) -> Plugin | None:
    """The installed package that a stage type comes from, None for a built-in one.

    Raises:
        RecipeError: several packages have it.
    """
    return plugins.lookup(plugins.STAGES, type_name, STAGES)


@cache
def stage(type_name: str) -> Stage:
    """The stage of that type.

    Raises:
        KeyError: no such type.
        RecipeError: it belongs to an installed package and cannot be loaded, or several packages have it.
    """
    plugin = package_of(type_name)
    if plugin is not None:
        return _foreign(plugin)
    module, _, attribute = STAGES[type_name].partition(":")
    return getattr(import_module(module), attribute)()


def _foreign(plugin: Plugin) -> Stage:
    from posttrain.pipeline.stage import Stage, StageConfig

    found = plugins.load(plugin)
    if not (isinstance(found, type) and issubclass(found, Stage)):
        raise plugins.refuse(plugin, "is not a subclass of posttrain.pipeline.stage.Stage")
    if getattr(found, "type", None) != plugin.name:
        raise plugins.refuse(
            plugin, f"calls itself {getattr(found, 'type', None)!r}", f"name both the same in {plugin.package}"
        )
    config = getattr(found, "Config", None)
    if not (isinstance(config, type) and issubclass(config, StageConfig)):
        raise plugins.refuse(plugin, "has no `Config` that is a subclass of StageConfig")
    return found()
