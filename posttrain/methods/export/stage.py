"""The `export` stage: a model in, the same model in another program's layout and a certificate of it out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from posttrain.errors import RecipeError
from posttrain.methods.export.config import ExportConfig
from posttrain.methods.export.targets import Holdings, holdings, obstacles
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.files import clear
from posttrain.pipeline.stage import ArtifactMeta, Estimate, InputSpec, Stage


class Export(Stage):
    """Write a model natively or in stock classes; see `ExportConfig` and docs/export.md."""

    type: ClassVar[str] = "export"
    version: ClassVar[str] = "4"
    Config = ExportConfig
    inputs: ClassVar[dict[str, InputSpec]] = {
        "model": InputSpec("model", doc="the model to write"),
        "conversion": InputSpec("conversion", optional=True, doc="account of the conversion, for the certificate"),
        "evaluation": InputSpec("evaluation", optional=True, doc="evaluation of the model, for the certificate"),
        "source": InputSpec("model", optional=True, doc="what the model was made of, for the certificate's errors"),
        "data": InputSpec("dataset", optional=True, doc="text for the certificate's errors and perplexities"),
    }
    outputs: ClassVar[dict[str, str]] = {"model": "model", "certificate": "certificate"}

    def describe(self, cfg: ExportConfig, inputs: Mapping[str, ArtifactMeta]) -> dict[str, ArtifactMeta]:
        source = inputs["model"]
        architecture = source.architecture if cfg.to == "native" else None
        extra = {name: value for name, value in source.extra.items() if name in ("dtype", "label", "eos_token_id")}
        if cfg.dtype:
            extra["dtype"] = cfg.dtype
        if cfg.to != "native":
            extra["stock"] = cfg.to
        model = ArtifactMeta("model", architecture, source.tokenizer, source.chat_template, extra=extra)
        return {"model": model, "certificate": ArtifactMeta("certificate")}

    def check(self, cfg: ExportConfig, inputs: Mapping[str, ArtifactMeta]) -> None:
        architecture = inputs["model"].architecture
        if architecture is not None and "counted_as" in architecture:
            kind = architecture["model_type"]
            what = f"model_type {kind} is an installed package's, and an export is checked without it"
            raise RecipeError(what, where="inputs.model", fix="use the model's folder, with that package beside it")
        if architecture is None:
            return
        extra = inputs["model"].extra
        if found := obstacles(architecture, cfg, extra.get("dtype"), extra.get("open", ())):
            raise RecipeError(problems=found)

    def estimate(self, cfg: ExportConfig, inputs: Mapping[str, ArtifactMeta]) -> Estimate:
        architecture = inputs["model"].architecture
        if architecture is None:
            return Estimate()
        model, export = holdings(architecture, ExportConfig()), holdings(architecture, cfg)
        size = 4 if (cfg.dtype or inputs["model"].extra.get("dtype")) == "float32" else 2
        # The plan knows the states of an architecture, and a stock class has more of them than the model.
        falcon = cfg.to == "falcon_h1"
        return Estimate(
            parameters=export.parameters,
            memory={"model": 4 * model.parameters, "exports": 8 * export.parameters},
            cache_bytes_per_token=export.cache_bytes_per_token,
            cache_state_bytes=export.cache_state_bytes if falcon else None,
            disk_bytes=size * export.parameters,
            notes=(_note(model, export),) if falcon else (),
        )

    def run(self, ctx: StageContext) -> dict[str, Path]:
        from posttrain.methods.export.certificate import write_certificate, write_readme
        from posttrain.methods.export.write import Given, export_model

        target, folder = ctx.output_dir("model"), ctx.output_dir("certificate")
        for place in (target, folder):
            clear(place)
        given = Given(**{name: given.path for name, given in ctx.inputs.items() if name != "model"})
        # The prompts do not depend on the run's seed: equal models get equal certificates.
        certificate = export_model(ctx.inputs["model"].path, target, ctx.config, given)
        write_certificate(folder, certificate)
        write_readme(ctx.inputs["model"].path, target, certificate)
        ctx.record_result(logit_error=max(step["relative"] for step in certificate["steps"] if step["exact"]))
        return {"model": target, "certificate": folder}

    def uses_seed(self, cfg: ExportConfig) -> bool:
        return False


def _note(model: Holdings, export: Holdings) -> str:
    more = export.parameters - model.parameters
    return (
        f"stock FalconH1: {more:,} parameters more ({more / model.parameters:.1%}), for halves of layers that are zero "
        f"and shared rows written out; its cache takes {export.cache_bytes_per_token:,} B a token and "
        f"{export.cache_state_bytes / 1e6:.2f} MB a sequence, the model's {model.cache_bytes_per_token:,} B and "
        f"{model.cache_state_bytes / 1e6:.2f} MB"
    )
