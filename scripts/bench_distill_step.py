"""Tokens a second, milliseconds and peak memory of a distillation step: ours, and what one would write without us.

    python scripts/bench_distill_step.py --model outputs/…/SmolLM2-135M --steps 60 \\
        --variants ours ours:activation_budget_gib=5 stock stock:compile=model --parts --csv kernels/benchmarks/results
    python scripts/bench_distill_step.py --shape tiny --batch 2 --sequence 64 --steps 6 --warmup 2   # smoke test, CPU
    python scripts/bench_distill_step.py --model … --curve curve.json --steps 200                    # bf16 against fp32

A variant is `ours` or `stock` and settings after a colon, split by commas: for ours fields of `posttrain show distill`,
for stock `compile=model`, `liger=true` (if installed), `teacher_dtype=bfloat16`. Ours is the stage's own trainer. Stock
is a plain loop: transformers' model, fp32 weights under bf16 autocast, TRL's chunked divergence, fused AdamW, clipping.
Both see the same batches. The student is the teacher with noise on its weights. Weights of a `--shape` are random, and
said to be.
"""
# ruff: noqa: E402  (the checkout comes first on the path)

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from posttrain.methods.distillation.config import DistillConfig
from posttrain.methods.distillation.trainer import DistillTrainer, hidden_states
from posttrain.models.architecture import layer_parameters, normalise
from posttrain.pipeline.context import StageContext
from posttrain.training.blocks import OrderedBlocks, collate

GIB = 2**30
NOISE = 0.2  # of a tensor's standard deviation: far enough that rounding is small beside the divergence
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2_135m": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                         num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True),
    "llama32_1b": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                       num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
    "tiny": dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
                 num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
}  # fmt: skip


class Clock(TrainerCallback):
    """Marks the end of every step; what comes before the end of the `warmup`-th is set apart.

    The peak of memory counts from the first step on: a captured step's memory is taken while it is captured.
    """

    def __init__(self, device: torch.device, warmup: int, limit: float) -> None:
        self.device, self.warmup, self.limit = device, warmup, limit
        self.marks: list[Any] = []
        self.began = time.monotonic()
        self.warm = self.began
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop |= self.step()
        return control

    def step(self) -> bool:
        """Call after each step; true when the time is up."""
        if self.device.type == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append(mark)
        if len(self.marks) == self.warmup:
            _synchronize(self.device)
            self.warm = time.monotonic()
        return time.monotonic() - self.began > self.limit

    def result(self, tokens: int) -> dict[str, Any]:
        _synchronize(self.device)
        pairs = list(zip(self.marks[self.warmup - 1 :], self.marks[self.warmup :], strict=False))
        if not pairs:
            raise TimeoutError(f"{len(self.marks)} steps in the time limit, {self.warmup} of them warm-up: give more")
        cuda = self.device.type == "cuda"
        times = [a.elapsed_time(b) if cuda else (b - a) * 1e3 for a, b in pairs]
        median = statistics.median(times)
        peak = torch.cuda.max_memory_allocated() if cuda else None
        return {
            "median_ms": median,
            "worst_ms": max(times),
            "tokens_per_second": tokens / median * 1e3,
            "wall_tokens_per_second": tokens * len(times) / (time.monotonic() - self.warm),
            "warmup_seconds": self.warm - self.began,
            "steps": len(times),
            "peak_gib": peak / GIB if peak else None,
            "reserved_gib": torch.cuda.max_memory_reserved() / GIB if cuda else None,
        }


def make_models(options: argparse.Namespace, teacher_dtype: str = "float32") -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student (fp32, the teacher with noise) and teacher on the device."""
    torch.manual_seed(0)
    if options.model:
        teacher = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, local_files_only=True)
    else:
        fields = {"max_position_embeddings": 8192, "initializer_range": 0.06, **SHAPES[options.shape]}
        teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields), dtype=torch.float32)
    teacher = teacher.to(options.device)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(NOISE * parameter.std(correction=0) * torch.randn_like(parameter))
    return student.train(), teacher.to(getattr(torch, teacher_dtype)).eval().requires_grad_(False)


def make_blocks(options: argparse.Namespace, vocabulary: int) -> torch.Tensor:
    """Token blocks [N, T] of `--tokens` (a saved integer tensor), or random ones of a quarter of the vocabulary."""
    if options.tokens:
        flat = torch.load(options.tokens, weights_only=True).flatten()
        return flat[: len(flat) // options.sequence * options.sequence].view(-1, options.sequence)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, vocabulary // 4, (16 * options.batch, options.sequence), generator=generator)


def make_trainer(options: argparse.Namespace, settings: dict[str, Any], work: str) -> DistillTrainer:
    # The stock loop's constant rate, so that the last losses can be compared.
    fixed = {"max_steps": options.steps, "save_seconds": 0, "lr": 1e-5, "precision": "bf16"}
    fixed |= {"lr_scheduler": "constant", "warmup_ratio": 0.0}
    shape = {"tokens_per_step": options.batch * options.sequence, "sequence_length": options.sequence}
    compiled = {"compile": "layers" if options.device == "cuda" else "off"}
    config = DistillConfig(**{**fixed, **shape, **compiled, "micro_batch_size": options.batch, **settings})
    student, teacher = make_models(options, config.teacher_dtype)
    ctx = StageContext("distill", config, Path(work), device=options.device)
    return DistillTrainer(ctx, config, student, teacher, make_blocks(options, student.config.vocab_size))


def run_ours(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        trainer = make_trainer(options, settings, work)
        clock = Clock(trainer.args.device, options.warmup, options.time_limit)
        trainer.add_callback(clock)
        history = trainer.fit()
        plan = trainer.activation_plan()
        found = {"plan": f"{plan.kept}, {plan.recomputed} layers and {plan.recomputed_mlps} MLPs recomputed"}
        losses = {"first_loss": history[0]["loss"], "last_loss": history[-1]["loss"]}
        return {**clock.result(trainer.config.tokens_per_step), **found, **losses}


def run_stock(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """What TRL's distillation trainer computes, without its generation: `_chunked_divergence_loss` over all tokens."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher = make_models(options, settings.get("teacher_dtype", "float32"))
    if settings.get("liger"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        for model in (student, teacher):
            apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, cross_entropy=False, model=model)
    heads = student.get_output_embeddings().weight, teacher.get_output_embeddings().weight
    if settings.get("compile") == "model":
        student.base_model.compile()
        teacher.base_model.compile()
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    device = torch.device(options.device)
    blocks = make_blocks(options, student.config.vocab_size)
    data = OrderedBlocks(blocks, options.steps * options.batch, seed=0)
    spans = [range(step * options.batch, (step + 1) * options.batch) for step in range(options.steps)]
    batches = [collate([data[row] for row in rows])["input_ids"].to(device) for rows in spans]
    clock = Clock(device, options.warmup, options.time_limit)
    for step in range(options.steps):
        ids = batches[step]
        with torch.autocast(options.device, dtype=torch.bfloat16):
            with torch.no_grad():
                teacher_h = hidden_states(teacher, ids).flatten(0, 1)
            student_h = hidden_states(student, ids).flatten(0, 1)
            arguments = student_h, heads[0], None, teacher_h, heads[1], None, 0.0, 1.0, 1.0, None, 1.0, None
            loss = ChunkedDivergenceFunction.apply(*arguments)[0].sum() / ids.numel()
        del student_h, teacher_h, arguments
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        first = loss.detach() if step == 0 else first  # noqa: F821
        if clock.step():
            break
    return {**clock.result(options.batch * options.sequence), "first_loss": first.item(), "last_loss": loss.item()}


def run_parts(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Milliseconds and GiB of the parts of our step, each after the other with the device idle in between."""
    with tempfile.TemporaryDirectory() as work:
        trainer = make_trainer(options, settings, work)
        batch = collate([trainer.train_dataset[row] for row in range(options.batch)])
        batch = {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, fused=True)
        with trainer.fast():
            rounds = [_parts_of_a_step(trainer, batch, parameters, optimiser) for _ in range(options.warmup + 8)]
    rounds = rounds[options.warmup :]
    sizes = {"weights": sum(p.nbytes for p in trainer.model.parameters())}
    sizes["gradients"] = sum(p.nbytes for p in parameters)
    sizes["moments"] = sum(t.nbytes for state in optimiser.state.values() for t in state.values())
    sizes["teacher"] = sum(p.nbytes for p in trainer.teacher.parameters())
    result: dict[str, dict[str, float]] = {"held_gib": {name: size / GIB for name, size in sizes.items()}}
    for kind in rounds[0]:
        result[kind] = {name: statistics.median(r[kind][name] for r in rounds) for name in rounds[0][kind]}
    return result


def _parts_of_a_step(trainer: Any, batch: Any, parameters: Any, optimiser: Any) -> dict[str, dict[str, float]]:
    """`ms`, `left_gib` (memory that a part leaves behind) and `peak_gib` (above what was there when it began)."""
    found: dict[str, dict[str, float]] = {"ms": {}, "left_gib": {}, "peak_gib": {}}
    device, model, ids = trainer.args.device, trainer.model.train(), batch["input_ids"]

    def part(name: str, run: Any) -> Any:
        _synchronize(device)
        cuda = device.type == "cuda"
        before = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        value = run()
        _synchronize(device)
        found["ms"][name] = (time.perf_counter() - began) * 1e3
        if cuda:
            found["left_gib"][name] = (torch.cuda.memory_allocated() - before) / GIB
            found["peak_gib"][name] = (torch.cuda.max_memory_allocated() - before) / GIB
        return value

    with trainer.compute_loss_context_manager():
        with torch.no_grad():
            teacher_h = part("teacher forward", lambda: hidden_states(trainer.teacher, ids))
        student_h = part("student forward", lambda: hidden_states(model, ids))
        loss = part("loss", lambda: trainer.divergence(student_h, teacher_h, batch))
    part("backward", loss.backward)
    part("clipping", lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0))
    part("optimiser", lambda: (optimiser.step(), optimiser.zero_grad()))
    return found


def run_curve(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Losses of the same steps from the same start, in bf16 autocast and in fp32."""
    curves = {}
    for precision in ("bf16", "fp32"):
        with tempfile.TemporaryDirectory() as work:
            trainer = make_trainer(options, {"lr": 1e-4, **settings, "precision": precision}, work)
            curves[precision] = [row["loss"] for row in trainer.fit()]
        del trainer
        _forget(options.device)
    apart = [abs(a / b - 1) for a, b in zip(curves["bf16"], curves["fp32"], strict=True)]
    return {**curves, "largest_relative_difference": max(apart), "mean": sum(apart) / len(apart)}


def main() -> None:
    options = _arguments()
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    weights = options.model or f"{options.shape} (random weights)"
    print(f"{weights}, {options.batch} x {options.sequence} tokens a step, {where}, torch {torch.__version__}")
    if options.curve:
        found = run_curve(options, _settings(options.variants[0])[1])
        Path(options.curve).write_text(json.dumps({"weights": weights, **found}) + "\n")
        print(f"curves apart by {found['largest_relative_difference']:.2%} at most, {found['mean']:.2%} on average")
        return
    rows = []
    options.limit_ms = _limit_ms(options) if options.csv else None
    for variant in options.variants:
        family, settings = _settings(variant)
        try:
            found = {"ours": run_ours, "stock": run_stock}[family](options, settings)
        except (ImportError, TimeoutError, torch.cuda.OutOfMemoryError) as error:
            print(f"{variant:48} {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        finally:
            _forget(options.device)
        rows.append({"variant": variant, **found})
        cuda = found["peak_gib"] is not None
        peak = f"{found['peak_gib']:6.2f} ({found['reserved_gib']:.2f}) GiB" if cuda else " " * 17
        print(
            f"{variant:48} {found['median_ms']:8.1f} ms {found['tokens_per_second']:10.0f} tokens/s {peak} "
            f"warm-up {found['warmup_seconds']:.0f} s, loss {found['first_loss']:.4f} {found.get('plan', '')}"
        )
        if options.csv:
            _write_csv(options, rows, where)
    parts = {}
    for variant in [name for name in options.variants if options.parts and name.startswith("ours")]:
        parts[variant] = run_parts(options, _settings(variant)[1])
        _forget(options.device)
        print(f"{variant}: {json.dumps(parts[variant], indent=1)}")
    if options.json:
        document = {"weights": weights, "gpu": where, "batch": options.batch, "sequence": options.sequence}
        Path(options.json).write_text(json.dumps({**document, "rows": rows, "parts": parts}, indent=1) + "\n")


def _write_csv(options: argparse.Namespace, rows: list[dict[str, Any]], gpu: str) -> None:
    """A row for the last variant; `correct`: its first and last losses are the first stock variant's within 2 %.

    The first step runs before anything is captured, the last after. Empty where no stock variant has run yet.
    """
    from benchmarks.harness import package_version
    from benchmarks.results import write_rows

    name = Path(options.model).name if options.model else f"{options.shape}_random"
    fixed = {"operator": "distill_step", "shape": f"{name} {options.batch}x{options.sequence}", "dtype": "bf16"}
    versions = {"gpu": gpu, "torch": torch.__version__, "triton": package_version("triton"), "date": options.date}
    write_rows(
        Path(options.csv) / "distill_step.csv",
        [
            {**fixed, **versions, "implementation": _name(row["variant"]), "direction": "step"}
            | {"median_ms": row["median_ms"], "peak_mib": row["peak_gib"] and row["peak_gib"] * 1024}
            | {"limit_ms": options.limit_ms, "correct": _agrees(row, rows)}
            for row in rows[-1:]
        ],
    )


def _name(variant: str) -> str:
    """The variant as the CSVs call it: ours is `posttrain`."""
    family, colon, settings = variant.partition(":")
    return ("posttrain" if family == "ours" else family) + colon + settings


def _limit_ms(options: argparse.Namespace) -> float:
    """The matrix products of a step at the rate measured on this device: causal attention, nothing recomputed.

    A forward pass is 2 operations a parameter and token and 2·T²·H·d_h a layer and sequence; the student's backward
    pass is twice its forward pass, the teacher has a forward pass.
    """
    from benchmarks.ceilings import measure_ceilings

    fields = {"model_type": "llama", **SHAPES[options.shape]} if options.shape else None
    arch = normalise(fields or json.loads((Path(options.model) / "config.json").read_text()))
    layers = range(arch["num_hidden_layers"])
    used = arch["vocab_size"] * arch["hidden_size"] + sum(layer_parameters(arch, layer) for layer in layers)
    width = arch["num_attention_heads"] * arch["head_dim"] * len(layers)
    forward = 2 * options.batch * options.sequence * (used + options.sequence * width)
    return measure_ceilings(torch.device(options.device)).ceilings.gemm_ms(4 * forward)


def _agrees(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool | None:
    stock = next((other for other in rows if other["variant"].startswith("stock")), None)
    if stock is None or stock["steps"] != row["steps"]:
        return None
    return all(abs(row[name] / stock[name] - 1) < 0.02 for name in ("first_loss", "last_loss"))


def _settings(variant: str) -> tuple[str, dict[str, Any]]:
    family, _, text = variant.partition(":")
    if family not in ("ours", "stock"):
        raise SystemExit(f"unknown variant {variant}: ours[:field=value,…] or stock[:field=value,…]")
    pairs = (item.split("=", 1) for item in text.split(",") if item)
    # "off" and "on" are words here, which YAML would take for truth values.
    words = ("compile", "cuda_graph")
    return family, {name: value if name in words else yaml.safe_load(value) for name, value in pairs}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _forget(device: str) -> None:
    """What one variant compiled or left in memory is not the next one's."""
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="folder of a Llama model")
    source.add_argument("--shape", choices=SHAPES, help="random weights of that shape")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=10, help="steps before measuring")
    parser.add_argument("--variants", nargs="+", default=["ours", "stock", "stock:compile=model"])
    parser.add_argument("--time-limit", type=float, default=120, help="seconds a variant, compilation included")
    parser.add_argument("--tokens", help="a tensor of token ids saved by torch.save; default: random ones")
    parser.add_argument("--parts", action="store_true", help="time and memory by part for the variants of ours")
    parser.add_argument("--curve", help="train `--steps` steps in bf16 and in fp32 and write both curves to this JSON")
    parser.add_argument("--json", help="write everything measured to this file")
    parser.add_argument("--csv", help="append to distill_step.csv in this folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")  # one for all variants: they are one run
    return options


if __name__ == "__main__":
    main()
