"""Preference training on TRL's `DPOTrainer`: its losses and metrics, our pairs, checkpoints and stops."""

from __future__ import annotations

from typing import Any

import trl
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.dpo_trainer import DataCollatorForPreference

from posttrain.methods.preference.config import PreferenceConfig
from posttrain.pipeline.context import StageContext
from posttrain.training.adapters import peft_config
from posttrain.training.selection import select_trainable
from posttrain.training.trl_seam import TrlStageTrainer, ordered_rows, padding_multiple, require_trl

DPO_RELIED_ON = {
    "_prepare_dataset": ("self", "dataset", "processing_class", "args", "dataset_name"),
    "_precompute_ref_logps": ("self", "dataset", "name", "batch_size"),
    "compute_ref_log_probs": ("self", "model", "inputs"),
}
"""Methods of TRL's `DPOTrainer` that are replaced or called here, with their parameters."""


class PreferenceTrainer(TrlStageTrainer, trl.DPOTrainer):
    """Trains `model` on tokenised pairs (`Pairs.rows`); with `config.lora`, adapters on it.

    Args:
        reference: a frozen copy of `model`; None with adapters or with `config.precompute_reference`.
    """

    config: PreferenceConfig

    def __init__(
        self,
        ctx: StageContext,
        config: PreferenceConfig,
        model: PreTrainedModel,
        reference: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        rows: Dataset,
    ) -> None:
        require_trl(trl.DPOTrainer, DPO_RELIED_ON)
        select_trainable(model, config.trainable)
        self.pairs = rows
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        super().__init__(
            ctx,
            config,
            model,
            _in_order(rows, config, ctx.seed),
            DataCollatorForPreference(pad_token_id=pad, pad_to_multiple_of=padding_multiple(ctx, config)),
            tokens_per_step=2 * config.pairs_per_step * config.sequence_length,
            processing_class=tokenizer,
            arguments_class=trl.DPOConfig,
            arguments={
                "max_length": config.sequence_length,
                "loss_type": [config.loss_type],
                "beta": config.beta,
                "label_smoothing": config.label_smoothing,
                "precompute_ref_log_probs": config.precompute_reference,
            },
            frozen=() if reference is None else (reference.requires_grad_(False),),
            ref_model=reference,
            **({"peft_config": peft_config(config.lora)} if config.lora else {}),
        )

    def trained(self) -> PreTrainedModel:
        """The model to save, adapters merged in."""
        return self.model.merge_and_unload() if self.config.lora else self.model

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's mean over this micro-batch's pairs, as its share of the step's."""
        pairs = len(inputs["input_ids"]) // 2
        return super().compute_loss(model, inputs) * self.share_of_step(pairs)

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        """Ours are tokenised and cut already."""
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """The reference's log-probability of every answer, once for each pair and not for each use of it.

        Computed under the autocast of training: a ratio of two log-probabilities of different roundings would carry
        their noise. TRL would write a cache file beside the dataset, and compute every epoch anew.
        """
        found: dict[str, list[float]] = {"ref_chosen_logps": [], "ref_rejected_logps": []}
        for start in range(0, len(self.pairs), batch_size):
            if self.ctx.should_stop():
                self.ctx.stop(0)
            rows = [self.pairs[index] for index in range(start, min(start + batch_size, len(self.pairs)))]
            batch = {key: value.to(self.args.device) for key, value in self.data_collator(rows).items()}
            with self.compute_loss_context_manager():
                sides = self.compute_ref_log_probs(self.model, batch)
            for values, side in zip(found.values(), sides, strict=True):
                values += side.float().cpu().tolist()
            self.ctx.progress(start + len(rows), len(self.pairs), "reference pair")
        rows = self.pairs
        for key, values in found.items():
            rows = rows.add_column(key, values)
        return _in_order(rows, self.config, self.ctx.seed)


def _in_order(rows: Dataset, config: PreferenceConfig, seed: int) -> Dataset:
    return ordered_rows(rows, config.max_steps * config.pairs_per_step, seed)
