"""Base of stages with a policy gradient: model + questions -> trained model and its history."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from posttrain.errors import Problem, RecipeError
from posttrain.models.architecture import cache_bytes, cache_bytes_per_token, parameter_count
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.device import plans_for_gpu
from posttrain.pipeline.stage import ArtifactMeta, Estimate, InputSpec
from posttrain.policy.config import PolicyConfig
from posttrain.rewards.score import check_rows, identity
from posttrain.training.adapters import adapter_parameters, target_problems
from posttrain.training.estimate import (
    ELEMENT_SIZE,
    activation_plan,
    budget_notes,
    trainable_parameters,
    training_memory,
)
from posttrain.training.stage import TrainingStage
from posttrain.training.trl_memory import head_bytes


class PolicyStage(TrainingStage):
    """What `grpo` and its kin promise; subclasses give `type`, `version`, `Config` and the trainer."""

    inputs: ClassVar[dict[str, InputSpec]] = {
        "model": InputSpec("model", doc="The policy to train; it should know the answers' format."),
        "data": InputSpec(
            "dataset", doc="Questions whose answers can be checked: rows with `task`, `answer` or `tests`."
        ),
    }

    def trainer(self) -> type:
        """The class of the trainer, imported when it is needed."""
        from posttrain.policy.trainer import PolicyTrainer

        return PolicyTrainer

    def external(self, cfg: PolicyConfig) -> dict[str, Any]:
        found = {name: identity(reward, f"rewards.{name}") for name, reward in cfg.rewards.items()}
        return {"rewards": {name: versions for name, versions in found.items() if versions}}

    def check(self, cfg: PolicyConfig, inputs: Mapping[str, ArtifactMeta]) -> None:
        problems = [*data_problems(cfg, inputs["data"]), *model_problems(cfg, inputs["model"].architecture)]
        if problems:
            raise RecipeError(problems=problems)

    def estimate(self, cfg: PolicyConfig, inputs: Mapping[str, ArtifactMeta]) -> Estimate:
        arch, data = inputs["model"].architecture, inputs["data"]
        prompt = mean_prompt_tokens(cfg, data)
        question = cfg.num_generations * (prompt + cfg.max_completion_length)
        tokens = cfg.rollouts * cfg.questions_per_batch * question
        asked_once = None if data.rows is None else data.rows * question
        if arch is None:
            return Estimate(tokens=tokens, data_tokens=asked_once)
        adapters = adapter_parameters(arch, cfg.lora) if cfg.lora else 0
        trainable = adapters or trainable_parameters(arch, cfg.trainable)
        micro_batch_tokens = cfg.micro_batch() * (cfg.max_prompt_length + cfg.max_completion_length)
        plan = activation_plan(
            arch,
            micro_batch_tokens,
            cfg.precision,
            compiled=cfg.compiles(on_gpu=plans_for_gpu()),
            everything=cfg.gradient_checkpointing,
            budget=cfg.activation_budget,
        )
        reference = arch if cfg.beta and not cfg.lora else None
        memory = training_memory(
            arch, trainable, micro_batch_tokens, 1, precision=cfg.precision, plan=plan, teacher=reference
        )
        if "teacher" in memory:
            memory["reference"] = memory.pop("teacher")
        memory["weights"] += 4 * adapters
        return Estimate(
            parameters=parameter_count(arch),
            notes=(*self.notes(cfg, inputs), *budget_notes(arch, micro_batch_tokens, cfg, plan)),
            trainable=trainable,
            tokens=tokens,
            data_tokens=asked_once,
            memory={**memory, "logits": head_bytes(arch, micro_batch_tokens), **rollout_bytes(cfg, arch)},
            cache_bytes_per_token=cache_bytes_per_token(arch),
            disk_bytes=ELEMENT_SIZE[cfg.save_dtype] * parameter_count(arch),
        )

    def notes(self, cfg: PolicyConfig, inputs: Mapping[str, ArtifactMeta]) -> tuple[str, ...]:
        """Sentences for the plan."""
        said = (
            f"{cfg.rollouts} roll-out batches of {cfg.questions_per_batch} questions x {cfg.num_generations} "
            f"completions, {cfg.steps_per_rollout} optimiser step{'s' if cfg.steps_per_rollout > 1 else ''} each",
        )
        rows = inputs["data"].rows
        if rows and rows < cfg.questions_per_batch:
            said += (f"the data's {rows} questions are fewer than a roll-out batch has: questions repeat within it",)
        return said

    def run(self, ctx: StageContext) -> dict[str, Path]:
        from posttrain.policy.train import train

        train(ctx, self.trainer())
        return {name: ctx.output_dir(name) for name in self.outputs}


def mean_prompt_tokens(cfg: PolicyConfig, data: ArtifactMeta) -> int:
    """Tokens of a prompt, estimated: a row's, with its answer."""
    if data.rows and data.tokens is not None:
        return min(cfg.max_prompt_length, -(-data.tokens // data.rows))
    return cfg.max_prompt_length


def rollout_bytes(cfg: PolicyConfig, arch: Mapping[str, Any]) -> dict[str, int]:
    """The engine's own weights and caches, in bf16 on a GPU; of transformers' generate its caches in fp32."""
    if cfg.rollout not in ("auto", "engine", "transformers"):
        return {}
    engine = cfg.rollout != "transformers" and cfg.lora is None
    size = 2 if engine and cfg.rollout_dtype != "float32" and plans_for_gpu() else 4
    rows = min(cfg.rollout_rows, cfg.generation_batch_size)
    length = cfg.max_prompt_length + cfg.max_completion_length
    cache = rows * cache_bytes(arch, length, size)
    return {"rollout": cache + (size * parameter_count(arch) if engine else 0)}


def data_problems(cfg: PolicyConfig, data: ArtifactMeta) -> list[Problem]:
    """What the data lacks, as far as a plan can know it."""
    where = f"data={cfg.inputs.get('data', '?')}"
    if data.rows == 0:
        return [
            Problem("the data has no rows", where=where, fix="give a dataset of questions, e.g. data=reasoning_gym_rl")
        ]
    kind = data.extra.get("rows")
    if kind == "text":
        problem = "the data is plain text, which asks nothing"
        return [Problem(problem, where=where, fix="a dataset of questions, e.g. data=reasoning_gym_rl")]
    if (fields := data.extra.get("fields")) is None:
        return []
    try:
        check_rows(cfg.rewards, fields)
    except RecipeError as error:
        return list(error.problems)
    return []


def model_problems(cfg: PolicyConfig, arch: Mapping[str, Any] | None) -> list[Problem]:
    """What does not fit the model."""
    if not arch:
        return []
    problems = target_problems(cfg.lora, arch)
    longest, wanted = arch["max_position_embeddings"], cfg.max_prompt_length + cfg.max_completion_length
    if wanted > longest:
        problem = (
            f"prompts of {cfg.max_prompt_length} and completions of {cfg.max_completion_length} tokens exceed the "
        )
        problem += f"model's {longest} positions"
        where, fix = "max_completion_length", f"max_completion_length={longest - cfg.max_prompt_length}"
        if cfg.max_prompt_length >= longest:  # no completion would fit behind such prompts
            where, rest = "max_prompt_length", longest - cfg.max_completion_length
            fix = f"max_prompt_length={rest}"
            if rest < 1:
                fix = f"max_prompt_length={longest // 2} max_completion_length={longest - longest // 2}"
        problems.append(Problem(problem, where=where, fix=fix))
    return problems
