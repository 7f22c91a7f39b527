"""Run one stage in this process: context, checks, the stage itself, measurement, publication."""

from __future__ import annotations

import math
import os
import platform
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from posttrain.config import plugins, registry
from posttrain.config.schema import SHARDED
from posttrain.errors import EXIT_FAILED, DamagedInputs, PosttrainError, RecipeError, StageError
from posttrain.launch.job import Job, clear_work, describe_failure, write_outcome
from posttrain.launch.source_code import SourceCode, source_code
from posttrain.pipeline.context import InputArtifact, StageContext
from posttrain.pipeline.disk import free_reserve
from posttrain.pipeline.events import EventLog
from posttrain.pipeline.files import list_files, remove_tree
from posttrain.pipeline.fingerprint import changed_external
from posttrain.pipeline.graph import in_section
from posttrain.pipeline.lock import Lock
from posttrain.pipeline.stage import ArtifactMeta, Stage
from posttrain.pipeline.store import Artifact, damage, publish, seal, sealed

VERSIONED = ("posttrain", "torch", "transformers", "trl", "peft", "accelerate", "safetensors", "tokenizers", "numpy")
STRUCTURE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "mixers",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)
"""Architecture fields in which a finished model must be what the plan said."""


def execute_job(job: Job, work_dir: Path, lock: Lock | None = None) -> Artifact:
    """Run the job's stage and publish its artifact.

    Args:
        lock: of the work folder; nothing is published once somebody else has taken it over.

    Raises:
        StageError, RecipeError: the stage or one of its checks failed for a known reason.
        StopRequested: a stop was asked for and the stage has saved its state.
    """
    if sealed(work_dir):
        return publish(work_dir, Path(job.target))
    stage = registry.stage(job.type)
    started, code = time.time(), source_code()
    clear_leftovers(work_dir)
    check_external(stage, job, work_dir)
    check_inputs(job)
    if job.world_size > 1 or strategy_of(job) in SHARDED:
        from posttrain.launch.ranks import run_ranks

        computed = Computed.from_json(run_ranks(job, work_dir))
    else:
        device = prepare_process(job.seed, job.device)
        computed = compute(job, make_context(job, work_dir, device))
    check_external(stage, job, work_dir)
    check_result(job.stage, computed.result)
    _check_outputs(stage, computed.outputs, work_dir)
    metas = {name: measure(stage, job, name, computed.outputs[name]) for name in stage.outputs}
    seal(work_dir, make_manifest(job, stage, computed, metas, started, code), code.diff)
    if lock is not None:
        lock.require()
    return publish(work_dir, Path(job.target))


@dataclass(frozen=True)
class Computed:
    """What a stage has made: the folders of its outputs, its metrics, and where it computed."""

    outputs: dict[str, Path]
    result: dict[str, Any]
    timing: dict[str, Any]
    device: str
    host: dict[str, Any]
    threads: int | None

    def to_json(self) -> dict[str, Any]:
        outputs = {name: str(path) for name, path in self.outputs.items()}
        plain = {"result": _plain(self.result), "timing": _plain(self.timing), "host": self.host}
        return {"outputs": outputs, "device": self.device, "threads": self.threads, **plain}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Computed:
        return cls(**{**data, "outputs": {name: Path(path) for name, path in data["outputs"].items()}})


def compute(job: Job, context: StageContext) -> Computed:
    """Run the job's stage in this process, as the only rank or one of several.

    Raises:
        StageError, RecipeError, StopRequested: as `execute_job`.
    """
    stage = registry.stage(job.type)
    if job.debug.get("anomaly"):
        import torch

        torch.autograd.set_detect_anomaly(True)
    try:
        stage.check(context.config, {name: one.meta for name, one in context.inputs.items()})
        outputs = stage.run(context)
    except PosttrainError as error:
        raise type(error)(problems=in_section(error.problems, stage, job.stage)) from error
    where = {"device": context.device, "host": host_facts(context.device), "threads": _threads()}
    return Computed(dict(outputs), context.result, context.timing, **where)


def check_external(stage: Stage, job: Job, work_dir: Path) -> None:
    """Hold what lies outside the recipe against the key, which was made before the stage read it.

    Raises:
        StageError: it is not what was planned. What the stage has made of it is removed, since a later attempt under
            the same key would take it for its own.
    """
    config = stage.config_for(job.config).model_validate(job.config)
    try:
        changed = changed_external(stage, config, job.document)
    except RecipeError as error:
        changed = [problem.what for problem in error.problems]
    if changed:
        clear_work(work_dir)
        fix = "run again: posttrain run plans with what is there now"
        raise StageError("an input changed while the run was going on", "; ".join(changed), fix)


def check_inputs(job: Job) -> None:
    """Hash the inputs again: a file may have been cut short or changed since it was written, by a disk or a person.

    Raises:
        DamagedInputs: with what is wrong of which input.
    """
    found = {}
    for name, one in job.inputs.items():
        folder = Path(one["path"])
        if lines := damage(folder.parent, folder.name):
            found[name] = lines
    if found:
        raise DamagedInputs(found)


def clear_leftovers(work_dir: Path) -> None:
    """Remove what a killed attempt was just writing: hidden folders beside the outputs, and files not yet in place.

    Finished files stay: what they are worth is for the stage to say.
    """
    outputs = work_dir / "outputs"
    for entry in list(outputs.iterdir()) if outputs.exists() else []:
        if entry.name.startswith(".") and entry.is_dir() and not entry.is_symlink():
            remove_tree(entry)
    for path in list_files(outputs).values():
        if path.name.startswith(".") and path.name.endswith(".aside"):
            path.unlink()


def make_context(job: Job, work_dir: Path, device: str, **ranks: Any) -> StageContext:
    """The context of a job, reporting to its run's event log.

    Args:
        ranks: its fields `rank`, `world_size`, `agree` and `abandon`, where there are several.
    """
    config = registry.stage(job.type).config_for(job.config).model_validate(job.config)
    log = EventLog(Path(job.events))

    def emit(event: str, fields: dict[str, Any]) -> None:
        log.append(event, job.stage, **fields)

    inputs = {
        name: InputArtifact(Path(one["path"]), ArtifactMeta.from_json(one["meta"]), one["reference"])
        for name, one in job.inputs.items()
    }
    return StageContext(
        job.stage,
        config,
        work_dir,
        inputs,
        job.seed,
        device,
        strategy=strategy_of(job),
        deepspeed=job.environment.get("deepspeed", {}),
        tracker=job.tracker,
        emit=emit,
        profile=_profile(job),
        **{"abandon": partial(give_up, work_dir), **ranks},
    )


def strategy_of(job: Job) -> str:
    """How the ranks of the job share a model; a stage that works on one rank alone has all of it."""
    return job.environment.get("strategy", "single") if registry.stage(job.type).parallel else "single"


def give_up(work_dir: Path, error: Exception) -> NoReturn:
    """End this worker at once as failed, whatever its other threads wait for."""
    try:
        free_reserve(work_dir)
        outcome = write_outcome(work_dir, "failed", **describe_failure(error, work_dir))
        print(f"posttrain: failed {outcome['message']}", flush=True)
    finally:
        os._exit(EXIT_FAILED)


def _profile(job: Job) -> tuple[Path, int] | None:
    return (Path(job.profile), job.debug["profile_steps"]) if job.profile is not None else None


def prepare_process(seed: int, device: str) -> str:
    """Seed every generator, fix the number of threads, make CPU computing deterministic; returns the real device.

    Raises:
        StageError: CUDA is asked for and there is none.
    """
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if threads := os.environ.get("OMP_NUM_THREADS", ""):
        torch.set_num_threads(int(threads) if threads.isdigit() and int(threads) else torch.get_num_threads())
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise StageError("the engine asks for a CUDA device, but torch sees none", "engine.device", "write engine=cpu")
    resolved = "cuda" if available and device != "cpu" else "cpu"
    if resolved == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
    return resolved


def check_result(stage: str, result: Mapping[str, Any]) -> None:
    """Raises StageError if a result metric is NaN or infinite."""
    broken = [f"{name} = {value}" for name, value in _numbers(result) if not math.isfinite(value)]
    if broken:
        fix = "look at the log and the loss curve; a lower learning rate or another dtype is the usual cure"
        raise StageError(f"stage {stage} ended with results that are no numbers: {', '.join(broken)}", fix=fix)


def _numbers(value: Any, path: str = "") -> list[tuple[str, float]]:
    if isinstance(value, Mapping):
        named = ((f"{path}.{name}" if path else str(name), item) for name, item in value.items())
        return [pair for name, item in named for pair in _numbers(item, name)]
    if isinstance(value, list | tuple):
        return [pair for index, item in enumerate(value) for pair in _numbers(item, f"{path}[{index}]")]
    return [(path, value)] if isinstance(value, float) else []


def _check_outputs(stage: Stage, outputs: Mapping[str, Path], work_dir: Path) -> None:
    for name in stage.outputs:
        if name not in outputs:
            raise StageError(f"stage type {stage.type} did not return its output '{name}'")
        if Path(outputs[name]).resolve() != (work_dir / "outputs" / name).resolve():
            raise StageError(f"output '{name}' was written to {outputs[name]}, not to the work folder's outputs/{name}")


ANOTHER_MODEL = "correct `architecture:` in the model's YAML, or the settings of the stage"
"""Advice where an output is not the model that was planned."""


def measure(stage: Stage, job: Job, name: str, path: Path, fix: str = ANOTHER_MODEL) -> ArtifactMeta:
    """Meta of a finished output, held against what was planned. Raises RecipeError or StageError."""
    type_, predicted = stage.outputs[name], ArtifactMeta.from_json(job.predicted[name])
    if type_ == "model":
        from posttrain.models.inspect import check_model_folder, check_weight_files

        # Of another program's classes the architecture says nothing here: the stage has compared what they compute.
        (check_weight_files if predicted.extra.get("stock") else check_model_folder)(path)
    measured = stage.measure(name, path, predicted)
    if measured.type != type_:
        raise StageError(f"output '{name}' of stage {job.stage} is a {measured.type}, declared as a {type_}", str(path))
    _check_prediction(job.stage, name, predicted, measured, fix)
    return measured


def _check_prediction(stage: str, name: str, predicted: ArtifactMeta, measured: ArtifactMeta, fix: str) -> None:
    """Later stages were planned for the predicted structure: another one must not pass.

    Fields under `open` of the prediction follow from weights or data; their values there are for estimates alone.
    """
    expected, found = predicted.architecture or {}, measured.architecture or {}
    left = predicted.extra.get("open", ())
    differing = [
        f"{field} {expected[field]} → {found[field]}"
        for field in STRUCTURE
        if field not in left and field in expected and field in found and expected[field] != found[field]
    ]
    if differing:
        what = f"output '{name}' of stage {stage} is not the model that was planned: {', '.join(differing)}"
        raise StageError(what, fix=fix)


def make_manifest(
    job: Job, stage: Stage, computed: Computed, metas: Mapping[str, ArtifactMeta], started: float, code: SourceCode
) -> dict[str, Any]:
    """The manifest but for the files' digests and its own, which `seal` adds. `code`: as it was at the start."""
    finished = time.time()
    return {
        "format": 1,
        "stage": job.stage,
        "type": job.type,
        "version": stage.version,
        "key": job.key,
        "key_document": job.document,
        "config": job.config,
        "seed": job.seed,
        "recipe": job.recipe,
        "inputs": {
            name: {"reference": one["reference"], "key": one["key"], "output": one["output"]}
            for name, one in job.inputs.items()
        },
        "outputs": {name: {"type": stage.outputs[name], "meta": metas[name].to_json()} for name in stage.outputs},
        "metrics": {"result": _plain(computed.result), "timing": _plain(computed.timing)},
        "estimate": job.estimate,
        "versions": _versions(strategy_of(job)),
        "git": code.entry | ({} if source_code().entry == code.entry else {"changed_meanwhile": True}),
        "host": computed.host,
        "engine": {
            **job.environment,
            "device": computed.device,
            "ranks": job.ranks,
            "nodes": job.nodes,
            "threads": computed.threads,
        },
        "started": started,
        "finished": finished,
        "seconds": finished - started,
        "attempts": job.attempt,
    }


def _plain(value: Any) -> Any:
    """Values as JSON has them; non-finite timings become None, results were checked before."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.item() if hasattr(value, "item") else value


def _versions(strategy: str) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in (*VERSIONED, *(["deepspeed"] if strategy.startswith("zero") else [])):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    # The version that runs may come from a path before the installed one.
    found.update({name: sys.modules[name].__version__ for name in VERSIONED if _has_version(name)})
    found.update(plugins.in_use())
    return {name: str(value) for name, value in found.items()}


def _has_version(name: str) -> bool:
    return hasattr(sys.modules.get(name), "__version__")


def host_facts(device: str) -> dict[str, Any]:
    host = {"name": platform.node(), "platform": platform.platform(), "cpus": os.cpu_count(), "cpu": _cpu_name()}
    if device == "cuda":
        import torch

        host["gpu"] = torch.cuda.get_device_name()
    return host


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else None
