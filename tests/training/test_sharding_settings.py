"""What recipes say of sharded engines: DeepSpeed's configuration, memory in plans, who reads whose checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from source_models import make_source

from posttrain.cli import show
from posttrain.config import load_recipe
from posttrain.config.deepspeed import OURS, deepspeed_config, forbidden
from posttrain.config.schema import SHARDED
from posttrain.errors import RecipeError, StageError
from posttrain.models.architecture import normalise, parameter_count
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.device import planning_for
from posttrain.pipeline.plan import make_plan
from posttrain.training.estimate import training_memory
from posttrain.training.sharding.base import Piece
from posttrain.training.sharding.layout import require_readable, write_layout
from posttrain.training.sharding.memory import sharded_teacher
from posttrain.training.sharding.shards import Shards, read_weights, write_shard

BATCH = {"micro_batch": 2, "accumulation": 3, "max_grad_norm": 0.5}


def test_the_configuration_is_that_of_the_stage() -> None:
    two, three = deepspeed_config(2, 4, **BATCH), deepspeed_config(3, 4, **BATCH)
    for config in (two, three):
        assert config["train_batch_size"] == 4 * 2 * 3
        assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (2, 3)
        assert config["gradient_clipping"] == 0.5
        assert not {"fp16", "bf16", "optimizer", "scheduler"} & config.keys()
    assert (two["zero_optimization"]["stage"], three["zero_optimization"]["stage"]) == (2, 3)
    assert two["gradient_allreduce_op"] == "sum" and "gradient_allreduce_op" not in three


def test_a_recipe_is_merged_over_it() -> None:
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 7}}
    zero = deepspeed_config(2, 1, **BATCH, overrides=offload)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu"} and zero["reduce_bucket_size"] == 7 and zero["stage"] == 2


@pytest.mark.parametrize("key", OURS)
def test_what_would_break_a_promise_is_refused(key: str) -> None:
    value: object = 1
    for part in reversed(key.split(".")):
        value = {part: value}
    assert [line for line in forbidden(value) if f"engine.deepspeed.{key} cannot be set" in line]  # type: ignore[arg-type]


def test_recipes_with_wrong_deepspeed_settings_do_not_load() -> None:
    with pytest.raises(RecipeError, match="bf16 cannot be set: weights are fp32"):
        load_recipe("x_ecomla", ["engine=zero2", "engine.deepspeed={bf16: {enabled: true}}"])
    with pytest.raises(RecipeError, match="deepspeed is for engine=zero2 and engine=zero3, not for engine=fsdp2"):
        load_recipe("x_ecomla", ["engine=fsdp2", "engine.deepspeed={steps_per_print: 1}"])


def test_show_prints_it_for_every_training_stage(capsys: pytest.CaptureFixture[str]) -> None:
    show.command("x_ecomla", ["scale=smoke", "engine=zero3", "engine.ranks=4"])
    text = capsys.readouterr().out
    assert "configuration in stage distill" in text and "configuration in stage prefer" in text
    body = text.split("in stage distill:\n")[1].split("\n\n")[0].replace("#   ", "")
    assert json.loads(body)["zero_optimization"]["stage"] == 3
    show.command("x_ecomla", ["scale=smoke", "engine=fsdp2"])
    assert "DeepSpeed" not in capsys.readouterr().out


def test_a_rank_needs_less_memory_the_more_there_are() -> None:
    arch = normalise(make_source(hidden_size=256, num_hidden_layers=12).config.to_dict())
    size = parameter_count(arch)

    def terms(strategy: str, ranks: int, **more: object) -> dict[str, int]:
        with planning_for("cuda", strategy, ranks):
            return training_memory(arch, size, 64, 64, **more)

    whole = terms("ddp", 8)
    assert whole == terms("single", 1)
    for strategy in SHARDED:
        shared = terms(strategy, 8)
        assert shared["optimizer"] == pytest.approx(whole["optimizer"] / 8, rel=0.01)
        assert {name: shared[name] for name in ("activations", "logits")} == {
            name: whole[name] for name in ("activations", "logits")
        }
    assert terms("zero2", 8)["weights"] > whole["weights"] > terms("fsdp2", 8)["weights"]
    teacher = {"teacher": arch}
    assert terms("ddp", 8, **teacher, teacher_sharded=True)["teacher"] < terms("ddp", 8, **teacher)["teacher"]
    assert sharded_teacher(arch, 4, 8) < 4 * size / 2


def test_layers_are_not_compiled_by_zero3(tmp_path: Path) -> None:
    recipe = load_recipe("x_ecomla", ["scale=smoke", "engine=zero3", "stages.distill.compile=layers"])
    with pytest.raises(RecipeError, match="engine zero3 swaps the weights of layers"):
        make_plan(recipe, outputs=tmp_path)


def context(strategy: str, ranks: int) -> StageContext:
    return StageContext("distill", None, Path("."), strategy=strategy, world_size=ranks)


@pytest.mark.parametrize(
    ("written", "ranks", "read", "now", "draws", "said"),
    [
        ("ddp", 2, "single", 1, None, None),
        ("ddp", 2, "ddp", 3, "dropout draws", r"by 2 ranks; 3 would go on with other numbers: dropout draws"),
        ("ddp", 2, "ddp", 2, "dropout draws", None),
        ("zero2", 2, "fsdp2", 4, None, None),
        ("zero2", 2, "zero2", 1, "dropout draws", r"by 2 ranks; 1 would"),
        ("zero2", 2, "ddp", 2, None, r"in shards \(strategy zero2\), which strategy ddp does not read"),
        ("single", 1, "zero3", 1, None, r"the whole model on every rank \(strategy single\)"),
    ],
)
def test_who_goes_on_from_what(
    written: str, ranks: int, read: str, now: int, draws: str | None, said: str | None, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    write_layout(folder, context(written, ranks))
    if said is None:
        require_readable(folder, context(read, now), draws)
        return
    with pytest.raises(StageError, match=said) as raised:
        require_readable(folder, context(read, now), draws)
    assert "go on with engine" in raised.value.problems[0].fix and "--force distill" in raised.value.problems[0].fix


def piece(start: int, length: int) -> Piece:
    values = torch.arange(6.0)[start : start + length]
    return Piece("w", (2, 3), start, values, {"exp_avg": values * 10, "exp_avg_sq": values * 100})


def write(folder: Path, *parts: tuple[int, int]) -> None:
    for rank, part in enumerate(parts):
        write_shard(folder, [piece(*part)], rank=rank, world_size=len(parts), strategy="zero2", steps=4)


def test_shards_are_read_by_range(tmp_path: Path) -> None:
    write(tmp_path, (0, 2), (2, 3), (5, 1))
    shards = Shards(tmp_path)
    assert shards.steps == 4
    assert shards.whole("w").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert shards.read("exp_avg", "w", 1, 4).tolist() == [10, 20, 30, 40]


@pytest.mark.parametrize("parts", [((0, 2), (3, 3)), ((0, 4), (2, 4)), ((0, 5),)])
def test_shards_with_gaps_or_overlaps_are_refused(parts: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    write(tmp_path, *parts)
    with pytest.raises(StageError, match="do not hold every element of w once"):
        Shards(tmp_path)


def test_shards_of_another_model_are_refused(tmp_path: Path) -> None:
    write(tmp_path, (0, 6))
    with pytest.raises(StageError, match="other parameters than are trained"):
        read_weights(tmp_path, {"w": torch.nn.Parameter(torch.zeros(3, 2))})
