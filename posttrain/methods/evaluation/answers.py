"""Answers of a model to problems: sampled batch by batch, scored, and kept so that a stopped evaluation goes on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from posttrain.data.builders.batches import batch_seed, cut, in_batches
from posttrain.generation import DecodeEngine, Sampling, unsupported
from posttrain.generation.fallback import generate_by_transformers
from posttrain.generation.tokens import stop_tokens
from posttrain.methods.evaluation.config import ProblemSettings
from posttrain.pipeline.context import StageContext
from posttrain.rewards.score import RewardSet

log = logging.getLogger(__name__)

REWARD = "correct"
SHOWN_PROBLEMS, SHOWN_SAMPLES = 4, 2
"""Answers that are kept as text: the first samples of the first problems."""


@dataclass(frozen=True)
class Problem:
    """A problem as a model meets it; `place` is its number among those that are answered."""

    place: int
    id: str
    task: str | None
    difficulty: int | None
    text: str
    prompt: list[int]
    row: dict[str, Any]


@dataclass(frozen=True)
class Answers:
    """What one model answered.

    Attributes:
        scores: a list per problem, a score per sample; None: it cannot be scored.
        figures: entropy per token, mean length, shares cut off and without an answer, counts of failures.
        texts: of the shown problems, per problem the shown samples.
    """

    scores: list[list[float | None]]
    figures: dict[str, Any]
    texts: list[list[str]]


Written = tuple[list[list[int]], list[float], list[bool]]
"""Tokens, negative log-probability (nats, of all tokens together) and whether it ended by itself, a row each."""


def answer_problems(
    name: str, model: Any, tokenizer: Any, problems: Sequence[Problem], cfg: ProblemSettings, ctx: StageContext
) -> Answers:
    """`cfg.samples` scored answers of the model `name` to every problem.

    Finished batches are in `problems_NAME.jsonl` of the work folder. Raises StageError as the rewards do, and
    StopRequested between two batches.
    """
    rows = [(problem, sample) for problem in problems for sample in range(cfg.samples)]
    batches = cut(rows, cfg.batch_rows)
    where = f"stages.{ctx.name}.problems.reward"
    with RewardSet(
        {REWARD: cfg.reward}, cfg.answer, workers=cfg.pool.workers, memory_mb=cfg.pool.memory_mb, where=where
    ) as rewards:

        def prepare() -> Callable[[int], list[dict[str, Any]]]:
            write = _writer(model, tokenizer, problems, cfg, ctx.seed)
            return lambda number: _answered(batches[number], write(number, batches[number]), tokenizer, rewards)

        found = in_batches(ctx, batches, prepare, f"problems_{name}.jsonl")
    return _collected(found, len(problems), cfg)


def _answered(
    batch: Sequence[tuple[Problem, int]], written: Written, tokenizer: Any, rewards: RewardSet
) -> list[dict[str, Any]]:
    """A record for each answer; the counts of the batch stand in its first."""
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written[0]]
    lengths = [len(tokens) for tokens in written[0]]
    scores = rewards.score(
        [problem.text for problem, _ in batch], texts, [problem.row for problem, _ in batch], lengths
    )
    records = []
    for index, (problem, sample) in enumerate(batch):
        record: dict[str, Any] = {"score": scores.by_reward[REWARD][index], "tokens": lengths[index]}
        record |= {"nll": written[1][index], "ended": written[2][index]}
        if problem.place < SHOWN_PROBLEMS and sample < SHOWN_SAMPLES:
            record["text"] = texts[index].strip()
        records.append(record)
    records[0]["counts"] = scores.counts
    return records


def _collected(records: list[dict[str, Any]], count: int, cfg: ProblemSettings) -> Answers:
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(record.get("counts", {}))
    tokens, answers = sum(record["tokens"] for record in records), len(records)
    figures = {
        "answers": answers,
        "tokens": tokens,
        "entropy": sum(record["nll"] for record in records) / tokens,
        "mean_tokens": tokens / answers,
        "cut_off": sum(not record["ended"] for record in records) / answers,
        "parse_failures": counts.pop("parse_failures", 0) / answers,
        **dict(sorted(counts.items())),
    }
    by_problem = cut(records, cfg.samples)
    scores = [[record["score"] for record in own] for own in by_problem]
    texts = [[record["text"] for record in own if "text" in record] for own in by_problem[:SHOWN_PROBLEMS]]
    assert len(scores) == count
    return Answers(scores, figures, texts)


def _writer(
    model: Any, tokenizer: Any, problems: Sequence[Problem], cfg: ProblemSettings, seed: int
) -> Callable[[int, Sequence[tuple[Problem, int]]], Written]:
    stop = stop_tokens(model, tokenizer)
    if reason := unsupported(model):
        log.warning("answers are written by transformers' generate: the fast decoder does not support %s", reason)
        pad = tokenizer.pad_token_id
        return lambda number, batch: _by_transformers(
            model, [problem.prompt for problem, _ in batch], cfg.sampling(_batch_seed(seed, number), stop), pad
        )
    longest = max(len(problem.prompt) for problem in problems) + cfg.max_new_tokens
    most = min(cfg.batch_rows, len(problems) * cfg.samples)
    engine = DecodeEngine(model, most, longest, dtype=model.dtype, share=True)
    sampling = cfg.sampling(seed, stop)

    def write(number: int, batch: Sequence[tuple[Problem, int]]) -> Written:
        row_ids = [problem.place * cfg.samples + sample for problem, sample in batch]
        found = engine.generate([problem.prompt for problem, _ in batch], sampling, row_ids)
        return found.tokens, [-sum(logprobs) for logprobs in found.logprobs], found.finished

    return write


def _batch_seed(seed: int, number: int) -> int:
    return batch_seed("evaluate.problems", seed, number)


def _by_transformers(model: Any, prompts: list[list[int]], sampling: Sampling, pad: int | None) -> Written:
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        written = generate_by_transformers(model, prompts, sampling, pad)
    tokens, ended = [], []
    for row in written:
        end = next((place for place, token in enumerate(row) if token in sampling.stop), None)
        tokens.append(row if end is None else row[: end + 1])
        ended.append(end is not None)
    pairs = zip(prompts, tokens, strict=True)
    return tokens, [negative_logprob(model, prompt, own, sampling.temperature) for prompt, own in pairs], ended


@torch.inference_mode()
def negative_logprob(model: Any, prompt: list[int], answer: list[int], temperature: float) -> float:
    """-log probability of an answer in nats, under softmax(logits / T), T = 1 where greedy; one forward pass."""
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([[*prompt, *answer[:-1]]], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float()
    log_p = torch.log_softmax(logits / (temperature or 1.0), -1)
    return -log_p.gather(-1, torch.tensor(answer, device=device)[:, None]).double().sum().item()
