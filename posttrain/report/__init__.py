"""The report of a run: `report.md`, one self-contained `report.html` and a card a model, from the run's files alone."""

from __future__ import annotations

from pathlib import Path


def build(run_dir: Path) -> Path:
    """Write `report.md`, `report_files/*.png`, `report.html` and `cards/*` into the run folder; the path of the HTML.

    Works for runs that failed or were stopped, too. Nothing is written when the report on disk was made from the same
    inputs. Raises RecipeError when the folder is not a run's.
    """
    from posttrain.report.writing import build_report

    return build_report(Path(run_dir))
