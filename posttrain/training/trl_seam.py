"""The seam to TRL's trainers: `class SftTrainer(TrlStageTrainer, trl.SFTTrainer)` keeps what `StageTrainer` promises.

TRL 1.16 is pinned. What is relied on stands in `RELIED_ON`, and a test holds the installed TRL to it: a new TRL breaks
that test with a sentence and not a run with a wrong number.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from posttrain.errors import StageError
from posttrain.pipeline.context import StageContext
from posttrain.training.config import TrainingConfig
from posttrain.training.meter import Meter
from posttrain.training.order import run_order
from posttrain.training.trainer import StageTrainer

TRL_ARGUMENTS: dict[str, Any] = {
    # TRL's own defaults differ from transformers': both would be done a second time, or done to fp32 runs.
    "gradient_checkpointing": False,
    "bf16": False,
    "fp16": False,
}

NOT_OF_THE_RESULT = ("num_tokens", "step_time")
"""Metrics that are not the same on every run: TRL does not restore its count of tokens, and times a step."""

COMPILED_WIDTHS = 128
"""Tokens between two widths of padded batches where layers are compiled."""

RELIED_ON: dict[str, tuple[str, ...]] = {
    "compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
    "log": ("self", "logs", "start_time"),
    "training_step": ("self", "args", "kwargs"),
    "_save_checkpoint": ("self", "model", "trial"),
    "_send_telemetry": ("self",),
    "create_model_card": ("self", "model_name", "dataset_name", "tags"),
}
"""Methods of TRL's trainers that this seam calls, is called by or replaces, with their parameters."""


class TrlStageTrainer(StageTrainer):
    """`StageTrainer` on top of a TRL trainer, which comes second among the bases and keeps its loss and metrics.

    - The loss of a step does not depend on the micro-batch: `compute_loss` must return this micro-batch's share. A
      TRL loss that divides by `num_items_in_batch` does with `_get_num_items_in_batch` overridden; one that is a mean
      over the micro-batch's rows does when multiplied by `self.share_of_step(rows)`.
    - TRL reads numbers from the device at every micro-batch, so that nothing is logged late and nothing is captured.
    - Its metrics enter the history, but for those of `NOT_OF_THE_RESULT`.
    - Nothing is sent anywhere: no telemetry, no model card.
    - The model's and the tokenizer's special tokens are as before after construction.

    Args:
        train_dataset: the rows of all steps in order, see `ordered_rows`.
        processing_class: the tokenizer.
        arguments_class: TRL's config class; `arguments`: further fields of it.
        trainer_kwargs: further arguments of the TRL trainer (`ref_model`, `peft_config`, …).
    """

    def __init__(
        self,
        ctx: StageContext,
        config: TrainingConfig,
        model: PreTrainedModel,
        train_dataset: Dataset,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None,
        *,
        tokens_per_step: int,
        processing_class: PreTrainedTokenizerBase,
        arguments_class: type[TrainingArguments],
        arguments: Mapping[str, Any] | None = None,
        frozen: Sequence[PreTrainedModel] = (),
        **trainer_kwargs: Any,
    ) -> None:
        before = _special_tokens(model, processing_class)
        super().__init__(
            ctx,
            config,
            model,
            train_dataset,
            data_collator,
            tokens_per_step=tokens_per_step,
            frozen=frozen,
            whole_rows=False,
            arguments_class=arguments_class,
            arguments={**TRL_ARGUMENTS, **(arguments or {})},
            processing_class=processing_class,
            **trainer_kwargs,
        )
        for holder, pad in before:
            holder.pad_token_id = pad
        self.meter = Meter(lag=0)

    def fit(self) -> list[dict[str, float]]:
        for values in self._metrics.values():
            values.clear()
        return super().fit()

    def share_of_step(self, rows: int) -> float:
        """A micro-batch's part of its optimiser step, by rows."""
        return rows / self.config.sequences_per_step

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name in NOT_OF_THE_RESULT:
            self._metrics["train"].pop(name, None)
        super().log(logs, start_time)

    def _send_telemetry(self) -> None:
        """TRL would tell the hub which trainer and device are used."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Not beside checkpoints; what a model is stands in the store's manifest."""


def ordered_rows(rows: Dataset, total: int, seed: int) -> Dataset:
    """The rows of a whole run in order, as `train_dataset` of a TRL trainer: epochs are permutations (`run_order`)."""
    return rows.select(run_order(len(rows), total, seed).numpy(), keep_in_memory=True)


def padding_multiple(ctx: StageContext, config: TrainingConfig) -> int:
    """What the width of a padded batch should be a multiple of: every width is compiled anew, some 20 s each."""
    return COMPILED_WIDTHS if config.compiles(on_gpu=ctx.device != "cpu") else 1


def label_tokens(batches: Sequence[Mapping[str, torch.Tensor]], device: torch.device) -> torch.Tensor:
    """Positions of an optimiser step's micro-batches that have a next token to predict, `labels` not being -100."""
    counts = [(batch["labels"][:, 1:] != -100).sum() for batch in batches]
    return torch.stack(counts).sum().to(device)


def require_trl(trainer: type, further: Mapping[str, tuple[str, ...]] | None = None) -> None:
    """Refuse a TRL whose trainer differs from what this seam was made for.

    Args:
        further: as `RELIED_ON`, what a stage relies on besides.

    Raises:
        StageError: a method is missing or has other parameters.
    """
    import trl

    for name, expected in {**RELIED_ON, **(further or {})}.items():
        method = getattr(trainer, name, None)
        found = tuple(inspect.signature(method).parameters) if method else None
        if found != expected:
            raise StageError(
                f"{trainer.__name__}.{name} of TRL {trl.__version__} takes {found}, posttrain knows {expected}",
                where="posttrain/training/trl_seam.py",
                fix="pip install 'trl>=1.16,<1.17'",
            )


def _special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[tuple[Any, int | None]]:
    holders = [model.config.get_text_config(), tokenizer]
    if getattr(model, "generation_config", None) is not None:
        holders.append(model.generation_config)
    return [(holder, holder.pad_token_id) for holder in holders]
