"""How surely a key hidden in long text was found: tables by length, plots by depth, and lines for the card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.report import facts, plots
from posttrain.report.blocks import Block, Bullets, Figure, Heading, Table
from posttrain.report.numbers import percent, whole, with_interval
from posttrain.report.palette import COLOURS, GREY
from posttrain.report.read import Json, RunRecord, StageRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = ("-", "--", ":", "-.")
"""Of lengths, in ascending order; colours are of models."""
SHARES, ENDS = ("choice", "accuracy"), ("", "_low", "_high", "_verdict")


@dataclass(frozen=True)
class Hidden:
    """A finished evaluation with a needle; `labels` name its models as the other tables do."""

    stage: StageRecord
    labels: dict[str, str]

    @property
    def detail(self) -> Json:
        return self.stage.result["needle"]


def hidden(run: RunRecord) -> list[Hidden]:
    """Every finished evaluation that had a needle, in execution order."""
    found = []
    for evaluation in facts.evaluations(run):
        stage = evaluation.stage
        if isinstance(stage.result.get("needle"), dict):
            names = [name for name in ("baseline", "model") if name in stage.result["needle"]["models"]]
            labels = {
                name: facts.model_label(run, (stage.inputs.get(name) or {"stage": stage.name})["stage"])
                for name in names
            }
            found.append(Hidden(stage, labels))
    return found


def summary(result: Json) -> Json:
    """The figures by length of `baseline`, `model` and their `difference`, from the flat ones of an evaluation."""
    detail = result["needle"]
    return {
        "candidates": detail["settings"]["candidates"],
        "chance": detail["chance"],
        "prompts": detail["prompts"],
        "lengths": {str(length): _at(result, length) for length in detail["settings"]["lengths"]},
    }


def _at(result: Json, length: int) -> Json:
    found = {}
    for name, prefix in (("baseline", "baseline_"), ("model", ""), ("difference", "difference_")):
        keys = {
            f"{figure}{end}": f"{prefix}needle_{figure}@{length}{end}"
            for figure in (*SHARES, "logprob")
            for end in ENDS
        }
        if own := {short: result[key] for short, key in keys.items() if key in result}:
            found[name] = own
    return found


def sentences(found: Json, baseline: str | None) -> Iterator[str]:
    """A line for each length of a `summary`, for cards."""
    for length, figures in found["lengths"].items():
        names = {"model": "this model", "baseline": baseline or "the baseline"}
        told = [f"{names[name]} {_share(figures[name], 'choice')}" for name in names if name in figures]
        written = [percent(figures[name]["accuracy"]) for name in names if name in figures]
        yield (
            f"a key hidden in {whole(int(length))} tokens is the most likely of {found['candidates']} (chance "
            f"{percent(found['chance'])}) in {' against '.join(told)} of {found['prompts']} prompts, and in the greedy "
            f"answer in {' against '.join(written)}"
        )


def needles(run: RunRecord) -> Iterator[Block]:
    """A table by length and a plot by depth for every evaluation that hid a needle."""
    found = hidden(run)
    if not found:
        return
    yield Heading("Needle in a haystack")
    for one in found:
        yield _table(one)
        yield Figure(plots._draw(list(_panels(one))), _caption(one))
        yield Bullets(list(_conditions(one)))


def _table(one: Hidden) -> Table:
    found, rows = summary(one.stage.result), []
    labels = {**one.labels, "difference": "difference, paired by prompt"}
    for length, figures in found["lengths"].items():
        for name in (name for name in labels if name in figures):
            cells = _differences(figures[name]) if name == "difference" else _figures(figures[name])
            rows.append([labels[name], whole(int(length)), whole(found["prompts"]), *cells])
    return Table(
        [
            one.stage.name,
            "tokens",
            "prompts",
            f"most likely of {found['candidates']} (chance {percent(found['chance'])})",
            "in the greedy answer",
            "log p(key), nats",
        ],
        rows,
    )


def _figures(figures: Json) -> list[str]:
    return [*(_share(figures, name) for name in SHARES), with_interval(figures, "logprob")]


def _share(figures: Json, name: str) -> str:
    low, high = (100 * figures[f"{name}{end}"] for end in ("_low", "_high"))
    return f"{percent(figures[name])} ({low:.1f} to {high:.1f})"


def _differences(figures: Json) -> list[str]:
    """Shares in percentage points, log-probabilities in nats, each with what is known of its sign."""
    cells = []
    for name, scale, digits, unit in (*((name, 100, 1, " points") for name in SHARES), ("logprob", 1, 3, "")):
        value, low, high = (figures.get(f"{name}{end}") for end in ("", "_low", "_high"))
        bounds = "" if low is None else f" ({scale * low:+.{digits}f} to {scale * high:+.{digits}f})"
        cells.append(f"{scale * value:+.{digits}f}{unit}{bounds}: {figures[f'{name}_verdict']}")
    return cells


def _caption(one: Hidden) -> str:
    lengths = " and ".join(whole(length) for length in one.detail["settings"]["lengths"])
    return (
        f"{one.stage.name}: by place of the hidden sentence in {lengths} tokens, from the beginning (0) to the end "
        f"(1); {one.detail['settings']['samples']} prompts a point."
    )


def _conditions(one: Hidden) -> Iterator[str]:
    settings = one.detail["settings"]
    yield (
        f"One sentence with a key ({settings['key']}) in held-out text, asked for at the end with the answer begun; "
        f"{settings['depths']} depths, {settings['samples']} prompts each, the same ones for all models. Lengths hold "
        f"the prompt and {settings['max_new_tokens']} tokens for the answer."
    )
    yield (
        "Intervals: 95 %, Wilson's for shares; bootstrap over prompts for log-probabilities and differences, which are "
        "paired by prompt. They do not cover other texts or wordings."
    )
    yield (
        "A single sentence unlike its surroundings, asked for in its own words, is the easiest retrieval: who fails "
        "here fails elsewhere, who passes may still fail with several keys, paraphrase or reasoning."
    )


def _panels(one: Hidden) -> Iterator[tuple[str, Callable[[Axes], None]]]:
    yield f"needle_choice_{one.stage.name}", _by_depth(one, "choice", "Key most likely, by depth")
    yield f"needle_logprob_{one.stage.name}", _by_depth(one, "logprob", "Log-probability of the key, by depth")


def _by_depth(one: Hidden, figure: str, title: str) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        for index, (length, depths) in enumerate(one.detail["by_depth"].items()):
            for name, label in one.labels.items():
                axis.plot(
                    [float(depth) for depth in depths],
                    [figures[name][figure] for figures in depths.values()],
                    LINES[index % len(LINES)],
                    color=GREY if name == "baseline" else COLOURS[0],
                    marker="o",
                    markersize=4,
                    label=f"{label}, {whole(int(length))}",
                )
        if figure == "choice":
            axis.axhline(one.detail["chance"], color="#333333", linewidth=0.8, linestyle=(0, (1, 3)), label="chance")
            axis.set_ylim(-0.05, 1.05)
        axis.set(xlabel="depth", ylabel="share of prompts" if figure == "choice" else "nats")
        axis.set_title(title)
        axis.legend(fontsize=8.5)

    return draw
