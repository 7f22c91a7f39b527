"""The part of an evaluation with a needle: how surely each model finds a key that long text hides, and the figures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.data.builders.batches import cut, in_batches
from posttrain.errors import fail
from posttrain.generation.tokens import stop_tokens
from posttrain.methods.evaluation.config import NeedleSettings
from posttrain.methods.evaluation.haystack import Prompt, contains_key, make_prompts
from posttrain.methods.evaluation.intervals import Json, mean_intervals, share_interval, verdict
from posttrain.methods.evaluation.prefix import Prefix, greedy, logprobs, prefix_class
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.files import write_text

FIGURES = ("accuracy", "choice", "logprob")
"""Share of greedy answers with the key; share of prompts whose key is the most likely candidate; mean log p(key)."""

Found = dict[str, Any]
"""Of one prompt and model: `accuracy` and `choice` as true or false, `logprob` in nats, `text` of the answer."""


def measure_needle(
    models: Mapping[str, Any], tokenizer: Any, rows: Sequence[Mapping[str, Any]], limit: float, ctx: StageContext
) -> Measured:
    """Have every model read every prompt, answer it and score its candidates.

    Finished prompts are in `needle_NAME.jsonl` of the work folder.

    Args:
        limit: most positions of the models.

    Raises:
        StageError: a length exceeds the models' positions, there is too little text, an output is not a number.
        StopRequested: a stop was asked for; finished prompts are kept.
    """
    cfg: NeedleSettings = ctx.config.needle
    if cfg.lengths[-1] > limit:
        fail(
            f"a prompt of {cfg.lengths[-1]} tokens exceeds the {limit:.0f} positions of the models",
            where=f"stages.{ctx.name}.needle.lengths",
            fix="shorter lengths, or a model whose max_position_embeddings is larger",
        )
    prompts = make_prompts(rows, tokenizer, cfg)
    return Measured(
        prompts, {name: _answers(name, model, tokenizer, prompts, cfg, ctx) for name, model in models.items()}, ctx
    )


def _answers(
    name: str, model: Any, tokenizer: Any, prompts: Sequence[Prompt], cfg: NeedleSettings, ctx: StageContext
) -> list[Found]:
    """One prompt after the other: the results then depend on no batch size, and one cache is held."""
    batches = cut(prompts, 1)

    def prepare() -> Callable[[int], list[Found]]:
        reader, stop = prefix_class(name, model), stop_tokens(model, tokenizer)
        return lambda number: [answer(reader, model, tokenizer, batches[number][0], cfg.max_new_tokens, stop)]

    return in_batches(ctx, batches, prepare, f"needle_{name}.jsonl")


def answer(reader: type[Prefix], model: Any, tokenizer: Any, prompt: Prompt, most: int, stop: Sequence[int]) -> Found:
    """Read the prompt once, score its candidates, answer it greedily."""
    prefix, needle = reader(model, prompt.ids), prompt.needle
    scores = logprobs(prefix, prompt.keys)
    if not all(map(math.isfinite, scores)):
        fail(
            f"needle: the model's output behind {len(prompt.ids)} tokens is not a finite number",
            where="evaluate",
            fix="look at the stage that made the model (its loss curve); on bf16 try precision=fp32",
        )
    own = needle.candidates.index(needle.key)
    text = tokenizer.decode(greedy(prefix, most, stop), skip_special_tokens=True)
    others = [score for place, score in enumerate(scores) if place != own]
    return {
        "accuracy": contains_key(text, needle.key),
        # A tie is not found: a model that gives all keys the same has chosen none.
        "choice": scores[own] > max(others),
        "logprob": scores[own],
        "text": text.strip(),
    }


class Measured:
    """Prompts with what every model found, as figures and as a file."""

    def __init__(self, prompts: list[Prompt], found: dict[str, list[Found]], ctx: StageContext) -> None:
        self.cfg: NeedleSettings = ctx.config.needle
        self.interval = mean_intervals(ctx.config.bootstrap_samples, ctx.seed)
        self.prompts, self.found = prompts, found

    def figures(self) -> Json:
        """The result metrics: `needle_FIGURE@LENGTH` flat, also of the baseline and of the difference, and `needle`
        with the settings and the figures by depth."""
        flat: Json = {}
        by_depth: Json = {}
        for length in self.cfg.lengths:
            own = [place for place, prompt in enumerate(self.prompts) if prompt.length == length]
            for name, figures in self._of(own).items():
                prefix = "needle_" if name == "model" else f"{name}_needle_"
                flat |= {prefix + _at(length, key): value for key, value in figures.items()}
            by_depth[str(length)] = {
                f"{depth:.2f}": self._of([place for place in own if self.prompts[place].depth == depth])
                for depth in self.cfg.places()
            }
        detail = {
            "settings": self.cfg.model_dump(mode="json"),
            "chance": 1 / self.cfg.candidates,
            "prompts": self.cfg.prompts,
            "tokens": sum(len(prompt.ids) for prompt in self.prompts) * len(self.found),
            "models": list(self.found),
            "by_depth": by_depth,
        }
        return {**flat, "needle": detail}

    def write(self, folder: Path) -> None:
        """`needle.jsonl`: every prompt with its key, place and what each model found."""
        rows = []
        for place, prompt in enumerate(self.prompts):
            row = {"length": prompt.length, "depth": prompt.depth, "at": prompt.at, "sample": prompt.sample}
            row |= {"city": prompt.needle.city, "key": prompt.needle.key, "key_tokens": len(prompt.keys[0])}
            rows.append({**row, **{name: found[place] for name, found in self.found.items()}})
        write_text(folder / "needle.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def _of(self, places: Sequence[int]) -> dict[str, Json]:
        """Figures of each model over these prompts, and of the difference, paired by prompt."""
        values = {name: {key: [found[place][key] for place in places] for key in FIGURES} for name, found in
                  self.found.items()}  # fmt: skip
        figures = {
            name: {
                **share_interval("accuracy", own["accuracy"]),
                **share_interval("choice", own["choice"]),
                **self.interval("logprob", own["logprob"]),
            }
            for name, own in values.items()
        }
        if len(values) < 2:
            return figures
        difference: Json = {}
        for key in FIGURES:
            pairs = zip(values["model"][key], values["baseline"][key], strict=True)
            bounded = self.interval(key, [float(one) - float(other) for one, other in pairs])
            difference |= {**bounded, f"{key}_verdict": verdict(bounded, key)}
        return {**figures, "difference": difference}


def _at(length: int, key: str) -> str:
    """`accuracy_low` of 2048 tokens is `accuracy@2048_low`."""
    name, _, end = key.partition("_")
    return f"{name}@{length}" + (f"_{end}" if end else "")
