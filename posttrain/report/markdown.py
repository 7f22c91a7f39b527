"""Blocks as Markdown. Plots are links to PNG files beside the report."""

from __future__ import annotations

from posttrain.pipeline.visible import visible
from posttrain.report.blocks import Block, Bullets, Code, Figure, Graph, Heading, Notice, Sample, Table, Text

FILES = "report_files"


def render(blocks: list[Block]) -> str:
    """The whole document; figures are expected in `report_files/NAME.png`."""
    return "\n\n".join(_block(block) for block in blocks) + "\n"


def _block(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_escape(text)}"
        case Text(text):
            return _escape(text)
        case Notice(text):
            return "\n".join(f"> **{_escape(line.strip())}**  " for line in text.splitlines() if line.strip())
        case Bullets(items):
            return "\n".join(f"- {_escape(item)}" for item in items)
        case Table(header, rows):
            return _table(header, rows)
        case Figure(panels, caption):
            return "\n".join(f"![{name}]({FILES}/{name}.png)" for name, _ in panels) + f"\n\n*{_escape(caption)}*"
        case Code(text, language):
            return f"```{language}\n{text}\n```"
        case Sample(prompt, answers):
            return f"**{_escape(prompt)}**\n\n" + _table(["model", "answer"], [list(answer) for answer in answers])
        case Graph(nodes):
            return "\n".join(
                f"- {_escape(node.name)} ({node.type}, {node.status})"
                + (" from " + ", ".join(f"{stage} as {name}" for name, stage in node.parents) if node.parents else "")
                for node in nodes
            )


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return _escape(text).replace("|", "\\|").replace("\n", "<br>") if text != "---" else text


def _escape(text: str) -> str:
    """Keep generated text from turning into markup."""
    text = visible(text)
    for character in "\\`*<[":
        text = text.replace(character, "\\" + character if character != "<" else "&lt;")
    return text
