from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from harness import RUN, posttrain


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs folder of one whole smoke run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    posttrain(*RUN, cwd=folder)
    return folder / "outputs"


@pytest.fixture
def copied(undisturbed: Path, tmp_path: Path) -> Path:
    """A folder with a copy of that outputs folder."""
    shutil.copytree(undisturbed, tmp_path / "outputs", symlinks=True)
    return tmp_path
