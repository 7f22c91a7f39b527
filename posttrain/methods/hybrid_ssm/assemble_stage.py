"""The `assemble` stage: two conversions of one source and a choice of layers in, the hybrid out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from posttrain.errors import RecipeError
from posttrain.methods.hybrid_ssm.config import AssembleConfig
from posttrain.methods.hybrid_ssm.shape import assembled_architecture, check_donors, check_kept, check_tokenizers
from posttrain.models.architecture import cache_bytes_per_token, parameter_count
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.files import clear
from posttrain.pipeline.stage import ArtifactMeta, Estimate, InputSpec, Stage
from posttrain.training.estimate import ELEMENT_SIZE

DONORS = ("state", "attention")


class Assemble(Stage):
    """Take every layer from the model that has its kind, tensors as they are; optimiser states stay behind."""

    type: ClassVar[str] = "assemble"
    Config = AssembleConfig
    inputs: ClassVar[dict[str, InputSpec]] = {
        "state": InputSpec("model", doc="state-space layers everywhere, from hybrid_init and ild"),
        "attention": InputSpec("model", doc="attention everywhere: the source, or its conversion by mla_upcycle"),
        "selection": InputSpec("selection", optional=True, doc="which layers stay attention, from layer_select"),
    }
    outputs: ClassVar[dict[str, str]] = {"model": "model"}

    def uses_seed(self, cfg: AssembleConfig) -> bool:
        return False

    def describe(self, cfg: AssembleConfig, inputs: Mapping[str, ArtifactMeta]) -> dict[str, ArtifactMeta]:
        state, attention = (inputs[name] for name in DONORS)
        extra = {name: value for name, value in state.extra.items() if name != "open"}
        if "dtype" in extra:
            extra["dtype"] = wider(extra["dtype"], attention.extra.get("dtype"))
        left = {*attention.extra.get("open", ())}
        if cfg.keep is None and "selection" in inputs and inputs["selection"].extra.get("open"):
            left.add("mixers")
        if left:
            extra["open"] = sorted(left)
        return {"model": replace(state, architecture=_target(cfg, inputs), extra=extra)}

    def check(self, cfg: AssembleConfig, inputs: Mapping[str, ArtifactMeta]) -> None:
        if (cfg.keep is None) == ("selection" not in inputs):
            given = "both are given" if cfg.keep is not None else "neither is given"
            raise RecipeError(
                f"the layers that stay attention come from inputs.selection or from keep, and {given}",
                where="keep",
                fix="write inputs.selection=STAGE.selection of a layer_select stage and keep=null, or keep=[0,5,10] "
                "without inputs.selection ('~inputs.selection')",
            )
        check_tokenizers({name: inputs[name].tokenizer for name in DONORS}, _where(cfg))
        _target(cfg, inputs)

    def estimate(self, cfg: AssembleConfig, inputs: Mapping[str, ArtifactMeta]) -> Estimate:
        target = _target(cfg, inputs)
        if target is None:
            return Estimate()
        size = parameter_count(target)
        donors = [parameter_count(inputs[name].architecture) for name in DONORS]
        return Estimate(
            parameters=size,
            memory={"weights": 4 * size, "models it comes from": 4 * sum(donors)},
            cache_bytes_per_token=cache_bytes_per_token(target),
            disk_bytes=ELEMENT_SIZE.get(wider(*(inputs[name].extra.get("dtype") for name in DONORS)), 4) * size,
        )

    def run(self, ctx: StageContext) -> dict[str, Path]:
        from posttrain.methods.hybrid_ssm.assembly import assemble, embedding_distance
        from posttrain.methods.hybrid_ssm.selection import read_selection
        from posttrain.models.loading import load_model, load_tokenizer, save_model

        cfg: AssembleConfig = ctx.config
        state, attention = (load_model(ctx.inputs[name].path, device="cpu", dtype="auto") for name in DONORS)
        kept = cfg.keep if cfg.keep is not None else read_selection(ctx.inputs["selection"].path)["kept"]
        hybrid = assemble(state, attention, kept)
        target, folder = ctx.output_dir("model"), ctx.inputs["state"].path
        clear(target)
        save_model(hybrid, load_tokenizer(folder), target, tokenizer_from=folder)
        apart = embedding_distance(state, attention)
        ctx.record_result(kept=list(kept), mixers=list(hybrid.config.mixers), embeddings_differ_by=apart)
        return {"model": target}

    def measure(self, name: str, path: Path, predicted: ArtifactMeta) -> ArtifactMeta:
        from posttrain.models.inspect import model_meta

        found = model_meta(path)
        known = {name: value for name, value in predicted.extra.items() if name != "open"}
        return replace(found, extra={**known, **found.extra})


def wider(one: str | None, other: str | None) -> str:
    """The type of two that holds the tensors of both as they are; fp32 where one is unknown."""
    return str(one) if one == other and one is not None else "float32"


def _where(cfg: AssembleConfig) -> str:
    return ", ".join(f"{name}={cfg.inputs.get(name, '?')}" for name in DONORS)


def _target(cfg: AssembleConfig, inputs: Mapping[str, ArtifactMeta]) -> dict[str, Any] | None:
    """The hybrid's architecture; None while something is unknown. Raises RecipeError where it cannot be."""
    state, attention = (inputs[name].architecture for name in DONORS)
    if state is None or attention is None:
        return None
    check_donors(state, attention, _where(cfg))
    kept: Sequence[int] | None = cfg.keep
    if kept is None:
        kept = inputs["selection"].extra.get("kept") if "selection" in inputs else None
    if kept is None:
        return None
    layers = state["num_hidden_layers"]
    if cfg.keep is None and (chosen := inputs["selection"].extra.get("layers", layers)) != layers:
        what = f"the selection was made for {chosen} layers, the models have {layers}"
        raise RecipeError(what, where="inputs.selection", fix="select among layers of the same models")
    check_kept(kept, layers, "keep" if cfg.keep is not None else "inputs.selection")
    return assembled_architecture(state, attention, kept)
