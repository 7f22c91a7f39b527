"""Text that the model writes: seeded, resumable to the same bytes, held out by topic."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from posttrain.data.builders import batches, teacher_samples
from posttrain.data.config import DataSourceConfig
from posttrain.data.reading import read_rows
from posttrain.data.stage import DataSource
from posttrain.errors import RecipeError, StopRequested
from posttrain.models.inspect import model_meta
from posttrain.models.tiny import write_random_model
from posttrain.paths import shipped
from posttrain.pipeline.context import InputArtifact, StageContext

ARCHITECTURE = yaml.safe_load((shipped("conf") / "model" / "tiny.yaml").read_text())["architecture"]
CFG = DataSourceConfig(
    builder="teacher_samples",
    inputs={"model": "model"},
    samples={"num_samples": 22, "max_new_tokens": 6, "batch_size": 4},
    heldout_fraction=0.2,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> InputArtifact:
    folder = tmp_path_factory.mktemp("model")
    write_random_model(folder, ARCHITECTURE, 0)
    return InputArtifact(folder, model_meta(folder), "model")


def context(work: Path, model: InputArtifact, seed: int = 0) -> StageContext:
    work.mkdir(exist_ok=True)
    return StageContext(name="data", config=CFG, work_dir=work, inputs={"model": model}, seed=seed)


def bytes_of(outputs: dict[str, Path]) -> list[bytes]:
    return [(path / "rows.jsonl").read_bytes() for path in outputs.values()]


def test_stopped_and_torn_run_ends_with_the_same_bytes(model, tmp_path) -> None:
    whole = bytes_of(DataSource().run(context(tmp_path / "whole", model)))
    ctx = context(tmp_path / "stopped", model)
    stop_after(ctx, batches=2)
    with pytest.raises(StopRequested):
        DataSource().run(ctx)
    partial = ctx.work_dir / batches.PARTIAL
    assert len(partial.read_text().splitlines()) == 2
    with partial.open("a") as file:
        file.write('{"batch": 2, "answ')
    (ctx.work_dir / "STOP").unlink()
    assert bytes_of(DataSource().run(context(ctx.work_dir, model))) == whole
    assert len(partial.read_text().splitlines()) == 6


def stop_after(ctx: StageContext, batches: int) -> None:
    """Ask for a stop when that many batches are written."""

    def emit(event: str, values: dict) -> None:
        if event == "progress" and values["done"] == batches:
            (ctx.work_dir / "STOP").touch()

    ctx.emit = emit
    ctx._last_progress = float("-inf")
    # Every progress event must come through, not five a second.
    ctx.progress = lambda done, total, unit="", **values: emit("progress", {"done": done})  # type: ignore[method-assign]


def test_seed_decides_the_text_and_the_global_random_state_is_left_alone(model, tmp_path) -> None:
    import torch

    before = torch.get_rng_state()
    first = bytes_of(DataSource().run(context(tmp_path / "a", model)))
    assert torch.equal(torch.get_rng_state(), before)
    assert first != bytes_of(DataSource().run(context(tmp_path / "b", model, seed=1)))


def test_topics_are_held_out_whole(model, tmp_path) -> None:
    outputs = DataSource().run(context(tmp_path / "w", model))
    train, heldout = (read_rows(outputs[name]) for name in ("train", "heldout"))
    topics = {prompt: topic for topic, prompt in teacher_samples.prompts_of(CFG.samples)}
    used = [{topics[row["messages"][0]["content"]] for row in rows} for rows in (train, heldout)]
    assert used[0] and used[1] and not used[0] & used[1]
    assert all("<|im_" not in row["messages"][1]["content"] for row in train + heldout)


def test_prompts_of_the_user() -> None:
    samples = CFG.samples.model_copy(update={"prompts": ["a", "b", "c"], "num_samples": 5})
    assert [prompt for _, prompt in teacher_samples.prompts_of(samples)] == ["a", "b", "c", "a", "b"]


def test_needs_a_model(model) -> None:
    with pytest.raises(RecipeError, match="needs a model"):
        DataSource().check(CFG, {})
    DataSource().check(CFG, {"model": model.meta})


def test_estimate_counts_the_sampling(model) -> None:
    estimate = DataSource().estimate(CFG, {"model": model.meta})
    assert estimate.tokens == 22 * 6
    assert estimate.memory["weights"] == 4 * estimate.parameters
