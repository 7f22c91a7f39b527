"""`posttrain list` and `posttrain show`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.cli import list_, show
from posttrain.config import load_recipe, registry, validate_mapping
from posttrain.config.catalogue import everything
from posttrain.config.documents import load_document
from posttrain.errors import RecipeError


def listed(capsys: pytest.CaptureFixture[str], *arguments: str, **options) -> str:
    list_.command(*arguments, **options)
    return capsys.readouterr().out


def shown(capsys: pytest.CaptureFixture[str], name: str, *overrides: str, **options) -> str:
    show.command(name, list(overrides), **options)
    return capsys.readouterr().out


def test_all_that_can_be_named_is_listed_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = listed(capsys).splitlines()
    for entry in everything():
        if entry.kind in ("recipe", "stage", "model", "data") and entry.name not in registry.SOURCE_TYPES:
            (line,) = [line for line in lines if line.split(maxsplit=1)[:1] == [entry.name] and entry.line in line][:1]
            assert len(line.split(maxsplit=1)[1]) > 10


def test_one_section_and_a_slip(capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(capsys, "models").startswith("models:\n")
    with pytest.raises(RecipeError, match="posttrain list models"):
        listed(capsys, "modls")


def test_runs_are_listed_with_their_state(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert listed(capsys, "runs", outputs=tmp_path) == "runs:\n  none\n"
    for name, record in (
        # A record's time is what time.time() gives.
        ("one", {"format": 1, "created": 1767323045.25, "stages": []}),
        ("two", {"format": 9}),
    ):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text(json.dumps(record))
    text = listed(capsys, "runs", outputs=tmp_path)
    assert "2026-01-02 03:04 UTC" in text and "two  unreadable" in text


def test_a_recipe_is_shown_as_it_would_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "shown.yaml"
    for origin in (False, True):
        path.write_text(shown(capsys, "x_ecomla", "scale=smoke", "seed=5", origin=origin))
        data = load_document(path).data
        assert data == load_recipe("x_ecomla", ["scale=smoke", "seed=5"]).document()
        assert validate_mapping(data).frame.seed == 5


def test_origins_stand_beside_the_values(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "x_ecomla", "scale=smoke", "seed=5", origin=True).splitlines()
    (seed,) = [line for line in lines if line.startswith("seed:")]
    (width,) = [line for line in lines if "logits_dtype:" in line]
    (ratio,) = [line for line in lines if "kv_ratio:" in line]
    assert seed.endswith("# seed=5") and width.endswith("# default") and "x_ecomla.yaml:" in ratio


@pytest.mark.parametrize("name", sorted(registry.STAGES))
def test_every_setting_of_a_stage_is_shown_and_explained(capsys: pytest.CaptureFixture[str], name: str) -> None:
    stage = registry.stage(name)
    text = shown(capsys, name)
    for field, info in stage.Config.model_fields.items():
        if field not in ("type", "inputs"):
            assert f"  {field}: " in text
            assert info.description and info.description.split()[0] in text
    for artifact in (*stage.inputs, *stage.outputs):
        assert f"  {artifact}" in text
    document = json.loads(shown(capsys, name, schema=True))
    assert set(document["config"]["properties"]) == set(stage.Config.model_fields)


def test_an_option_is_shown_as_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "tiny")
    assert "tiny (model)" in text and "tiny (data)" in text and "random: true" in text
    assert "PackageFile" in shown(capsys, "smollm2_135m", schema=True)
    assert "device" in shown(capsys, "gpu", schema=True)
    assert "limit_hours" in shown(capsys, "x_ecomla", schema=True)


def test_a_slip_and_a_setting_where_none_fits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecipeError, match="posttrain show distill"):
        shown(capsys, "distil")
    with pytest.raises(RecipeError, match="takes no settings"):
        shown(capsys, "distill", "lr=3")
