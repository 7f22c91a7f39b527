"""The command from end to end at `scale=smoke`: run, run again, change, stop, resume, load."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import (
    ROOT,
    RUN,
    artifact,
    copy_store_without,
    deterministic_part,
    environment,
    events,
    has_event,
    posttrain,
    start,
    start_and_pause,
    step_of,
    thaw,
    wait_for,
)


def plan_of(*overrides: str, cwd: Path) -> dict[str, dict]:
    text = posttrain("plan", "x_ecomla", "scale=smoke", *overrides, "--json", cwd=cwd).stdout
    return {stage["name"]: stage for stage in json.loads(text)["stages"]}


def test_the_report_has_its_table_and_is_one_file(undisturbed: Path) -> None:
    run = next(undisturbed.glob("runs/*/run.json")).parent
    html = (run / "report.html").read_text()
    assert html.count("data:image/png;base64,") >= 2 and "<table" in html
    assert 'src="http' not in html and 'href="http' not in html
    text = (run / "report.md").read_text()
    assert "evaluate_converted" in text and "ppl" in text.lower() or "perplexity" in text.lower()


def test_measured_cache_bytes_equal_predicted(undisturbed: Path) -> None:
    for stage in ("evaluate_converted", "evaluate"):
        metrics = json.loads((artifact(undisturbed, stage) / "manifest.json").read_text())["metrics"]["result"]
        assert metrics["kv_bytes_per_token_measured"] == metrics["kv_bytes_per_token_predicted"] > 0


def test_run_again_is_cached(copied: Path) -> None:
    before = len(events(copied / "outputs"))
    posttrain(*RUN, cwd=copied)
    new = events(copied / "outputs")[before:]
    assert {item["event"] for item in new} <= {"run_started", "stage_cached", "run_finished"}
    assert sum(item["event"] == "stage_cached" for item in new) == 8


def test_plan_says_what_reruns_and_why(copied: Path) -> None:
    assert all(stage["status"] == "cached" for stage in plan_of(cwd=copied).values())
    changed = plan_of("stages.distill.lr=0.002", cwd=copied)
    rerun = {name for name, stage in changed.items() if stage["status"] != "cached"}
    assert rerun == {"distill", "datasets.pairs", "prefer", "evaluate"}
    assert changed["distill"]["reasons"] == ["lr 0.001 → 0.002"]
    assert changed["evaluate"]["reasons"] == ["parent prefer changed"]
    for override in ("tracker=wandb", "engine=cpu", "stages.distill.micro_batch_size=1", "run.name=other"):
        assert all(stage["status"] == "cached" for stage in plan_of(override, cwd=copied).values()), override


def test_until_only_from_and_force(copied: Path) -> None:
    outputs = copied / "outputs"
    for type_ in ("distill", "preference", "evaluate"):
        shutil.rmtree(outputs / "store" / type_)
    done = posttrain(*RUN, "--only", "evaluate", cwd=copied, check=False)
    assert done.returncode == 2 and "prefer" in done.stderr
    posttrain(*RUN, "--until", "evaluate_converted", cwd=copied)
    assert not (outputs / "store" / "distill").exists()
    posttrain(*RUN, "--only", "evaluate_converted", "--force", "evaluate_converted", cwd=copied)
    assert has_event(outputs, "stage_started", "evaluate_converted")
    posttrain("verify", "all", cwd=copied)


def test_a_model_folder_and_a_file_of_ones_own(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact(undisturbed, "model") / "model", tmp_path / "m")
    rows = [{"text": f"Document {number}. " + "Some words of my own. " * 40} for number in range(12)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    posttrain(*RUN, "model.path=./m", "data.path=./my.jsonl", cwd=tmp_path)
    assert (artifact(tmp_path / "outputs", "distill") / "model" / "config.json").exists()


@pytest.mark.parametrize("how", ["ctrl-c", "cancel"])
def test_a_graceful_stop_resumes_to_the_same_result(how: str, undisturbed: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    copy_store_without(undisturbed, outputs, "distill")
    runner, pid = start_and_pause(*RUN, cwd=tmp_path, event=step_of("distill", 1))
    asking = None
    if how == "ctrl-c":
        os.kill(runner.pid, signal.SIGINT)
    else:
        asking = start("cancel", cwd=tmp_path)
    wait_for(lambda: any(outputs.glob("store/distill/.work-*/STOP")), "the wish to stop")
    thaw(pid)
    assert runner.wait(timeout=60) == 75
    assert asking is None or asking.wait(timeout=60) == 0
    assert has_event(outputs, "stage_stopped", "distill")
    assert "stopped" in posttrain("status", cwd=tmp_path).stdout
    posttrain("resume", cwd=tmp_path)
    assert deterministic_part(outputs, "distill") == deterministic_part(undisturbed, "distill")


LOAD = """
import sys, torch
mode, folder = sys.argv[1:]
if mode == "registered":
    import posttrain.models
else:
    sys.modules["posttrain"] = None  # any import of the package fails
from transformers import AutoModelForCausalLM, AutoTokenizer
remote = mode == "remote"
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=remote).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
texts = ["a", "some longer text here", "mid size"]
batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
options = dict(max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
cached = model.generate(**batch, use_cache=True, **options)
plain = model.generate(**batch, use_cache=False, **options)
assert torch.equal(cached, plain)
with torch.no_grad():
    print(model(torch.arange(40)[None] % 250).logits.double().sum().item().hex())
"""


def test_another_process_loads_the_result_with_and_without_the_package(undisturbed: Path, tmp_path: Path) -> None:
    folder = artifact(undisturbed, "distill") / "model"
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    sums = []
    for mode in ("registered", "remote"):
        env = environment(tmp_path / "cache") | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
        if mode == "remote":
            env["PYTHONPATH"] = ""
            env["PYTHONNOUSERSITE"] = "1"
        else:
            env["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(
            [sys.executable, str(script), mode, str(folder)],
            env=env,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        sums.append(done.stdout.split()[-1])
    assert sums[0] == sums[1]
