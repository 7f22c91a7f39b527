"""GRPO, Dr. GRPO and RiskPO's variants at equal roll-outs: one model, several seeds, the same held-out problems.

    python scripts/riskpo_study.py prepare --model FOLDER --out DIR        # data, and the format taught by sft
    python scripts/riskpo_study.py run --out DIR --parallel 4 --gpus 2     # every arm and seed that is not done yet
    python scripts/riskpo_study.py report --out DIR --to docs/results/riskpo_study

An arm is the stage itself, in a process of its own, `--parallel` at once on each device; what was done is in
`DIR/results`, a JSON file an arm and seed, so that a study may be spread over several sittings. Training problems and
held-out ones come from ranges of seeds that cannot meet, and are the same for all arms; the seed decides the order of
the questions and every draw.
"""
# ruff: noqa: E402  (the checkout comes first on the path)

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]

import yaml

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {}),
    "dr_grpo": ("grpo", {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "paper": ("riskpo", {"preset": "paper"}),
    "rb": ("riskpo", {"preset": "rb"}),
    "rb_stratified": ("riskpo", {"preset": "rb", "risk": {"bundles": "stratified"}}),
    "question": ("riskpo", {"preset": "rb", "risk": {"level": "question"}}),
}
"""Name to stage type and what the arm sets beside `SETTINGS`."""

SETTINGS: dict[str, Any] = {
    "max_steps": 150,
    "num_generations": 8,
    "generation_batch_size": 320,
    "micro_batch_size": 80,
    "max_prompt_length": 160,
    "max_completion_length": 32,
    "lr": 1e-5,
    "compile": "off",
    "save_seconds": 0,
    "rewards": {"correct": {"type": "gym"}},
}
TEACH = {"max_steps": 150, "tokens_per_step": 8192, "sequence_length": 256, "lr": 1e-4, "compile": "off"}
HELDOUT, SAMPLES, K = 2000, 16, (1, 4, 16)


def prepare(options: argparse.Namespace) -> None:
    """Write `train`, `heldout` and `taught`, and have the taught model answer the held-out problems."""
    from posttrain.data.builders.reasoning_gym import build
    from posttrain.data.documents import write_dataset
    from posttrain.data.sections import GymTasks
    from posttrain.methods.sft.config import SftConfig
    from posttrain.methods.sft.stage import Sft

    out: Path = options.out
    settings = yaml.safe_load((ROOT / "conf" / "data" / "reasoning_gym_rl.yaml").read_text())["gym"]
    tasks = GymTasks.model_validate({**settings, "size": options.train + options.heldout})
    share = options.heldout / (options.train + options.heldout)
    train, heldout = build(tasks, share, context("data", None, out / "data", 0, options))
    for name, documents in (("train", train), ("heldout", heldout)):
        (out / name).mkdir(parents=True, exist_ok=True)
        write_dataset(out / name, documents, name=name)
    config = SftConfig.model_validate({**TEACH, **precision(options), **options.teach})
    ctx = context("teach", config, out / "teach", 0, options, model=options.model, data=out / "train")
    Sft().run(ctx)
    shutil.rmtree(out / "taught", ignore_errors=True)
    shutil.copytree(ctx.output_dir("model"), out / "taught")
    write(out / "results" / "taught.json", {"arm": "taught", **answered(out / "taught", options)})


def run_one(options: argparse.Namespace) -> None:
    """Train and evaluate one arm with one seed."""
    from posttrain.config import registry

    kind, own = ARMS[options.arm]
    stage = registry.stage(kind)
    config = stage.Config.model_validate({**SETTINGS, **own, **precision(options), **options.set})
    folder = options.out / "work" / f"{options.arm}-{options.seed}"
    shutil.rmtree(folder, ignore_errors=True)
    began = time.time()
    ctx = context("rl", config, folder, options.seed, options, model=options.out / "taught", data=options.out / "train")
    stage.run(ctx)
    history = [json.loads(line) for line in (ctx.output_dir("history") / "history.jsonl").read_text().splitlines()]
    found = {"arm": options.arm, "seed": options.seed, "settings": config.model_dump(mode="json"), "history": history}
    found |= {"result": ctx.result, "timing": ctx.timing, **answered(ctx.output_dir("model"), options)}
    write(options.out / "results" / f"{options.arm}-{options.seed}.json", {**found, "seconds": time.time() - began})
    shutil.rmtree(folder)


def answered(model_folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Right answers of the model to every held-out problem, and what else its answers say."""
    import torch

    from posttrain.data.reading import read_rows
    from posttrain.methods.evaluation.config import EvaluateConfig
    from posttrain.methods.evaluation.problems import measure_problems
    from posttrain.models.loading import load_model, load_tokenizer

    problems = {
        "samples": options.samples,
        "k": [k for k in K if k <= options.samples],
        "max_problems": options.heldout,
        "max_new_tokens": SETTINGS["max_completion_length"],
        "batch_rows": 2048,
    }
    config = EvaluateConfig.model_validate({"problems": problems})
    folder = Path(f"{model_folder}-answers")
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model = load_model(model_folder, device=options.device, dtype=dtype)
    ctx = context("evaluate", config, folder, 0, options)
    measured = measure_problems(
        {"model": model}, load_tokenizer(model_folder), read_rows(options.out / "heldout"), 8192, ctx
    )
    measured.write(folder)
    shutil.rmtree(folder / "none", ignore_errors=True)
    rows = [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()]
    shutil.rmtree(folder)
    correct = {row["id"]: row["correct"]["model"] for row in rows}
    levels = {row["id"]: f"{row['task']}/{row['difficulty']}" for row in rows}
    return {"figures": measured.figures(), "correct": correct, "levels": levels, "samples": options.samples}


def run_all(options: argparse.Namespace) -> None:
    """Every arm and seed that has no result yet, seeds outside, until the deadline would be passed."""
    results = options.out / "results"
    todo = [
        (arm, seed) for seed in options.seeds for arm in options.arms if not (results / f"{arm}-{seed}.json").exists()
    ]
    running: dict[subprocess.Popen[bytes], tuple[str, int, float, int]] = {}
    places = [gpu for _ in range(options.parallel) for gpu in range(options.gpus)]
    began, longest = time.time(), 0.0
    while todo or running:
        spare = options.deadline - (time.time() - began)
        while todo and places and spare > 1.1 * longest:
            (arm, seed), gpu = todo.pop(0), places.pop(0)
            running[start(arm, seed, gpu, options)] = (arm, seed, time.time(), gpu)
        if not running:
            break
        time.sleep(0.5)
        for process in [process for process in running if process.poll() is not None]:
            arm, seed, since, gpu = running.pop(process)
            places.append(gpu)
            longest = max(longest, time.time() - since)
            print(f"{arm} {seed}: {time.time() - since:.0f} s, exit {process.returncode}", flush=True)
    print(f"left: {len(todo)}; {time.time() - began:.0f} s", flush=True)


def start(arm: str, seed: int, gpu: int, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    logs = options.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "one", "--out", str(options.out), "--arm", arm, "--seed", str(seed)]
    command += ["--device", options.device, "--heldout", str(options.heldout), "--samples", str(options.samples)]
    command += ["--set", json.dumps(options.set)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    if options.device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    with (logs / f"{arm}-{seed}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def context(name: str, config: Any, folder: Path, seed: int, options: argparse.Namespace, **inputs: Path) -> Any:
    from posttrain.pipeline.context import InputArtifact, StageContext
    from posttrain.pipeline.stage import ArtifactMeta

    folder.mkdir(parents=True, exist_ok=True)
    found = {
        key: InputArtifact(path, ArtifactMeta("model" if key == "model" else "dataset")) for key, path in inputs.items()
    }
    return StageContext(name, config, folder, found, seed, options.device)


def precision(options: argparse.Namespace) -> dict[str, str]:
    return {"precision": "bf16" if options.device == "cuda" else "fp32"}


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["prepare", "run", "one", "report"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="for prepare: folder of the model to start from")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--arm", choices=list(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=1, help="arms at once on a GPU")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds after which no arm is started")
    parser.add_argument("--train", type=int, default=6000, help="training problems")
    parser.add_argument("--heldout", type=int, default=HELDOUT, help="held-out problems")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="answers to each held-out problem")
    parser.add_argument("--set", type=json.loads, default={}, help="JSON: settings of all arms beside SETTINGS")
    parser.add_argument("--teach", type=json.loads, default={}, help="JSON: settings of the sft beside TEACH")
    parser.add_argument("--device", default=None)
    parser.add_argument("--to", type=Path, help="for report: where table and plots go")
    options = parser.parse_args()
    if options.device is None:
        import torch

        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.command == "report":
        from riskpo_study_report import report

        report(options.out / "results", options.to)
        return
    {"prepare": prepare, "run": run_all, "one": run_one}[options.command](options)


if __name__ == "__main__":
    main()
