"""What the stages that train one model promise alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from posttrain.pipeline.stage import ArtifactMeta, Stage


class TrainingStage(Stage):
    """Trains the model of one input, on any number of ranks, to `model`; `history` has a line a step.

    Subclasses set the rest of what a `Stage` is; their `Config` has `save_dtype` and `check_ranks`.
    """

    trains: ClassVar[str] = "model"
    """The input whose model is trained."""
    parallel: ClassVar[bool] = True
    outputs: ClassVar[dict[str, str]] = {"model": "model", "history": "history"}

    def describe(self, cfg: Any, inputs: Mapping[str, ArtifactMeta]) -> dict[str, ArtifactMeta]:
        before = inputs[self.trains]
        model = replace(before, extra={**before.extra, "dtype": cfg.save_dtype})
        return {"model": model, "history": ArtifactMeta(type="history")}

    def check_ranks(self, cfg: Any, ranks: int) -> None:
        cfg.check_ranks(ranks)

    def measure(self, name: str, path: Path, predicted: ArtifactMeta) -> ArtifactMeta:
        if name != "model":
            return predicted
        from posttrain.models.inspect import model_meta

        found = model_meta(path)
        known = {name: value for name, value in predicted.extra.items() if name != "open"}
        return replace(found, extra={**known, **found.extra})
