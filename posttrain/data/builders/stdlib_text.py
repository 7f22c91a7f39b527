"""Text that every Python has: the language reference in `pydoc_data`, and the standard library's docstrings and code.

What is taken, and why: the language reference and docstrings are English prose about programming with short code in it,
the nearest to ordinary text that is on every machine. Of the docstrings, each third module becomes a conversation of
questions and answers, so that training also meets the chat format. Raw source code is kept to a small share, since its
text is far from prose.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from posttrain.data.chat import plain_text
from posttrain.data.documents import Document

LEFT_OUT = {
    "__pycache__",
    "config",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib-dynload",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
"""Folders of tests, tables and vendored code, or of code that some distributions leave out."""

MIN_CHARACTERS, PAGE_CHARACTERS = 400, 6000
CHAT_EVERY, CODE_EVERY = 3, 12
MAX_ANSWERS = 4


def build() -> list[Document]:
    """About 2 MB in some 700 documents; a module's page, conversation and code share a group, so a split keeps them."""
    documents = list(_reference())
    library = Path(sysconfig.get_paths()["stdlib"])
    modules = [path for path in sorted(library.rglob("*.py")) if not _left_out(path.relative_to(library))]
    for number, path in enumerate(modules):
        documents += _module_documents(path, path.relative_to(library), number)
    # Mixed, so that also the first few blocks hold something of everything.
    return sorted(documents, key=lambda document: hashlib.sha256(document.id.encode()).digest())


def _left_out(relative: Path) -> bool:
    return any(part in LEFT_OUT or part.startswith(("config-", "_sysconfigdata")) for part in relative.parts)


def _reference() -> Iterator[Document]:
    """The pages of Python's language reference."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        plain = _without_underlines(text)
        for number, page in enumerate(_pages(plain)):
            yield Document(id=f"reference/{name}#{number}", text=page, group=f"reference/{name}")


def _module_documents(path: Path, relative: Path, number: int) -> Iterator[Document]:
    source = path.read_text(encoding="utf-8", errors="replace")
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
    group = f"module/{name}"
    described = list(_docstrings(tree))
    if number % CHAT_EVERY == 0:
        yield from _conversations(name, group, described)
    else:
        page = "\n\n".join(f"{title}\n\n{text}" if title else text for title, text in described)
        if len(page) >= MIN_CHARACTERS:
            for index, part in enumerate(_pages(page)):
                yield Document(id=f"docstrings/{name}#{index}", text=part, group=group)
    if number % CODE_EVERY == 0 and len(source) >= MIN_CHARACTERS:
        yield Document(id=f"code/{name}", text=source[:PAGE_CHARACTERS].rpartition("\n")[0], group=group)


def _docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(signature, docstring) of the module ("" as signature) and of its classes and functions, in source order."""
    if text := ast.get_docstring(tree):
        yield "", text.strip()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (
            text := ast.get_docstring(node)
        ):
            kind = "class " if isinstance(node, ast.ClassDef) else ""
            arguments = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
            yield f"{kind}{node.name}{arguments}", inspect.cleandoc(text)


def _conversations(name: str, group: str, described: list[tuple[str, str]]) -> Iterator[Document]:
    answers = [(title, text) for title, text in described if 80 <= len(text) <= 1500]
    for start in range(0, len(answers), MAX_ANSWERS):
        turns: list[dict[str, str]] = []
        for title, text in answers[start : start + MAX_ANSWERS]:
            question = f"What does `{title}` of Python's module `{name}` do?" if title else f"What is `{name}` for?"
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        pairs = tuple((turn["role"], turn["content"]) for turn in turns)
        yield Document(id=f"chat/{name}#{start}", text=plain_text(turns), group=group, messages=pairs)


def _without_underlines(text: str) -> str:
    """Headings without their rows of asterisks or equal signs."""
    lines = [line for line in text.strip().splitlines() if not (len(line) > 3 and set(line) <= set("*=-^~"))]
    return "\n".join(lines)


def _pages(text: str) -> Iterator[str]:
    """Pieces of at most about `PAGE_CHARACTERS`, cut at blank lines."""
    page = ""
    for paragraph in text.split("\n\n"):
        if page and len(page) + len(paragraph) > PAGE_CHARACTERS:
            yield page
            page = ""
        page += ("\n\n" if page else "") + paragraph
    if page.strip():
        yield page
