"""`posttrain card`: of a run, of one of its stages, of a folder; to the screen or a file; without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from report.fabricated_run import complete_run, failed_run

from posttrain.cli.card import command
from posttrain.errors import RecipeError
from posttrain.pipeline.store import link

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run_dir = complete_run(tmp_path, scale="demo", paper=None, deviations=[])
    for entry in json.loads((run_dir / "run.json").read_text())["stages"]:
        link(run_dir / "artifacts" / entry["name"], tmp_path / entry["artifact"])
    return run_dir


def said(capsys, *arguments: str, outputs: Path, **options) -> str:
    command(*arguments, *([None] * (2 - len(arguments))), outputs=outputs, **{"out": None, **options})
    return capsys.readouterr().out


def test_a_run_means_its_newest_model_and_a_stage_that_of_the_stage(run_dir: Path, tmp_path: Path, capsys) -> None:
    newest = said(capsys, "demo", outputs=tmp_path)
    assert newest.startswith("# TestLM-1M, dequantised Q4_1 → upcycle → distill\n")
    assert said(capsys, "demo", "distill", outputs=tmp_path) == newest
    assert "→ distill" not in said(capsys, str(run_dir), "upcycle", outputs=Path("nowhere")).partition("\n")[0]


def test_a_folder_means_the_artifact_it_is_of(run_dir: Path, tmp_path: Path, capsys) -> None:
    for folder in ("artifacts/distill", "artifacts/distill/model"):
        text = said(capsys, str(run_dir / folder), outputs=tmp_path)
        assert text.startswith("# TestLM-1M, dequantised Q4_1 → upcycle → distill\n")


def test_as_json_with_the_hubs_head_and_into_a_file(run_dir: Path, tmp_path: Path, capsys) -> None:
    card = json.loads(said(capsys, "demo", outputs=tmp_path, as_json=True))
    assert card["artifact"]["stage"] == "distill" and card["format"] == 1
    file = tmp_path / "card.md"
    assert said(capsys, "demo", outputs=tmp_path, hub=True, out=file).strip() == str(file)
    assert yaml.safe_load(file.read_text().split("---")[1])["library_name"] == "transformers"
    with pytest.raises(RecipeError, match="cannot be written"):
        said(capsys, "demo", outputs=tmp_path, out=tmp_path / "nowhere" / "card.md")


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["demo", "distil"], "distil is no stage of run demo-1a2b3c4d", "write posttrain card demo-1a2b3c4d distill"),
        (["demo", "data"], "data has made no model in run", "stages with a model: model, upcycle, distill"),
        (["dmo-1a2b3c4d"], "no run 'dmo-1a2b3c4d'", "write demo-1a2b3c4d"),
    ],
)
def test_a_mistake_is_answered_with_what_to_type(
    run_dir: Path, tmp_path: Path, arguments: list[str], what: str, fix: str, capsys
) -> None:
    with pytest.raises(RecipeError) as caught:
        said(capsys, *arguments, outputs=tmp_path)
    (problem,) = caught.value.problems
    assert what in problem.what and fix in problem.fix


def test_a_folder_that_is_nothing_and_a_run_without_a_model(run_dir: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="is no artifact"):
        said(capsys, str(tmp_path / "empty"), outputs=tmp_path)
    with pytest.raises(RecipeError, match="leave out distill"):
        said(capsys, str(run_dir / "artifacts" / "distill"), "distill", outputs=tmp_path)
    broken = failed_run(tmp_path / "other")
    for path in (tmp_path / "other" / "store").glob("*/*/manifest.json"):
        if path.parent.parent.name in ("model_source", "mla_upcycle"):
            path.unlink()
    with pytest.raises(RecipeError, match="has made no model yet"):
        said(capsys, broken.name, outputs=tmp_path / "other")


def test_it_needs_neither_torch_nor_what_draws_plots(run_dir: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom posttrain.cli.main import main\n"
        f"sys.argv = ['posttrain', 'card', 'demo', '--outputs', {str(tmp_path)!r}]\n"
        "try:\n    main()\nexcept SystemExit as error:\n    assert not error.code, error.code\n"
        "heavy = sorted({'torch', 'transformers', 'datasets', 'rich', 'matplotlib', 'hydra'} & set(sys.modules))\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0 and done.stdout.startswith("# TestLM"), done.stderr
