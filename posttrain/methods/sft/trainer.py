"""Fine-tuning on TRL's `SFTTrainer`: its chunked head and its cross-entropy, our rows, checkpoints and stops."""

from __future__ import annotations

from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.methods.sft.config import SftConfig
from posttrain.methods.sft.data import Collator
from posttrain.pipeline.context import StageContext
from posttrain.training.adapters import peft_config
from posttrain.training.selection import select_trainable
from posttrain.training.trl_seam import TrlStageTrainer, label_tokens, ordered_rows, padding_multiple, require_trl

# TRL reads these in its constructor; rows are tokenised, cut and packed before, and the collator is ours.
READY_ROWS = {"dataset_kwargs": {"skip_prepare_dataset": True}, "packing": False, "loss_type": "nll"}


class SftTrainer(TrlStageTrainer, trl.SFTTrainer):
    """Trains `model` on sequences (`Sequences.rows`); with `config.lora`, adapters on it."""

    config: SftConfig

    def __init__(
        self,
        ctx: StageContext,
        config: SftConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Dataset,
    ) -> None:
        require_trl(trl.SFTTrainer)
        select_trainable(model, config.trainable)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        super().__init__(
            ctx,
            config,
            model,
            ordered_rows(rows, config.max_steps * config.sequences_per_step, ctx.seed),
            Collator(pad, config.sequence_length, config.packing, padding_multiple(ctx, config)),
            tokens_per_step=config.tokens_per_step,
            processing_class=tokenizer,
            arguments_class=trl.SFTConfig,
            arguments=READY_ROWS,
            **({"peft_config": peft_config(config.lora)} if config.lora else {}),
        )

    def trained(self) -> PreTrainedModel:
        """The model to save, adapters merged in."""
        return self.model.merge_and_unload() if self.config.lora else self.model

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        """TRL divides each micro-batch's sum by it: the tokens that are learnt in the whole step."""
        mine = label_tokens(batch_samples, device)
        return mine if self.ctx.world_size == 1 else self.accelerator.reduce(mine, reduction="sum")
