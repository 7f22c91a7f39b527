"""Text out of installed packages: what is taken, what is left out, and what a missing package does."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import yaml

from posttrain.data.builders import prose, python_text
from posttrain.data.documents import split_documents
from posttrain.paths import shipped

SENTENCES = [
    "The first harbour keeps every lantern burning until the fishermen come home at dawn.",
    "A second paragraph tells how the miller carried flour across the frozen river in winter.",
    "Nobody in the village remembered who had planted the orchard behind the old chapel.",
    "When the bridge was repaired, the mayor invited the carpenters to a long supper.",
    "Rain fell for nine days, and the gardeners moved their seedlings under the roof.",
]


def module(name: str, text: str) -> str:
    return f'raise SystemExit("imported")\n\n\ndef {name}(self, a, *rest, b=1):\n    """{text}"""\n'


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    """A package `fakedocs` 1.2 that must not be imported, beside a standard library without modules."""
    package = tmp_path / "site" / "fakedocs"
    (package / "part").mkdir(parents=True)
    (package / "tests").mkdir()
    (package / "__init__.py").write_text('raise SystemExit("imported")\n')
    for number in range(12):
        text = "\n\n    ".join(f"{word(number)} {sentence}" for sentence in SENTENCES)
        (package / f"m{number}.py").write_text(module(f"f{number}", text))
    (package / "part" / "p.py").write_text(module("inner", " ".join(SENTENCES)))
    (package / "part" / "guide.md").write_text("# Guide\n\n" + " ".join(s[::-1] for s in SENTENCES))
    (package / "tests" / "t.py").write_text(module("secret", " ".join(f"unseen {s[::-1]}" for s in SENTENCES)))
    (package / "broken.py").write_text("def (:\n")
    info = tmp_path / "site" / "fakedocs-1.2.dist-info"
    info.mkdir()
    readme = " ".join(word(i) * 3 + " lake shore walk" for i in range(40))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fakedocs\nVersion: 1.2\n\n{readme}\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    (tmp_path / "library").mkdir()
    monkeypatch.setattr(python_text, "get_paths", lambda: {"stdlib": str(tmp_path / "library")})
    monkeypatch.setattr(python_text, "_reference", lambda repetitions: iter(()))
    return package


def word(number: int) -> str:
    """A long word of its own for each number, in letters."""
    return "".join(chr(97 + (number * 7 + k * (number + 3)) % 26) for k in range(20))


def test_a_package_is_read_and_not_imported(fake) -> None:
    rows = python_text.build(["fakedocs"])
    assert "fakedocs" not in sys.modules
    assert {row.id.split("/")[0] for row in rows} >= {"chat", "docstrings", "files"}
    assert any(row.id == "files/fakedocs/README#0" for row in rows)
    assert any(row.id == "files/fakedocs/part/guide.md#0" for row in rows)
    assert not any("secret" in row.text for row in rows)
    assert len({row.id for row in rows}) == len(rows) and all(row.group for row in rows)
    talk = next(row for row in rows if row.messages)
    assert [role for role, _ in talk.messages] == ["user", "assistant"] and "(a, *rest, b)" in talk.messages[0][1]
    assert rows == python_text.build(["fakedocs"])


def test_a_part_of_a_package_is_that_part(fake) -> None:
    rows = [row for row in python_text.build(["fakedocs.part"]) if "README" not in row.id]
    assert rows and all(row.id.split("/", 1)[1].startswith(("fakedocs.part", "fakedocs/part")) for row in rows)
    assert {row.id for row in python_text.build(["fakedocs.m1"]) if "README" not in row.id} <= {
        "docstrings/fakedocs.m1#0",
        "chat/fakedocs.m1#0",
        "code/fakedocs.m1",
    }


def test_parts_that_overlap_give_nothing_twice(fake) -> None:
    whole = python_text.build(["fakedocs"])
    assert {row.id for row in python_text.build(["fakedocs", "fakedocs.part"])} == {row.id for row in whole}


def test_versions_say_what_is_missing(fake) -> None:
    names = ["fakedocs", "fakedocs.part", "fakedocs.m3", "fakedocs.gone", "no_such_package", "no_such_package.part"]
    found = python_text.versions(names)
    assert list(found.values()) == ["1.2", "1.2", "1.2", *["not installed"] * 3]
    assert python_text.build(["no_such_package"]) == []


def test_the_demo_takes_what_is_installed() -> None:
    option = yaml.safe_load((shipped("conf") / "data" / "demo_text.yaml").read_text())["python"]
    found = python_text.versions(option["packages"])
    missing = [name for name, version in found.items() if version == python_text.ABSENT]
    assert len(missing) <= len(found) // 5, missing
    assert option["max_bytes"] >= 12_000_000


def test_standard_library_text() -> None:
    rows = python_text.build()
    size = sum(len(row.text.encode()) for row in rows)
    assert 1_000_000 < size < 6_000_000 and len(rows) > 400
    assert abs(size - python_text.LIBRARY_BYTES) < 0.35 * size
    assert len({row.id for row in rows}) == len(rows)
    assert {row.id.split("/")[0] for row in rows[:80]} == {"chat", "code", "comments", "docstrings", "reference"}
    assert sum(len(row.text) for row in rows if row.id.startswith("code/")) < 0.15 * size
    assert 0.2 * size < sum(len(row.text) for row in rows if row.messages) < 0.5 * size
    train, heldout = split_documents(rows, 0.05)
    assert not {row.group for row in train} & {row.group for row in heldout}


def test_copies_are_found_in_other_lines_and_with_other_numbers() -> None:
    repetitions = prose.Repetitions()
    text = " ".join(SENTENCES[:3]) + " It was built in 1830, they say."
    assert not repetitions.repeated(text)
    assert repetitions.repeated("   " + text.replace(" the ", "\n    the ").replace("1830", "1912"))
    assert not repetitions.repeated(SENTENCES[3])
    assert not repetitions.repeated(f"{SENTENCES[3]} {' '.join(s[::-1] for s in SENTENCES)}")


def test_a_text_of_copies_is_dropped_and_a_heading_goes_with_its_paragraph() -> None:
    repetitions = prose.Repetitions()
    assert prose.distinct(f"{SENTENCES[0]}\n\nNotes\n-----\n\n{SENTENCES[1]}", repetitions) == (
        f"{SENTENCES[0]}\n\nNotes\n\n{SENTENCES[1]}"
    )
    assert prose.distinct(f"{SENTENCES[0]}\n\n{SENTENCES[2]}", prose.Repetitions())
    kept = prose.distinct(
        f"{SENTENCES[2]} {SENTENCES[3]}\n\nNotes\n\n{SENTENCES[1]}\n\nEnd\n\n{SENTENCES[4]}", repetitions
    )
    assert kept == f"{SENTENCES[2]} {SENTENCES[3]}\n\nEnd\n\n{SENTENCES[4]}"
    assert prose.distinct(f"{SENTENCES[0]}\n\n{SENTENCES[1]}", repetitions) == ""


def test_examples_stay_after_prose_and_markup_goes() -> None:
    example = ">>> f(1, 2)\n(3, 4)"
    text = f"See :func:`~a.b.c` too. {SENTENCES[0]}\n\n.. note::\n\n{example}\n\n{example}\n\n{SENTENCES[1]}"
    kept = prose.distinct(text, prose.Repetitions())
    assert kept.startswith("See `a.b.c` too.") and kept.count(">>>") == 1 and ".. note" not in kept
    assert prose.distinct(f"{SENTENCES[0]}\n\nIt ends with <|im_end|> always.", prose.Repetitions()) == SENTENCES[0]


def test_code_has_no_licence_and_comments_are_prose() -> None:
    source = "# Copyright 2020 somebody\n#\n\nimport a\n\nvalue = 1\nrest"
    assert prose.code(source, 6000) == "import a\n\nvalue = 1"
    words = "\n".join(f"    # {sentence}" for sentence in SENTENCES)
    (found,) = prose.comments(f"x = 1\n{words}\ny = 2\n# short\n")
    assert found == "\n".join(SENTENCES)
    assert not list(prose.comments(words.replace("harbour", "licence")))


def test_documentation_of_compiled_functions_is_found() -> None:
    text = " ".join(SENTENCES)
    tree = ast.parse(f'add(f, r"""\n    {text}\n    """.format(a=1))\nx = "{text}"\n')
    assert list(prose.strings(tree)) == [text]
