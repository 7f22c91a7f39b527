"""How often the answers to an evaluation's problems were right: pass@k of the model against its baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.pipeline.files import read_json
from posttrain.report import facts, plots
from posttrain.report.blocks import Block, Bullets, Figure, Heading, Sample, Table, Text
from posttrain.report.numbers import percent, significant, whole
from posttrain.report.palette import COLOURS, GREY
from posttrain.report.read import Json, RunRecord, StageRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Answered:
    """A finished evaluation with problems; `labels` name its models as the other tables do."""

    stage: StageRecord
    labels: dict[str, str]

    @property
    def detail(self) -> Json:
        return self.stage.result["problems"]

    @property
    def ks(self) -> list[int]:
        return self.detail["settings"]["k"]

    def figures(self, name: str) -> Json:
        """pass@k over all problems of `model`, `baseline` or their `difference`."""
        prefix = "" if name == "model" else f"{name}_"
        result = self.stage.result
        found = {key.removeprefix(prefix): value for key, value in result.items() if key.startswith(f"{prefix}pass@")}
        return found


def answered(run: RunRecord) -> list[Answered]:
    """Every finished evaluation that had problems answered, in execution order."""
    found = []
    for evaluation in facts.evaluations(run):
        stage = evaluation.stage
        if isinstance(stage.result.get("problems"), dict):
            names = [name for name in ("baseline", "model") if name in stage.result["problems"]["answers"]]
            labels = {
                name: facts.model_label(run, (stage.inputs.get(name) or {"stage": stage.name})["stage"])
                for name in names
            }
            found.append(Answered(stage, labels))
    return found


def problems(run: RunRecord) -> Iterator[Block]:
    """Tables over all problems, by task and by difficulty, and a plot, for every evaluation that has them."""
    found = answered(run)
    if not found:
        return
    yield Heading("Problems")
    for one in found:
        yield from _of_one(one)


def _of_one(one: Answered) -> Iterator[Block]:
    yield Table(
        [one.stage.name, "problems", *(f"pass@{k} (95 % interval)" for k in one.ks)],
        [[one.labels[name], whole(one.detail["problems"]), *_cells(one.figures(name), one.ks)] for name in one.labels]
        + _difference_row(one.figures("difference"), one),
    )
    yield Figure(plots._draw(list(_panels(one))), _caption(one))
    for field, title in (("by_task", "task"), ("by_difficulty", "difficulty")):
        if groups := one.detail[field]:
            yield _groups_table(one, title, groups)
    yield _answers_table(one)
    yield Bullets(list(_conditions(one)))
    yield from _shown(one)


def _difference_row(difference: Json, one: Answered) -> list[list[str]]:
    if not difference:
        return []
    cells = [f"{cell}: {difference[f'pass@{k}_verdict']}" for cell, k in _signed(difference, one.ks)]
    return [["difference, paired by problem", whole(one.detail["problems"]), *cells]]


def _groups_table(one: Answered, title: str, groups: Json) -> Table:
    """A row a group: pass@1 and pass@k of the largest k of each model, and what is known of their difference."""
    ks = list(dict.fromkeys((one.ks[0], one.ks[-1])))
    header = [title, "problems", *(f"{label}: pass@{k}" for k in ks for label in one.labels.values())]
    rows = []
    for group, figures in groups.items():
        cells = [_cell(figures[name], k) for k in ks for name in one.labels]
        rows.append([group, whole(figures["problems"]), *cells, *_verdicts(figures.get("difference"))])
    return Table(header + (["difference of pass@1"] if len(one.labels) > 1 else []), rows)


def _verdicts(difference: Json | None) -> list[str]:
    """The cell of a group's difference; none without a baseline."""
    return [] if difference is None else [f"{_signed(difference, [1])[0][0]}: {difference['pass@1_verdict']}"]


def _cells(figures: Json, ks: Sequence[int]) -> list[str]:
    return [_cell(figures, k) for k in ks]


def _cell(figures: Json, k: int) -> str:
    value, low, high = (figures.get(f"pass@{k}{end}") for end in ("", "_low", "_high"))
    return percent(value) if low is None else f"{percent(value)} ({100 * low:.1f} to {100 * high:.1f})"


def _signed(difference: Json, ks: Sequence[int]) -> list[tuple[str, int]]:
    """The difference in percentage points with its interval, for each k."""
    found = []
    for k in ks:
        value, low, high = (difference.get(f"pass@{k}{end}") for end in ("", "_low", "_high"))
        bounds = "" if low is None else f" ({100 * low:+.1f} to {100 * high:+.1f})"
        found.append((f"{100 * value:+.1f} points{bounds}", k))
    return found


def _answers_table(one: Answered) -> Table:
    answers = one.detail["answers"]
    columns: list[tuple[str, Callable[[Json], str]]] = [
        ("entropy, nats/token", lambda figures: significant(figures["entropy"])),
        ("mean tokens", lambda figures: significant(figures["mean_tokens"])),
        ("cut off", lambda figures: percent(figures["cut_off"])),
        ("no answer found", lambda figures: percent(figures["parse_failures"])),
        ("too slow, crashed or failed to score", lambda figures: whole(_failed(figures))),
    ]
    return Table(
        ["sampled answers", *(name for name, _ in columns)],
        [[one.labels[name], *(cell(answers[name]) for _, cell in columns)] for name in one.labels],
    )


def _failed(figures: Json) -> int:
    return sum(figures.get(name, 0) for name in ("timeouts", "crashes", "errors"))


def _conditions(one: Answered) -> Iterator[str]:
    settings, left_out = one.detail["settings"], one.detail["left_out"]
    filters = "".join(
        f", {name} {settings[name]}" for name, off in (("top_p", 1.0), ("top_k", 0)) if settings[name] != off
    )
    yield (
        f"{settings['samples']} answers to each problem at temperature {settings['temperature']}{filters}, at most "
        f"{settings['max_new_tokens']} tokens; right by reward {settings['reward']['type']}."
    )
    yield (
        "pass@k: unbiased chance that at least one of k sampled answers is right. Intervals: 95 %, problems drawn with "
        "replacement (seeded bootstrap); the difference is paired by problem. Not detected is not absent: more "
        "problems may show it, and an interval of no width says only that these came out alike."
    )
    yield "Entropy: mean of -log p of the sampled tokens, without top-k and top-p, at that temperature."
    reasons = {"without": "nothing to score", "too_long": "too long", "unscorable": "could not be scored"}
    if said := [f"{count} {reasons.get(name, name)}" for name, count in left_out.items() if count]:
        yield f"Left out: {', '.join(said)}."


def _shown(one: Answered) -> Iterator[Block]:
    for folder, _ in one.stage.outputs("evaluation"):
        if not (folder / "answers.json").is_file():
            continue
        yield Text("The first sampled answers to the first problems; nothing is selected.")
        for shown in read_json(folder / "answers.json"):
            right = [] if shown.get("answer") is None else [("right answer", shown["answer"])]
            texts = [(one.labels[name], text or "(nothing)") for name in one.labels for text in shown.get(name, [])]
            yield Sample(shown["prompt"], [*right, *texts])


def _caption(one: Answered) -> str:
    return f"{one.stage.name}: share of {one.detail['problems']} problems solved within k tries, with 95 % intervals."


def _panels(one: Answered) -> Iterator[tuple[str, Callable[[Axes], None]]]:
    yield f"pass_at_k_{one.stage.name}", _curves(one)
    for field, title in (("by_task", "task"), ("by_difficulty", "difficulty")):
        if len(one.detail[field]) > 1:
            yield f"pass_at_1_{field}_{one.stage.name}", _bars(one, title, one.detail[field])


def _colour(name: str) -> str:
    return GREY if name == "baseline" else COLOURS[0]


def _curves(one: Answered) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        for index, (name, label) in enumerate(one.labels.items()):
            figures = one.figures(name)
            values = [figures[f"pass@{k}"] for k in one.ks]
            # Apart by two hundredths, or one model's interval hides the other's.
            places = [k * 1.02**index for k in one.ks]
            errors = _errors([figures] * len(one.ks), one.ks, values)
            axis.errorbar(places, values, errors, color=_colour(name), marker="o", markersize=4, capsize=3, label=label)
        axis.set(xlabel="k", ylabel="pass@k")
        if one.ks[-1] > 1:
            axis.set_xscale("log", base=2)
        axis.set_xticks(one.ks, [str(k) for k in one.ks])
        axis.set_title("Problems solved within k tries")
        _share_axis(axis)

    return draw


def _bars(one: Answered, title: str, groups: Json) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        width = 0.8 / len(one.labels)
        for index, (name, label) in enumerate(one.labels.items()):
            figures = [group[name] for group in groups.values()]
            values = [each["pass@1"] for each in figures]
            places = [place + (index - (len(one.labels) - 1) / 2) * width for place in range(len(groups))]
            axis.bar(places, values, width, color=_colour(name), label=label,
                     yerr=_errors(figures, [1] * len(figures), values), capsize=2)  # fmt: skip
        axis.set_xticks(range(len(groups)), [plots.short_label(group) for group in groups])
        axis.set(ylabel="pass@1")
        axis.set_title(f"pass@1 by {title}")
        _share_axis(axis)

    return draw


def _share_axis(axis: Axes) -> None:
    """0 to 1, with room for the legend above."""
    axis.set_ylim(0, 1.35)
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axis.legend(loc="upper left", fontsize=9.5)


def _errors(figures: Sequence[Json], ks: Sequence[int], values: Sequence[float]) -> Any:
    """Distances to the bounds for matplotlib, 0 where there is no interval."""
    ends = [
        (each.get(f"pass@{k}_low", value), each.get(f"pass@{k}_high", value))
        for each, k, value in zip(figures, ks, values, strict=True)
    ]
    # Rounding may put a bound on the wrong side of its value, which matplotlib refuses.
    below = [max(0.0, value - low) for (low, _), value in zip(ends, values, strict=True)]
    return [below, [max(0.0, high - value) for (_, high), value in zip(ends, values, strict=True)]]
