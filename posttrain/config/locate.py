"""Where recipes and groups are: the user's folders first, then the shipped ones."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from posttrain import paths
from posttrain.config.suggest import among, nearest
from posttrain.errors import RecipeError


def search_path(config_dir: Path | None = None) -> list[Path]:
    """Folders with recipes and groups, first wins.

    Raises:
        RecipeError: `config_dir` is no folder.
    """
    folders = [paths.shipped("conf"), paths.shipped("recipes")]
    if config_dir is not None:
        own = Path(config_dir).resolve()
        if not own.is_dir():
            fix = "give the folder of your recipes and groups"
            raise RecipeError(f"--config-dir {config_dir} is no folder", fix=fix)
        folders = [folder for folder in (own, own / "conf", own / "recipes") if folder.is_dir()] + folders
    return folders


def recipe_files(config_dir: Path | None = None) -> dict[str, Path]:
    """Recipe name to its file; the user's own before shipped ones of the same name."""
    folders = [paths.shipped("recipes")]
    if config_dir is not None:
        folders += [Path(config_dir), Path(config_dir) / "recipes"]
    return {path.stem: path.resolve() for folder in folders for path in sorted(folder.glob("*.yaml"))}


def find_recipe(recipe: str, config_dir: Path | None, cwd: Path) -> Path:
    """The file of a recipe given by name or path.

    Raises:
        RecipeError: there is none; names the nearest.
    """
    names = recipe_files(config_dir)
    if "=" in recipe:
        raise RecipeError(f"`{recipe}` stands where the recipe should", fix=f"give the recipe first: {among(names)}")
    if recipe.endswith((".yaml", ".yml")) or os.sep in recipe:
        return _recipe_at(recipe, (cwd / Path(recipe).expanduser()).resolve(), names)
    if recipe in names:
        return names[recipe]
    if (cwd / f"{recipe}.yaml").is_file():
        raise RecipeError(f"there is no recipe `{recipe}`", fix=f"write ./{recipe}.yaml for the file in this folder")
    guess = nearest(recipe, names)
    raise RecipeError(f"there is no recipe `{recipe}`", fix=f"write {guess}" if guess else f"there are {among(names)}")


def _recipe_at(typed: str, path: Path, names: Mapping[str, Path]) -> Path:
    if path.is_file() and path.suffix == ".yaml":
        return path
    if path.is_file():
        raise RecipeError(f"{typed} should end in .yaml", typed, f"rename it to {Path(typed).with_suffix('.yaml')}")
    others = [other.name for other in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    fix = "`posttrain list recipes` lists the shipped ones"
    if guess := nearest(path.name, others):
        fix = f"write {typed.removesuffix(path.name)}{guess}"
    elif guess := nearest(path.stem, names):
        fix = f"write {guess} for the shipped recipe"
    raise RecipeError(f"there is no recipe file {typed}", fix=fix)


def shown_path(path: Path, cwd: Path) -> str:
    """A path as short as it can be said from the current directory."""
    return str(path.relative_to(cwd)) if path.is_relative_to(cwd) else str(path)
