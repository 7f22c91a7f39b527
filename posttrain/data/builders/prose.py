"""English prose in Python source: docstrings, documentation strings and long comments, without what repeats."""

from __future__ import annotations

import ast
import inspect
import re
import string
from collections.abc import Iterable, Iterator

PAGE_CHARACTERS = 6000
MIN_CLAUSE = 16
"""Letters of a clause that counts when repetitions are looked for; shorter ones ("optional") are in every text."""

MIN_DOCSTRING, MIN_STRING, MIN_COMMENT = 40, 300, 250
MAX_EXAMPLE = 600
PROSE_SHARE = 0.75
"""Letters, spaces, commas and full stops over all characters, above which a paragraph is prose."""

_NOT_LETTERS = re.compile(r"[^a-z]+")
_CLAUSE_END = re.compile(r"[.,:;!?]\s")
_ROLE = re.compile(r":[a-zA-Z:+-]+:`[~!]?([^`<]*?)(?:\s*<[^`>]*>)?`")
_DIRECTIVE = re.compile(r"^\s*(?:\.\. [\w:+-]+::|\.\. _|\[\[|</?[a-zA-Z])")
_SPECIAL_TOKEN = re.compile(r"<\|[^|\n]{1,40}\|>|</?s>")
_UNDERLINE = set("*=-^~")
_FORMATTED = str.maketrans("", "", string.ascii_letters + " ,.\n'")


class Repetitions:
    """Remembers clauses, and finds the paragraphs that consist of remembered ones.

    Clauses are compared by their letters, so that neither line breaks nor numbers nor indentation hide a copy.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def repeated(self, paragraph: str) -> bool:
        """True if more than half of the paragraph was seen before; it is remembered either way."""
        flat = " ".join(paragraph.lower().split()) + " "
        letters = (_NOT_LETTERS.sub("", part) for part in _CLAUSE_END.split(flat))
        clauses = [clause for clause in letters if len(clause) >= MIN_CLAUSE]
        old = sum(len(clause) for clause in clauses if clause in self._seen)
        self._seen.update(clauses)
        return 2 * old > sum(map(len, clauses))


def distinct(text: str, repetitions: Repetitions) -> str:
    """The prose of a text, and short examples that follow prose; "" if most of it was seen before.

    A heading stays if the paragraph after it does.
    """
    kept: list[str] = []
    heading, prose_before, lost, found = "", False, 0, 0
    for paragraph in _tidy(text).split("\n\n"):
        paragraph = paragraph.strip("\n")
        if len(paragraph) < 30 and "\n" not in paragraph:
            heading = paragraph
            continue
        prose = is_prose(paragraph)
        if has_special_token(paragraph) or not prose and not (prose_before and len(paragraph) <= MAX_EXAMPLE):
            prose_before = False
            continue
        prose_before = prose
        found += len(paragraph)
        if repetitions.repeated(paragraph):
            lost += len(paragraph)
            prose_before = False
        else:
            kept += [heading, paragraph] if heading else [paragraph]
        heading = ""
    return "\n\n".join(kept).strip() if 2 * lost <= found else ""


def is_prose(paragraph: str) -> bool:
    """True for mostly letters, and no interactive session."""
    return ">>>" not in paragraph and len(paragraph.translate(_FORMATTED)) <= (1 - PROSE_SHARE) * len(paragraph)


def has_special_token(text: str) -> bool:
    """True if a tokenizer may take a piece of the text for an end of text or of a turn."""
    return _SPECIAL_TOKEN.search(text) is not None


def docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(signature, docstring) of the module ("" as signature) and of its classes and functions, in source order."""
    if text := ast.get_docstring(tree):
        yield "", text
    yield from _inner_docstrings(tree.body)


def strings(tree: ast.Module) -> Iterator[str]:
    """Long strings inside of calls: documentation that is attached to compiled functions."""
    for statement in tree.body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            for node in ast.walk(statement.value):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) >= MIN_STRING:
                    yield inspect.cleandoc(node.value)


def comments(source: str) -> Iterator[str]:
    """Comments of several lines in prose, in source order."""
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        stripped = line.lstrip()
        if stripped.startswith("#"):
            block.append(stripped.lstrip("#").removeprefix(":").removeprefix(" ").rstrip())
            continue
        if len(block) > 2:
            text = "\n".join(block).strip()
            if len(text) >= MIN_COMMENT and is_prose(text) and not re.search("copyright|licen[sc]e", text.lower()):
                yield text
        block = []


def code(source: str, characters: int) -> str:
    """The beginning of a source file, whole lines, without the comments (licences) that it opens with."""
    lines = source.splitlines()
    while lines and (not lines[0].strip() or lines[0].startswith("#")):
        lines.pop(0)
    return "\n".join(lines)[:characters].rpartition("\n")[0]


def pages(text: str) -> Iterator[str]:
    """Pieces of at most about `PAGE_CHARACTERS`, cut at blank lines."""
    page = ""
    for paragraph in text.split("\n\n"):
        if page and len(page) + len(paragraph) > PAGE_CHARACTERS:
            yield page
            page = ""
        page += ("\n\n" if page else "") + paragraph
    if page.strip():
        yield page


def _inner_docstrings(body: Iterable[ast.AST]) -> Iterator[tuple[str, str]]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            text = ast.get_docstring(node)
            if text and len(text) >= MIN_DOCSTRING:
                is_class = isinstance(node, ast.ClassDef)
                yield f"class {node.name}" if is_class else f"{node.name}({_arguments(node.args)})", text
            yield from _inner_docstrings(node.body)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from _inner_docstrings(node.body)
            yield from _inner_docstrings(getattr(node, "orelse", ()))


def _arguments(arguments: ast.arguments) -> str:
    """Names alone: types and defaults are code."""
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [argument.arg for argument in arguments.kwonlyargs]
    names += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return ", ".join(name for name in names if name not in ("self", "cls"))


def _tidy(text: str) -> str:
    """Without the markup that only a documentation generator reads."""
    lines = [
        "" if _DIRECTIVE.match(line) else line.rstrip()
        for line in _ROLE.sub(r"`\1`", text.replace("\r", "")).splitlines()
        if not (len(line.strip()) > 2 and set(line.strip()) <= _UNDERLINE)
    ]
    return "\n".join(lines).strip()
