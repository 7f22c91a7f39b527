"""The stage as the runner sees it: prediction, checks, cost, run, stop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from posttrain.errors import RecipeError, StageError, StopRequested
from posttrain.launch.execute import _check_prediction
from posttrain.methods.mla_upcycling.config import MlaUpcycleConfig
from posttrain.methods.mla_upcycling.plan import MlaPlan
from posttrain.methods.mla_upcycling.stage import MlaUpcycle
from posttrain.models.architecture import cache_bytes_per_token, normalise, parameter_count
from posttrain.models.inspect import model_meta
from posttrain.models.loading import load_model
from posttrain.models.tiny import write_random_model
from posttrain.pipeline.context import InputArtifact, StageContext
from posttrain.pipeline.stage import ArtifactMeta

TINY = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
STAGE = MlaUpcycle()


def config(**settings) -> MlaUpcycleConfig:
    small = {"calibration_tokens": 256, "calibration_sequence_length": 32, "qk_rope_head_dim": 8}
    return MlaUpcycleConfig(**{**small, "kv_ratio": 0.5, **settings})


def metas(calibrated: bool = True, **changes) -> dict[str, ArtifactMeta]:
    source = ArtifactMeta(
        "model", normalise({**TINY, **changes}), tokenizer="t", extra={"dtype": "float32", "label": "x"}
    )
    return {"model": source, **({"calibration": ArtifactMeta("dataset", rows=3)} if calibrated else {})}


def context(folder: Path, cfg: MlaUpcycleConfig, words: int = 400, **fields) -> StageContext:
    source = folder / "source"
    if not source.exists():
        write_random_model(source, TINY, seed=0)
    data = folder / "data"
    data.mkdir(exist_ok=True)
    rows = [{"id": str(index), "text": f"row {index} " * (words // 4)} for index in range(4)]
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    work = folder / "work"
    work.mkdir(exist_ok=True)
    inputs = {
        "model": InputArtifact(source, model_meta(source), "model"),
        "calibration": InputArtifact(data, ArtifactMeta("dataset"), "data.train"),
    }
    return StageContext(name="upcycle", config=cfg, work_dir=work, inputs=inputs, **fields)


def test_the_prediction_is_what_comes_out(tmp_path: Path) -> None:
    ctx = context(tmp_path, config())
    folders = STAGE.run(ctx)
    inputs = {name: artifact.meta for name, artifact in ctx.inputs.items()}
    predicted = STAGE.describe(ctx.config, inputs)["model"]
    measured = STAGE.measure("model", folders["model"], predicted)
    assert measured.architecture == predicted.architecture
    assert measured.tokenizer == predicted.tokenizer and measured.chat_template == predicted.chat_template
    estimate, model = STAGE.estimate(ctx.config, inputs), load_model(folders["model"])
    assert estimate.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert estimate.cache_bytes_per_token == cache_bytes_per_token(measured.architecture) == 2 * 2 * (16 + 8)
    assert measured.extra["dtype"] == ctx.inputs["model"].meta.extra["dtype"]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("settings", [{"rank_allocation": "water_fill"}, {"kv_ratio": None, "energy": 0.8}])
def test_ranks_that_follow_from_spectra_are_no_broken_promise(tmp_path: Path, settings: dict) -> None:
    ctx = context(tmp_path, config(rank_multiple=1, **settings))
    folders = STAGE.run(ctx)
    predicted = STAGE.describe(ctx.config, {name: artifact.meta for name, artifact in ctx.inputs.items()})["model"]
    measured = STAGE.measure("model", folders["model"], predicted)
    assert measured.architecture["kv_lora_rank"] != predicted.architecture["kv_lora_rank"]
    _check_prediction("upcycle", "model", predicted, measured, "another plan")
    assert "open" not in measured.extra
    with pytest.raises(StageError, match="kv_lora_rank"):
        _check_prediction("upcycle", "model", replace(predicted, extra={}), measured, "another plan")
    fixed = STAGE.describe(config(), {name: artifact.meta for name, artifact in ctx.inputs.items()})["model"]
    assert "open" not in fixed.extra


def test_the_tokenizer_of_a_qwen2_source_is_not_rewritten(tmp_path: Path) -> None:
    write_random_model(tmp_path / "source", {**TINY, "model_type": "qwen2"}, seed=0)
    ctx = context(tmp_path, config())
    assert model_meta(STAGE.run(ctx)["model"]).tokenizer == ctx.inputs["model"].meta.tokenizer


def test_conversion_artifact_and_result(tmp_path: Path) -> None:
    ctx = context(tmp_path, config())
    folders = STAGE.run(ctx)
    report = json.loads((folders["conversion"] / "conversion.json").read_text())
    assert [layer["layer"] for layer in report["layers"]] == [0, 1]
    assert {"kv_lora_rank", "rel_error", "energy", "alpha", "key_error", "value_error"} <= report["layers"][0].keys()
    assert report["calibration_tokens"] == 256 and report["objective"] == "activation"
    assert ctx.result["kv_ratio"] == report["kv_ratio"] == 24 / 64
    assert 0 < ctx.result["mean_rel_error"] < 1
    assert MlaPlan.load(folders["conversion"]).shape.kv_lora_rank == 16


def test_running_again_gives_the_same_files(tmp_path: Path) -> None:
    def produce() -> dict[str, bytes]:
        folders = STAGE.run(context(tmp_path, config(), seed=3)).values()
        return {path.name: path.read_bytes() for folder in folders for path in folder.iterdir() if path.is_file()}

    first = produce()
    (tmp_path / "work" / "outputs" / "model" / "leftover.bin").write_bytes(b"half written")
    assert produce() == first


def test_a_stop_is_obeyed_between_units_and_the_next_attempt_is_undisturbed(tmp_path: Path) -> None:
    seen: list[float] = []
    ctx = context(tmp_path, config())

    def emit(event: str, values: dict) -> None:
        seen.append(values["done"])
        (ctx.work_dir / "STOP").touch()

    ctx.emit = emit
    with pytest.raises(StopRequested):
        STAGE.run(ctx)
    assert seen == [1]
    (ctx.work_dir / "STOP").unlink()
    assert STAGE.run(context(tmp_path, config()))["model"].is_dir()


def test_progress_ends_at_its_total(tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []
    ctx = context(tmp_path, config(), emit=lambda _, values: seen.append((values["done"], values["total"])))
    STAGE.run(ctx)
    assert seen[-1][0] == seen[-1][1] == 256 / 32 / 4 + 2 * 2


def test_too_little_text_says_so(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="calibration needs at least 4096 tokens"):
        STAGE.run(context(tmp_path, config(calibration_sequence_length=4096), words=8))


def test_text_is_not_used_where_the_plan_follows_from_the_weights(tmp_path: Path) -> None:
    ctx = context(tmp_path, config(rotary_plan="xeco"), words=0)
    STAGE.run(ctx)
    assert ctx.result["calibration_tokens"] == 0


def test_the_notes_show_the_real_ratio_and_factor() -> None:
    notes = " ".join(STAGE.estimate(config(), metas()).notes)
    assert "16 + 8 of 64" in notes and "0.3750 (asked: 0.5)" in notes and "2.67x smaller" in notes
    assert "no calibration input" in " ".join(STAGE.estimate(config(), metas(calibrated=False)).notes)
    assert "not used" in " ".join(STAGE.estimate(config(rotary_plan="xeco"), metas()).notes)


def test_statistics_are_counted_where_they_are_collected() -> None:
    with_text, without = (STAGE.estimate(config(), metas(calibrated=flag)) for flag in (True, False))
    assert with_text.memory["statistics"] == 2 * 8 * (64 * 64 + 64) and "statistics" not in without.memory
    assert (with_text.tokens, without.tokens) == (256, 0)
    assert with_text.parameters == parameter_count(STAGE.describe(config(), metas())["model"].architecture)


def test_an_objective_that_needs_text_is_refused_at_plan_time() -> None:
    with pytest.raises(RecipeError, match="needs calibration text"):
        STAGE.check(config(objective="activation"), metas(calibrated=False))
    STAGE.check(config(objective="activation"), metas())


def test_an_impossible_rank_is_refused_at_plan_time() -> None:
    with pytest.raises(RecipeError, match="larger than possible"):
        STAGE.check(config(kv_ratio=None, kv_lora_rank=57), metas())


def test_an_unknown_shape_is_left_unknown() -> None:
    inputs = {"model": ArtifactMeta("model")}
    assert STAGE.describe(config(), inputs)["model"].architecture is None
    STAGE.check(config(), inputs)
    assert STAGE.estimate(config(), inputs).parameters is None


@pytest.mark.parametrize(
    ("shape", "rank", "rope", "ratio"),
    [
        ((2048, 32, 8, 64, 16), 512, 32, 0.53125),
        ((2048, 32, 8, 64, 16), 128, 32, 0.15625),
        ((2048, 32, 8, 64, 16), 64, 32, 0.09375),
        ((2048, 32, 8, 64, 16), 48, 32, 0.078125),
        ((3072, 24, 8, 128, 28), 816, 64, 0.4296875),
        ((3072, 24, 8, 128, 28), 128, 64, 0.09375),
        ((4096, 32, 8, 128, 32), 512, 64, 0.28125),
        ((2048, 32, 32, 64, 24), 480, 32, 0.125),
        ((4096, 32, 32, 128, 32), 512, 64, 0.0703125),
    ],
)
def test_published_cache_sizes(shape: tuple[int, ...], rank: int, rope: int, ratio: float) -> None:
    """The accounting table of the method card, section 5."""
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers")
    inputs = metas(**dict(zip(names, shape, strict=True)))
    cfg = MlaUpcycleConfig(kv_lora_rank=rank, qk_rope_head_dim=rope, rotary_plan="xeco")
    estimate = STAGE.estimate(cfg, inputs)
    assert estimate.cache_bytes_per_token == 2 * shape[-1] * (rank + rope)
    assert estimate.cache_bytes_per_token == ratio * cache_bytes_per_token(inputs["model"].architecture)


def test_what_an_interrupted_attempt_left_is_gone(tmp_path: Path) -> None:
    ctx = context(tmp_path, config())
    for name in ("model", "conversion"):
        (ctx.output_dir(name) / "half").mkdir()
        (ctx.output_dir(name) / "half" / "written.safetensors").write_bytes(b"x")
    folders = STAGE.run(ctx)
    assert not any((folder / "half").exists() for folder in folders.values())
