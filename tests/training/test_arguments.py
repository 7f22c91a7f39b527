"""Stage settings as transformers' arguments."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import get_scheduler

from posttrain.pipeline.context import StageContext
from posttrain.training.arguments import training_arguments
from posttrain.training.config import TrainingConfig


@pytest.fixture
def make(tmp_path, monkeypatch):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    monkeypatch.setattr(os, "environ", environment)

    def arguments(tracker=None, max_steps=100, **settings):
        ctx = StageContext("distill", None, tmp_path, seed=7, tracker=tracker)
        config = TrainingConfig(type="train", lr=1e-3, max_steps=max_steps, **settings)
        return training_arguments(ctx, config, micro_batch=2, accumulation=3)

    return arguments


def test_nothing_is_saved_evaluated_or_hidden_by_transformers(make):
    arguments = make()
    assert arguments.save_strategy == "no" and arguments.eval_strategy == "no"
    assert arguments.logging_nan_inf_filter is False
    assert arguments.report_to == []
    assert not arguments.bf16 and not arguments.fp16
    assert arguments.n_gpu <= 1 and arguments.device == torch.device("cpu")
    assert arguments.seed == 7 and arguments.optim == "adamw_torch_fused"


def test_optimiser_settings_arrive(make):
    arguments = make(weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, max_grad_norm=0.5)
    assert (arguments.learning_rate, arguments.weight_decay, arguments.max_grad_norm) == (1e-3, 0.1, 0.5)
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon) == (0.8, 0.95, 1e-6)
    assert arguments.per_device_train_batch_size == 2 and arguments.gradient_accumulation_steps == 3


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("cosine", {0: 0.0, 5: 5e-4, 10: 1e-3, 55: 5e-4, 100: 0.0}),
        ("linear", {0: 0.0, 5: 5e-4, 10: 1e-3, 55: 5e-4, 100: 0.0}),
        ("constant", {0: 0.0, 5: 5e-4, 10: 1e-3, 55: 1e-3, 100: 1e-3}),
    ],
)
def test_schedules_warm_up_and_end_as_named(make, scheduler, expected):
    arguments = make(lr_scheduler=scheduler, warmup_ratio=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=arguments.learning_rate)
    schedule = get_scheduler(arguments.lr_scheduler_type, optimizer, arguments.get_warmup_steps(100), 100)
    rates = []
    for _ in range(101):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert {step: rates[step] for step in expected} == pytest.approx(expected, abs=1e-9)


def test_warmup_is_rounded_up_to_whole_steps(make):
    assert make(warmup_ratio=0.01, max_steps=40).get_warmup_steps(40) == 1
    assert make(warmup_ratio=0.0).get_warmup_steps(100) == 0


def test_batches_are_made_in_the_training_process_unless_a_dataset_needs_workers(make, tmp_path):
    assert make().dataloader_num_workers == 0 and not make().dataloader_persistent_workers
    ctx = StageContext("sft", None, tmp_path)
    arguments = training_arguments(ctx, TrainingConfig(type="train"), 1, 1, workers=2)
    assert arguments.dataloader_num_workers == 2 and arguments.dataloader_persistent_workers


def test_settings_that_only_change_how_are_in_no_key():
    how = {
        "micro_batch_size": 3,
        "compile": "layers",
        "attention": "math",
        "activation_budget_gib": 2.5,
        "gradient_checkpointing": True,
        "save_every": 1,
        "save_seconds": 2,
        "keep_checkpoints": 9,
    }
    config = TrainingConfig(type="train", **how)
    assert config.key_fields() == TrainingConfig(type="train").key_fields()
    assert config.activation_budget == 2.5 * 2**30


def test_tracker_is_told_by_its_environment_and_the_users_wins(make, monkeypatch, tmp_path):
    assert make({"name": "none", "project": "p", "mode": "online"}).report_to == []
    assert "WANDB_PROJECT" not in os.environ
    monkeypatch.setenv("WANDB_MODE", "disabled")
    arguments = make({"name": "wandb", "project": "p", "mode": "online"})
    assert arguments.report_to == ["wandb"] and arguments.run_name == "distill"
    assert os.environ["WANDB_MODE"] == "disabled"
    assert os.environ["WANDB_PROJECT"] == "p" and os.environ["WANDB_DIR"] == str(tmp_path)


def test_trackers_files_go_where_the_run_says(make, tmp_path):
    make({"name": "wandb", "dir": str(tmp_path / "run")})
    assert os.environ["WANDB_DIR"] == str(tmp_path / "run")
