"""Puts conf/, recipes/ and data/ into the wheel, as `posttrain/_conf` and so on; all else is in pyproject.toml."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("conf", "recipes", "data")


class BuildWithFolders(build_py):
    """`posttrain.paths.shipped` finds these folders inside the package, or beside it in a checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in SHIPPED:
            target = Path(self.build_lib) / "posttrain" / f"_{name}"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(name, target, ignore=shutil.ignore_patterns("local", "__pycache__"))


setup(cmdclass={"build_py": BuildWithFolders})
