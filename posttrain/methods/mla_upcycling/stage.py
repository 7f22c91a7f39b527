"""The `mla_upcycle` stage: a source model in, the same model with latent attention and an account of it out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from posttrain.errors import RecipeError, StageError
from posttrain.methods.mla_upcycling.config import MlaUpcycleConfig
from posttrain.methods.mla_upcycling.memory import (
    HIDDEN_STATES,
    SEQUENCES_PER_BATCH,
    memory_terms,
    plan_bytes,
    stored_statistics_bytes,
)
from posttrain.methods.mla_upcycling.notes import layer_notes, plan_notes
from posttrain.methods.mla_upcycling.replay import conversion_meta, digests, read_conversion, replayed_shape
from posttrain.methods.mla_upcycling.shape import MlaShape, resolve_shape
from posttrain.models.architecture import cache_bytes_per_token, normalise, parameter_count
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.device import planning_for
from posttrain.pipeline.files import clear
from posttrain.pipeline.stage import ArtifactMeta, Estimate, InputSpec, Stage

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from posttrain.methods.mla_upcycling.plan import MlaPlan

ELEMENT_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


class MlaUpcycle(Stage):
    """Convert attention to multi-head latent attention; see `MlaUpcycleConfig` and docs/mla_upcycling.md."""

    type: ClassVar[str] = "mla_upcycle"
    version: ClassVar[str] = "3"
    Config = MlaUpcycleConfig
    inputs: ClassVar[dict[str, InputSpec]] = {
        "model": InputSpec("model", doc="the source: Llama, Mistral, Qwen2 or Qwen3 shaped, MHA, GQA or MQA"),
        "calibration": InputSpec("dataset", optional=True, doc="text whose keys and values the latent should preserve"),
        "conversion": InputSpec("conversion", optional=True, doc="a plan to carry out again instead of making one"),
    }
    outputs: ClassVar[dict[str, str]] = {"model": "model", "conversion": "conversion"}

    def external(self, cfg: MlaUpcycleConfig) -> dict[str, Any]:
        """Content of the plan that is carried out again."""
        return {} if cfg.plan_folder is None else {"plan": digests(cfg.plan_folder)}

    def describe(self, cfg: MlaUpcycleConfig, inputs: Mapping[str, ArtifactMeta]) -> dict[str, ArtifactMeta]:
        source = inputs["model"]
        found = _shape(cfg, inputs)
        architecture = None if found is None else upcycled_architecture(source.architecture or {}, *found)
        extra = {name: value for name, value in source.extra.items() if name in ("dtype", "label", "eos_token_id")}
        if found and found[1] is None and (cfg.energy is not None or cfg.allocation == "water_fill"):
            extra["open"] = ["kv_lora_rank"]
        model = ArtifactMeta("model", architecture, source.tokenizer, source.chat_template, extra=extra)
        return {"model": model, "conversion": conversion_meta(*found) if found else ArtifactMeta("conversion")}

    def check(self, cfg: MlaUpcycleConfig, inputs: Mapping[str, ArtifactMeta]) -> None:
        objective = "weight" if cfg.replays else cfg.objective_for("calibration" in inputs)
        if objective != "weight" and "calibration" not in inputs:
            raise RecipeError(
                f"objective={objective} needs calibration text",
                where="objective",
                fix="write inputs.calibration=data.train, or write objective=weight",
            )
        _shape(cfg, inputs)

    def estimate(self, cfg: MlaUpcycleConfig, inputs: Mapping[str, ArtifactMeta]) -> Estimate:
        source = inputs["model"]
        found = _shape(cfg, inputs)
        if source.architecture is None or found is None:
            return Estimate()
        shape, ranks = found
        target = upcycled_architecture(source.architecture, shape, ranks)
        before, after = parameter_count(source.architecture), parameter_count(target)
        calibrated = "calibration" in inputs and not cfg.replays and cfg.objective_for(True) != "weight"
        memory = memory_terms(source.architecture, target, shape, cfg, calibrated)
        notes = plan_notes(cfg, shape, source.architecture, (before, after), "calibration" in inputs, ranks)
        disk = after * ELEMENT_SIZE.get(str(source.extra.get("dtype")), 2) + plan_bytes(shape)
        if HIDDEN_STATES in memory:
            meanwhile = stored_statistics_bytes(shape) if calibrated else 0
            notes += layer_notes(cfg, calibrated, meanwhile)
            disk += meanwhile
        return Estimate(
            parameters=after,
            tokens=cfg.calibration_tokens if calibrated else 0,
            memory=memory,
            cache_bytes_per_token=cache_bytes_per_token(target),
            disk_bytes=disk,
            notes=tuple(notes),
        )

    def run(self, ctx: StageContext) -> dict[str, Path]:
        from posttrain.models.loading import load_tokenizer

        tokenizer = load_tokenizer(ctx.inputs["model"].path)
        blocks = _calibration_blocks(ctx, tokenizer)
        target, conversion = ctx.output_dir("model"), ctx.output_dir("conversion")
        for folder in (target, conversion):
            clear(folder)
        with planning_for(ctx.device):
            memory = self.estimate(ctx.config, {name: given.meta for name, given in ctx.inputs.items()}).memory
        convert = _by_layer if HIDDEN_STATES in memory else _in_memory
        plan = convert(ctx, tokenizer, blocks, target)
        plan.save(conversion)
        _record(ctx, plan.report())
        return {"model": target, "conversion": conversion}

    def measure(self, name: str, path: Path, predicted: ArtifactMeta) -> ArtifactMeta:
        if name == "conversion":
            return conversion_meta(*read_conversion(path))
        from posttrain.models.inspect import model_meta

        meta = model_meta(path)
        known = {name: value for name, value in predicted.extra.items() if name != "open"}
        return ArtifactMeta.from_json({**meta.to_json(), "extra": {**known, **meta.extra}})


def _in_memory(ctx: StageContext, tokenizer: Any, blocks: list[torch.Tensor] | None, target: Path) -> MlaPlan:
    import torch

    from posttrain.methods.mla_upcycling.build import build_plan
    from posttrain.methods.mla_upcycling.calibration import collect_statistics
    from posttrain.methods.mla_upcycling.convert import apply_plan
    from posttrain.methods.mla_upcycling.replay import replayed_plan
    from posttrain.models.loading import load_model, save_model, stored_dtype

    source = ctx.inputs["model"].path
    model = load_model(source, device=ctx.device, dtype=torch.float32)
    layers, batches = model.config.num_hidden_layers, 0 if blocks is None else len(blocks)
    planned = batches + ctx.config.planning_passes * layers
    units = _Units(ctx, planned + layers)
    with _finite_activations():
        statistics = None if blocks is None else collect_statistics(model, blocks, units.since(0))
    plan = replayed_plan(ctx) or build_plan(model, ctx.config, statistics, units.since(batches))
    converted = apply_plan(model, plan, units.since(planned))
    del model, statistics
    save_model(converted, tokenizer, target, dtype=stored_dtype(source), tokenizer_from=source)
    return plan


def _by_layer(ctx: StageContext, tokenizer: Any, blocks: list[torch.Tensor] | None, target: Path) -> MlaPlan:
    from posttrain.methods.mla_upcycling import offload
    from posttrain.methods.mla_upcycling.replay import replayed_plan
    from posttrain.models.loading import save_by_shards, stored_dtype
    from posttrain.models.offloaded import OffloadedModel

    source = OffloadedModel(ctx.inputs["model"].path, ctx.device)
    layers = source.config.num_hidden_layers
    start = 0 if blocks is None else layers
    planned = start + ctx.config.planning_passes * layers
    units = _Units(ctx, planned + layers)
    scratch = ctx.work_dir / "statistics"
    with _finite_activations():
        statistics = None if blocks is None else offload.collect_by_layer(source, blocks, scratch, units.since(0))
    plan = replayed_plan(ctx) or offload.plan_by_layer(source, ctx.config, statistics, units.since(start))
    shards = offload.shards_by_layer(source, plan, units.since(planned))
    skeleton, dtype = offload.skeleton(source, plan), stored_dtype(source.folder)
    save_by_shards(skeleton, shards, tokenizer, target, dtype=dtype, tokenizer_from=source.folder)
    shutil.rmtree(scratch, ignore_errors=True)
    return plan


def _shape(cfg: MlaUpcycleConfig, inputs: Mapping[str, ArtifactMeta]) -> tuple[MlaShape, list[int] | None] | None:
    """Shape and, of a plan that exists, ranks by layer; None while the model or the plan is unknown.

    Raises:
        RecipeError: no such plan, or it does not fit the model.
    """
    architecture = inputs["model"].architecture
    if architecture is None:
        return None
    if cfg.replays:
        return replayed_shape(cfg, inputs.get("conversion"), architecture)
    return resolve_shape(architecture, cfg), None


def upcycled_architecture(source: Mapping[str, Any], shape: MlaShape, ranks: list[int] | None = None) -> dict[str, Any]:
    """The architecture dict of the converted model, before it exists; `ranks` by layer where they are known."""
    ranks = ranks or [shape.kv_lora_rank]
    own_rope = shape.latent_rope_parameters
    return normalise(
        {
            **source,
            "model_type": "upcycled",
            "source_model_type": source["model_type"],
            "mixers": ["latent_attention"] * shape.layers,
            "kv_lora_rank": ranks[0] if len(set(ranks)) == 1 else ranks,
            "q_lora_rank": shape.q_lora_rank,
            "qk_nope_head_dim": shape.qk_nope_head_dim,
            "qk_rope_head_dim": shape.qk_rope_head_dim,
            "v_head_dim": shape.v_head_dim,
            "rope_frequency_indices": None if own_rope else list(shape.rope_frequency_indices),
            "latent_rope_parameters": own_rope,
            "query_pre_attn_scalar": shape.head_dim,
            "latent_bias": shape.latent_bias,
        }
    )


class _Units:
    """Progress over the phases of a conversion; ends the stage at a unit boundary when a stop was asked for."""

    def __init__(self, ctx: StageContext, total: int) -> None:
        self.ctx, self.total = ctx, total

    def since(self, start: int) -> Callable[[int], None]:
        def done(count: int) -> None:
            self.ctx.progress(start + count, self.total, unit="step")
            # Nothing is saved between units: the conversion is deterministic and starts again.
            if self.ctx.should_stop():
                self.ctx.stop(start + count)

        return done


def _calibration_blocks(ctx: StageContext, tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor] | None:
    """Batches of token ids [B, T] from documents in an order drawn with the seed; None when no text is used."""
    cfg: MlaUpcycleConfig = ctx.config
    if "calibration" not in ctx.inputs or cfg.replays or cfg.objective_for(True) == "weight":
        return None
    from posttrain.training.blocks import sample_blocks

    blocks = sample_blocks(
        ctx.inputs["calibration"].path,
        tokenizer,
        cfg.calibration_tokens,
        cfg.calibration_sequence_length,
        ctx.seed,
        purpose="calibration",
        where=f"{ctx.name}.inputs.calibration ({ctx.inputs['calibration'].reference})",
        setting=f"stages.{ctx.name}.calibration_sequence_length",
    )
    return list(blocks.split(SEQUENCES_PER_BATCH))


@contextmanager
def _finite_activations() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        fix = "evaluate the source model first: its activations must be finite"
        raise StageError(str(error), where="mla_upcycle calibration", fix=fix) from error


def _record(ctx: StageContext, report: Mapping[str, Any]) -> None:
    layers = report["layers"]
    means = {
        f"mean_{name}": sum(layer[name] for layer in layers) / len(layers)
        for name in ("rel_error", "key_error", "value_error", "energy", "rotary_energy")
    }
    ranks = [layer["kv_lora_rank"] for layer in layers]
    ctx.record_result(
        kv_ratio=report["kv_ratio"],
        kv_lora_rank=ranks[0] if len(set(ranks)) == 1 else ranks,
        calibration_tokens=report["calibration_tokens"],
        **means,
    )
