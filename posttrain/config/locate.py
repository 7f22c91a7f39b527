"""Where recipes and groups are: the user's folders first, then those of installed packages, then the shipped ones.

What the user has wins over all. Among installed packages and posttrain itself a name belongs to one: where two have it,
using it is an error, so that installing a package never changes what a recipe means.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from posttrain import paths
from posttrain.config import plugins
from posttrain.config.suggest import among, nearest
from posttrain.errors import RecipeError


def search_path(config_dir: Path | None = None) -> list[Path]:
    """Folders with recipes and groups, first wins.

    Raises:
        RecipeError: `config_dir` is no folder.
    """
    folders = [*plugins.config_folders(), paths.shipped("conf"), paths.shipped("recipes")]
    if config_dir is not None:
        own = Path(config_dir).resolve()
        if not own.is_dir():
            fix = "give the folder of your recipes and groups"
            raise RecipeError(f"--config-dir {config_dir} is no folder", fix=fix)
        folders = [folder for folder in (own, own / "conf", own / "recipes") if folder.is_dir()] + folders
    return folders


def recipe_files(config_dir: Path | None = None) -> dict[str, list[Path]]:
    """Recipe name to its file; to several where installed packages have the same name and the user has none."""
    own = [] if config_dir is None else [Path(config_dir) / "recipes", Path(config_dir)]
    others = [folder for folder in plugins.config_folders() if folder.name == "recipes"]
    return by_name([*own, *others, paths.shipped("recipes")])


def by_name(folders: Iterable[Path]) -> dict[str, list[Path]]:
    """Name of each YAML file in those folders to the files that count, see `counting`."""
    found: dict[str, list[Path]] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, []).append(path.resolve())
    return {name: counting(files) for name, files in found.items()}


def counting(files: Iterable[Path]) -> list[Path]:
    """Of files of one name, in the order of the search path, those that count: the user's own first one, else all."""
    distinct = list(dict.fromkeys(files))
    return distinct[:1] if distinct and not owner(distinct[0]) else distinct


def owner(path: Path) -> str:
    """The installed package that a file comes from: "posttrain" for shipped ones, "" for the user's own."""
    for folder, plugin in plugins.config_folders().items():
        if path.is_relative_to(folder):
            return plugin.package
    shipped = (paths.shipped("conf"), paths.shipped("recipes"))
    return "posttrain" if any(path.is_relative_to(folder) for folder in shipped) else ""


def the_one(files: list[Path], what: str) -> Path:
    """The only file that counts.

    Raises:
        RecipeError: there are several; `what` says what they are.
    """
    if len(files) == 1:
        return files[0]
    owners = ", ".join(owner(path) for path in files)
    fix = "copy the one that you mean into a folder of your own (--config-dir), or uninstall a package"
    raise RecipeError(f"{what} is in several installed packages: {owners}", ", ".join(map(str, files)), fix)


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
        return the_one(names[recipe], f"recipe `{recipe}`")
    if (cwd / f"{recipe}.yaml").is_file():
        raise RecipeError(f"there is no recipe `{recipe}`", fix=f"write ./{recipe}.yaml for the file in this folder")
    guess = nearest(recipe, names)
    raise RecipeError(f"there is no recipe `{recipe}`", fix=f"write {guess}" if guess else f"there are {among(names)}")


def _recipe_at(typed: str, path: Path, names: Mapping[str, list[Path]]) -> Path:
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
