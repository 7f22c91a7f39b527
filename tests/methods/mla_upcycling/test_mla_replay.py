"""A saved plan carried out again through the stage, refused where it does not fit, and compared from the command."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from methods.mla_upcycling.test_mla_stage import STAGE, config, context, metas
from pydantic import ValidationError

from posttrain.errors import RecipeError
from posttrain.methods.mla_upcycling import diff
from posttrain.methods.mla_upcycling.config import MlaUpcycleConfig
from posttrain.methods.mla_upcycling.plan import MlaPlan
from posttrain.models.architecture import cache_bytes_per_token
from posttrain.pipeline.context import InputArtifact
from posttrain.pipeline.stage import ArtifactMeta

BY_INPUT = {"model": "model", "conversion": "upcycle.conversion"}
SHARED = {"kv_ratio": None, "bytes_per_token": 2 * 2 * 24, "rank_multiple": 4, "q_lora_rank": 24}
"""A plan with ranks by layer and a low-rank query."""


def converted(folder: Path, **settings) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return STAGE.run(context(folder, config(**settings)))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.mark.parametrize("by", ["path", "input"])
def test_a_replayed_plan_gives_the_same_model(by: str, tmp_path: Path) -> None:
    first = converted(tmp_path / "one", **SHARED)
    cfg = MlaUpcycleConfig(plan=str(first["conversion"])) if by == "path" else MlaUpcycleConfig(inputs=BY_INPUT)
    (tmp_path / "two").mkdir()
    ctx = context(tmp_path / "two", cfg, words=0)  # no text: nothing is calibrated
    known = STAGE.measure("conversion", first["conversion"], ArtifactMeta("conversion"))
    if by == "input":
        ctx.inputs["conversion"] = InputArtifact(first["conversion"], known, "upcycle.conversion")
    inputs = {name: artifact.meta for name, artifact in ctx.inputs.items()}
    STAGE.check(cfg, inputs)
    predicted, estimate = STAGE.describe(cfg, inputs), STAGE.estimate(cfg, inputs)
    second = STAGE.run(ctx)
    assert files(second["model"]) == files(first["model"]) and files(second["conversion"]) == files(first["conversion"])
    measured = STAGE.measure("model", second["model"], predicted["model"])
    assert measured.architecture == predicted["model"].architecture
    assert estimate.cache_bytes_per_token == cache_bytes_per_token(measured.architecture) == 2 * 2 * 24
    assert (
        STAGE.measure("conversion", second["conversion"], predicted["conversion"]) == known == predicted["conversion"]
    )
    assert "carried out again" in estimate.notes[0] and estimate.tokens == 0 and "decomposition" not in estimate.memory


def test_a_plan_of_an_earlier_stage_is_known_before_it_exists() -> None:
    promised = STAGE.describe(config(), metas())["conversion"]
    inputs = {"model": metas()["model"], "conversion": promised}
    again = MlaUpcycleConfig(inputs=BY_INPUT)
    assert (
        STAGE.describe(again, inputs)["model"].architecture == STAGE.describe(config(), metas())["model"].architecture
    )
    STAGE.check(again, inputs)
    unknown = {**inputs, "conversion": ArtifactMeta("conversion")}
    assert STAGE.describe(again, unknown)["model"].architecture is None
    assert STAGE.estimate(again, unknown).parameters is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4, the plan has 2"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, the plan has 2"),
        ({"hidden_size": 128}, "hidden_size is 128, the plan has 64"),
        ({"model_type": "qwen2"}, "keys and values have biases, the plan has none"),
        ({"model_type": "qwen3"}, "qk_norm is True, the plan has False"),
    ],
)
def test_a_plan_for_another_model_is_refused_at_plan_time(changes: dict, said: str) -> None:
    promised = STAGE.describe(config(), metas())["conversion"]
    inputs = {"model": metas(**changes)["model"], "conversion": promised}
    with pytest.raises(RecipeError, match=said):
        STAGE.check(MlaUpcycleConfig(inputs=BY_INPUT), inputs)


def test_a_folder_without_a_plan_is_refused(tmp_path: Path) -> None:
    cfg = MlaUpcycleConfig(plan=str(tmp_path))
    with pytest.raises(RecipeError, match=r"has no conversion\.json and no plan\.safetensors"):
        STAGE.check(cfg, metas())
    with pytest.raises(RecipeError, match=r"has no conversion\.json"):
        STAGE.external(cfg)
    for name in ("conversion.json", "plan.safetensors"):
        (tmp_path / name).write_text("[]")
    with pytest.raises(RecipeError, match="not the account of a conversion"):
        STAGE.check(cfg, metas())


def test_the_content_of_the_plan_enters_the_key(tmp_path: Path) -> None:
    first, second = converted(tmp_path / "one"), converted(tmp_path / "two", objective="attention")
    keys = [STAGE.external(MlaUpcycleConfig(plan=str(folder["conversion"]))) for folder in (first, first, second)]
    assert keys[0] == keys[1] != keys[2]
    assert STAGE.external(config()) == {} and "plan" not in MlaUpcycleConfig(plan="folder").key_fields()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kv_ratio": 0.5}, "leave out kv_ratio, e.g. kv_ratio=null"),
        ({"preset": "transmla"}, "leave out preset"),
        ({"rotary_plan": "xeco"}, "leave out rotary_plan"),
        ({"inputs": BY_INPUT}, "plan or inputs.conversion, not both"),
    ],
)
def test_settings_beside_a_plan_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        MlaUpcycleConfig(plan="folder", **settings)


def test_an_unused_calibration_is_said() -> None:
    promised = STAGE.describe(config(), metas())["conversion"]
    notes = STAGE.estimate(MlaUpcycleConfig(inputs=BY_INPUT), {**metas(), "conversion": promised}).notes
    assert any("calibration input is not used: the plan is made" in note for note in notes)


def test_two_conversions_are_compared_from_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first, second = converted(tmp_path / "one"), converted(tmp_path / "two", q_lora_rank=24)
    one, two = str(first["conversion"]), str(second["conversion"])
    assert diff.main([one, one]) == 0 and "equal" in capsys.readouterr().out
    assert diff.main([one, two]) == 1
    said = capsys.readouterr().out
    assert "config.q_lora_rank: None → 24" in said and "layers.0.query_encode: only in the second" in said
    assert diff.main([one, str(tmp_path)]) == 2 and "has no conversion.json" in capsys.readouterr().err
    command = [sys.executable, "-m", "posttrain.methods.mla_upcycling.diff", "--help"]
    assert "FOLDER FOLDER" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_plan_without_a_low_rank_query_reads_as_before(tmp_path: Path) -> None:
    plan = MlaPlan.load(converted(tmp_path / "one")["conversion"])
    assert plan.layers[0].query_encode is None and plan.shape.q_lora_rank is None
    lines = plan.diff(replace(plan, shape=replace(plan.shape, latent_rope_parameters={"rope_type": "yarn"})))
    assert lines == ["shape.latent_rope_parameters: None → {'rope_type': 'yarn'}"]
