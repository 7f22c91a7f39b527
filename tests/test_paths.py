"""Where the user's cache is."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.paths import user_cache


@pytest.mark.parametrize(("variable", "rest"), [("POSTTRAIN_CACHE", "x"), ("XDG_CACHE_HOME", "x/posttrain")])
def test_a_tilde_in_a_cache_variable_is_the_home_folder(
    variable: str, rest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("POSTTRAIN_CACHE", raising=False)
    monkeypatch.setenv(variable, "~/x")
    assert user_cache() == tmp_path / rest
