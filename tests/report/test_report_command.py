"""`posttrain report`: the newest run by default, the path on standard output."""

from __future__ import annotations

from pathlib import Path

import pytest
from fabricated_run import complete_run

from posttrain.cli.report import command
from posttrain.errors import RecipeError


@pytest.mark.parametrize("name", [None, "demo", "demo-1a2b3c4d"])
def test_it_builds_the_report_and_prints_where(name: str | None, tmp_path: Path, capsys) -> None:
    run_dir = complete_run(tmp_path)
    command([name] if name else None, None, tmp_path)
    assert Path(capsys.readouterr().out.strip()) == run_dir / "report.html"
    assert (run_dir / "report.html").exists() and (run_dir / "report.md").exists()


def test_a_wrong_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    complete_run(tmp_path)
    with pytest.raises(RecipeError, match="no run 'dmo-1a2b3c4d'"):
        command(["dmo-1a2b3c4d"], None, tmp_path)


def test_the_packages_function_stays_a_function_after_its_first_use(tmp_path: Path) -> None:
    from posttrain import report

    run_dir = complete_run(tmp_path)
    assert report.build(run_dir) == report.build(run_dir)
