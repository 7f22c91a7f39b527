"""Random pipelines, legal ones and ones with a single fault: recipes as dicts, drawn by seed.

A pipeline turns a source into something (nothing, latent attention, a hybrid at once, a hybrid by measurement), with or
without alignment, and trains it by any methods in any order; sources may be fine-tuned first. What a stage makes of its
inputs is tracked by kind: `full`, `latent`, `state`, `hybrid`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Stage = dict[str, Any]
SMALL: dict[str, Stage] = {
    "mla_upcycle": {"kv_ratio": 0.5, "rank_multiple": 1, "calibration_tokens": 256, "calibration_sequence_length": 32},
    "ild": {"max_steps": 2, "tokens_per_step": 64, "sequence_length": 32},
    "hybrid_init": {"statistics_tokens": 64, "statistics_sequence_length": 32},
    "layer_select": {"tokens": 64, "sequence_length": 32, "n_keep": 1},
    "distill": {"max_steps": 2, "tokens_per_step": 64, "sequence_length": 32},
    "sft": {"max_steps": 2, "tokens_per_step": 512, "sequence_length": 256},
    "preference": {"max_steps": 2, "pairs_per_step": 2, "sequence_length": 256, "keep": "trained"},
    "rl": {
        "max_steps": 2,
        "num_generations": 4,
        "generation_batch_size": 20,
        "max_prompt_length": 200,
        "max_completion_length": 8,
    },
}
TRAINING = ("distill", "sft", "preference", "grpo", "riskpo", "ild")


class Pipeline:
    """Stages so far, the model they end with, and what kind of model every reference is."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.stages: dict[str, Stage] = {}
        self.model, self.teacher = "model", "model"
        self.kinds = {"model": "full"}
        self.stock = "native"
        """The stock layout that holds the line's model, if there is one."""

    def add(self, kind: str, inputs: dict[str, str], makes: str | None = None, **settings: Any) -> str:
        """A stage under a name of its own; the reference of what it makes."""
        name = f"{kind}_{len(self.stages)}"
        small = SMALL.get("rl" if kind in ("grpo", "riskpo") else kind, {})
        self.stages[name] = {"type": kind, "inputs": inputs, **small, **settings}
        reference = f"{name}.selection" if kind == "layer_select" else f"{name}.model"
        if makes is not None:
            self.kinds[reference] = makes
        return reference

    def recipe(self) -> dict[str, Any]:
        """As a recipe's YAML file would say it."""
        groups: list[Any] = [
            "base",
            {"model": "tiny"},
            {"data": "tiny"},
            {"data@datasets.pairs": "reasoning_gym_pairs"},
            {"data@datasets.problems": "reasoning_gym_rl"},
            *({f"stage@stages.{name}": stage["type"]} for name, stage in self.stages.items()),
            "_self_",
        ]
        bodies = {name: {k: v for k, v in stage.items() if k != "type"} for name, stage in self.stages.items()}
        datasets = {"pairs": {"inputs": {"model": self.pairs_of()}}}
        return {"defaults": groups, "description": "drawn", "datasets": datasets, "stages": bodies}

    def pairs_of(self) -> str:
        """The model whose mistakes the preference data hold: the first that learns from them, else the source."""
        users = [stage["inputs"]["model"] for stage in self.stages.values() if stage["type"] == "preference"]
        return users[0] if users else "model"


def legal(seed: int) -> Pipeline:
    """A pipeline that must pass `plan`."""
    draw = random.Random(seed)
    line = Pipeline(draw)
    if draw.random() < 0.3:
        line.model = line.teacher = line.add("sft", {"model": "model", "data": "datasets.problems.train"}, "full")
    draw.choice((keep_source, to_latent, to_hybrid_at_once, to_hybrid_by_measurement))(line)
    if draw.random() < 0.5:
        evaluated(line)
    for kind in draw.sample(TRAINING, draw.randint(1, 4)):
        if line.model != line.teacher or kind not in ("distill", "ild"):  # nothing is its own teacher
            train(line, kind)
    evaluated(line)
    if draw.random() < 0.5 or line.stock != "native":
        line.add("export", {"model": line.model}, to=line.stock)
    return line


def keep_source(line: Pipeline) -> None:
    """No change of architecture."""


def to_latent(line: Pipeline) -> None:
    line.model = _latent(line)


def _latent(line: Pipeline) -> str:
    given = {"calibration": "data.train"} if line.draw.random() < 0.5 else {}
    return line.add("mla_upcycle", {"model": line.teacher, **given}, "latent")


def to_hybrid_at_once(line: Pipeline) -> None:
    if line.draw.random() < 0.5:
        latent = {"latent": _latent(line)}
    else:
        latent = {}
    aligned = line.draw.random() < 0.5
    data = {"data": "data.train"} if aligned else {}
    start = {"init": "aligned"} if aligned else {}
    line.model = line.add("hybrid_init", {"model": line.teacher, **latent, **data}, "hybrid", keep=[1], **start)
    line.stock = "native" if latent or aligned else "falcon_h1"


def to_hybrid_by_measurement(line: Pipeline) -> None:
    attention = _latent(line) if line.draw.random() < 0.6 else line.teacher
    state = line.add("hybrid_init", {"model": line.teacher}, "state")
    if attention != line.teacher and line.draw.random() < 0.7:
        attention = _aligned(line, attention)
    if line.draw.random() < 0.8:
        state = _aligned(line, state)
    donors = {"state": state, "attention": attention}
    method = line.draw.choice(("smart", "uniform", "greedy_kl"))
    inputs = {**donors, "teacher": line.teacher, "data": "data.train"}
    selection = line.add("layer_select", inputs, method=method)
    line.model = line.add("assemble", {**donors, "selection": selection}, "hybrid")
    # Alignment of the donors keeps their form; attention that is not the teacher's is latent.
    line.stock = "falcon_h1" if line.kinds[attention] == "full" else "native"


def _aligned(line: Pipeline, model: str) -> str:
    inputs = {"student": model, "teacher": line.teacher, "data": "data.train"}
    return line.add("ild", inputs, line.kinds[model])


def train(line: Pipeline, kind: str) -> None:
    """One training stage on the line's model."""
    inputs = {
        "distill": {"student": line.model, "teacher": line.teacher, "data": "data.train"},
        "ild": {"student": line.model, "teacher": line.teacher, "data": "data.train"},
        "sft": {"model": line.model, "data": "datasets.problems.train"},
        "preference": {"model": line.model, "data": "datasets.pairs.train"},
        "grpo": {"model": line.model, "data": "datasets.problems.train"},
        "riskpo": {"model": line.model, "data": "datasets.problems.train"},
    }[kind]
    line.model = line.add(kind, inputs, line.kinds[line.model])


def evaluated(line: Pipeline) -> None:
    line.add("evaluate", {"model": line.model, "baseline": line.teacher, "data": "data.heldout"})


# ----- one fault each: what is done to a legal pipeline, and what the refusal must say


def convert_twice(line: Pipeline) -> str:
    """Latent attention made of what is no longer full attention."""
    to_latent(line)
    line.add("mla_upcycle", {"model": line.model})
    return "mla_upcycle|upcycled"


def states_of_latent(line: Pipeline) -> str:
    to_latent(line)
    line.add("hybrid_init", {"model": line.model})
    return "latent_attention: it cannot become mamba2"


def swapped_donors(line: Pipeline) -> str:
    state = line.add("hybrid_init", {"model": line.teacher}, "state")
    line.add("assemble", {"state": line.teacher, "attention": state}, keep=[0])
    return "must have state-space layers everywhere"


def select_among_states(line: Pipeline) -> str:
    state = line.add("hybrid_init", {"model": line.teacher}, "state")
    line.add("layer_select", {"state": state, "attention": state, "teacher": line.teacher, "data": "data.train"})
    return "must have attention everywhere"


def assemble_nothing(line: Pipeline) -> str:
    state = line.add("hybrid_init", {"model": line.teacher}, "state")
    line.add("assemble", {"state": state, "attention": line.teacher})
    return "neither is given"


def keep_what_is_not_there(line: Pipeline) -> str:
    line.add("hybrid_init", {"model": line.teacher}, keep=[7])
    return "layer 7 is kept"


def aligned_without_text(line: Pipeline) -> str:
    line.add("hybrid_init", {"model": line.teacher}, init="aligned")
    return "no text is given"


def a_history_for_a_model(line: Pipeline) -> str:
    train(line, "sft")
    name = line.model.partition(".")[0]
    line.add("sft", {"model": f"{name}.history", "data": "data.train"})
    return "history"


def a_selection_for_a_model(line: Pipeline) -> str:
    to_hybrid_by_measurement(line)
    selection = next(name for name in line.stages if name.startswith("layer_select"))
    line.add("evaluate", {"model": f"{selection}.selection", "data": "data.heldout"})
    return "selection"


def a_circle(line: Pipeline) -> str:
    train(line, "sft")
    first = line.model.partition(".")[0]
    train(line, "sft")
    line.stages[first]["inputs"]["model"] = line.model
    return "wait for each other"


def a_stage_that_is_not_there(line: Pipeline) -> str:
    line.add("evaluate", {"model": "distil_9.model", "data": "data.heldout"})
    return "distil_9"


def without_data(line: Pipeline) -> str:
    line.add("ild", {"student": line.model, "teacher": line.teacher})
    return "data"


def rewards_without_answers(line: Pipeline) -> str:
    line.add("riskpo", {"model": line.model, "data": "data.train"})
    return "answer|reward|problem"


def stock_export_of_states(line: Pipeline) -> str:
    state = line.add("hybrid_init", {"model": line.teacher}, "state")
    line.add("export", {"model": state}, to="deepseek_v3")
    return r"nothing else(.|\n)*to=falcon_h1"


def its_own_teacher(line: Pipeline) -> str:
    to_latent(line)
    kind = line.draw.choice(("distill", "ild"))
    line.add(kind, {"student": line.model, "teacher": line.model, "data": "data.train"})
    return "the teacher is the student itself"


FAULTS: tuple[Callable[[Pipeline], str], ...] = (
    convert_twice,
    its_own_teacher,
    states_of_latent,
    swapped_donors,
    select_among_states,
    assemble_nothing,
    keep_what_is_not_there,
    aligned_without_text,
    a_history_for_a_model,
    a_selection_for_a_model,
    a_circle,
    a_stage_that_is_not_there,
    without_data,
    rewards_without_answers,
    stock_export_of_states,
)


def illegal(seed: int) -> tuple[Pipeline, str, str]:
    """A pipeline with one fault, the fault's name, and what the refusal must say (a regular expression)."""
    draw = random.Random(seed)
    line = Pipeline(draw)
    if draw.random() < 0.5:
        line.model = line.teacher = line.add("sft", {"model": "model", "data": "datasets.problems.train"}, "full")
    fault = FAULTS[seed % len(FAULTS)]
    reason = fault(line)
    if draw.random() < 0.5:
        evaluated(line)
    return line, fault.__name__, reason
