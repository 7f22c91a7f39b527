"""From a stage's type to its code. Names map to "module:Class" strings, so listing them imports nothing."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from posttrain.pipeline.stage import Stage

STAGES: dict[str, str] = {
    "model_source": "posttrain.models.stage:ModelSource",
    "data_source": "posttrain.data.stage:DataSource",
    "mla_upcycle": "posttrain.methods.mla_upcycling.stage:MlaUpcycle",
    "distill": "posttrain.methods.distillation.stage:Distill",
    "sft": "posttrain.methods.sft.stage:Sft",
    "preference": "posttrain.methods.preference.stage:Preference",
    "evaluate": "posttrain.methods.evaluation.stage:Evaluate",
    "export": "posttrain.methods.export.stage:Export",
}
SOURCE_TYPES = ("model_source", "data_source")
"""Stages behind a recipe's `model`, `models.*`, `data`, `datasets.*`; not for use under `stages`."""


@cache
def stage(type_name: str) -> Stage:
    """The stage of that type.

    Raises:
        KeyError: no such type.
    """
    module, _, attribute = STAGES[type_name].partition(":")
    return getattr(import_module(module), attribute)()
