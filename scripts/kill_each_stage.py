"""Kill a run inside every one of its stages, go on each time, and compare all artifacts with an undisturbed run's.

    python scripts/kill_each_stage.py OUT zebra_llama scale=demo
    python scripts/kill_each_stage.py OUT compose_all scale=smoke --save-every 1

OUT/whole is the undisturbed run, OUT/killed the other; what is there already is used again. Every stage is killed (-9)
once: half way through where it reports progress, else when half of the time has passed that it took undisturbed; in
turns the worker alone, or the runner and then the worker, as when a machine fails. Prints a Markdown table; the exit
code is 1 if an artifact differs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def events_of(outputs: Path) -> list[dict[str, Any]]:
    """Events of the only run in an outputs folder."""
    files = list(outputs.glob("runs/*/events.jsonl"))
    lines = files[0].read_text(encoding="utf-8").split("\n")[:-1] if files else []
    return [json.loads(line) for line in lines if line]


def start(outputs: Path, words: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "posttrain", "run", *words, f"paths.outputs={outputs}"]
    log = (outputs / "command.log").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def moment(found: list[dict[str, Any]], done: set[str], undisturbed: dict[str, float]) -> tuple[str, int, str] | None:
    """The stage to kill now, its worker's pid and how far it is; None: not yet.

    `undisturbed`: seconds that every stage took.
    """
    started = [event for event in found if event["event"] == "stage_started"]
    if not started or started[-1]["stage"] in done:
        return None
    stage, pid = started[-1]["stage"], started[-1]["pid"]
    later = [event for event in found if event["stage"] == stage and event["time"] >= started[-1]["time"]]
    if any(event["event"] in ("stage_finished", "stage_failed") for event in later):
        return None
    steps = [event for event in later if event["event"] == "progress" and event["total"] > 1]
    if steps:
        last = steps[-1]
        return (
            (stage, pid, f"{last['unit']} {last['done']:g} of {last['total']:g}")
            if last["done"] >= last["total"] / 2
            else None
        )
    waited = time.time() - started[-1]["time"]
    return (stage, pid, f"{waited:.1f} s after its start") if waited >= undisturbed[stage] / 2 else None


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0]:
        time.sleep(0.05)


def killed_run(outputs: Path, words: list[str], undisturbed: dict[str, float]) -> dict[str, str]:
    """Run until nothing is left to kill; for every stage how it was killed."""
    told: dict[str, str] = {}
    while True:
        runner = start(outputs, words)
        while runner.poll() is None:
            time.sleep(0.02)
            now = moment(events_of(outputs), set(told), undisturbed)
            if now is None:
                continue
            stage, pid, when = now
            victim = "worker" if len(told) % 2 == 0 else "runner and worker"
            if victim != "worker":
                kill(runner.pid)
            kill(pid)
            runner.wait()
            told[stage] = f"{victim}, {when}"
            print(f"{stage}: killed {told[stage]}", flush=True)
            break
        else:
            if runner.returncode:
                raise SystemExit(f"the run ended with {runner.returncode}: {outputs / 'command.log'}")
            return told


def artifacts(outputs: Path) -> dict[str, dict[str, str]]:
    """SHA-256 of every file of every stage's outputs."""
    (record,) = outputs.glob("runs/*/run.json")
    found = {}
    for stage in json.loads(record.read_text(encoding="utf-8"))["stages"]:
        found[stage["name"]] = {
            f"{name}/{file}": facts["sha256"]
            for name, output in manifest(outputs, stage)["outputs"].items()
            for file, facts in output["files"].items()
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("words", nargs="+", help="recipe and overrides")
    parser.add_argument("--save-every", type=int, default=5, help="steps between checkpoints of training stages")
    options = parser.parse_args()
    whole, killed = (options.out.absolute() / name for name in ("whole", "killed"))
    for folder in (whole, killed):
        folder.mkdir(parents=True, exist_ok=True)
    if code := start(whole, options.words).wait():
        raise SystemExit(f"the undisturbed run ended with {code}: {whole / 'command.log'}")
    (record,) = whole.glob("runs/*/run.json")
    stages = json.loads(record.read_text(encoding="utf-8"))["stages"]
    made = {stage["name"]: manifest(whole, stage) for stage in stages}
    saves = [f"stages.{name}.save_every={options.save_every}" for name in made if "save_every" in made[name]["config"]]
    told = killed_run(killed, [*options.words, *saves], {name: made[name]["seconds"] for name in made})
    ours, theirs = artifacts(whole), artifacts(killed)
    print("\n| stage | killed | started | files | equal |\n|---|---|---|---|---|")
    started = [event["stage"] for event in events_of(killed) if event["event"] == "stage_started"]
    for name, files in ours.items():
        same = sum(theirs[name].get(file) == digest for file, digest in files.items())
        print(f"| {name} | {told.get(name, '–')} | {started.count(name)} times | {len(files)} | {same} |")
    return int(ours != theirs)


def manifest(outputs: Path, stage: dict[str, Any]) -> dict[str, Any]:
    return json.loads((outputs / "store" / stage["type"] / stage["key"] / "manifest.json").read_text())


if __name__ == "__main__":
    sys.exit(main())
