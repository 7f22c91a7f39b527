"""Distillation on transformers' Trainer: both models give hidden states, the loss makes logits a chunk at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.errors import StageError
from posttrain.methods.distillation.config import DistillConfig
from posttrain.methods.distillation.data import OrderedBlocks, collate
from posttrain.methods.distillation.loss import IGNORE, distillation_loss
from posttrain.pipeline.context import StageContext
from posttrain.training.trainer import StageTrainer

MIXER = "self_attn"
"""A decoder layer's token mixer, whatever its kind, in the source families and in the upcycled decoder."""


class DistillTrainer(StageTrainer):
    """Trains `student` to the next-token distribution of `teacher` on the given token blocks [N, T]."""

    config: DistillConfig

    def __init__(
        self,
        ctx: StageContext,
        config: DistillConfig,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        blocks: Tensor,
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        check_heads(student, teacher)
        select_trainable(student, config.trainable)
        super().__init__(
            ctx,
            config,
            student,
            OrderedBlocks(blocks, config.max_steps * config.sequences_per_step, ctx.seed),
            collate,
            tokens_per_step=config.tokens_per_step,
            frozen=(teacher,),
            whole_rows=True,
        )
        self.teacher.to(self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        ids = inputs["input_ids"]  # [B, T]
        with torch.no_grad():
            teacher_h = hidden_states(self.teacher, ids)
        return self.divergence(hidden_states(model, ids), teacher_h, ids)

    def divergence(self, student_h: Tensor, teacher_h: Tensor, ids: Tensor) -> Tensor:
        """This micro-batch's share of the step's loss from both models' hidden states [B, T, D]."""
        config = self.config
        label_tokens = config.sequences_per_step * (config.sequence_length - 1)
        parts = distillation_loss(
            student_h,
            self.model.get_output_embeddings().weight,
            teacher_h,
            self.teacher.get_output_embeddings().weight,
            reduction=config.reduction,
            temperature=config.temperature,
            divergence=config.divergence,
            beta=config.jsd_beta,
            tokens=config.tokens_per_step,
            sequences=config.sequences_per_step,
            labels=next_tokens(ids) if config.ce_weight else None,
            ce_weight=config.ce_weight,
            label_tokens=label_tokens,
            chunk_tokens=config.chunk_tokens,
            logits_dtype=getattr(torch, config.logits_dtype),
        )
        self.record_parts(kl=parts.kl_sum / config.tokens_per_step)
        if config.ce_weight:
            self.record_parts(ce=parts.ce_sum / label_tokens)
        return parts.loss


def hidden_states(model: Any, ids: Tensor) -> Tensor:
    """What the model's head multiplies: the normalised last hidden states [B, T, D]."""
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


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
