"""What stages measured layer by layer: losses of an alignment, scores of a choice of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING

from posttrain.report import plots
from posttrain.report.blocks import Block, Figure, Heading, Table, Text
from posttrain.report.numbers import percent, significant
from posttrain.report.palette import COLOURS, GREY
from posttrain.report.read import RunRecord, StageRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIRST, LAST, SCORES = "first_layer_losses", "last_tenth_layer_losses", "scores"


def by_layer(run: RunRecord) -> Iterator[Block]:
    """Tables and plots of every stage whose result has losses or scores by layer."""
    aligned = [stage for stage in run.stages if stage.result.get(FIRST) and stage.result.get(LAST)]
    choices = [stage for stage in run.stages if stage.result.get("kept") and "kl_kept" in stage.result]
    if aligned or choices:
        yield Heading("Layer by layer")
    if aligned:
        yield Table(
            ["stage", "loss before, all layers", "after", "least fall of a layer", "median fall"],
            [_fall(stage) for stage in aligned],
        )
        yield Figure(
            plots._draw([(f"layers_{stage.name}", _losses(stage)) for stage in aligned]),
            "Loss of every layer against the source's, at the first step and over the last tenth of the steps.",
        )
    for stage in choices:
        yield Text(_choice(stage))
    if scored := [stage for stage in choices if stage.result.get(SCORES)]:
        yield Figure(
            plots._draw([(f"scores_{stage.name}", _scores(stage)) for stage in scored]),
            "By how much each layer as attention lowers the divergence of a hybrid without any; in colour the chosen.",
        )


def falls(stage: StageRecord) -> list[float]:
    """Share by which the loss of every layer fell."""
    pairs = zip(stage.result[FIRST], stage.result[LAST], strict=True)
    return [1 - after / before if before else 0.0 for before, after in pairs]


def _fall(stage: StageRecord) -> list[str]:
    found = falls(stage)
    before, after = (sum(stage.result[name]) for name in (FIRST, LAST))
    least = min(range(len(found)), key=found.__getitem__)
    numbers = [significant(before), significant(after), f"{percent(found[least])} (layer {least})"]
    return [stage.name, *numbers, percent(median(found))]


def _choice(stage: StageRecord) -> str:
    result = stage.result
    kept = ", ".join(map(str, result["kept"]))
    said = f"{stage.name} keeps {len(result['kept'])} of {result.get('layers')} layers as attention "
    said += f"({result.get('method')}): {kept}."
    if "kl_none_kept" in result:
        said += f" KL to the teacher without any: {significant(result['kl_none_kept'])} nats per token,"
        said += f" with these: {significant(result['kl_kept'])}."
    else:
        said += f" KL to the teacher with these: {significant(result['kl_kept'])} nats per token."
    if "feasible" in result:
        said += f" Sets between the same ends that the method could have chosen: {result['feasible']}."
    return said


def _losses(stage: StageRecord) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        for name, label, colour in ((FIRST, "first step", GREY), (LAST, "last tenth", COLOURS[0])):
            axis.plot(range(len(stage.result[name])), stage.result[name], color=colour, label=label, marker="o", ms=4)
        if all(value > 0 for name in (FIRST, LAST) for value in stage.result[name]):
            axis.set_yscale("log")
        axis.set(xlabel=f"layer ({stage.name})", ylabel="loss per token")
        axis.set_title("Loss of each layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()

    return draw


def _scores(stage: StageRecord) -> Callable[[Axes], None]:
    scores: Sequence[float] = stage.result[SCORES]
    kept = set(stage.result["kept"])

    def draw(axis: Axes) -> None:
        axis.bar(
            range(len(scores)), scores, color=[COLOURS[0] if layer in kept else GREY for layer in range(len(scores))]
        )
        axis.set(xlabel=f"layer ({stage.name})", ylabel="fall of KL, nats per token")
        axis.set_title("Gain of each layer as attention")
        axis.xaxis.get_major_locator().set_params(integer=True)

    return draw
