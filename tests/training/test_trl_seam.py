"""TRL's trainers under ours: the names they share, and what StageTrainer promises, with DPO as the example."""

from __future__ import annotations

import pytest
import torch
import trl
from datasets import Dataset
from source_models import make_source
from trl.trainer.dpo_trainer import DataCollatorForPreference

from posttrain.errors import StageError, StopRequested
from posttrain.models.tiny import tiny_tokenizer
from posttrain.pipeline.context import StageContext
from posttrain.training.config import TrainingConfig
from posttrain.training.order import run_order
from posttrain.training.trainer import StageTrainer
from posttrain.training.trl_seam import RELIED_ON, TrlStageTrainer, label_tokens, ordered_rows, require_trl

PAIRS = 4


class PairsConfig(TrainingConfig):
    type: str = "pairs"

    @property
    def sequences_per_step(self) -> int:
        return PAIRS


class PairsTrainer(TrlStageTrainer, trl.DPOTrainer):
    """DPO on rows that are tokenised already."""

    def _prepare_dataset(self, dataset, *args):
        return dataset

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs) * self.share_of_step(len(inputs["input_ids"]) // 2)


def pairs(count: int = 6) -> Dataset:
    tokens = torch.randint(0, 200, (count, 32), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [
        {"prompt_ids": row[:8], "chosen_ids": row[8:16], "rejected_ids": row[16 : 20 + index]}
        for index, row in enumerate(tokens)
    ]
    return Dataset.from_list(rows)


def make(folder, **settings) -> PairsTrainer:
    config = PairsConfig(**{"max_steps": 4, "micro_batch_size": 2, "lr": 1e-3, "save_seconds": 0, **settings})
    folder.mkdir(parents=True, exist_ok=True)
    ctx = StageContext("pairs", config, folder, seed=3, device="cpu")
    model, reference = (make_source("llama", initializer_range=0.05) for _ in range(2))
    return PairsTrainer(
        ctx,
        config,
        model,
        ordered_rows(pairs(), config.max_steps * PAIRS, ctx.seed),
        DataCollatorForPreference(pad_token_id=258, max_length=64, truncation_mode="keep_start"),
        tokens_per_step=128,
        processing_class=tiny_tokenizer(),
        arguments_class=trl.DPOConfig,
        arguments={"max_length": 64, "beta": 0.1},
        ref_model=reference,
        frozen=(reference,),
    )


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


@pytest.mark.parametrize("trainer", [trl.SFTTrainer, trl.DPOTrainer])
def test_the_installed_trl_is_the_one_the_seam_knows(trainer):
    assert trl.__version__.startswith("1.16.")
    require_trl(trainer)
    assert set(RELIED_ON) >= {"compute_loss", "log", "_send_telemetry", "create_model_card"}


def test_another_trl_is_refused():
    class Changed(trl.SFTTrainer):
        def log(self, logs): ...

    with pytest.raises(StageError, match=r"(?s)Changed\.log of TRL 1\.16.*posttrain knows.*1\.17"):
        require_trl(Changed)


def test_our_methods_come_first():
    order = PairsTrainer.__mro__
    assert order.index(StageTrainer) < order.index(trl.DPOTrainer)
    for name in ("_save_checkpoint", "_get_train_sampler", "_get_grad_norm", "training_step"):
        assert getattr(PairsTrainer, name) is getattr(StageTrainer, name)
    for name in ("_send_telemetry", "create_model_card", "log", "fit"):
        assert getattr(PairsTrainer, name) is getattr(TrlStageTrainer, name)


def test_trl_brings_none_of_its_own_defaults(tmp_path):
    trainer = make(tmp_path)
    assert not trainer.args.bf16 and not trainer.args.gradient_checkpointing and trainer.args.logging_steps == 1
    assert not any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
    assert trainer.model.config.pad_token_id == make_source("llama").config.pad_token_id
    assert trainer.model.config.use_cache and not trainer.captures


def test_micro_batches_change_nothing(tmp_path):
    trainers = [make(tmp_path / str(size), micro_batch_size=size) for size in (1, 2, 4)]
    histories = [trainer.fit() for trainer in trainers]
    losses = [[row["loss"] for row in history] for history in histories]
    assert losses[0] == pytest.approx(losses[2], rel=1e-5) and losses[1] == pytest.approx(losses[2], rel=1e-5)
    assert losses[0][-1] < losses[0][0]
    assert "rewards/accuracies" in histories[0][0] and "num_tokens" not in histories[0][0]
    for trainer in trainers[:2]:
        found, wanted = weights(trainer), weights(trainers[2])
        assert all((found[name] - wanted[name]).abs().max() < 1e-6 for name in wanted)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_interrupted_is_uninterrupted(tmp_path, monkeypatch, stop):
    whole = make(tmp_path / "whole")
    history = whole.fit()
    first = make(tmp_path / "parts")
    monkeypatch.setattr(first.ctx, "should_stop", lambda: first.state.global_step >= stop)
    with pytest.raises(StopRequested):
        first.fit()
    assert not (tmp_path / "parts" / "README.md").exists()
    second = make(tmp_path / "parts")
    assert second.fit() == history
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(second).values(), strict=True))


def test_a_nan_is_refused_before_the_weights_move(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    before = weights(trainer)
    plain = trainer.compute_loss
    monkeypatch.setattr(trainer, "compute_loss", lambda *args, **kwargs: plain(*args, **kwargs) * float("nan"))
    with pytest.raises(StageError, match="the loss is nan at step 1"):
        trainer.fit()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights(trainer).values(), strict=True))


def test_order_is_of_permutations_and_nothing_else():
    order = run_order(5, 12, seed=1).tolist()
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5)) and order[:5] != order[5:10]
    assert run_order(5, 7, seed=1).tolist() == order[:7] and run_order(5, 12, seed=2).tolist() != order
    with pytest.raises(ValueError, match="no rows"):
        run_order(0, 3, seed=1)


def test_label_tokens_are_those_that_something_predicts():
    batches = [{"labels": torch.tensor([[7, -100, 7], [-100, 7, 7]])}, {"labels": torch.tensor([[7, 7, -100]])}]
    assert int(label_tokens(batches, torch.device("cpu"))) == 4
