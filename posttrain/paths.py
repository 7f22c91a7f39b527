"""Where things are: shipped recipes and conf, the user's cache, the outputs folder."""

from __future__ import annotations

import os
from pathlib import Path


def shipped(folder: str) -> Path:
    """The shipped `conf`, `recipes` or `data` folder: inside the installed package, else beside it in a checkout.

    Raises:
        FileNotFoundError: neither place has it.
    """
    package = Path(__file__).resolve().parent
    for candidate in (package / f"_{folder}", package.parent / folder):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"posttrain's {folder}/ folder is missing beside {package}: reinstall posttrain")


def user_cache() -> Path:
    """The per-user cache folder (`$POSTTRAIN_CACHE`, else `$XDG_CACHE_HOME/posttrain`, else `~/.cache/posttrain`)."""
    if explicit := os.environ.get("POSTTRAIN_CACHE"):
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "posttrain"
