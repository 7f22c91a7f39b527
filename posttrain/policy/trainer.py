"""Policy-gradient training on TRL's `GRPOTrainer`: its loss and metrics; our roll-outs, rewards and checkpoints."""

from __future__ import annotations

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy
import torch
import trl
from accelerate.utils import gather, set_seed
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import RepeatSampler

from posttrain.errors import fail
from posttrain.generation import Sampling
from posttrain.generation.tokens import stop_tokens
from posttrain.pipeline.context import StageContext
from posttrain.policy.alignment import align, back
from posttrain.policy.arguments import NamedReward, trl_arguments, uses_engine
from posttrain.policy.completions import CompletionLog
from posttrain.policy.config import PolicyConfig
from posttrain.policy.data import PROMPT, ROW, Prompts
from posttrain.policy.rails import Rails
from posttrain.policy.rollout import EngineRollout
from posttrain.policy.step_means import StepMeans
from posttrain.rewards.score import RewardSet
from posttrain.training import checkpoints, speed
from posttrain.training.adapters import peft_config
from posttrain.training.logprob import TokenLogprobs, token_logprobs
from posttrain.training.order import run_order
from posttrain.training.selection import select_trainable
from posttrain.training.trl_seam import TrlStageTrainer, padding_multiple, require_trl

GRPO_RELIED_ON = {
    "training_step": ("self", "model", "inputs", "num_items_in_batch"),
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "_generate_single_turn": (
        "self",
        "prompt_ids",
        "images",
        "multimodal_fields",
        "num_generations",
        "has_tool_images",
    ),
    "_generate_and_score_completions": ("self", "inputs"),
    "_compute_loss": ("self", "model", "inputs"),
    "_prepare_inputs": ("self", "generation_batch"),
    "_tokenize_prompts": ("self", "prompts"),
    "_get_per_token_logps_and_entropies": (
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
        "pixel_values",
        "image_grid_thw",
        "num_images",
        "pixel_attention_mask",
        "spatial_shapes",
        "num_tiles",
        "image_sizes",
        "token_type_ids",
        "mm_token_type_ids",
        "image_position_ids",
    ),
}
"""Methods of TRL's `GRPOTrainer` that are replaced or called here, with their parameters."""

QUESTION = "question"
"""The loader's only column: the number of a question among `Prompts.rows`."""

DRAWS, SHUFFLE = 0, 1
"""What the random numbers of a roll-out batch are for."""


class PolicyTrainer(TrlStageTrainer, trl.GRPOTrainer):
    """Trains `model` on questions; subclasses override `advantages_of`.

    - A roll-out batch depends on seed, step and weights alone, never on random numbers drawn before: a run that is
      resumed at the border of two batches goes on bit for bit.
    - Its checkpoints lie at such borders only, because completions in use are not saved.
    - Rewards are scored in processes of their own; TRL's reward functions are not called.

    Attributes:
        rewards: `[completions of all ranks, rewards]` of the batch in use, NaN where one could not be scored.
        lengths: `[completions of all ranks]`, their tokens.
    """

    config: PolicyConfig

    def __init__(
        self,
        ctx: StageContext,
        config: PolicyConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        reward_set: RewardSet,
    ) -> None:
        require_trl(trl.GRPOTrainer, GRPO_RELIED_ON)
        select_trainable(model, config.trainable)
        self.prompts, self.reward_set, self.names = prompts, reward_set, list(config.rewards)
        self.deciding = [at for at, reward in enumerate(config.rewards.values()) if reward.correctness]
        self.rails = Rails(ctx, config, self.deciding)
        self.completion_log = CompletionLog(ctx.work_dir, config.kept_completions if ctx.rank == 0 else 0)
        self.rewards, self.lengths = torch.empty(0), torch.empty(0)
        self.clock = Clock()
        self.width_multiple = padding_multiple(ctx, config)
        self.means = StepMeans()
        self._scores = TokenLogprobs(torch.empty(0), torch.empty(0))
        policy, total = model, config.rollouts * config.questions_per_batch
        super().__init__(
            ctx,
            config,
            model,
            # Numbers only: the loader reads a whole batch of rows at every micro-batch.
            Dataset.from_dict({QUESTION: run_order(len(prompts.rows), total, ctx.seed)}),
            None,
            tokens_per_step=config.sequences_per_step * (prompts.longest + config.max_completion_length),
            processing_class=tokenizer,
            arguments_class=trl.GRPOConfig,
            arguments=trl_arguments(ctx, config),
            reward_funcs=[NamedReward(name) for name in self.names],
            **({"peft_config": peft_config(config.lora)} if config.lora else {}),
        )
        if tokenizer.pad_token_id is None:
            # TRL pads with it at every batch; what is saved comes from the source's files.
            tokenizer.pad_token_id = tokenizer.eos_token_id
        if self.ref_model is not None:
            self.frozen = (self.ref_model,)
        self.rollout = self._rollout(policy, prompts.longest)

    def _rollout(self, policy: PreTrainedModel, longest_prompt: int) -> EngineRollout | None:
        """Our engine, or None for TRL's own ways to generate."""
        config = self.config
        if not uses_engine(config, policy):
            return None
        sampling = Sampling(
            max_new_tokens=config.max_completion_length,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            stop=stop_tokens(policy, self.processing_class),
        )
        rows = min(config.rollout_rows, config.generation_batch_size // self.ctx.world_size)
        return EngineRollout(policy, sampling, rows, longest_prompt, config.rollout_dtype)

    def trained(self) -> PreTrainedModel:
        """The model to save, adapters merged in."""
        return self.model.merge_and_unload() if self.config.lora else self.model

    # ----- order, borders of roll-out batches

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """Every question `num_generations` times in a row; a batch's questions again for each use of the batch."""
        return RepeatSampler(
            data_source=self.train_dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.config.questions_per_batch,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=False,
        )

    def saves_at(self, step: int) -> bool:
        return step % self.config.steps_per_rollout == 0

    def draws(self) -> str | None:
        ours = self.rollout is not None
        return super().draws() if ours else "completions are drawn from random numbers of each rank (rollout)"

    def stage_state(self) -> dict[str, Any]:
        return {"rails": self.rails.state()}

    def load_stage_state(self, state: dict[str, Any]) -> None:
        self.rails.load(state["rails"])

    def _stop_if_asked(self) -> None:
        """Before completions are written: nothing has happened since the last step, so its state is the state now."""
        step = self.state.global_step
        self.watchdog.beat(f"roll-out for step {step + 1}")
        if not self.ctx.should_stop():
            return
        if step and not self.ctx.first_does(
            lambda: (checkpoints.checkpoint_path(self.ctx.checkpoint_dir, step) / checkpoints.MARKER).is_file()
        ):
            self._save_checkpoint(self.model, None)
        self.ctx.stop(step)

    def _seed_of(self, purpose: int) -> int:
        rollout = self.state.global_step // self.config.steps_per_rollout
        return (self.ctx.seed << 24) + (rollout << 1) + purpose

    # ----- roll-outs and rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        # Of ways to generate that draw from global random numbers: other ones on every rank.
        (seed,) = numpy.random.SeedSequence(self._seed_of(DRAWS), spawn_key=(self.ctx.rank,)).generate_state(1)
        set_seed(int(seed))
        rows = self.prompts.rows[[row[QUESTION] for row in inputs]]
        with self.clock("batches"):
            out = super()._generate_and_score_completions(
                [{PROMPT: prompt, ROW: row} for prompt, row in zip(rows[PROMPT], rows[ROW], strict=True)]
            )
        if (advantages := self.advantages_of(self.rewards)) is not None:
            self._take(advantages, out)
        self._metrics["train"]["advantages/mean"].append(sum(self._logs["advantages"]) / len(self._logs["advantages"]))
        self.completion_log.add(self.state.global_step, self._logs)
        # TRL shuffles next, from global random numbers.
        torch.manual_seed(self._seed_of(SHUFFLE))
        return out

    def advantages_of(self, rewards: Tensor) -> Tensor | None:
        """Advantages of all ranks' completions in order, the same on every rank; None: TRL's.

        `[N]`, or for every token `[N, T]` with T the largest of `self.lengths`; behind a completion's end they are not
        looked at.

        Args:
            rewards: `[N, rewards]`, NaN where a completion could not be scored; N is questions times num_generations.
        """
        return None

    def _take(self, advantages: Tensor, out: dict[str, Any]) -> None:
        """Put advantages in the place of TRL's, in this rank's batch and in the log: there a completion's mean."""
        mine = len(out["prompt_ids"])
        own = advantages[self.ctx.rank * mine : (self.ctx.rank + 1) * mine].to(out["advantages"])
        if own.dim() == 2:
            own = own[:, : out["completion_ids"].shape[1]]
            there = torch.arange(advantages.shape[1], device=self.lengths.device) < self.lengths[:, None]
            advantages = (advantages * there.to(advantages)).sum(1) / self.lengths.to(advantages)
        out["advantages"] = own
        for _ in range(len(advantages)):
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(advantages.tolist())

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """Tokenised already, as an evaluation of the same data does it."""
        return [self.prompts.ids[prompt] for prompt in prompts], None, {}

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before or not self._sorts:
            return inputs
        self._sort_buffered()
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    @property
    def _sorts(self) -> bool:
        """TRL's entropy bonus and quantile are of a micro-batch: of short completions alone they would be others."""
        args = self.args
        return not (args.entropy_coef or args.use_adaptive_entropy or args.top_entropy_quantile < 1)

    def _sort_buffered(self) -> None:
        """Completions of like length into one forward pass: an update is a sum over them in any order."""
        accumulation = self.args.gradient_accumulation_steps
        ordered: list[dict[str, Any]] = []
        for first in range(0, len(self._buffered_inputs), accumulation):
            parts = self._buffered_inputs[first : first + accumulation]
            lengths = torch.cat([part["prompt_mask"].sum(1) + part["completion_mask"].sum(1) for part in parts])
            order = lengths.argsort(stable=True).chunk(accumulation)
            joined = {name: _joined([part[name] for part in parts]) for name in parts[0]}
            ordered += [
                {name: value[rows] if value.dim() else value for name, value in joined.items()} for rows in order
            ]
        self._buffered_inputs = ordered

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: Any,
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        self._stop_if_asked()
        with self.clock("rollout"):
            if self.rollout is None:
                return self._generate_by_trl(prompt_ids, num_generations)
            first_row = self.ctx.rank * len(prompt_ids)
            written = self.rollout(
                prompt_ids, first_row, self._seed_of(DRAWS), self._stop_if_asked, weights=self.whole_weights
            )
            return written.tokens, written.logprobs

    def _generate_by_trl(
        self, prompt_ids: list[list[int]], num_generations: int
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """TRL's generation, on plain layers: compiled ones would be compiled anew for every length of the cache."""
        size = len(prompt_ids) if self.use_vllm else self.config.rollout_rows
        tokens: list[list[int]] = []
        logprobs: list[list[float]] | None = None
        with speed.plain_layers(self.model), self.whole_weights():
            for start in range(0, len(prompt_ids), size):
                self._stop_if_asked()
                part = prompt_ids[start : start + size]
                found, scores = super()._generate_single_turn(part, None, {}, num_generations)
                tokens += found
                if scores is not None:
                    logprobs = [*(logprobs or []), *scores]
        return tokens, logprobs

    def _calculate_rewards(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[str],
        completions: list[str],
        completion_ids_list: list[list[int]],
    ) -> Tensor:
        """Scores of all ranks' completions `[N, rewards]`; NaN where there is none."""
        doing = f"scoring for step {self.state.global_step + 1}"
        lengths, rows = [len(ids) for ids in completion_ids_list], [json.loads(row[ROW]) for row in inputs]
        with self.clock("scoring"):
            scores = self.reward_set.score(
                prompts, completions, rows, lengths, at_score=lambda: self.watchdog.beat(doing)
            )
        columns = [
            [float("nan") if score is None else score for score in scores.by_reward[name]] for name in self.names
        ]
        local = torch.tensor(columns, dtype=torch.float32, device=self.args.device).T.contiguous()
        if self.deciding:
            # Left with how it is written, an answer that nothing judges would be learnt for its form.
            local[torch.isnan(local[:, self.deciding]).all(1)] = torch.nan
        self.rewards, self.lengths = self._of_all(local), self._of_all(torch.tensor(lengths, device=self.args.device))
        counted = torch.tensor([scores.counts[name] for name in sorted(scores.counts)], device=self.args.device)
        total = self.accelerator.reduce(counted) if self.ctx.world_size > 1 else counted
        counts = dict(zip(sorted(scores.counts), total.tolist(), strict=True))
        groups = self.rewards.view(-1, self.num_generations, len(self.names))
        for name, value in self.rails.rewards(groups, counts).items():
            self._metrics["train"][name].append(value)
        return self.rewards

    def _of_all(self, values: Tensor) -> Tensor:
        """Rows of all ranks, in order."""
        return gather(values) if self.ctx.world_size > 1 else values

    # ----- loss

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities and entropies `[B, C]` of the completions' tokens, and no auxiliary loss.

        As TRL's, by TRL's head, but on rows without padding between prompt and completion, and under the training
        step's autocast wherever it is called: a ratio of two roundings is noise.
        """
        if unknown := [name for name, value in others.items() if value is not None and value is not False]:
            fail(f"the policy's log-probabilities are not made for {', '.join(unknown)}", where="posttrain.policy")
        # Without gradients it is called outside of the training step's forward pass.
        with contextlib.nullcontext() if torch.is_grad_enabled() else self.whole_weights():
            found = [
                self._scored(
                    model, input_ids[start : start + size], attention_mask[start : start + size], logits_to_keep
                )
                for size in [batch_size or len(input_ids)]
                for start in range(0, len(input_ids), size)
            ]
        logprobs, entropies = (torch.cat(parts) for parts in zip(*found, strict=True))
        self._scores = TokenLogprobs(logprobs.detach(), entropies.detach())
        return logprobs, entropies if compute_entropy else None, None

    def _scored(self, model: Any, input_ids: Tensor, attention_mask: Tensor, completion: int) -> TokenLogprobs:
        rows = align(input_ids, attention_mask, completion, self.width_multiple)
        plain = model.get_base_model() if self.config.lora else model
        with self.compute_loss_context_manager():
            hidden = plain.base_model(input_ids=rows.input_ids, use_cache=False).last_hidden_state[:, :-1][rows.scored]
            targets = rows.input_ids[:, 1:][rows.scored]
            found = token_logprobs(hidden, plain.get_output_embeddings().weight, targets, self.temperature)
        return TokenLogprobs(back(found.logprobs, rows), back(found.entropy, rows))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """TRL's loss as this micro-batch's share of the step's, over all ranks."""
        loss = super().compute_loss(model, inputs)
        mask = inputs["completion_mask"].bool()
        self.means.add("entropy", self._scores.entropy, mask)
        sampled = inputs.get("sampling_per_token_logps")
        # Later updates of a batch are no longer the policy that the sampler was a copy of.
        if sampled is not None and self.state.global_step % self.config.steps_per_rollout == 0:
            gap = (self._scores.logprobs - sampled).abs()
            self.means.add("rollout/logprob_gap", gap, mask & ~torch.isnan(sampled), largest=True)
        return loss * self._token_share(inputs) / self.ctx.world_size

    def _token_share(self, inputs: dict[str, Any]) -> Tensor | float:
        """For a loss that is a mean over a micro-batch's tokens: what makes it the mean over those of the step, however
        they are shared among micro-batches and ranks."""
        if self.loss_type != "bnpo":
            return 1.0
        accumulation, ranks = self.args.gradient_accumulation_steps, self.ctx.world_size
        place = self._step % self.args.steps_per_generation // accumulation * accumulation
        step = self._buffered_inputs[place : place + accumulation]
        tokens = torch.stack([part["completion_mask"].sum() for part in step]).sum()
        tokens = self.accelerator.reduce(tokens) if ranks > 1 else tokens
        return inputs["completion_mask"].sum() * accumulation * ranks / tokens.clamp(min=1)

    def fit(self) -> list[dict[str, float]]:
        newest = self._newest_checkpoint()
        self.completion_log.start(checkpoints.step_of(newest) if newest else 0)
        return super().fit()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name, value in self.means.take(self.accelerator if self.ctx.world_size > 1 else None).items():
            self._metrics["train"][name] = [value]
        super().log(logs, start_time)
        self.rails.look(self.state.global_step, logs)


class Clock:
    """Seconds by part of the work, of this attempt; a part may lie inside another."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - began


def _joined(parts: list[Tensor]) -> Tensor:
    """Rows of all parts; a number that is the same for all stays one."""
    return torch.cat(parts) if parts[0].dim() else parts[0]
