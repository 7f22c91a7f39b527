"""The report of a run: `report.md` and one self-contained `report.html`, from the files of the run alone."""

from __future__ import annotations

from pathlib import Path


def build(run_dir: Path) -> Path:
    """Write `report.md`, `report_files/*.png` and `report.html` into the run folder; the path of the HTML.

    Works for runs that failed or were stopped, too. Nothing is written when the report on disk was made from the same
    inputs. Raises RecipeError when the folder is not a run's.
    """
    from posttrain.report.writing import build_report

    return build_report(Path(run_dir))
