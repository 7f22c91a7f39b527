"""The report of a run: `report.md`, one self-contained `report.html` and a card a model, from the run's files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def build(run_dir: Path) -> Path:
    """Write `report.md`, `report_files/*.png`, `report.html` and `cards/*` into the run folder; the path of the HTML.

    Works for runs that failed or were stopped, too. Nothing is written when the report on disk was made from the same
    inputs. Raises RecipeError when the folder is not a run's.
    """
    from posttrain.report.writing import build_report

    return build_report(Path(run_dir))


def compare(folder: Path, runs: Sequence[Path], record: Mapping[str, Any] | None = None) -> Path:
    """Write a report that compares runs, given by their folders, into `folder`; the path of the HTML.

    Args:
        record: the sweep that the runs are points of, as in its `sweep.json`.
    """
    from posttrain.report.writing import build_comparison

    return build_comparison(Path(folder), [Path(run) for run in runs], dict(record) if record is not None else None)
