from __future__ import annotations

from pathlib import Path

import pytest
from harness import RUN, posttrain


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs folder of one whole smoke run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    posttrain(*RUN, cwd=folder)
    return folder / "outputs"
