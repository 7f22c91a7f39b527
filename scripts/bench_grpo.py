"""Samples a second of a whole GRPO step (roll-outs, rewards, update): ours, and TRL as a user would run it.

    python scripts/bench_grpo.py --model FOLDER --arms ours trl trl:static trl:continuous --samples 1024 --csv DIR
    python scripts/bench_grpo.py --model FOLDER --device cpu --samples 16 --tokens 8 --steps 2 --warmup 1   # smoke test

All arms answer the same questions of reasoning-gym with the same model, 8 completions each, and score them by the
tasks' own scorers. Ours is the stage's own trainer: fp32 weights under bf16 autocast, roll-outs by the decode engine,
rewards in processes of their own. TRL is its GRPOTrainer with bf16 weights, which favours it, and rewards computed in
its process. `static`: static cache and torch.compile of its decoding; `continuous`: transformers' continuous batching.
With `--long` only a token that is next to never drawn ends a completion, so that nearly all have `--tokens`.
"""
# ruff: noqa: E402  (the checkout comes first on the path)

from __future__ import annotations

import argparse
import csv
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch
import trl
from transformers import PrinterCallback, TrainerCallback

from posttrain.data.config import GymTasks
from posttrain.data.tasks import draw, generator_of
from posttrain.methods.grpo.config import GrpoConfig
from posttrain.models.loading import load_model, load_tokenizer
from posttrain.pipeline.context import StageContext
from posttrain.policy.data import Prompts, read_prompts
from posttrain.policy.trainer import PolicyTrainer
from posttrain.rewards.config import GymReward
from posttrain.rewards.score import RewardSet
from posttrain.training.callbacks import ProfileCallback

GENERATIONS = 8


class Marks(TrainerCallback):
    """The time at the end of every step, the device waited for."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.times: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mark()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mark()

    def mark(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def questions(count: int, tokenizer: Any) -> Prompts:
    """Easy problems of every kind in turn, as the stage would read them."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            {"id": one.id, "task": one.task, "messages": [{"role": "user", "content": one.question}]}
            for one in draw(GymTasks(size=count + 1), 0.0, 0).train[:count]
        ]
        (Path(folder) / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_prompts(Path(folder), tokenizer, 1024, {"correct": GymReward()})


def ours(options: argparse.Namespace, variant: dict[str, str]) -> dict[str, Any]:
    width = variant.pop("width", None)
    config = GrpoConfig.model_validate(
        {
            "max_steps": options.steps + options.warmup,
            "num_generations": GENERATIONS,
            "generation_batch_size": options.samples,
            "micro_batch_size": int(variant.pop("micro", options.micro_batch)),
            "max_completion_length": options.tokens,
            "precision": "bf16" if options.device == "cuda" else "fp32",
            "rollout": "engine",
            "rewards": {"correct": {"type": "gym"}},
            "answer": {"find": "whole"},
            "save_seconds": 0,
            "compile": "layers" if options.device == "cuda" else "off",
            "reward_workers": options.workers,
            **variant,
        }
    )
    model, tokenizer = load_model(options.model, device=options.device), load_tokenizer(options.model)
    if options.long:
        endless(model, tokenizer)
    prompts = questions(options.samples // GENERATIONS * (options.steps + options.warmup), tokenizer)
    with (
        tempfile.TemporaryDirectory() as folder,
        RewardSet(config.rewards, config.answer, workers=options.workers) as rewards,
    ):
        rewards.warm()
        ctx = StageContext("bench", config, Path(folder), device=options.device)
        trainer = PolicyTrainer(ctx, config, model, tokenizer, prompts, rewards)
        trainer.width_multiple = int(width or trainer.width_multiple)
        marks = Marks(options.device)
        trainer.add_callback(marks)
        if options.profile:
            trainer.add_callback(ProfileCallback(options.profile, 1))
        before: dict[str, float] = {}
        trainer.add_callback(_AtStep(options.warmup, lambda: before.update(trainer.clock.seconds)))
        history = trainer.fit()
    parts = {name: (value - before.get(name, 0.0)) / options.steps for name, value in trainer.clock.seconds.items()}
    return {**measured(marks, options), **lengths_of(history[options.warmup :]), **parts}


def by_trl(options: argparse.Namespace, variant: dict[str, str]) -> dict[str, Any]:
    model = load_model(
        options.model, device=options.device, dtype=torch.bfloat16 if options.device == "cuda" else torch.float32
    )
    tokenizer = load_tokenizer(options.model)
    if options.long:
        endless(model, tokenizer)
    prompts = questions(options.samples // GENERATIONS * (options.steps + options.warmup), tokenizer)
    micro = min(options.micro_batch, options.samples)
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.GRPOConfig(
            output_dir=folder,
            max_steps=options.steps + options.warmup,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=options.samples // micro,
            num_generations=GENERATIONS,
            max_completion_length=options.tokens,
            learning_rate=1e-6,
            loss_type="grpo",
            gradient_checkpointing=False,
            bf16=options.device == "cuda",
            use_cpu=options.device == "cpu",
            save_strategy="no",
            report_to=[],
            logging_steps=1,
            shuffle_dataset=False,
            disable_tqdm=True,
            use_transformers_continuous_batching="continuous" in variant,
            cache_implementation="static" if "static" in variant else None,
        )
        marks = Marks(options.device)
        trainer = trl.GRPOTrainer(
            model, [scored_here], arguments, prompts.rows, processing_class=tokenizer, callbacks=[marks]
        )
        if "static" in variant:
            trainer.generation_config.disable_compile = False
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        history = [row for row in trainer.state.log_history if "completions/mean_length" in row]
    return {**measured(marks, options), **lengths_of(history[options.warmup :])}


def scored_here(completions: list[Any], row: list[str], **kwargs: Any) -> list[float]:
    """The tasks' own scores, as one would write it for TRL."""
    found = []
    for completion, text in zip(completions, row, strict=True):
        task = json.loads(text)["task"]
        generator = generator_of(task)
        found.append(float(generator.score_answer(completion, generator[task["index"]]) >= 1.0))
    return found


def endless(model: Any, tokenizer: Any) -> None:
    """Make a token that is next to never drawn the only one that ends a completion."""
    never = tokenizer.convert_tokens_to_ids("<reponame>")
    model.generation_config.eos_token_id = never
    tokenizer.eos_token_id = never


def measured(marks: Marks, options: argparse.Namespace) -> dict[str, Any]:
    pairs = zip(marks.times[options.warmup :], marks.times[options.warmup + 1 :], strict=False)
    seconds = [end - begin for begin, end in pairs]
    found = {
        "seconds_per_step": statistics.median(seconds),
        "slowest": max(seconds),
        "samples_per_second": options.samples / statistics.median(seconds),
        "warmup_seconds": marks.times[options.warmup] - marks.times[0],
        "measured_steps": len(seconds),
    }
    if options.device == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def lengths_of(history: list[dict[str, Any]]) -> dict[str, float]:
    names = ("completions/mean_length", "completions/clipped_ratio", "reward", "rollout/logprob_gap")
    return {
        name: statistics.mean(values) for name in names if (values := [row[name] for row in history if name in row])
    }


class _AtStep(TrainerCallback):
    def __init__(self, step: int, call: Any) -> None:
        self.step, self.call = step, call

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.call()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model with its tokenizer")
    parser.add_argument("--arms", nargs="+", default=["ours", "trl", "trl:static"])
    parser.add_argument("--samples", type=int, default=1024, help="completions of a step")
    parser.add_argument("--tokens", type=int, default=96, help="longest completion")
    parser.add_argument("--micro-batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--profile", type=Path, help="folder for a profile of one step of ours")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, help="folder for bench_grpo.csv")
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}, trl {trl.__version__}; {options.samples} samples of <= {options.tokens}")
    rows = []
    for arm in options.arms:
        kind, _, rest = arm.partition(":")
        variant = dict(part.partition("=")[::2] for part in rest.split(",") if part)
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            found = (ours if kind == "ours" else by_trl)(options, variant)
        except (RuntimeError, TypeError, ValueError) as error:
            print(f"{arm}: failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        rows.append({"arm": arm, "samples": options.samples, "tokens": options.tokens, "device": name, **found})
        print(arm, json.dumps({key: round(value, 4) for key, value in found.items()}), flush=True)
    if options.csv and rows:
        options.csv.mkdir(parents=True, exist_ok=True)
        fields = list(dict.fromkeys(key for row in rows for key in row))
        with (options.csv / "bench_grpo.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
