"""The stage graph as inline SVG: a row a stage in execution order, a lane from each stage to those it feeds."""

from __future__ import annotations

from html import escape

from posttrain.report.blocks import Node
from posttrain.report.palette import COLOURS

ROW, LANE, MARGIN, RADIUS = 44, 20, 12, 6
CHARACTER = 7.0
"""Width of one character of a label, generously."""


def last_uses(nodes: list[Node]) -> list[int]:
    """Row of the last stage that each stage feeds; its own row when it feeds none. `nodes` in execution order."""
    rows = {node.name: index for index, node in enumerate(nodes)}
    last = list(range(len(nodes)))
    for index, node in enumerate(nodes):
        for _, stage in node.parents:
            if stage in rows:
                last[rows[stage]] = max(last[rows[stage]], index)
    return last


def lanes(nodes: list[Node]) -> list[int]:
    """A lane for each stage, so that no two stages share one while either still feeds a later stage."""
    last = last_uses(nodes)
    taken: list[int] = []
    result = []
    for index in range(len(nodes)):
        lane = next((number for number, until in enumerate(taken) if until < index), len(taken))
        taken[lane : lane + 1] = [last[index]]
        result.append(lane)
    return result


def svg(nodes: list[Node]) -> str:
    """Lines from each stage down its lane and across to the stages it feeds; names and inputs as text beside."""
    lane = lanes(nodes)
    rows = {node.name: index for index, node in enumerate(nodes)}
    text_x = 2 * MARGIN + (1 + max(lane, default=0)) * LANE
    parts = []
    for index, node in enumerate(nodes):
        for stage in dict.fromkeys(stage for _, stage in node.parents):
            if stage in rows:
                parent = rows[stage]
                parts.append(_line(_x(lane[parent]), _y(parent), _x(lane[index]), _y(index), _colour(parent)))
    labels = [(node.name, f"{node.type}, {node.status}" + _inputs(node)) for node in nodes]
    for index, (node, (name, detail)) in enumerate(zip(nodes, labels, strict=True)):
        parts.append(_stage(node, name, detail, _x(lane[index]), _y(index), text_x, _colour(index)))
    width = text_x + CHARACTER * max((len(text) for label in labels for text in label), default=0) + MARGIN
    height = len(nodes) * ROW + MARGIN
    label = "; ".join(f"{node.name}{_inputs(node)}" for node in nodes)
    return (
        f'<svg role="img" aria-label="{escape(label)}" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}">{"".join(parts)}</svg>'
    )


def _x(lane: int) -> float:
    return MARGIN + lane * LANE


def _y(row: int) -> float:
    return MARGIN + row * ROW + RADIUS


def _colour(row: int) -> str:
    return COLOURS[row % (len(COLOURS) - 1)]


def _inputs(node: Node) -> str:
    return " ← " + ", ".join(f"{name}: {stage}" for name, stage in node.parents) if node.parents else ""


def _line(x0: float, y0: float, x1: float, y1: float, colour: str) -> str:
    if x0 == x1:
        return f'<path d="M{x0:g} {y0:g}V{y1:g}" stroke="{colour}"/>'
    turn = 8 if x1 > x0 else -8
    return f'<path d="M{x0:g} {y0:g}V{y1 - 8:g}Q{x0:g} {y1:g} {x0 + turn:g} {y1:g}H{x1:g}" stroke="{colour}"/>'


def _stage(node: Node, name: str, detail: str, x: float, y: float, text_x: float, colour: str) -> str:
    fill = colour if node.status == "done" else "none"
    return (
        f'<g class="{escape(node.status)}"><circle cx="{x:g}" cy="{y:g}" r="{RADIUS}" stroke="{colour}" '
        f'fill="{fill}"/><text x="{text_x:g}" y="{y + 2:g}">{escape(name)}</text>'
        f'<text class="soft" x="{text_x:g}" y="{y + 18:g}">{escape(detail)}</text></g>'
    )
