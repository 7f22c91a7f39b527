"""The closing paragraph: what the figures of this run cannot tell, from the facts of the run."""

from __future__ import annotations

from collections.abc import Iterator

from posttrain.report import facts
from posttrain.report.blocks import Block, Bullets, Heading
from posttrain.report.numbers import whole
from posttrain.report.read import RunRecord

FEW_TOKENS = 1_000_000


def limits(run: RunRecord) -> Iterator[Block]:
    """A heading and one line for each limit that holds."""
    lines = [*_of_the_text(run), *_of_the_training(run), *_of_the_machine(run)]
    if run.status != "done":
        lines.insert(
            0, f"The run is not complete (status: {run.status}); the figures above are those of its finished stages."
        )
    lines.append(f"One seed ({run.seed}): how much the figures vary from seed to seed was not measured.")
    yield Heading("What this does not show")
    yield Bullets(lines)


def _of_the_text(run: RunRecord) -> Iterator[str]:
    rows = facts.rows(run)
    if not rows:
        yield "No model was evaluated: the run says nothing about quality."
        return
    values = rows[-1].values
    tokens, documents = values.get("tokens", 0), values.get("documents", 0)
    size = "a small" if tokens < FEW_TOKENS else "a"
    yield (
        f"Quality was measured on {size} held-out text of one kind: {whole(tokens)} tokens of {documents} documents. "
        "Intervals cover the choice of documents within that text, not other kinds of text."
    )
    window, hidden = values.get("window_tokens"), values.get("needle")
    if isinstance(hidden, dict):
        yield (
            f"Perplexity was measured on contexts of at most {window} tokens. Longer ones were tried by one hidden "
            f"sentence alone, up to {hidden['settings']['lengths'][-1]} tokens: the easiest retrieval there is."
        )
    else:
        yield f"Contexts were at most {window} tokens long; longer contexts were not tried."
    skill = "Skill at other tasks than the problems above" if _answered(run) else "Skill at tasks"
    yield (
        f"Perplexity, KL and top-1 agreement compare next-token predictions. {skill}, the following of "
        "instructions and safety were not measured; the sample answers are illustrations."
    )
    if _answered(run):
        yield (
            "Intervals of pass@k cover the choice of problems of this kind and of the samples, not that of the "
            "instruction, the answer's form or the sampling settings."
        )
    if len({row.values.get("data_sha256") for row in rows}) > 1:
        yield "Not all rows of the table were measured on the same text: compare only those with the same SHA-256."


def _answered(run: RunRecord) -> bool:
    return any(isinstance(stage.result.get("problems"), dict) for stage in run.stages)


def _of_the_training(run: RunRecord) -> Iterator[str]:
    for stage in run.stages:
        estimate = (stage.manifest or {}).get("estimate") or {}
        if stage.history and estimate.get("tokens"):
            steps = stage.history[-1].get("step")
            yield (
                f"{stage.name} trained for {steps} steps on {whole(estimate['tokens'])} tokens; what more training "
                "would bring is not known from this run."
            )


def _of_the_machine(run: RunRecord) -> Iterator[str]:
    timing = [row.timing for row in facts.rows(run) if "prefill_tokens_per_second" in row.timing]
    if timing:
        machine = timing[-1].get("device_name") or timing[-1].get("device", "cpu")
        yield (
            f"Speeds are of one machine ({machine}), one batch size and one short prompt; they include the overhead "
            "of Python and are not those of a serving engine."
        )
