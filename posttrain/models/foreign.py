"""Model types of installed packages: transformers is told of their classes before a model of that type is loaded.

The entry point (`posttrain.models`, by `model_type`) names a module that imports neither torch nor transformers at its
top, since plans import it as well. Its `register()` tells transformers' Auto classes; `architecture(config)`, if it is
there, gives the `config.json` fields of a supported family with the same shapes, see `architecture.normalise`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from posttrain.config import plugins


def register_for(folder: str | Path) -> None:
    """Tell transformers of the model type of a folder, if it is an installed package's. Raises RecipeError."""
    try:
        content = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # whoever reads the folder next says what is wrong with it
    if isinstance(content, dict):
        register(str(content.get("model_type")))


def register_all() -> None:
    """Tell transformers of every model type of installed packages: for models whose config is not here yet."""
    for name in plugins.names(plugins.MODELS):
        register(name)


def register(model_type: str) -> None:
    """Tell transformers of that model type, once, if it is an installed package's.

    Raises:
        RecipeError: the package cannot be imported, or transformers does not know the type afterwards.
    """
    if (plugin := plugins.lookup(plugins.MODELS, model_type)) is not None:
        _register(plugin)


@cache
def _register(plugin: plugins.Plugin) -> None:
    module = plugins.load(plugin)
    if (tell := getattr(module, "register", None)) is not None:
        tell()
    from transformers import CONFIG_MAPPING

    if plugin.name not in CONFIG_MAPPING:
        fix = f"let `register()` of {plugin.module} call AutoConfig.register and AutoModelForCausalLM.register"
        raise plugins.refuse(plugin, "is not known to transformers after its registration", fix)
