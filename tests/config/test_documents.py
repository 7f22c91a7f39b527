"""YAML with lines: read as OmegaConf reads it, refused with the line."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from posttrain.config.documents import load_document
from posttrain.errors import RecipeError

TEXT = """# head
a: 1e-4
b: {c: [on, 2024-01-01, 1_000, .5, "3"], d: null}
e:
  - f: 1.0
  - ~
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


def test_values_are_those_of_omegaconf(tmp_path: Path) -> None:
    path = write(tmp_path, TEXT)
    assert load_document(path).data == OmegaConf.to_container(OmegaConf.load(path))


def test_every_key_and_item_has_its_line(tmp_path: Path) -> None:
    lines = dict(load_document(write(tmp_path, TEXT)).lines())
    assert lines[("a",)] == 2
    assert lines[("b", "c")] == lines[("b", "c", 4)] == 3
    assert (lines[("e", 0, "f")], lines[("e", 1)]) == (5, 6)


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", 3, "YAML"),
        ("a: 1\nb:\n\tc: 1\n", 3, "YAML"),
        ("a: 1\nb: 2\na: 3\n", 3, "twice"),
        ("a: {b: 1, b: 2}\n", 1, "twice"),
        ("a: !!python/object/apply:os.system [x]\n", 1, "YAML"),
    ],
    ids=["bracket", "tab", "duplicate", "inner duplicate", "object"],
)
def test_broken_yaml_is_told_with_its_line(tmp_path: Path, text: str, line: int, word: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_document(write(tmp_path, text), "r.yaml")
    problem = caught.value.problems[0]
    assert problem.where == f"r.yaml:{line}" and word in problem.what


def test_aliases_that_unfold_without_end_are_refused(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
    for text in (bomb, "a: &a [*a]\n"):
        with pytest.raises(RecipeError):
            load_document(write(tmp_path, text))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"a: \xff\xfe")
    for path in (tmp_path / "r.yaml", tmp_path / "absent.yaml"):
        with pytest.raises(RecipeError, match="cannot read"):
            load_document(path)
