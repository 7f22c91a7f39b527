"""Recipes: found, composed by Hydra, checked by pydantic. `from posttrain.config import load_recipe`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.config.recipe import ResolvedRecipe, load_recipe, load_resolved, validate_mapping

__all__ = ["ResolvedRecipe", "load_recipe", "load_resolved", "validate_mapping"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `posttrain.config.registry` alone costs no pydantic.
    if name in __all__:
        from posttrain.config import recipe

        return getattr(recipe, name)
    raise AttributeError(name)
