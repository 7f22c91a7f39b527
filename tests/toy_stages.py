"""Stages that do next to nothing, and recipes made of them: for tests of the pipeline."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

from pydantic import Field

from posttrain.config import registry
from posttrain.config.recipe import ResolvedRecipe
from posttrain.config.schema import Frame
from posttrain.errors import RecipeError, StageError
from posttrain.pipeline.stage import NOT_IN_KEY, ArtifactMeta, Estimate, InputSpec, Stage, StageConfig
from posttrain.training.watchdog import Watchdog

TOYS = {
    "toy_source": "toy_stages:ToySource",
    "toy_train": "toy_stages:ToyTrain",
    "toy_evaluate": "toy_stages:ToyEvaluate",
}


class ToySourceConfig(StageConfig):
    type: str = "toy_source"
    rows: int = 4
    outside: str = ""


class ToySource(Stage):
    type = "toy_source"
    Config = ToySourceConfig
    outputs = {"train": "dataset", "heldout": "dataset"}

    def external(self, cfg):
        if cfg.outside == "missing":
            raise RecipeError("the folder is missing", fix="make it")
        file = Path("outside.txt")
        return {"outside": cfg.outside, **({"file": file.read_text()} if file.exists() else {})}

    def describe(self, cfg, inputs):
        return {name: ArtifactMeta("dataset", rows=cfg.rows, tokens=cfg.rows * 10) for name in self.outputs}

    def estimate(self, cfg, inputs):
        return Estimate(disk_bytes=100 * cfg.rows)

    def run(self, ctx):
        folders = {name: ctx.output_dir(name) for name in self.outputs}
        for folder in folders.values():
            rows = [json.dumps({"id": str(index), "text": f"row {index}"}) for index in range(ctx.config.rows)]
            (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
            (folder / "dataset.json").write_text(json.dumps({"rows": ctx.config.rows}))
        return folders


class ToyTrainConfig(StageConfig):
    type: str = "toy_train"
    lr: float = 1e-5
    steps: int = 5
    pause: float = Field(0.0, json_schema_extra=NOT_IN_KEY)
    memory: int | None = None
    fail: str = Field("", json_schema_extra=NOT_IN_KEY)
    noise: float = Field(0.0, json_schema_extra=NOT_IN_KEY)


class ToyTrain(Stage):
    """Sums its step numbers times lr, one step a checkpoint."""

    type = "toy_train"
    Config = ToyTrainConfig
    inputs = {"data": InputSpec("dataset"), "before": InputSpec("history", optional=True)}
    inputs["more"] = InputSpec("dataset", optional=True)
    outputs = {"history": "history"}

    def check(self, cfg, inputs):
        if cfg.lr <= 0:
            raise RecipeError("lr must be above 0", fix="raise it")

    def describe(self, cfg, inputs):
        return {"history": ArtifactMeta("history", rows=cfg.steps)}

    def estimate(self, cfg, inputs):
        memory = {} if cfg.memory is None else {"weights": cfg.memory // 2, "optimizer": cfg.memory - cfg.memory // 2}
        return Estimate(
            parameters=1_000, trainable=1_000, tokens=cfg.steps * 10, data_tokens=inputs["data"].tokens, memory=memory
        )

    def run(self, ctx):
        state_file = ctx.checkpoint_dir / "state.json"
        state = json.loads(state_file.read_text()) if state_file.exists() else {"step": 0, "losses": []}
        ctx.checkpoint_dir.mkdir(exist_ok=True)
        while state["step"] < ctx.config.steps:
            if ctx.should_stop():
                ctx.stop(state["step"])
            time.sleep(ctx.config.pause)
            state["step"] += 1
            state["losses"].append(1.0 / state["step"] + ctx.config.lr + ctx.config.noise)
            aside = state_file.with_suffix(".aside")
            aside.write_text(json.dumps(state))
            aside.replace(state_file)
            ctx.progress(state["step"], ctx.config.steps)
            ctx.log_metrics(state["step"], loss=state["losses"][-1])
        if ctx.config.fail == "known":
            raise StageError("the loss is no number", "step 3", "lower lr")
        if ctx.config.fail == "unknown":
            raise ZeroDivisionError("a bug")
        if ctx.config.fail == "hang":
            with Watchdog(ctx, 0.5) as watchdog:
                watchdog.beat("step 6")
                threading.Event().wait()
        if ctx.config.fail == "exit":
            import os

            os._exit(9)
        ctx.record_result(loss=float("nan") if ctx.config.fail == "nan" else state["losses"][-1])
        ctx.record_timing(steps_per_second=1.0)
        folder = ctx.output_dir("history")
        (folder / "history.jsonl").write_text(
            "".join(json.dumps({"step": n, "loss": loss}) + "\n" for n, loss in enumerate(state["losses"], 1))
        )
        return {"history": folder}


class ToyEvaluateConfig(StageConfig):
    type: str = "toy_evaluate"
    seed_of_sample: int = Field(0, description="Only to tell evaluations apart.")


class ToyEvaluate(Stage):
    type = "toy_evaluate"
    Config = ToyEvaluateConfig
    inputs = {"history": InputSpec("history"), "data": InputSpec("dataset")}
    outputs = {"evaluation": "evaluation"}

    def describe(self, cfg, inputs):
        return {"evaluation": ArtifactMeta("evaluation")}

    def run(self, ctx):
        losses = (ctx.inputs["history"].path / "history.jsonl").read_text().splitlines()
        folder = ctx.output_dir("evaluation")
        (folder / "metrics.json").write_text(json.dumps({"rows": len(losses)}))
        ctx.record_result(rows=len(losses))
        return {"evaluation": folder}


def register(monkeypatch) -> None:
    """Add the toys to the registry for one test."""
    for name, target in TOYS.items():
        monkeypatch.setitem(registry.STAGES, name, target)


def toy_recipe(
    outputs: Path | str = "outputs",
    *,
    recipe: str = "toy",
    frame: dict | None = None,
    source: dict | None = None,
    extra: dict[str, StageConfig] | None = None,
    **train,
) -> ResolvedRecipe:
    """data → train → evaluate; keyword arguments are settings of `train`."""
    inputs = {"data": "data.train", **train.pop("inputs", {})}
    stages = {
        "data": ToySourceConfig(**(source or {})),
        "train": ToyTrainConfig(inputs=inputs, **train),
        "evaluate": ToyEvaluateConfig(inputs={"history": "train.history", "data": "data.heldout"}),
        **(extra or {}),
    }
    settings = {"paths": {"outputs": str(outputs)}, "engine": {"device": "cpu"}, **(frame or {})}
    return ResolvedRecipe(recipe, None, (), None, Frame.model_validate(settings), stages)
