"""Trainings of every method on ranks that hold the model by one strategy: what each process of a test does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
FOLDERS = ("training", "methods/distillation", "methods/sft", "methods/preference")
# The worlds of single methods, whose folders pytest adds only with the tests in them.
sys.path += [str(TESTS / name) for name in FOLDERS if str(TESTS / name) not in sys.path]

METHODS = ("rows", "distill", "sft", "preference", "grpo")


def make_worlds(root: Path) -> None:
    """Models and data of all methods."""
    from preference_world import pair
    from sft_world import sums, write_rows
    from source_models import make_source
    from text_data import words, write_dataset

    from posttrain.models.loading import save_model
    from posttrain.models.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    save_model(make_source("llama", seed=1, initializer_range=0.05), tokenizer, root / "model")
    teacher = make_source("qwen2", seed=2, hidden_size=48, num_hidden_layers=1, tie_word_embeddings=False)
    save_model(teacher, tokenizer, root / "teacher")
    write_dataset(root / "text", words(20))
    write_rows(root / "chats", sums(14))
    write_rows(root / "pairs", [pair(number) for number in range(14)])


def parts_of(method: str) -> tuple[Any, Any, dict[str, str]]:
    """Stage, settings that four sequences a step and micro-batches of one make, and inputs."""
    common = {"micro_batch_size": 1, "lr": 1e-3, "warmup_ratio": 0.25, "save_seconds": 0, "adam_epsilon": 1e-4}
    if method == "distill":
        from posttrain.methods.distillation import Distill, DistillConfig

        cfg = DistillConfig(**common, max_steps=4, tokens_per_step=128, sequence_length=32, chunk_tokens=20)
        return Distill(), cfg, {"student": "model", "teacher": "teacher", "data": "text"}
    if method == "sft":
        from posttrain.methods.sft import Sft, SftConfig

        cfg = SftConfig(**common, max_steps=4, tokens_per_step=512, sequence_length=128)
        return Sft(), cfg, {"model": "model", "data": "chats"}
    from posttrain.methods.preference import Preference, PreferenceConfig

    cfg = PreferenceConfig(**common, max_steps=4, pairs_per_step=4, sequence_length=96, keep="trained")
    return Preference(), cfg, {"model": "model", "data": "pairs"}


def train(
    method: str, root: Path, work: Path, ranks: dict[str, Any], stop_after: int | None = None, **changes: Any
) -> dict[str, Any]:
    """Train and say what came of it: history and the weights' file; `stop_after`: end after that step's checkpoint."""
    from posttrain.pipeline.context import InputArtifact, StageContext
    from posttrain.pipeline.stage import ArtifactMeta

    class Context(StageContext):
        asked = 0

        def should_stop(self) -> bool:
            self.asked += 1
            return stop_after is not None and self.asked > stop_after

    work.mkdir(parents=True, exist_ok=True)
    if method in ("rows", "grpo"):
        return trainer_alone(method, work, ranks, stop_after, **changes)
    stage, cfg, inputs = parts_of(method)
    found = {
        name: InputArtifact(root / folder, ArtifactMeta(type=stage.inputs[name].type))
        for name, folder in inputs.items()
    }
    ctx = Context(method, type(cfg)(**{**cfg.model_dump(), **changes}), work, found, seed=3, **ranks)
    folders = stage.run(ctx)
    lines = (folders["history"] / "history.jsonl").read_text().splitlines() if ctx.rank == 0 else []
    return {"history": [json.loads(line) for line in lines], "model": str(folders["model"])}


def trainer_alone(
    method: str, work: Path, ranks: dict[str, Any], stop_after: int | None, **changes: Any
) -> dict[str, Any]:
    """Of `rows` (a trainer without any method, a model with latent attention) and `grpo` (scripted rewards)."""
    import torch
    from safetensors.torch import save_file

    if method == "rows":
        from training_world import LENGTH, ROWS, Rows, RowsConfig, RowsTrainer, make_mixed, stack

        from posttrain.pipeline.context import StageContext

        settings = {"max_steps": 4, "micro_batch_size": 1, "lr": 1e-3, "save_seconds": 0, "adam_epsilon": 1e-4}
        spoil = changes.pop("spoil", None)
        cfg = RowsConfig(**{**settings, **changes})
        ctx = StageContext("rows", cfg, work, seed=3, device="cpu", **ranks)
        options = {"tokens_per_step": ROWS * LENGTH, "whole_rows": True}
        trainer = RowsTrainer(ctx, cfg, make_mixed(), Rows(cfg.max_steps * ROWS), stack, **options)
        trainer.spoil = spoil
    else:
        from policy_world import make_trainer

        settings = {"max_steps": 4, "micro_batch_size": 2, "lr": 1e-3, "adam_epsilon": 1e-3, "rollout_rows": 8}
        trainer = make_trainer("grpo", work, ctx=ranks, **{**settings, **changes})
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return stop_after is not None and trainer.state.global_step >= stop_after

    trainer.ctx.should_stop = should_stop
    history = trainer.fit()
    if trainer.ctx.rank == 0:
        weights = {name: one.detach().contiguous() for name, one in trainer.model.named_parameters()}
        assert all(isinstance(one, torch.Tensor) and not one.is_meta for one in weights.values())
        save_file(weights, work / "model.safetensors")
    return {"history": history, "model": str(work)}


def context_of(strategy: str, rank: int, world_size: int) -> dict[str, Any]:
    """Fields of a rank's context."""
    from posttrain.launch.agreement import agree

    shared = {"rank": rank, "world_size": world_size, "agree": agree} if world_size > 1 else {}
    return {"strategy": strategy, **shared}


def of_rank(rank: int, world_size: int, jobs: Path) -> None:
    """Do the jobs of a file, in order, as one of the ranks; `OUT.RANK.json` has what came of each."""
    import torch
    import torch.distributed as dist

    from posttrain.errors import PosttrainError, StopRequested

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for name, job in json.loads(jobs.read_text()).items():
        torch.manual_seed(0)
        began = time.monotonic()
        ranks = context_of(job.pop("strategy"), rank, world_size)
        paths = {key: Path(job.pop(key)) for key in ("root", "work")}
        try:
            found[name] = train(job.pop("method"), paths["root"], paths["work"], ranks, **job)
        except StopRequested as stop:
            found[name] = {"stopped": stop.step}
        except PosttrainError as error:
            found[name] = {"error": str(error)}
        except Exception:
            traceback.print_exc()
            os._exit(1)
        found[name]["seconds"] = time.monotonic() - began
    jobs.with_suffix(f".{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def run_jobs(world_size: int, jobs: dict[str, dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Do them on so many processes; what came of them, by rank."""
    file = folder / f"jobs-{len(list(folder.glob('jobs-*')))}.json"
    file.write_text(json.dumps(jobs))
    code = f"from pathlib import Path; import sharded_world as w; w.of_rank(RANK, {world_size}, Path({str(file)!r}))"
    code += "; from posttrain.launch.rank import leave; leave(0)"  # as real ranks end
    paths = os.pathsep.join([str(TESTS), str(TESTS / FOLDERS[0]), *sys.path])
    shared = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(world_size)}
    port = str(20000 + (os.getpid() * 7 + len(list(folder.glob("jobs-*")))) % 20000)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code.replace("RANK", str(rank))],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port},
        )
        for rank in range(world_size)
    ]
    try:
        assert [process.wait(900) for process in processes] == [0] * world_size
    finally:
        for process in processes:
            process.kill()
    return [json.loads(file.with_suffix(f".{rank}.json").read_text()) for rank in range(world_size)]
