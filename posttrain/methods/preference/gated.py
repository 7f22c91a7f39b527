"""The gated part of the stage: both models on held-out data, and the folder of the better one."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from posttrain.data.reading import encode_documents, read_rows
from posttrain.errors import StageError
from posttrain.methods.preference.config import PreferenceConfig
from posttrain.methods.preference.data import Pairs, read_pairs
from posttrain.methods.preference.gate import (
    Figures,
    PairScores,
    decide,
    figures,
    implicit_rewards,
    score_pairs,
    text_perplexity,
)
from posttrain.models.loading import load_model
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.files import clear

log = logging.getLogger(__name__)


@dataclass
class Gate:
    """Held-out data, ready to be scored: `pairs` and `documents` (token ids), each None where it was not given.

    `overlap`: held-out pairs that were left out because their prompt is trained on.
    """

    pairs: Pairs | None = None
    documents: list[list[int]] | None = None
    overlap: int = 0
    pad: int = field(default=0)


def read_gate(ctx: StageContext, tokenizer: PreTrainedTokenizerBase, training: Pairs) -> Gate:
    """The held-out data of the inputs; read before training, so that what is wrong with it is said before.

    Raises:
        StageError: there is none that can be used.
    """
    cfg: PreferenceConfig = ctx.config
    gate = Gate(pad=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
    if "gate_data" in ctx.inputs:
        gate.pairs = read_pairs(ctx.inputs["gate_data"].path, tokenizer, cfg.sequence_length, cfg.gate_pairs)
        _without_trained(gate, training, ctx.inputs["gate_data"].path)
    if "gate_text" in ctx.inputs:
        folder = ctx.inputs["gate_text"].path
        found = encode_documents(read_rows(folder)[: cfg.gate_documents], tokenizer)
        gate.documents = [document for document in found if len(document) > 1]
        if not gate.documents:
            raise StageError("no text to take a perplexity of", where=str(folder), fix="give text, or no gate_text")
    return gate


def keep_the_better(ctx: StageContext, gate: Gate, folder: Path) -> dict[str, float]:
    """Score the input model and the saved one; where the input is to be kept, its files take the place of the saved.

    What is scored is what a user gets: the weights in the folders, in fp32. The verdict goes into the results and the
    log, and what is returned into the history.
    """
    cfg: PreferenceConfig = ctx.config
    source = ctx.inputs["model"].path
    if gate.pairs is None and gate.documents is None:
        ctx.record_result(kept="trained", gate={"metric": None, "reason": "no held-out data was given"})
        log.warning("the trained model is kept, unseen: keep=trained and no held-out data")
        return {}
    old_scores, before = _measure(ctx, gate, source, "input")
    new_scores, after = _measure(ctx, gate, folder, "trained")
    kept, reason = decide(before, after, cfg)
    log.warning("the %s model is kept: %s", kept, reason)
    if kept == "input":
        clear(folder)
        shutil.copytree(source, folder, dirs_exist_ok=True)
    rewards = implicit_rewards(new_scores, old_scores, cfg.beta) if old_scores and new_scores else {}
    ctx.record_result(
        kept=kept,
        gate={
            "metric": cfg.gate_metric,
            "reason": reason,
            "before": _storable(before.given),
            "after": _storable({**after.given, **rewards}),
            "pairs": len(gate.pairs.rows) if gate.pairs else 0,
            "documents": len(gate.documents or ()),
            "overlap": gate.overlap,
        },
    )
    shown: dict[str, float] = {"gate/kept_trained": float(kept == "trained")}
    figures_by_name = {
        **{f"gate/before/{name}": value for name, value in before.given.items()},
        **{f"gate/after/{name}": value for name, value in {**after.given, **rewards}.items()},
    }
    return shown | {name: value for name, value in figures_by_name.items() if math.isfinite(value)}


def _storable(values: dict[str, float]) -> dict[str, float | None]:
    """Null for what is no number: a manifest takes none, and the verdict's reason names it."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _measure(ctx: StageContext, gate: Gate, folder: Path, name: str) -> tuple[PairScores | None, Figures]:
    cfg: PreferenceConfig = ctx.config
    model = load_model(folder, device=ctx.device, dtype=torch.float32)
    units = -(-len(gate.pairs.rows) // cfg.micro_batch_size) if gate.pairs else 0
    boundary = _boundary(ctx, units + len(gate.documents or ()), f"held-out batch of the {name} model")
    scores = perplexity = None
    if gate.pairs is not None:
        scores = score_pairs(model, gate.pairs.rows, gate.pad, cfg.micro_batch_size, boundary)
    if gate.documents is not None:
        perplexity = text_perplexity(model, gate.documents, cfg.sequence_length, boundary)
    return scores, figures(scores, perplexity)


def _boundary(ctx: StageContext, units: int, unit: str) -> Callable[[], None]:
    """A stop is heeded between any two batches; what was trained since the last checkpoint is then trained again."""
    done = 0

    def heed() -> None:
        nonlocal done
        if ctx.should_stop():
            ctx.stop(ctx.config.max_steps)
        ctx.progress(done, units, unit)
        done += 1

    return heed


def _without_trained(gate: Gate, training: Pairs, folder: Path) -> None:
    """Leave out held-out pairs whose prompt is trained on.

    Raises:
        StageError: none is left.
    """
    assert gate.pairs is not None
    trained = {tuple(prompt) for prompt in training.rows["prompt_ids"]}
    kept = [index for index, prompt in enumerate(gate.pairs.rows["prompt_ids"]) if tuple(prompt) not in trained]
    gate.overlap = len(gate.pairs.rows) - len(kept)
    if gate.overlap:
        log.warning("%d held-out pairs left out: their prompts are trained on", gate.overlap)
    if not kept:
        raise StageError(
            "all prompts of the held-out pairs are trained on: they cannot judge",
            where=str(folder),
            fix="give gate_data other pairs than data, e.g. gate_data=data.heldout",
        )
    gate.pairs.rows = gate.pairs.rows.select(kept, keep_in_memory=True)
