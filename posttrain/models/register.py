"""Tell transformers' Auto classes of the upcycled decoder, without importing transformers.

Auto classes that are loaded already are told at once. Otherwise a finder on `sys.meta_path` waits for the two modules
that hold their tables and tells each as soon as it has been executed. Our own modules are watched too: when they are
what brings transformers in, they are not complete at that moment, and the telling follows when they are. So is
transformers' module of layers, which imports the models' table at its head and is needed by our decoder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_AUTO = "transformers.models.auto"
_OURS = "posttrain.models.upcycled"
CONFIG_TABLE, MODEL_TABLE = f"{_AUTO}.configuration_auto", f"{_AUTO}.modeling_auto"
_CONFIG, _MODEL = f"{_OURS}.configuration_upcycled", f"{_OURS}.modeling_upcycled"
_LAYERS = "transformers.modeling_layers"
_WATCHED = {CONFIG_TABLE, MODEL_TABLE, _CONFIG, _MODEL, _LAYERS}
_done: set[str] = set()


def register_when_transformers_is_there() -> None:
    """Register now what can be registered, and the rest when transformers is imported. Calling it again is harmless."""
    _register_what_is_ready()
    if _done != {CONFIG_TABLE, MODEL_TABLE} and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register_what_is_ready(just_executed: str | None = None) -> None:
    if CONFIG_TABLE not in _done and _ready(CONFIG_TABLE, {_CONFIG}, just_executed):
        _done.add(CONFIG_TABLE)
        from transformers.models.auto.configuration_auto import AutoConfig

        from posttrain.models.upcycled.configuration_upcycled import UpcycledConfig

        AutoConfig.register("upcycled", UpcycledConfig, exist_ok=True)
    if MODEL_TABLE not in _done and _ready(MODEL_TABLE, {_MODEL, _LAYERS}, just_executed):
        _done.add(MODEL_TABLE)
        from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM

        from posttrain.models.upcycled.configuration_upcycled import UpcycledConfig
        from posttrain.models.upcycled.modeling_upcycled import UpcycledForCausalLM, UpcycledModel

        AutoModel.register(UpcycledConfig, UpcycledModel, exist_ok=True)
        AutoModelForCausalLM.register(UpcycledConfig, UpcycledForCausalLM, exist_ok=True)


def _ready(table: str, needed: set[str], just_executed: str | None) -> bool:
    """The table is complete and no module that telling it needs is half-way through its own import."""
    unfinished = any(_complete(name, just_executed) is False for name in needed)
    return _complete(table, just_executed) is True and not unfinished


def _complete(name: str, just_executed: str | None) -> bool | None:
    """True: imported, False: being imported, None: not imported."""
    module = sys.modules.get(name)
    if module is None:
        return None
    return name == just_executed or not getattr(module.__spec__, "_initializing", False)


class _Finder(MetaPathFinder):
    """Finds the watched modules as Python would, and adds a step after their execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _WATCHED:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register_what_is_ready(fullname)

        spec.loader.exec_module = execute_and_register
        return spec
