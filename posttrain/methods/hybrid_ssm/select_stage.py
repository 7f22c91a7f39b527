"""The `layer_select` stage: two conversions, their source and text in, a selection of layers out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from posttrain.errors import RecipeError
from posttrain.methods.hybrid_ssm.config import LayerSelectConfig
from posttrain.methods.hybrid_ssm.select import count_feasible, layer_costs, select_layers
from posttrain.methods.hybrid_ssm.selection import read_selection, selection_meta, write_selection
from posttrain.methods.hybrid_ssm.shape import assembled_architecture, check_donors, check_tokenizers
from posttrain.models.architecture import cache_bytes, cache_ratios, parameter_count
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.device import plans_for_gpu
from posttrain.pipeline.files import clear, read_json, write_json
from posttrain.pipeline.stage import ArtifactMeta, Estimate, InputSpec, Stage

if TYPE_CHECKING:
    from posttrain.methods.hybrid_ssm.scoring import SwapScorer

MODELS = ("state", "attention", "teacher")
MEASURED = "measured.json"
"""What has been measured, so that a resumed stage does not measure it again."""


class LayerSelect(Stage):
    """Choose the layers that stay attention; see `LayerSelectConfig` and docs/hybrid_ssm.md."""

    type: ClassVar[str] = "layer_select"
    Config = LayerSelectConfig
    inputs: ClassVar[dict[str, InputSpec]] = {
        "state": InputSpec("model", doc="state-space layers everywhere, aligned"),
        "attention": InputSpec("model", doc="attention everywhere: layers that may be kept"),
        "teacher": InputSpec("model", doc="what the hybrid should predict like: the source"),
        "data": InputSpec("dataset", doc="text on which divergences are measured"),
    }
    outputs: ClassVar[dict[str, str]] = {"selection": "selection"}

    def uses_seed(self, cfg: LayerSelectConfig) -> bool:
        """Draws the sample of text."""
        return True

    def describe(self, cfg: LayerSelectConfig, inputs: Mapping[str, ArtifactMeta]) -> dict[str, ArtifactMeta]:
        shapes = _shapes(cfg, inputs)
        if shapes is None:
            return {"selection": ArtifactMeta("selection")}
        layers = shapes["state"]["num_hidden_layers"]
        return {"selection": selection_meta(_predicted(cfg, shapes), layers, predicted=cfg.method != "uniform")}

    def check(self, cfg: LayerSelectConfig, inputs: Mapping[str, ArtifactMeta]) -> None:
        shapes = _shapes(cfg, inputs)
        if shapes is None:
            return
        check_tokenizers({name: inputs[name].tokenizer for name in MODELS}, _where(cfg))
        if inputs["data"].rows == 0:
            raise RecipeError("the data has no rows", where=f"data={cfg.inputs.get('data', '?')}", fix="give text")
        for name, shape in shapes.items():
            if cfg.sequence_length > shape["max_position_embeddings"]:
                longest = shape["max_position_embeddings"]
                what = f"sequence_length {cfg.sequence_length} exceeds the {longest} positions of {name}"
                raise RecipeError(what, where="sequence_length", fix=f"sequence_length={longest}")
        _predicted(cfg, shapes)

    def estimate(self, cfg: LayerSelectConfig, inputs: Mapping[str, ArtifactMeta]) -> Estimate:
        shapes = _shapes(cfg, inputs)
        if shapes is None:
            return Estimate(tokens=cfg.tokens)
        teacher, rounds = shapes["teacher"], self._rounds(cfg, shapes)
        passing = cfg.micro_batch_size * cfg.sequence_length
        memory = {
            "weights": 4 * sum(parameter_count(shape) for shape in shapes.values()),
            "activations": 4 * passing * (6 * teacher["hidden_size"] + 3 * teacher["intermediate_size"]),
        }
        kept_of_teacher = 4 * cfg.tokens * teacher["hidden_size"]
        if not plans_for_gpu():  # else it lies in the host's memory
            memory["teacher's outputs"] = kept_of_teacher
        layers, swaps = teacher["num_hidden_layers"], rounds * teacher["num_hidden_layers"]
        notes = [f"{swaps} hybrids are measured on {cfg.tokens:,} tokens each"] if rounds else []
        if plans_for_gpu():
            notes.append(f"the teacher's outputs are kept in the host's memory: {kept_of_teacher / 1e9:.1f} GB")
        # The layers before a swap are computed once: half a model for each.
        return Estimate(tokens=cfg.tokens * max(1, rounds * layers // 2), memory=memory, notes=tuple(notes))

    def _rounds(self, cfg: LayerSelectConfig, shapes: Mapping[str, Any]) -> int:
        if cfg.method == "greedy_kl":
            return cfg.count(shapes["state"]["num_hidden_layers"]) or 0
        return 0 if cfg.method == "uniform" else 1

    def run(self, ctx: StageContext) -> dict[str, Path]:
        from posttrain.models.architecture import normalise

        cfg: LayerSelectConfig = ctx.config
        scorer = _scorer(ctx)
        shapes = {"state": scorer.models["state"], "attention": scorer.models["attention"], "teacher": scorer.teacher}
        shapes = {name: normalise(model.config.to_dict()) for name, model in shapes.items()}
        measuring = _Measuring(ctx, scorer, self._rounds(cfg, shapes))
        if cfg.method == "uniform":
            scores: Any = [0.0] * scorer.layers
        else:
            scores = measuring.scores if cfg.method == "greedy_kl" else measuring.scores(())
        kept = _choose(cfg, shapes, scores, cfg.method)
        found = {"kept": kept, "layers": scorer.layers, "method": cfg.method, "tokens": scorer.tokens}
        found |= {"kl_kept": scorer.divergence(kept), "rounds": measuring.rounds}
        if cfg.method == "smart":
            found["feasible"] = count_feasible(kept[0], kept[-1], len(kept))
        hybrid = assembled_architecture(shapes["state"], shapes["attention"], kept)
        growing, honest = cache_ratios(hybrid, shapes["teacher"], cfg.cache_tokens)
        found |= {"cache_tokens": cfg.cache_tokens, "cache_ratio_without_state": growing, "cache_ratio": honest}
        target = ctx.output_dir("selection")
        clear(target)
        write_selection(target, found)
        ctx.record_result(**{name: value for name, value in found.items() if name != "rounds"})
        if measuring.rounds:
            ctx.record_result(kl_none_kept=measuring.rounds[0]["kl"], scores=measuring.rounds[0]["scores"])
        return {"selection": target}

    def measure(self, name: str, path: Path, predicted: ArtifactMeta) -> ArtifactMeta:
        found = read_selection(path)
        return selection_meta(found["kept"], found["layers"])


class _Measuring:
    """Scores by round, with progress over all; what is measured stays in the work folder until the stage ends."""

    def __init__(self, ctx: StageContext, scorer: SwapScorer, rounds: int) -> None:
        self.ctx, self.scorer, self.size = ctx, scorer, ctx.config.micro_batch_size
        self.total = max(1, rounds * len(scorer.batches))
        self.file = ctx.work_dir / MEASURED
        known = read_json(self.file) if self.file.is_file() else {"rounds": [], "partly": None}
        self.rounds: list[dict[str, Any]] = known["rounds"]
        self.partly: dict[str, Any] | None = known["partly"]
        self.asked = 0

    def scores(self, kept: tuple[int, ...]) -> list[float]:
        """Of all layers, given those kept already."""
        before = self.asked * len(self.scorer.batches)
        self.asked += 1
        for known in self.rounds:
            if known["kept"] == list(kept):
                return known["scores"]

        def done(count: int, sums: list[float]) -> None:
            self.partly = {"kept": list(kept), "micro_batch_size": self.size, "since": [count, sums]}
            self._save()
            self.ctx.progress(before + count, self.total, unit="batch")
            if self.ctx.should_stop():
                self.ctx.stop(before + count)

        # Batches of another size are other batches: what was counted in them is no use.
        same = {"kept": list(kept), "micro_batch_size": self.size}
        mine = self.partly if self.partly and same.items() <= self.partly.items() else None
        divergence, scores = self.scorer.scores(kept, done, tuple(mine["since"]) if mine else None)
        self.rounds.append({"kept": list(kept), "kl": divergence, "scores": scores})
        self.partly = None
        self._save()
        return scores

    def _save(self) -> None:
        write_json(self.file, {"rounds": self.rounds, "partly": self.partly})


def _where(cfg: LayerSelectConfig) -> str:
    return ", ".join(f"{name}={cfg.inputs.get(name, '?')}" for name in MODELS)


def _shapes(cfg: LayerSelectConfig, inputs: Mapping[str, ArtifactMeta]) -> dict[str, dict[str, Any]] | None:
    """Architectures of the three models; None while one is unknown.

    Raises:
        RecipeError: they are not of one source.
    """
    shapes = {name: inputs[name].architecture for name in MODELS}
    if None in shapes.values():
        return None
    where = _where(cfg)
    check_donors(shapes["state"], shapes["attention"], where)
    if shapes["teacher"]["vocab_size"] != shapes["state"]["vocab_size"]:
        raise RecipeError("the teacher has another vocabulary", where=where, fix="give the source of both conversions")
    return shapes


def _predicted(cfg: LayerSelectConfig, shapes: Mapping[str, dict[str, Any]]) -> list[int]:
    """As many layers as will be kept, evenly spread, or with a budget as many of the first as fit: nothing is measured.

    Raises:
        RecipeError: as `_choose`.
    """
    alike = [1.0 if cfg.method == "budget" else 0.0] * shapes["state"]["num_hidden_layers"]
    return _choose(cfg, shapes, alike, "budget" if cfg.method == "budget" else "uniform")


def _choose(cfg: LayerSelectConfig, shapes: Mapping[str, dict[str, Any]], scores: Any, method: str) -> list[int]:
    """`select_layers` with what the settings say.

    Raises:
        RecipeError: more layers are to be kept than there are, or no choice fits the budget.
    """
    layers = shapes["state"]["num_hidden_layers"]
    if method != "budget":
        if cfg.n_keep is not None and cfg.n_keep > layers:
            what = f"{cfg.n_keep} layers are to stay attention, and the models have {layers}"
            raise RecipeError(what, where="n_keep", fix=f"n_keep from 1 to {layers}")
        return select_layers(scores, cfg.count(layers), method)
    state = shapes["state"]
    form = {"conv_kernel": state["mamba_conv_kernel"], "repeat_before_conv": state["mamba_repeat_before_conv"]}
    costs = layer_costs(shapes["attention"], cfg.cache_tokens, **form)
    whole = cache_bytes(shapes["teacher"], cfg.cache_tokens)
    least = sum(min(pair) for pair in costs) / whole
    if least > cfg.cache_ratio:
        what = f"the smallest hybrid takes {least:.3f} of the teacher's cache at {cfg.cache_tokens} tokens"
        fix = f"cache_ratio={math.ceil(1000 * least) / 1000:g}, or more cache_tokens"
        raise RecipeError(what, where="cache_ratio", fix=fix)
    return select_layers(scores, method=method, costs=costs, budget=cfg.cache_ratio * whole)


def _scorer(ctx: StageContext) -> SwapScorer:
    import torch

    from posttrain.methods.hybrid_ssm.scoring import SwapScorer
    from posttrain.models.loading import load_model, load_tokenizer
    from posttrain.training.blocks import sample_blocks

    cfg: LayerSelectConfig = ctx.config
    models = [load_model(ctx.inputs[name].path, device=ctx.device, dtype=torch.float32) for name in MODELS]
    blocks = sample_blocks(
        ctx.inputs["data"].path,
        load_tokenizer(ctx.inputs["state"].path),
        cfg.tokens,
        cfg.sequence_length,
        ctx.seed,
        purpose="layer_select",
        where=f"{ctx.name}.inputs.data ({ctx.inputs['data'].reference})",
        setting=f"stages.{ctx.name}.sequence_length",
    )
    return SwapScorer(*models, blocks.split(cfg.micro_batch_size), cfg.precision == "bf16")
