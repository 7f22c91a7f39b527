"""One run of `mla_study.py`: convert, distil from the source, measure on the way; one JSON with the learning curve."""
# ruff: noqa: E402  (the checkout comes first on the path)

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]

import torch
from mla_study_arms import settings
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from posttrain.methods.distillation.config import DistillConfig
from posttrain.methods.distillation.trainer import DistillTrainer
from posttrain.methods.mla_upcycling import upcycle
from posttrain.models.loading import load_model
from posttrain.pipeline.context import StageContext

CALIBRATION = (128, 256)
"""Sequences and tokens of each, as in TransMLA's code."""
EVALUATION_ROWS = 4
KINDS = ("text", "samples")


class Curve(TrainerCallback):
    """Measures the student at step 0 and at the given steps, on held-out text and held-out chats apart."""

    def __init__(self, student: PreTrainedModel, source: PreTrainedModel, blocks: dict[str, Tensor], tokens: int):
        self.student, self.source, self.blocks, self.tokens = student, source, blocks, tokens
        self.points: list[dict[str, Any]] = []
        self.steps: set[int] = set()

    def measure(self, step: int) -> None:
        training = self.student.training
        # Measured as it is, not through the layers that are compiled for training.
        with torch.compiler.set_stance("force_eager"):
            found = {kind: compare(self.student.eval(), self.source, self.blocks[kind]) for kind in KINDS}
        self.student.train(training)
        self.points.append({"step": step, "tokens": step * self.tokens, **found})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.measure(state.global_step)


@torch.inference_mode()
def compare(student: PreTrainedModel, source: PreTrainedModel, blocks: Tensor) -> dict[str, float]:
    """Means over tokens: KL(source ‖ student), both models' nll and top-1 agreement, on blocks [N, T], in fp32."""
    sums = torch.zeros(4, dtype=torch.float64, device=student.device)
    count = 0
    for ids in blocks.to(student.device).long().split(EVALUATION_ROWS):
        ours, theirs = (model(input_ids=ids, use_cache=False).logits[:, :-1] for model in (student, source))
        log_q, log_p = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
        labels = ids[:, 1:, None]
        sums += torch.stack(
            [
                (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64),
                -log_q.gather(-1, labels).sum(dtype=torch.float64),
                -log_p.gather(-1, labels).sum(dtype=torch.float64),
                (ours.argmax(-1) == theirs.argmax(-1)).sum(dtype=torch.float64),
            ]
        )
        count += labels.numel()
    names = ("kl", "nll", "source_nll", "top1")
    return dict(zip(names, (sums / count).tolist(), strict=True))


def eval_steps(total: int, points: int) -> set[int]:
    """Denser at the start, where the curves cross: quadratically spaced, the last step among them."""
    return {max(1, round(total * (index / points) ** 2)) for index in range(1, points + 1)}


def run(options: argparse.Namespace) -> dict[str, Any]:
    began, work = time.monotonic(), Path(options.work)
    blocks = load_file(work / "blocks.safetensors")
    train = blocks["train"].view(-1, options.sequence)
    source = load_model(work / "source", device=options.device, dtype=torch.float32)
    fields = settings(options.arm, options.budget)
    rows, width = CALIBRATION
    calibration = blocks["calibration"].view(-1, width)[:rows].long().split(4)
    student, conversion = upcycle(source, fields, calibration)
    steps = int(options.tokens) // options.batch_tokens
    config = DistillConfig(
        max_steps=steps,
        tokens_per_step=options.batch_tokens,
        sequence_length=options.sequence,
        micro_batch_size=options.batch_tokens // options.sequence,
        lr=options.lr,
        lr_scheduler="cosine",
        warmup_ratio=0.02,
        reduction="token_mean",
        precision="bf16" if options.device == "cuda" else "fp32",
        compile="layers" if options.device == "cuda" else "off",
        teacher_dtype="bfloat16" if options.device == "cuda" else "float32",
        save_seconds=0,
        save_every=0,
    )
    teacher = load_model(work / "source", device=options.device, dtype=getattr(torch, config.teacher_dtype))
    with tempfile.TemporaryDirectory() as scratch:
        ctx = StageContext("distill", config, Path(scratch), seed=options.seed, device=options.device)
        trainer = DistillTrainer(ctx, config, student, teacher, train)
        curve = Curve(student, source, {kind: blocks[f"heldout_{kind}"] for kind in KINDS}, options.batch_tokens)
        curve.steps = eval_steps(steps, options.points)
        trainer.add_callback(curve)
        curve.measure(0)
        history = trainer.fit()
    layers = conversion["layers"]
    means = {name: sum(row[name] for row in layers) / len(layers) for name in ("key_error", "value_error", "energy")}
    return {
        "arm": options.arm,
        "budget": options.budget,
        "seed": options.seed,
        "source": json.loads((work / "study.json").read_text()),
        "settings": fields,
        "ranks": [row["kv_lora_rank"] for row in layers],
        "conversion": means,
        "training": config.key_fields(),
        "curve": curve.points,
        "training_loss": [row["loss"] for row in history],
        "seconds": time.monotonic() - began,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("work", "arm", "out"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("budget", "seed", "tokens", "batch-tokens", "sequence", "points"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    found = run(options)
    part = Path(options.out).with_suffix(".part")
    part.write_text(json.dumps(found) + "\n")
    part.rename(options.out)


if __name__ == "__main__":
    main()
