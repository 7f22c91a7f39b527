"""A training stage under several engines through the real command: same loss curve, speed, memory a rank.

    python scripts/bench_engines.py --out DIR --recipe x_ecomla --stage distill --arms gpu:1 zero2:1 fsdp2:1 \\
        --set scale=gpu1 model.path=SmolLM2-135M-Instruct stages.distill.max_steps=60 --csv docs/results
    python scripts/bench_engines.py --out DIR --arms cpu:1 ddp:2 fsdp2:2 --device cpu --set scale=smoke  # smoke test
    python scripts/bench_engines.py --out DIR --arms gpu:1 ddp:1 ddp:2 --kill 2 --gpus 2 --set …   # a rank killed, too
    python scripts/bench_engines.py --out DIR --recipe grpo --stage rl --arms gpu:1 ddp:2 --gpus 2 --share 2 --set …

An arm is ENGINE:RANKS. The first one is the reference of the others, and what comes before the stage is made with it.
The others start from links to that, each in a folder of its own, and train the stage anew. All are started at once and
stand still (SIGSTOP) before they read their weights; then each has as many of `--gpus` to itself as it has ranks, until
it has trained, in the order in which arms are named. With `--share N` each GPU carries N arms and no speed is told.
Efficiency is steps a second (of the second half) over ranks times those of the same engine at one rank. Memory planned
is `posttrain plan`'s, a rank. Each final model is loaded by plain transformers in a process that cannot import
posttrain. `--kill STEP` does every arm of several ranks once more, where nothing has been trained yet, kills its last
rank after that step and resumes.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
AutoTokenizer.from_pretrained(folder)
ids = torch.arange(3, 35)[None]
assert torch.isfinite(model(ids).logits).all() and "posttrain" not in sys.modules
"""


GATE = """
import json, os, signal, sys
passed = []

def look(name, arguments):
    if passed or name != "open" or "transformers" not in sys.modules or not str(arguments[0]).endswith("/config.json"):
        return
    passed.append(True)
    with open(os.path.join(sys.orig_argv[sys.orig_argv.index({word!r}) + 1], "job.json")) as file:
        if json.load(file)["stage"] == {stage!r}:
            open(os.path.join({folder!r}, f"stands.{{os.getpid()}}"), "w").close()
            os.kill(os.getpid(), signal.SIGSTOP)

if {word!r} in sys.orig_argv:
    sys.addaudithook(look)
"""
"""A rank stops itself when all is imported and nothing is on its GPU: before it opens a model's configuration.
`posttrain.testing.Pause` stops the first process that gets there, of any stage; here all ranks of one stage stop."""


@dataclass
class Row:
    """What one arm came to. Differences are relative, the largest over all steps, against the first arm's curve."""

    arm: str
    device: str
    ranks: int
    steps: int
    first_value: float
    last_value: float
    difference: float
    grad_norm_difference: float
    first_grad_norm_difference: float
    steps_per_second: float | None
    efficiency: float | None
    peak_gib: float
    planned_gib: float
    loads_in_transformers: bool
    resumed_difference: float | None = None


@dataclass
class Arm:
    """One arm's run: what its artifact says, and what else was found out about it."""

    engine: str
    ranks: int
    manifest: dict[str, Any]
    history: list[dict[str, float]]
    times: list[float]
    """When each step was told, in seconds."""
    planned_gib: float = 0.0
    loads: bool = False
    resumed: list[dict[str, float]] | None = None


class Bench:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.out = arguments, arguments.out.absolute()
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        self.out.mkdir(parents=True, exist_ok=True)
        self.free = {gpu: arguments.share for gpu in range(arguments.gpus)}
        self.places = self.placed()
        self.waiting = list(arguments.arms)
        self.changed = threading.Condition()
        self.prepared = threading.Event()

    def placed(self) -> dict[str, list[int]]:
        """Each arm's GPUs: those that fewest arms of as many ranks have."""
        places: dict[str, list[int]] = {}
        for arm in self.arguments.arms:
            ranks = ranks_of(arm)
            held = [gpu for other, gpus in places.items() if ranks_of(other) == ranks for gpu in gpus]
            places[arm] = sorted(sorted(self.free, key=lambda gpu: (held.count(gpu), gpu))[:ranks])
        return places

    def words(self, engine: str, ranks: int, out: Path) -> list[str]:
        words = [self.arguments.recipe, *self.arguments.set, f"paths.outputs={out}", f"engine={engine}"]
        if self.arguments.device:
            words.append(f"engine.device={self.arguments.device}")
        return words if ranks == 1 and engine in ("cpu", "gpu", "auto") else [*words, f"engine.ranks={ranks}"]

    def seen(self, gpus: list[int]) -> dict[str, str]:
        """The environment of a command that sees these GPUs alone."""
        shown = {} if self.arguments.device == "cpu" else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
        return {**self.environment, **shown}

    def start(self, out: Path, *words: str, gpus: list[int], gate: Path | None = None) -> subprocess.Popen[bytes]:
        """A command of posttrain that writes what it says into the folder's `log.txt`."""
        out.mkdir(parents=True, exist_ok=True)
        command, environment = [sys.executable, "-m", "posttrain", *words], self.seen(gpus)
        if gate:  # what stood still must not be taken for hung by NCCL's monitor
            paths = os.pathsep.join((str(gate), environment["PYTHONPATH"]))
            environment |= {"PYTHONPATH": paths, "TORCH_NCCL_ENABLE_MONITORING": "0"}
        with (out / "log.txt").open("ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def check(self, process: subprocess.Popen[bytes], out: Path) -> None:
        if process.wait():
            said = (out / "log.txt").read_text(errors="replace")[-6000:]
            raise RuntimeError(f"{' '.join(map(str, process.args))}\nexit {process.returncode}\n{said}")

    def take(self, gpus: list[int], arm: str | None = None) -> None:
        """Wait until these GPUs are free, and until no arm that was named earlier waits for one of them."""

        def may_go() -> bool:
            before = self.waiting[: self.waiting.index(arm)] if arm in self.waiting else self.waiting
            return all(self.free[gpu] > 0 for gpu in gpus) and not any(
                set(gpus) & set(self.places[other]) for other in before
            )

        with self.changed:
            self.changed.wait_for(may_go)
            if arm in self.waiting:
                self.waiting.remove(arm)
            for gpu in gpus:
                self.free[gpu] -= 1
            self.changed.notify_all()

    def give(self, gpus: list[int]) -> None:
        with self.changed:
            for gpu in gpus:
                self.free[gpu] += 1
            self.changed.notify_all()

    def leave(self, arm: str) -> None:
        """An arm that has ended before it had its GPUs: nobody waits for it."""
        with self.changed:
            if arm in self.waiting:
                self.waiting.remove(arm)
            self.changed.notify_all()

    def run(self, engine: str, ranks: int, out: Path, text: str) -> Arm:
        """The stage under one engine. It stands still until its GPUs are free; others have them once it has trained."""
        stage, words, gpus = self.arguments.stage, self.words(engine, ranks, out), self.places[text]
        events, gate, held = out / "runs" / "arm" / "events.jsonl", gate_of(engine, ranks, out, stage), False
        options = ["--until", stage, "--force", stage, "--name", "arm", "--yes"]
        process = self.start(out, "run", *words, *options, gpus=gpus, gate=gate)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if told(events, stage, "stage_started"):
                    self.prepared.set()
                if text in self.waiting and len(standing(gate)) == ranks:
                    self.take(gpus, text)
                    held = True
                    go_on(gate)
                if held and trained(events, stage):
                    self.give(gpus)
                    held = False
        finally:
            if held:
                self.give(gpus)
            self.leave(text)
            go_on(gate)
        self.check(process, out)
        arm = Arm(engine, ranks, *self.artifact(out, "arm"), self.times(out))
        # Both look at the arm's own folder alone, and at no clock.
        arm.planned_gib, arm.loads = self.planned(engine, ranks, out), self.loads(out)
        return arm

    def artifact(self, out: Path, name: str) -> tuple[dict[str, Any], list[dict[str, float]]]:
        folder = out / "runs" / name / "artifacts" / self.arguments.stage
        lines = (folder / "history" / "history.jsonl").read_text().splitlines()
        return json.loads((folder / "manifest.json").read_text()), [json.loads(line) for line in lines]

    def times(self, out: Path) -> list[float]:
        return [one["time"] for one in told(out / "runs" / "arm" / "events.jsonl", self.arguments.stage, "metrics")]

    def planned(self, engine: str, ranks: int, out: Path) -> float:
        """GiB a rank; on the host the plan is of all ranks together."""
        gpus = list(range(ranks))
        command = [sys.executable, "-m", "posttrain", "plan", *self.words(engine, ranks, out), "--json"]
        done = subprocess.run(command, env=self.seen(gpus), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
        plan = json.loads(done.stdout)
        (stage,) = (one for one in plan["stages"] if one["name"] == self.arguments.stage)
        total = sum(stage["estimate"]["memory"].values()) / GIB
        return total / ranks if self.arguments.device == "cpu" else total

    def loads(self, out: Path) -> bool:
        site = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and ROOT not in
                (Path(path).resolve(), Path(path).resolve().parent)]  # fmt: skip
        environment = {**self.environment, "PYTHONPATH": os.pathsep.join(site), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", LOAD, str(out / "runs" / "arm" / "artifacts" / self.arguments.stage / "model")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd="/")
        if done.returncode:
            print(done.stderr[-1500:], flush=True)
        return done.returncode == 0

    def killed(self, engine: str, ranks: int, out: Path, gpus: list[int]) -> list[dict[str, float]]:
        """The history of a run of which the last rank is killed after a step and that is resumed then.

        In a folder without the stage's artifact: with one, the resumed run could have taken that.
        """
        stage, step, before = self.arguments.stage, self.arguments.kill, out
        out = out.with_name(f"{out.name}-killed")
        link(before, out, leave=self.folder_of_stage(before))
        words = self.words(engine, ranks, out)
        words += [f"stages.{stage}.save_every={self.arguments.save_every}", "--until", stage]
        events = out / "runs" / "killed" / "events.jsonl"
        self.take(gpus)
        try:
            process = self.start(out, "run", *words, "--name", "killed", "--yes", gpus=gpus)
            while not (events.exists() and f'"step": {step},' in events.read_text()):
                if process.poll() is not None:
                    self.check(process, out)
                    raise RuntimeError(f"{engine} with {ranks} ranks ended before it could be killed")
                time.sleep(0.05)
            began = time.monotonic()
            os.kill(rank_process(ranks - 1, out), signal.SIGKILL)
            code = process.wait()
            took = time.monotonic() - began
            print(f"{engine}: rank {ranks - 1} killed after step {step}, exit {code} after {took:.1f} s", flush=True)
            self.check(self.start(out, "resume", "killed", "--outputs", str(out), gpus=gpus), out)
        finally:
            self.give(gpus)
        again = told(events, stage, "stage_started")[1:]
        steps = [one["done"] for one in told(events, stage, "progress") if again and one["time"] > again[0]["time"]]
        if not steps or min(steps) <= 1:
            raise RuntimeError(f"{engine} with {ranks} ranks was not resumed from a checkpoint: {out / 'log.txt'}")
        print(f"{engine}: resumed at step {min(steps):g}", flush=True)
        return self.artifact(out, "killed")[1]

    def folder_of_stage(self, out: Path) -> Path:
        """Where the store has what the arm's run has trained."""
        return (out / "runs" / "arm" / "artifacts" / self.arguments.stage).resolve()

    def folder(self, arm: str) -> Path:
        return self.out / arm.replace(":", "-")

    def measure(self, text: str) -> Arm:
        """One arm, and where asked for once more with a rank killed; the first makes what comes before the stage."""
        engine, first = text.partition(":")[0], self.arguments.arms[0]
        count, out, began = ranks_of(text), self.folder(text), time.monotonic()
        try:
            if text != first:
                self.prepared.wait()
                link(self.folder(first), out)
            arm = self.run(engine, count, out, text)
        finally:
            self.prepared.set()
            self.leave(text)
        if self.arguments.kill and count > 1:
            arm.resumed = self.killed(engine, count, out, self.places[text])
        print(f"{text}: {time.monotonic() - began:.0f} s", flush=True)
        return arm


def ranks_of(arm: str) -> int:
    return int(arm.partition(":")[2] or 1)


def gate_of(engine: str, ranks: int, out: Path, stage: str) -> Path:
    """A folder for PYTHONPATH that has the processes which train under this engine stand still in it."""
    folder = out / "gate"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    word = "posttrain.launch.rank" if ranks > 1 or engine in ("zero2", "zero3", "fsdp2") else "worker"
    (folder / "sitecustomize.py").write_text(GATE.format(folder=str(folder), word=word, stage=stage))
    return folder


def standing(gate: Path) -> list[int]:
    return [int(file.suffix[1:]) for file in gate.glob("stands.*")]


def go_on(gate: Path) -> None:
    for pid in standing(gate):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def link(source: Path, target: Path, leave: Path | None = None) -> None:
    """`target` with the artifacts of `source`, but `leave`; files of a store are never written again."""
    shutil.rmtree(target, ignore_errors=True)

    def left(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if leave is not None and Path(folder, name).resolve() == leave]

    shutil.copytree(source / "store", target / "store", symlinks=True, copy_function=os.link, ignore=left)


def told(events: Path, stage: str, event: str) -> list[dict[str, Any]]:
    """What a run has told of a stage so far."""
    lines = events.read_text().split("\n")[:-1] if events.exists() else []
    return [one for one in map(json.loads, lines) if one["event"] == event and one["stage"] == stage]


def trained(events: Path, stage: str) -> bool:
    """Whether a run's stage has told of its last step."""
    progress = told(events, stage, "progress")[-1:]
    return bool(progress) and progress[0]["unit"] == "step" and progress[0]["done"] >= progress[0]["total"]


def rank_process(rank: int, out: Path) -> int:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            if b"posttrain.launch.rank" not in command or os.fsencode(f"{out}/") not in command:
                continue
            if f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:
            continue
    raise RuntimeError(f"there is no rank {rank}")


def difference(one: list[dict[str, float]], other: list[dict[str, float]], name: str) -> float:
    """The largest relative difference of two curves; where one passes through 0, a twentieth of its height counts."""
    floor = 0.05 * max(abs(a[name]) for a in one) or 1e-12
    return max(abs(a[name] - b[name]) / max(abs(a[name]), floor) for a, b in zip(one, other, strict=True))


def speed(arm: Arm) -> float:
    """Steps a second over the second half, where all is compiled and every buffer is there."""
    half = arm.times[len(arm.times) // 2 :]
    return (len(half) - 1) / (half[-1] - half[0]) if len(half) > 1 else 0.0


def row(text: str, arm: Arm, arms: dict[str, Arm], options: argparse.Namespace) -> Row:
    reference, name = arms[options.arms[0]].history, options.curve
    alone = arms.get(f"{arm.engine}:1")
    timed = options.share == 1
    return Row(
        arm=text,
        device=arm.manifest["host"].get("gpu") or arm.manifest["engine"]["device"],
        ranks=arm.ranks,
        steps=len(arm.history),
        first_value=arm.history[0][name],
        last_value=arm.history[-1][name],
        difference=difference(reference, arm.history, name),
        grad_norm_difference=difference(reference, arm.history, "grad_norm"),
        first_grad_norm_difference=difference(reference[:1], arm.history[:1], "grad_norm"),
        steps_per_second=speed(arm) if timed else None,
        efficiency=speed(arm) / (arm.ranks * speed(alone)) if timed and alone and speed(alone) else None,
        peak_gib=arm.manifest["metrics"]["timing"]["peak_memory_bytes"] / GIB,
        planned_gib=arm.planned_gib,
        loads_in_transformers=arm.loads,
        resumed_difference=difference(arm.history, arm.resumed, name) if arm.resumed else None,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="x_ecomla")
    parser.add_argument("--stage", default="distill")
    parser.add_argument("--arms", nargs="+", required=True, metavar="ENGINE:RANKS")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="engine.device, where the engine's own will not do")
    parser.add_argument("--curve", default="loss", help="the metric of the history that is compared: loss, reward, …")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs, or as many ranks as the CPU shall carry at once")
    parser.add_argument("--share", type=int, default=1, help="arms a GPU carries at once; above 1 nothing is timed")
    parser.add_argument("--kill", type=int, metavar="STEP", help="arms of several ranks once more, killed and resumed")
    parser.add_argument("--save-every", type=int, default=2, help="steps between the checkpoints of what is killed")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--csv", type=Path, help="folder for bench_engines_STAGE.csv and the curves")
    options = parser.parse_args()
    options.gpus = max(options.gpus, *(int(arm.partition(":")[2] or 1) for arm in options.arms))
    bench, arms, failed = Bench(options), {}, 0
    with ThreadPoolExecutor(len(options.arms)) as pool:
        tasks = {pool.submit(bench.measure, text): text for text in options.arms}
        for task in as_completed(tasks):
            try:
                arms[tasks[task]] = task.result()
            except (RuntimeError, OSError) as error:
                print(f"{tasks[task]}: {error}", flush=True)
                failed = 1
            if options.csv and options.arms[0] in arms:
                write(options.csv, arms, options)
    if options.arms[0] not in arms:
        return 1
    for text in options.arms:
        if text in arms:
            print(json.dumps(asdict(row(text, arms[text], arms, options))), flush=True)
    if options.csv:
        write(options.csv, arms, options)
    return failed


def write(folder: Path, arms: dict[str, Arm], options: argparse.Namespace) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"bench_engines_{options.stage}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row(text, arms[text], arms, options)) for text in options.arms if text in arms)
    kept = {arm: [[one[options.curve], one["grad_norm"]] for one in arms[arm].history] for arm in arms}
    (folder / f"bench_engines_{options.stage}_curves.json").write_text(json.dumps(kept))


if __name__ == "__main__":
    sys.exit(main())
