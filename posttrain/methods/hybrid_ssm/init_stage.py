"""The `hybrid_init` stage: a source in, the same model with state-space layers made from its attention out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from posttrain.errors import RecipeError, StageError
from posttrain.methods.hybrid_ssm.config import HybridInitConfig, MambaSettings
from posttrain.methods.hybrid_ssm.shape import (
    check_donated,
    check_form,
    check_kept,
    check_layers,
    check_tokenizers,
    hybrid_architecture,
)
from posttrain.models.architecture import cache_bytes_per_token, mixers, parameter_count
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.files import clear
from posttrain.pipeline.stage import ArtifactMeta, Estimate, InputSpec, Stage
from posttrain.training.estimate import ELEMENT_SIZE

if TYPE_CHECKING:
    from torch import nn

    from posttrain.methods.hybrid_ssm.statistics import HeadStatistics

ROWS_PER_BATCH = 4


class HybridInit(Stage):
    """Make state-space layers from attention; see `HybridInitConfig` and docs/hybrid_ssm.md."""

    type: ClassVar[str] = "hybrid_init"
    Config = HybridInitConfig
    inputs: ClassVar[dict[str, InputSpec]] = {
        "model": InputSpec("model", doc="the source: Llama, Mistral, Qwen2 or Qwen3 shaped"),
        "latent": InputSpec(
            "model", optional=True, doc="its conversion by mla_upcycle: layers that stay are taken from it, whole"
        ),
        "data": InputSpec("dataset", optional=True, doc="init=aligned: text on which attention distances are measured"),
    }
    outputs: ClassVar[dict[str, str]] = {"model": "model"}

    def describe(self, cfg: HybridInitConfig, inputs: Mapping[str, ArtifactMeta]) -> dict[str, ArtifactMeta]:
        source = inputs["model"]
        extra = {name: value for name, value in source.extra.items() if name in ("dtype", "label", "eos_token_id")}
        return {"model": replace(source, architecture=_target(cfg, inputs), extra=extra)}

    def check(self, cfg: HybridInitConfig, inputs: Mapping[str, ArtifactMeta]) -> None:
        if cfg.init == "aligned" and "data" not in inputs:
            raise RecipeError(
                "init=aligned measures how far attention looks, and no text is given",
                where="init",
                fix="write inputs.data=data.train, or write init=published",
            )
        arch = inputs["model"].architecture
        if cfg.init == "aligned" and arch and cfg.statistics_sequence_length > arch["max_position_embeddings"]:
            longest = arch["max_position_embeddings"]
            what = (
                f"statistics_sequence_length {cfg.statistics_sequence_length} exceeds the model's {longest} positions"
            )
            fix = f"statistics_sequence_length={longest}"
            raise RecipeError(what, where="statistics_sequence_length", fix=fix)
        if "latent" in inputs:
            where = ", ".join(f"{name}={cfg.inputs.get(name, '?')}" for name in ("model", "latent"))
            check_tokenizers({name: inputs[name].tokenizer for name in ("model", "latent")}, where)
        _target(cfg, inputs)

    def uses_seed(self, cfg: HybridInitConfig) -> bool:
        """Random parts of the published start; the sample of text of the aligned one."""
        return True

    def estimate(self, cfg: HybridInitConfig, inputs: Mapping[str, ArtifactMeta]) -> Estimate:
        source, target = inputs["model"].architecture, _target(cfg, inputs)
        if source is None or target is None:
            return Estimate()
        before, after = parameter_count(source), parameter_count(target)
        states = mixers(target).count("mamba2")
        memory = {"weights": 4 * before, "converted": 4 * after}
        if "latent" in inputs and inputs["latent"].architecture:
            memory["latent"] = 4 * parameter_count(inputs["latent"].architecture)
        if cfg.init == "aligned":
            length, heads = cfg.statistics_sequence_length, source["num_attention_heads"]
            memory["attention weights"] = 3 * 4 * ROWS_PER_BATCH * heads * length**2
        return Estimate(
            parameters=after,
            tokens=cfg.statistics_tokens if cfg.init == "aligned" else 0,
            memory=memory,
            cache_bytes_per_token=cache_bytes_per_token(target),
            disk_bytes=ELEMENT_SIZE.get(str(inputs["model"].extra.get("dtype")), 2) * after,
            notes=(f"{states} of {target['num_hidden_layers']} layers become state-space layers",),
        )

    def run(self, ctx: StageContext) -> dict[str, Path]:
        import torch

        from posttrain.methods.hybrid_ssm.convert import hybridize
        from posttrain.models.architecture import normalise
        from posttrain.models.loading import load_model, load_tokenizer, save_model, stored_dtype

        cfg: HybridInitConfig = ctx.config
        folder = ctx.inputs["model"].path
        tokenizer, model = load_tokenizer(folder), load_model(folder, device=ctx.device, dtype=torch.float32)
        latent = None
        if "latent" in ctx.inputs:
            latent = load_model(ctx.inputs["latent"].path, device=ctx.device, dtype=torch.float32)
        statistics = _statistics(ctx, tokenizer, model) if cfg.init == "aligned" else None
        source = normalise(model.config.to_dict())
        kinds = _mixers(cfg, source, None if latent is None else normalise(latent.config.to_dict()))
        settings = {name: getattr(cfg, name) for name in MambaSettings.model_fields}
        hybrid = hybridize(model, kinds, {**settings, "seed": ctx.seed}, statistics, latent_from=latent)
        target = ctx.output_dir("model")
        clear(target)
        save_model(hybrid, tokenizer, target, dtype=stored_dtype(folder), tokenizer_from=folder)
        ctx.record_result(state_layers=kinds.count("mamba2"), mixers=kinds)
        if statistics is not None:
            means = [None if distance is None else float(distance.mean()) for distance in statistics.distance]
            ctx.record_result(mean_attention_distance=means, statistics_tokens=statistics.tokens)
        return {"model": target}

    def measure(self, name: str, path: Path, predicted: ArtifactMeta) -> ArtifactMeta:
        from posttrain.models.inspect import model_meta

        found = model_meta(path)
        return replace(found, extra={**predicted.extra, **found.extra})


def _mixers(cfg: HybridInitConfig, source: Mapping[str, Any], latent: Mapping[str, Any] | None) -> list[str]:
    """Mixer of every layer of the hybrid.

    Raises:
        RecipeError: the source does not have the layers that should stay or be converted.
    """
    kinds, layers = mixers(source), source["num_hidden_layers"]
    kept = cfg.kept(layers)
    check_kept(kept, layers, "keep")
    donated = None if latent is None else mixers(latent)
    if donated is not None and len(donated) != layers:
        what = f"`latent` has {len(donated)} layers, the source {layers}"
        raise RecipeError(what, where="inputs.latent", fix="give a conversion of the same model")
    wanted = ["mamba2" if index not in kept else (donated or kinds)[index] for index in range(layers)]
    lost = [index for index in kept if donated is not None and donated[index] == "mamba2" != kinds[index]]
    if lost:
        what = f"layer {lost[0]} is to stay attention, and `latent` has a state-space layer there"
        raise RecipeError(what, where="inputs.latent", fix="give a conversion of the same model by mla_upcycle")
    if "mamba2" not in wanted:
        what = f"all {layers} layers stay: none becomes a state-space layer"
        raise RecipeError(what, where="keep_every" if cfg.keep_every else "keep", fix="keep fewer layers")
    check_layers(source, wanted, donated)
    check_form(source, wanted, cfg.config_fields(), "conv_kernel, repeat_before_conv, init")
    if latent is not None:
        check_donated(source, wanted, latent, "inputs.latent")
    return wanted


def _target(cfg: HybridInitConfig, inputs: Mapping[str, ArtifactMeta]) -> dict[str, Any] | None:
    """The architecture of the hybrid; None while a model is unknown. Raises RecipeError as `_mixers`."""
    source, latent = inputs["model"].architecture, None
    if "latent" in inputs:
        latent = inputs["latent"].architecture
    if source is None or ("latent" in inputs and latent is None):
        return None
    kinds = _mixers(cfg, source, latent)
    return hybrid_architecture(source, kinds, cfg.config_fields(), latent if "latent_attention" in kinds else None)


def _statistics(ctx: StageContext, tokenizer: Any, model: nn.Module) -> HeadStatistics:
    from posttrain.methods.hybrid_ssm.statistics import collect_head_statistics
    from posttrain.training.blocks import sample_blocks

    cfg: HybridInitConfig = ctx.config
    blocks = sample_blocks(
        ctx.inputs["data"].path,
        tokenizer,
        cfg.statistics_tokens,
        cfg.statistics_sequence_length,
        ctx.seed,
        purpose="init=aligned",
        where=f"{ctx.name}.inputs.data ({ctx.inputs['data'].reference})",
        setting=f"stages.{ctx.name}.statistics_sequence_length",
    )
    batches = blocks.split(ROWS_PER_BATCH)

    def done(count: int) -> None:
        ctx.progress(count, len(batches), unit="batch")
        # Nothing is saved between batches: the conversion is deterministic and starts again.
        if ctx.should_stop():
            ctx.stop(count)

    try:
        return collect_head_statistics(model, batches, done)
    except ValueError as error:
        raise StageError(str(error), where="hybrid_init statistics", fix="evaluate the source model first") from error
