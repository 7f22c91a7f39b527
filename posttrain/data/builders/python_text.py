"""Text that every installation has: the documentation of Python and of the packages that posttrain needs.

What is taken, and why: the language reference, docstrings, documentation files and long comments are English prose
about programming and mathematics with short examples in it, the nearest to ordinary text that is on every machine. A
share of the docstrings becomes conversations of questions and answers, so that training also meets the chat format. Raw
source code is kept to a small share, since its text is far from prose. Packages copy their own docstrings and each
other's: a paragraph that was seen before is left out.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import metadata, util
from pathlib import Path
from sysconfig import get_paths

from posttrain.data.builders import prose
from posttrain.data.chat import plain_text
from posttrain.data.documents import Document
from posttrain.pipeline.fingerprint import digest, digest_by

LICENCE = "PSF-2.0; the text of each package under that package's licence"
ABSENT = "not installed"

LEFT_OUT = {
    "__pycache__",
    "_vendor",
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
    "testing",
    "tests",
    "turtledemo",
    "v1",
    "vendor",
}
"""Folders of tests, tables and vendored or superseded code, or of code that some distributions leave out."""

DISTRIBUTIONS = {"hydra": "hydra-core", "mpl_toolkits": "matplotlib", "PIL": "pillow", "yaml": "pyyaml"}
"""Packages whose distribution has another name."""

DOCUMENT_SUFFIXES = (".md", ".rst", ".txt")
MIN_CHARACTERS, CODE_CHARACTERS, README_CHARACTERS = 400, 6000, 24_000
CHAT_EVERY, CODE_EVERY = 2, 24
MAX_ANSWERS, SHORTEST_ANSWER, LONGEST_ANSWER = 4, 80, 2000

LIBRARY_BYTES = 2_200_000
TEXT_SHARE = 0.22
"""Text over source code, bytes, for estimates: what a large package gives."""

QUESTIONS = (
    "What does `{title}` of the Python module `{module}` do?",
    "Explain `{title}` in `{module}`.",
    "How is `{title}` from `{module}` used?",
    "Please describe `{title}` (Python, module `{module}`).",
    "I found `{title}` in `{module}`. What is it for?",
    "In `{module}`, what should I know about `{title}`?",
)


def build(packages: Sequence[str] = ()) -> list[Document]:
    """Documents of the standard library and of the packages, e.g. "numpy" or a part of one, "torch.nn".

    Everything that comes from one module shares a group, so a split keeps it together. A package that is not installed
    is left out; `versions` says so.
    """
    with _without_collector():
        documents = _documents(packages, prose.Repetitions())
    # Mixed, so that also the first few blocks hold something of everything.
    return sorted(documents, key=lambda document: hashlib.sha256(document.id.encode()).digest())


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The installed version of each package or part of one, or `ABSENT`."""
    return dict(_versions(tuple(packages), tuple(sys.path)))


@lru_cache(maxsize=8)
def _versions(packages: tuple[str, ...], path: tuple[str, ...]) -> dict[str, str]:
    return {package: _version(package) if _locate(package) else ABSENT for package in packages}


def expected_bytes(packages: Sequence[str]) -> int:
    """About how much text `build` makes, by the size of the source code; counted once for each set of versions."""
    # The file stands for the standard library, the name for the packages.
    name = f"python_text-1 {digest(versions(packages))}"
    return int(digest_by(Path(ast.__file__), lambda _: str(_count_bytes(packages)), name))


def _count_bytes(packages: Sequence[str]) -> int:
    found = {path: path.stat().st_size for package in packages for path, _ in _package_files(package)}
    return LIBRARY_BYTES + int(TEXT_SHARE * sum(found.values()))


@contextmanager
def _without_collector() -> Iterator[None]:
    """Syntax trees have no cycles, but so many nodes that looking for some takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _documents(packages: Sequence[str], repetitions: prose.Repetitions) -> list[Document]:
    documents = list(_reference(repetitions))
    library = Path(get_paths()["stdlib"])
    sources = [(path, path.relative_to(library)) for path in sorted(library.rglob("*.py"))]
    for package in packages:
        sources += _package_files(package)
    for top in dict.fromkeys(package.partition(".")[0] for package in packages):
        documents += _readme(top, repetitions)
    taken: set[Path] = set()
    for path, relative in sources:
        if path in taken or _left_out(relative):
            continue
        taken.add(path)
        if path.suffix == ".py":
            documents += _module_documents(path, relative, repetitions)
        else:
            text = prose.distinct(path.read_text(encoding="utf-8", errors="replace"), repetitions)
            documents += _page_documents("files", relative.as_posix(), text)
    return documents


def _locate(package: str) -> Path | None:
    """The folder or file of a package or of a part of one, without importing anything."""
    top, *parts = package.split(".")
    spec = util.find_spec(top)
    places = list(spec.submodule_search_locations or ()) if spec else []
    for place in places:
        path = Path(place, *parts)
        for found in (path, path.with_suffix(".py")):
            if found.exists() and _version(package) != ABSENT:
                return found
    return None


def _version(package: str) -> str:
    top = package.partition(".")[0]
    name = DISTRIBUTIONS.get(top, top)
    try:
        return _recorded(tuple(sys.path)).get(re.sub(r"[-_.]+", "_", name).lower()) or metadata.version(name)
    except metadata.PackageNotFoundError:
        return ABSENT


@lru_cache(maxsize=8)
def _recorded(path: tuple[str, ...]) -> dict[str, str]:
    """Versions of installed wheels by name, as their folders are called: a plan cannot wait for all their metadata."""
    found: dict[str, str] = {}
    for place in path:
        for record in Path(place or ".").glob("*.dist-info"):
            name, _, version = record.name.removesuffix(".dist-info").partition("-")
            found.setdefault(re.sub(r"[-_.]+", "_", name).lower(), version)
    return found


def _package_files(package: str) -> Iterator[tuple[Path, Path]]:
    """(path, path from the folder that holds the top package) of modules and documentation files, sorted."""
    found = _locate(package)
    if found is None:
        return
    root = found.parents[package.count(".")]
    paths = [found] if found.is_file() else sorted(found.rglob("*"))
    for path in paths:
        if path.suffix in (".py", *DOCUMENT_SUFFIXES) and path.is_file() and not _left_out(path.relative_to(root)):
            yield path, path.relative_to(root)


def _left_out(relative: Path) -> bool:
    folders = any(part in LEFT_OUT or part.startswith(("config-", "_sysconfigdata")) for part in relative.parts)
    return folders or relative.name.startswith(("test_", "conftest", "LICEN", "requirements", "CMakeLists"))


def _readme(top: str, repetitions: prose.Repetitions) -> Iterator[Document]:
    """The description that the package's distribution comes with; what is far behind is a change log."""
    if _locate(top) is None:
        return
    about = metadata.metadata(DISTRIBUTIONS.get(top, top))
    text = about.get_payload() or about.get("Description") or ""
    yield from _page_documents("files", f"{top}/README", prose.distinct(text[:README_CHARACTERS], repetitions))


def _reference(repetitions: prose.Repetitions) -> Iterator[Document]:
    """The pages of Python's language reference."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield from _page_documents("reference", name, prose.distinct(text, repetitions))


def _module_documents(path: Path, relative: Path, repetitions: prose.Repetitions) -> Iterator[Document]:
    source = path.read_text(encoding="utf-8", errors="replace")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    if number % CODE_EVERY == 1:
        # Code alone: pages of its docstrings would say the same again.
        code = prose.code(source, CODE_CHARACTERS)
        if len(code) >= MIN_CHARACTERS and not prose.has_special_token(code):
            yield Document(id=f"code/{name}", text=code, group=f"module/{name}")
        return
    described = [(title, text) for title, raw in prose.docstrings(tree) if (text := prose.distinct(raw, repetitions))]
    if number % CHAT_EVERY == 0:
        answers = [(title, text) for title, text in described if SHORTEST_ANSWER <= len(text) <= LONGEST_ANSWER]
        described = [pair for pair in described if pair not in answers]
        yield from _conversations(name, answers)
    described += [("", prose.distinct(text, repetitions)) for text in prose.strings(tree)]
    page = "\n\n".join(f"{title}\n\n{text}" if title else text for title, text in described if text)
    yield from _page_documents("docstrings", name, page)
    notes = (prose.distinct(text, repetitions) for text in prose.comments(source))
    yield from _page_documents("comments", name, "\n\n".join(text for text in notes if text))


def _page_documents(kind: str, name: str, text: str) -> Iterator[Document]:
    if len(text) >= MIN_CHARACTERS:
        for number, page in enumerate(prose.pages(text)):
            yield Document(id=f"{kind}/{name}#{number}", text=page, group=f"module/{name}")


def _conversations(module: str, answers: list[tuple[str, str]]) -> Iterator[Document]:
    for start in range(0, len(answers), MAX_ANSWERS):
        turns: list[dict[str, str]] = []
        for number, (title, text) in enumerate(answers[start : start + MAX_ANSWERS], start + len(module)):
            question = QUESTIONS[number % len(QUESTIONS)].format(title=title, module=module)
            question = question if title else f"What is `{module}` for?"
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        pairs = tuple((turn["role"], turn["content"]) for turn in turns)
        yield Document(id=f"chat/{module}#{start}", text=plain_text(turns), group=f"module/{module}", messages=pairs)
