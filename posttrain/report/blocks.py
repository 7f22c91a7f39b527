"""The pieces a report is made of, so that Markdown and HTML say the same."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph of plain text."""

    text: str


@dataclass(frozen=True)
class Notice:
    """Something that must not be overlooked."""

    text: str


@dataclass(frozen=True)
class Bullets:
    items: list[str]


@dataclass(frozen=True)
class Table:
    """Cells are plain text; the first column names the row."""

    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Figure:
    """PNGs by name, side by side where there is room, with what they show in words."""

    panels: list[tuple[str, bytes]]
    caption: str


@dataclass(frozen=True)
class Code:
    text: str
    language: str = "sh"


@dataclass(frozen=True)
class Sample:
    """One prompt and the answers of several models."""

    prompt: str
    answers: list[tuple[str, str]]


@dataclass(frozen=True)
class Node:
    """A stage in the graph; `parents` are the (input, stage) pairs that feed it."""

    name: str
    type: str
    status: str
    parents: list[tuple[str, str]]


@dataclass(frozen=True)
class Graph:
    nodes: list[Node]


Block = Heading | Text | Notice | Bullets | Table | Figure | Code | Sample | Graph
