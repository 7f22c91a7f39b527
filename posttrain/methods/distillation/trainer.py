"""Distillation on transformers' Trainer: both models give hidden states, the loss makes logits a chunk at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.errors import StageError
from posttrain.methods.distillation.config import DistillConfig
from posttrain.methods.distillation.data import (
    WithTeacher,
    collate_packs,
    collate_with_teacher,
    run_sequences,
)
from posttrain.methods.distillation.loss import IGNORE, LossParts, TopK, distillation_loss, top_k_loss
from posttrain.methods.distillation.models import add_adapters, check_heads, hidden_states, teacher_device
from posttrain.methods.distillation.packing import PackedRows
from posttrain.methods.distillation.teacher_cache import TopKCache
from posttrain.pipeline.context import StageContext
from posttrain.training.blocks import collate
from posttrain.training.selection import select_trainable
from posttrain.training.trainer import StageTrainer


class DistillTrainer(StageTrainer):
    """Trains `student` to the next-token distribution of `teacher` on token blocks [N, T] or on packed documents.

    With a `cache` of the teacher's likeliest tokens the teacher is not called and may be None. With `config.lora`,
    adapters on the student are trained; `trained` gives the model to save.
    """

    config: DistillConfig

    def __init__(
        self,
        ctx: StageContext,
        config: DistillConfig,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        blocks: Tensor | PackedRows,
        cache: TopKCache | None = None,
    ) -> None:
        if (teacher is None) == (cache is None):
            raise ValueError("give either a teacher or a cache of one")
        packed = isinstance(blocks, PackedRows)
        self.sequences = run_sequences(blocks, config, ctx.seed)
        collator = collate_packs if packed else collate
        self.teacher, self.cache = teacher, cache
        if teacher is not None:
            teacher.eval().requires_grad_(False)
            check_heads(student, teacher)
        select_trainable(student, config.trainable)
        super().__init__(
            ctx,
            config,
            add_adapters(student, config.lora, ctx.seed) if config.lora else student,
            self.sequences if cache is None else WithTeacher(self.sequences, cache),
            collator if cache is None else collate_with_teacher(collator),
            tokens_per_step=config.tokens_per_step,
            frozen=() if teacher is None else (teacher,),
            # Packed documents need masks, which transformers makes from the positions.
            whole_rows=not packed,
        )
        if teacher is not None:
            teacher.to(teacher_device(config.teacher_device, self.args.device))
            # Moved once: the loss needs it beside the student's at every step.
            self.teacher_head = teacher.get_output_embeddings().weight.detach().to(self.args.device)
            self._shard_teacher(teacher)

    @property
    def shards_teacher(self) -> bool:
        """Whether every rank holds a part of the teacher."""
        return self.config.teacher_sharding == "sharded" and self.ctx.world_size > 1

    def _shard_teacher(self, teacher: PreTrainedModel) -> None:
        """Where it is asked for. The head stays whole, apart from embeddings that it may be tied to."""
        if not self.shards_teacher:
            return
        from posttrain.training.sharding.fsdp2 import shard_frozen

        self.teacher_head = self.teacher_head.clone()
        teacher.get_output_embeddings().weight = None
        shard_frozen(teacher, self.args.device.type)

    @property
    def captures(self) -> bool:
        """As for every stage; a teacher on another device or in shards, which ranks gather together, is against it."""
        against = None
        if self.teacher is not None and self.teacher.device != self.args.device:
            against = "the teacher is on another device"
        elif self.teacher is not None and self.shards_teacher:
            against = "the teacher is in shards"
        if against is None:
            return super().captures
        if self.config.cuda_graph == "on":
            where = f"stages.{self.ctx.name}.cuda_graph"
            raise StageError(f"no CUDA graph: {against}", where=where, fix=f"{where}=auto")
        return False

    def trained(self) -> PreTrainedModel:
        """The model to save, adapters merged in."""
        return self.model.merge_and_unload() if self.config.lora else self.model

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        ids, positions = inputs["input_ids"], inputs.get("position_ids")  # [B, T]
        if self.teacher is None:
            return self.divergence_from_cache(hidden_states(model, ids, positions), inputs)
        with torch.no_grad():
            there = self.teacher.device
            given = positions if positions is None else positions.to(there)
            teacher_h = hidden_states(self.teacher, ids.to(there), given).to(ids.device)
        return self.divergence(hidden_states(model, ids, positions), teacher_h, inputs)

    def divergence(self, student_h: Tensor, teacher_h: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """This micro-batch's share of the step's loss from both models' hidden states [B, T, D]."""
        options = self._loss_options(inputs)
        parts = distillation_loss(
            student_h,
            self.model.get_output_embeddings().weight,
            teacher_h,
            self.teacher_head,
            divergence=self.config.divergence,
            beta=self.config.jsd_beta,
            **options,
        )
        return self._recorded(parts, options)

    def divergence_from_cache(self, student_h: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """The same from the student's hidden states and what was kept of the teacher."""
        options = self._loss_options(inputs)
        kept = TopK(inputs["teacher_ids"], inputs["teacher_logprobs"])
        parts = top_k_loss(student_h, self.model.get_output_embeddings().weight, kept, **options)
        return self._recorded(parts, options)

    def _loss_options(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """What both losses need to know of the micro-batch, its optimiser step and the settings."""
        config, ids = self.config, inputs["input_ids"]
        labels = inputs["labels"] if "labels" in inputs else next_tokens(ids)
        return {
            "mask": inputs.get("mask"),
            "reduction": config.reduction,
            "temperature": config.temperature,
            "tokens": inputs.get("step_tokens", config.tokens_per_step),
            "sequences": config.sequences_per_step,
            "labels": labels if config.ce_weight else None,
            "ce_weight": config.ce_weight,
            "label_tokens": inputs.get("step_labels", config.sequences_per_step * (config.sequence_length - 1)),
            "chunk_tokens": config.chunk_tokens,
            "logits_dtype": getattr(torch, config.logits_dtype),
        }

    def _recorded(self, parts: LossParts, options: dict[str, Any]) -> Tensor:
        """The loss, after its parts were added to the step's log."""
        self.record_parts(kl=parts.kl_sum / options["tokens"])
        if self.config.ce_weight:
            self.record_parts(ce=parts.ce_sum / options["label_tokens"])
        return parts.loss


def next_tokens(ids: Tensor) -> Tensor:
    """For every position the token after it; the last has none."""
    labels = ids.roll(-1, dims=1)
    labels[:, -1] = IGNORE
    return labels
