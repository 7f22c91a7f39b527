"""Distillation on transformers' Trainer: both models give hidden states, the loss makes logits a chunk at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.errors import StageError
from posttrain.methods.distillation.config import DistillConfig
from posttrain.methods.distillation.data import OrderedBlocks, OrderedPacks, collate, collate_packs
from posttrain.methods.distillation.loss import IGNORE, distillation_loss
from posttrain.methods.distillation.packing import PackedRows
from posttrain.pipeline.context import StageContext
from posttrain.training.trainer import StageTrainer

MIXER = "self_attn"
"""A decoder layer's token mixer, whatever its kind, in the source families and in the upcycled decoder."""


class DistillTrainer(StageTrainer):
    """Trains `student` to the next-token distribution of `teacher` on token blocks [N, T] or on packed documents."""

    config: DistillConfig

    def __init__(
        self,
        ctx: StageContext,
        config: DistillConfig,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        blocks: Tensor | PackedRows,
    ) -> None:
        packed = isinstance(blocks, PackedRows)
        total = config.max_steps * config.sequences_per_step
        if packed:
            dataset: OrderedBlocks = OrderedPacks(blocks, total, ctx.seed, config.sequences_per_step)
        else:
            dataset = OrderedBlocks(blocks, total, ctx.seed)
        self.teacher = teacher.eval().requires_grad_(False)
        check_heads(student, teacher)
        select_trainable(student, config.trainable)
        super().__init__(
            ctx,
            config,
            student,
            dataset,
            collate_packs if packed else collate,
            tokens_per_step=config.tokens_per_step,
            frozen=(teacher,),
            # Packed documents need masks, which transformers makes from the positions.
            whole_rows=not packed,
        )
        self.teacher.to(teacher_device(config.teacher_device, self.args.device))
        # Moved once: the loss needs it beside the student's at every step.
        self.teacher_head = self.teacher.get_output_embeddings().weight.detach().to(self.args.device)

    @property
    def captures(self) -> bool:
        """As for every stage; a graph holds one device, so that a teacher on another one is against it."""
        if self.teacher.device == self.args.device:
            return super().captures
        if self.config.cuda_graph == "on":
            where = f"stages.{self.ctx.name}.cuda_graph"
            raise StageError("no CUDA graph: the teacher is on another device", where=where, fix=f"{where}=auto")
        return False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        ids, positions = inputs["input_ids"], inputs.get("position_ids")  # [B, T]
        with torch.no_grad():
            there = self.teacher.device
            given = positions if positions is None else positions.to(there)
            teacher_h = hidden_states(self.teacher, ids.to(there), given).to(ids.device)
        return self.divergence(hidden_states(model, ids, positions), teacher_h, inputs)

    def divergence(self, student_h: Tensor, teacher_h: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """This micro-batch's share of the step's loss from both models' hidden states [B, T, D]."""
        config, ids = self.config, inputs["input_ids"]
        tokens = inputs.get("step_tokens", config.tokens_per_step)
        label_tokens = inputs.get("step_labels", config.sequences_per_step * (config.sequence_length - 1))
        labels = inputs["labels"] if "labels" in inputs else next_tokens(ids)
        parts = distillation_loss(
            student_h,
            self.model.get_output_embeddings().weight,
            teacher_h,
            self.teacher_head,
            inputs.get("mask"),
            reduction=config.reduction,
            temperature=config.temperature,
            divergence=config.divergence,
            beta=config.jsd_beta,
            tokens=tokens,
            sequences=config.sequences_per_step,
            labels=labels if config.ce_weight else None,
            ce_weight=config.ce_weight,
            label_tokens=label_tokens,
            chunk_tokens=config.chunk_tokens,
            logits_dtype=getattr(torch, config.logits_dtype),
        )
        self.record_parts(kl=parts.kl_sum / tokens)
        if config.ce_weight:
            self.record_parts(ce=parts.ce_sum / label_tokens)
        return parts.loss


def hidden_states(model: Any, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """What the model's head multiplies: the normalised last hidden states [B, T, D].

    `positions` [B, T] that start anew inside a row part it into documents that do not see each other. A model that PEFT
    wrapped is asked below the wrapping, with its adapters.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    # Named only when given: whole rows keep the call, and with it the compiled graph, that they had.
    extra = {} if positions is None else {"position_ids": positions}
    return model.base_model(input_ids=ids, use_cache=False, **extra).last_hidden_state


def teacher_device(wanted: str, student: torch.device) -> torch.device:
    """The device `teacher_device` names.

    Raises:
        StageError: this machine does not have it.
    """
    device = student if wanted == "same" else torch.device(wanted)
    if wanted.startswith("cuda") and device.index >= torch.cuda.device_count():
        raise StageError(
            f"there is no {wanted}: {torch.cuda.device_count()} CUDA devices are visible",
            where="teacher_device",
            fix="teacher_device=same",
        )
    return device


def next_tokens(ids: Tensor) -> Tensor:
    """For every position the token after it; the last has none."""
    labels = ids.roll(-1, dims=1)
    labels[:, -1] = IGNORE
    return labels


def select_trainable(model: nn.Module, trainable: str) -> int:
    """Freeze what is not trained; return the number of trainable parameters.

    Raises:
        StageError: the model has no module of a known mixer name.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable == "all" or MIXER in name.split("."))
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not count:
        raise StageError(f"no token mixer found in {type(model).__name__}", fix="trainable=all")
    return count


def check_heads(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse models whose logits are not `hidden @ head.T` over one vocabulary.

    Raises:
        StageError: vocabularies differ, or a head has a bias, or logits are scaled or capped.
    """
    rows = [model.get_output_embeddings().weight.shape[0] for model in (student, teacher)]
    if rows[0] != rows[1]:
        raise StageError(
            f"student and teacher have {rows[0]} and {rows[1]} vocabulary rows",
            fix="use a teacher of the same vocabulary, or cut padded rows off the larger model's embedding",
        )
    for role, model in (("student", student), ("teacher", teacher)):
        head = model.get_output_embeddings()
        odd = ["a head with a bias"] if getattr(head, "bias", None) is not None else []
        for field in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            odd += [field] if getattr(model.config, field, None) not in (None, 1, 1.0) else []
        if odd:
            raise StageError(f"the {role} ({type(model).__name__}) has {', '.join(odd)}, which the loss does not know")
