"""A next-token trainer on random rows: the shared trainer without any method."""

from __future__ import annotations

import pytest
import torch
from source_models import make_source
from torch.nn import functional as F

from posttrain.pipeline.context import StageContext
from posttrain.training.config import TrainingConfig
from posttrain.training.trainer import StageTrainer

LATENT = {"kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
ROWS, LENGTH = 4, 32

requires_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class RowsConfig(TrainingConfig):
    """Four rows of 32 tokens a step."""

    type: str = "rows"

    @property
    def sequences_per_step(self) -> int:
        return ROWS


class Rows(torch.utils.data.Dataset):
    """Rows that a model can learn: every token is followed by its successor modulo 50."""

    def __init__(self, count: int) -> None:
        starts = torch.randint(0, 50, (count, 1), generator=torch.Generator().manual_seed(0))
        self.rows = (starts + torch.arange(LENGTH)) % 50

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index]


def stack(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.stack(rows)}


class RowsTrainer(StageTrainer):
    """Cross-entropy of the next token; `spoil` (step, factor) multiplies the loss of one step."""

    spoil: tuple[int, float] | None = None
    factor: torch.Tensor | None = None

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.factor is None:
            self.factor = torch.ones((), device=self.args.device)
        # In memory that a captured step reads, and not a condition that it would have been captured with.
        self.factor.fill_(self.spoil[1] if self.spoil and self.state.global_step + 1 == self.spoil[0] else 1.0)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = inputs["input_ids"]
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden).float()
        share = len(ids) / ROWS
        loss = share * F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        self.record_parts(nats=loss.double())
        return loss * self.factor


def make_model(**changes):
    return make_source("llama", **{"attn_implementation": "sdpa", "initializer_range": 0.05, **changes})


def make_mixed(layers: int = 4):
    """An upcycled model with two kinds of mixer in turn."""
    from posttrain.models.upcycled.configuration_upcycled import UpcycledConfig
    from posttrain.models.upcycling import build_upcycled

    source = make_model(num_hidden_layers=layers)
    mixers = ["full_attention", "latent_attention"] * (layers // 2)
    model = build_upcycled(source, UpcycledConfig.from_source(source.config, mixers=mixers, **LATENT))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.isnan().any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.config._attn_implementation = "sdpa"
    return model


def make_trainer(folder, model=None, device: str = "cpu", **settings) -> RowsTrainer:
    config = RowsConfig(**{"max_steps": 6, "micro_batch_size": 2, "lr": 1e-3, "save_seconds": 0, **settings})
    folder.mkdir(parents=True, exist_ok=True)
    ctx = StageContext("rows", config, folder, seed=3, device=device)
    model = make_model() if model is None else model
    data = Rows(config.max_steps * ROWS)
    return RowsTrainer(ctx, config, model, data, stack, tokens_per_step=ROWS * LENGTH, whole_rows=True)
