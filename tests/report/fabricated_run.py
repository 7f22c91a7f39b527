"""A run folder as the pipeline leaves it, made of small JSON files: source, conversion, training, two evaluations."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from posttrain.pipeline.store import manifest_digest

LABEL = "TestLM-1M, dequantised Q4_1"
DATA_SHA256 = "ab" * 32
LAYERS = 12
CONVERTED = {
    "perplexity": 31.5,
    "perplexity_low": 27.0,
    "perplexity_high": 36.25,
    "kl": 0.8125,
    "top1_agreement": 0.5625,
}
DISTILLED = {
    "perplexity": 18.25,
    "perplexity_low": 16.0,
    "perplexity_high": 20.5,
    "kl": 0.21875,
    "top1_agreement": 0.75,
}
SOURCE_PERPLEXITY = 14.5
EVENT = {"time": 1.0}


def evaluation_metrics(figures: dict[str, float]) -> dict[str, Any]:
    """The result metrics of an evaluation against the source."""
    nll, source = math.log(figures["perplexity"]), math.log(SOURCE_PERPLEXITY)
    return {
        "precision": "fp32",
        "window_tokens": 1024,
        "data_sha256": DATA_SHA256,
        "documents": 24,
        "tokens": 20480,
        "text_bytes": 81920,
        **figures,
        "nll": nll,
        "bits_per_byte": nll / math.log(2) / 4,
        "baseline_perplexity": SOURCE_PERPLEXITY,
        "baseline_perplexity_low": 13.0,
        "baseline_perplexity_high": 16.25,
        "baseline_nll": source,
        "baseline_bits_per_byte": source / math.log(2) / 4,
        "parameters": 1234567,
        "kv_bytes_per_token_predicted": 7680,
        "kv_bytes_per_token_measured": 7680,
        "kv_constant_bytes": 0,
        "baseline_parameters": 1200000,
        "baseline_kv_bytes_per_token_predicted": 46080,
        "baseline_kv_bytes_per_token_measured": 46080,
        "baseline_kv_constant_bytes": 0,
    }


EVALUATION_TIMING = {
    "prefill_tokens_per_second": 812.5,
    "decode_tokens_per_second": 14.25,
    "baseline_prefill_tokens_per_second": 905.0,
    "baseline_decode_tokens_per_second": 13.5,
    "prefill_tokens": 512,
    "decode_tokens": 32,
    "batch_size": 1,
    "process_peak_bytes": 2 * 2**30,
    "device": "cpu",
    "threads": 2,
}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


class FabricatedRun:
    """Writes stages one by one; `finish` writes `run.json` and the events."""

    def __init__(self, outputs: Path, name: str = "demo-1a2b3c4d") -> None:
        self.outputs, self.folder = outputs, outputs / "runs" / name
        self.stages: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = [{**EVENT, "event": "run_started", "stage": None}]

    def stage(self, name: str, type_: str, inputs: dict[str, str], *, artifact: dict[str, Any] | None = None) -> Path:
        """Add a stage; with `artifact` (outputs, metrics, config, estimate) a finished one. Its folder."""
        key = f"{name}-key".encode().hex().ljust(32, "0")[:32]
        resolved = {}
        for role, reference in inputs.items():
            producer, _, output = reference.partition(".")
            entry = next(item for item in self.stages if item["name"] == producer)
            source = {"stage": producer, "output": output or "model", "key": entry["key"]}
            resolved[role] = {"reference": reference, **source}
        path = f"store/{type_}/{key}"
        self.stages.append(
            {"name": name, "type": type_, "key": key, "inputs": resolved, "artifact": path, "status": "pending"}
        )
        if artifact is not None:
            inputs = {
                role: {name: one[name] for name in ("reference", "key", "output")} for role, one in resolved.items()
            }
            named = {"stage": name, "inputs": inputs, **artifact.get("manifest", {})}
            self._manifest(self.outputs / path, type_, key, {**artifact, "manifest": named})
            self.events += [
                {**EVENT, "event": "stage_started", "stage": name, "attempt": 1, "pid": 1},
                {**EVENT, "event": "stage_finished", "stage": name, "seconds": 12.0},
            ]
        return self.outputs / path

    def _manifest(self, folder: Path, type_: str, key: str, artifact: dict[str, Any]) -> None:
        outputs = {}
        for name, (output_type, meta, files) in artifact["outputs"].items():
            sizes = {}
            for relative, text in files.items():
                write(folder / name / relative, text)
                sizes[relative] = {"sha256": "0" * 64, "size": len(text.encode())}
            outputs[name] = {"type": output_type, "meta": meta, "files": sizes}
        manifest = {
            "format": 1,
            "stage": type_,
            "type": type_,
            "version": "1",
            "key": key,
            "config": {"type": type_, **artifact.get("config", {})},
            "outputs": outputs,
            "metrics": artifact.get("metrics", {"result": {}, "timing": {}}),
            "estimate": artifact.get("estimate", {}),
            "versions": {"torch": "2.13.0", "posttrain": "0.1.0"},
            "git": {"commit": "feedbeef", "dirty": False},
            "host": {"name": "testhost", "cpus": 2},
            "engine": "cpu",
            "seconds": 12.0,
            "attempts": 1,
            **artifact.get("manifest", {}),
        }
        write(folder / "manifest.json", json.dumps({**manifest, "sha256": manifest_digest(manifest)}))

    def finish(
        self, *, overrides: tuple[str, ...] = ("scale=demo",), description: str = "A test recipe.", **more: Any
    ) -> Path:
        run = {
            "format": 1,
            "name": self.folder.name,
            "recipe": "x_ecomla",
            "description": description,
            "overrides": list(overrides),
            "created": 1.0,
            "seed": 7,
            "stages": self.stages,
            **more,
        }
        write(self.folder / "run.json", json.dumps(run))
        write(self.folder / "events.jsonl", lines(self.events))
        return self.folder


def model_output(label: str | None = None, **extra: Any) -> dict[str, Any]:
    meta = {"type": "model", "extra": {**({"label": label} if label else {}), **extra}}
    return {"model": ("model", meta, {"config.json": "{}"})}


def dataset_outputs() -> dict[str, Any]:
    card = {"name": "demo", "split": "heldout", "rows": 24, "bytes": 81920, "sha256": DATA_SHA256, "licence": "CC0"}
    files = {"rows.jsonl": "{}\n", "dataset.json": json.dumps(card)}
    return {name: ("dataset", {"type": "dataset", "rows": 24}, files) for name in ("train", "heldout")}


def evaluation_artifact(figures: dict[str, float], answer: str, **changes: Any) -> dict[str, Any]:
    """A finished evaluation of 24 documents whose perplexities spread around the totals."""
    generator = random.Random(3)
    rows = []
    for index in range(24):
        factor = math.exp(generator.gauss(0, 0.5))
        noise = math.exp(generator.gauss(0, 0.08))
        rows.append(
            {
                "id": f"doc-{index}",
                "tokens": 853,
                "nll": 1.0,
                "baseline_nll": 1.0,
                "perplexity": figures["perplexity"] * factor * noise,
                "baseline_perplexity": SOURCE_PERPLEXITY * factor,
            }
        )
    samples = [{"prompt": "Is 1 < 2 & true?", "model": answer, "baseline": "Yes | it is."}]
    result = {**evaluation_metrics(figures), **changes}
    files = {"metrics.json": "{}", "documents.jsonl": lines(rows), "samples.json": json.dumps(samples)}
    estimate = {"parameters": 1234567, "tokens": 40960, "memory": {"weights": 2**30}, "cache_bytes_per_token": 3840}
    return {
        "outputs": {"evaluation": ("evaluation", {"type": "evaluation"}, files)},
        "metrics": {"result": result, "timing": EVALUATION_TIMING},
        "estimate": estimate,
    }


def conversion_artifact() -> dict[str, Any]:
    generator = random.Random(5)
    layers = [
        {
            "layer": layer,
            "kv_lora_rank": 64 if layer % 3 else 32,
            "rel_error": 0.1 + 0.02 * layer * generator.random(),
            "energy": 0.97 - 0.01 * generator.random(),
        }
        for layer in range(LAYERS)
    ]
    files = {"conversion.json": json.dumps({"plan": "p", "layers": layers})}
    conversion = ("conversion", {"type": "conversion"}, files)
    return {"outputs": {**model_output(), "conversion": conversion}, "config": {"kv_ratio": 0.167}}


def training_artifact(steps: int = 40) -> dict[str, Any]:
    generator = random.Random(1)
    rows = []
    for step in range(1, steps + 1):
        kl = 0.75 * math.exp(-step / 15) + 0.2 + 0.02 * generator.random()
        rows.append({"step": step, "loss": kl, "kl": kl, "lr": 8e-5 * min(1, step / 5)})
    history = ("history", {"type": "history"}, {"history.jsonl": lines(rows)})
    return {
        "outputs": {**model_output(), "history": history},
        "config": {"max_steps": steps, "lr": 8e-5},
        "estimate": {"tokens": steps * 1024, "memory": {"weights": 2**20}},
    }


def complete_run(outputs: Path, *, source: dict[str, Any] | None = None, **more: Any) -> Path:
    """The whole run: model, data, upcycle, evaluate_converted, distill, evaluate. `more`: fields of run.json."""
    run = FabricatedRun(outputs)
    model = {"outputs": model_output(LABEL, source="package"), **(source or {})}
    run.stage("model", "model_source", {}, artifact=model)
    run.stage("data", "data_source", {}, artifact={"outputs": dataset_outputs()})
    run.stage("upcycle", "mla_upcycle", {"model": "model"}, artifact=conversion_artifact())
    _evaluation(run, "evaluate_converted", "upcycle.model", CONVERTED, "Maybe <b>no</b>.\x00\x1b[2J")
    run.stage(
        "distill",
        "distill",
        {"student": "upcycle.model", "teacher": "model", "data": "data.train"},
        artifact=training_artifact(),
    )
    _evaluation(run, "evaluate", "distill.model", DISTILLED, "Yes.")
    return run.finish(overrides=("scale=demo", "stages.distill.lr=1e-4"), **more)


def _evaluation(run: FabricatedRun, name: str, model: str, figures: dict[str, float], answer: str) -> None:
    inputs = {"model": model, "baseline": "model", "data": "data.heldout"}
    run.stage(name, "evaluate", inputs, artifact=evaluation_artifact(figures, answer))


def failed_run(outputs: Path) -> Path:
    """The conversion was evaluated, then the training failed; the last evaluation never started."""
    run = FabricatedRun(outputs, "broken-00000000")
    run.stage("model", "model_source", {}, artifact={"outputs": model_output("random", source="random")})
    run.stage("data", "data_source", {}, artifact={"outputs": dataset_outputs()})
    run.stage("upcycle", "mla_upcycle", {"model": "model"}, artifact=conversion_artifact())
    run.stage("distill", "distill", {"student": "upcycle.model", "teacher": "model", "data": "data.train"})
    run.events += [
        {**EVENT, "event": "stage_started", "stage": "distill", "attempt": 1, "pid": 1},
        {**EVENT, "event": "metrics", "stage": "distill", "step": 1, "loss": 3.0},
        {**EVENT, "event": "metrics", "stage": "distill", "step": 2, "loss": 2.5},
        {**EVENT, "event": "stage_failed", "stage": "distill", "message": "the loss is <NaN> at step 3"},
    ]
    run.stage("evaluate", "evaluate", {"model": "distill.model", "baseline": "model", "data": "data.heldout"})
    return run.finish()
